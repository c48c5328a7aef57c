"""A language model that generates text, whatever computes its logits. Needs no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lbllm_compile.codegen.errors import first_line
from lbllm_compile.native.generate import AnswerText, GenerationError, Sampling, Steps, left_pad, tokens


class TemplateError(GenerationError):
    """The model's chat template refuses a conversation."""


COMPILED_CONTEXT = "compiled_context"
"""Key of a compiled model's configuration: tokens its graph is right for, where that is less than the model's own."""


def context_length(config: Mapping[str, Any]) -> int | None:
    """Tokens that a model of this configuration can attend to; None where it does not say."""
    for key in (COMPILED_CONTEXT, "max_position_embeddings", "n_positions", "max_seq_len"):
        value = config.get(key)
        if isinstance(value, int) and value > 0:
            return value
    return None


@dataclass(frozen=True)
class InputBounds:
    """How far the inputs of a model may reach: kernels look rows of tables up and check nothing.

    Attributes:
        vocabulary: rows of the token embedding; None where tokens are looked up in no table.
        positions: rows of the smallest table that positions index; None where there is none.
        slots: the same of positions that the graph counts itself, where padding has positions, too.
    """

    vocabulary: int | None
    positions: int | None
    slots: int | None = None

    def check_ids(self, lowest: int, highest: int) -> None:
        """Refuses token ids outside the embedding.

        Raises:
            GenerationError: naming the vocabulary.
        """
        if self.vocabulary is not None and (lowest < 0 or highest >= self.vocabulary):
            raise GenerationError(f"a token id is outside the vocabulary, 0 to {self.vocabulary - 1}")

    def check_length(self, tokens: int, slots: int) -> None:
        """Refuses sequences of more tokens than there are positions.

        Args:
            tokens: of the longest sequence.
            slots: the same with its padding.

        Raises:
            GenerationError: naming how many there are.
        """
        for most, given in ((self.positions, tokens), (self.slots, slots)):
            if most is not None and given > most:
                raise GenerationError(f"the model has positions for {most} tokens, and {given} are given; use fewer")


def encode(tokenizer: Any, prompt: str, *, chat: bool = False) -> list[int]:
    """Token ids of a prompt; see :meth:`LanguageModel.encode`."""
    if chat:
        return encode_turns(tokenizer, [{"role": "user", "content": prompt}])
    _check_text(tokenizer, prompt)
    return tokenizer(prompt)["input_ids"]


def encode_turns(tokenizer: Any, turns: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a conversation in the tokenizer's chat template, up to where the next answer begins.

    Args:
        tokenizer: as :attr:`LanguageModel.tokenizer`.
        turns: each with its ``role`` and ``content``.

    Raises:
        TemplateError: the template refuses the turns.
        GenerationError: there is no tokenizer or no chat template, or a turn is not valid text.
    """
    for turn in turns:
        _check_text(tokenizer, turn["content"])
    if not has_chat_template(tokenizer):
        raise GenerationError("the tokenizer has no chat template; pass the prompt as plain text")
    try:
        text = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of the model's, and may fail in any way
        raise TemplateError(
            f"the model's chat template refuses the prompt ({first_line(error)}); give other turns, or plain text"
        ) from error
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def has_chat_template(tokenizer: Any) -> bool:
    """Whether conversations can be put in the form that the model was trained on."""
    return bool(getattr(tokenizer, "chat_template", None))


def _check_text(tokenizer: Any, text: str) -> None:
    if tokenizer is None:
        raise GenerationError("the model has no tokenizer; pass token ids instead of text")
    if lone := next((c for c in text if "\ud800" <= c <= "\udfff"), None):
        raise GenerationError(
            f"the prompt is not valid text: it has half of a surrogate pair (U+{ord(lone):04X}); give it in UTF-8"
        )


def check_prompts(prompts: Sequence[Sequence[int]], sampling: Sampling, limit: int | None) -> None:
    """Checks that prompts of token ids can be answered within a context of ``limit`` tokens; needs no model.

    Raises:
        GenerationError: one is empty, or does not fit together with the new tokens.
    """
    if not prompts or any(not len(p) for p in prompts):
        raise GenerationError("the prompt is empty; give at least one token")
    longest = max(len(p) for p in prompts)
    if limit is not None and longest + sampling.max_new_tokens > limit:
        raise GenerationError(
            f"the prompt has {longest} tokens and {sampling.max_new_tokens} more were asked for, but the model's"
            f" context holds {limit}; "
            + ("shorten the prompt" if longest >= limit else f"ask for at most {limit - longest}")
        )


class LanguageModel(ABC):
    """Text and tokens in, text and tokens out.

    Attributes:
        config: the model's configuration.
        tokenizer: called with text gives ``{"input_ids": [...]}``; has ``decode``, ``chat_template``,
            ``apply_chat_template`` and ``eos_token_id`` like a transformers tokenizer. None without one.
    """

    config: Mapping[str, Any]
    tokenizer: Any

    @abstractmethod
    def session(self, batch: int, capacity: int = 0) -> Steps:
        """An empty conversation with ``batch`` sequences and room for ``capacity`` tokens, which grows."""

    @property
    def context_length(self) -> int | None:
        """Tokens the model can attend to, as its configuration says; None where it does not say."""
        return context_length(self.config)

    def encode(self, prompt: str, *, chat: bool = False) -> list[int]:
        """Token ids of a prompt; with ``chat`` as a user's turn in the tokenizer's chat template.

        Raises:
            GenerationError: there is no tokenizer or no chat template, the template refuses the prompt, or the prompt
                is not valid text.
        """
        return encode(self.tokenizer, prompt, chat=chat)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def stop_tokens(self) -> tuple[int, ...]:
        """End-of-text tokens that configuration and tokenizer name."""
        found = self.config.get("eos_token_id")
        ids = [*found] if isinstance(found, list) else [found]
        ids.append(getattr(self.tokenizer, "eos_token_id", None))
        return tuple(dict.fromkeys(i for i in ids if isinstance(i, int)))

    def generate_ids(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling | None = None, stop: Sequence[int] | None = None
    ) -> Iterator[list[int | None]]:
        """Generates from token ids; yields one token per sequence and step, None where a sequence has ended.

        Prompts of different lengths are padded on the left. ``stop`` defaults to :meth:`stop_tokens`.

        Raises:
            GenerationError: a prompt is empty, or does not fit the context together with the new tokens.
        """
        sampling = sampling or Sampling()
        check_prompts(prompts, sampling, self.context_length)
        ids, mask = left_pad(prompts)
        session = self.session(len(prompts), ids.shape[1] + sampling.max_new_tokens)
        session.start(mask)
        return tokens(session, ids, sampling, self.stop_tokens() if stop is None else stop)

    def stream(
        self, prompt: str | Sequence[int], *, chat: bool = False, stop_text: Sequence[str] = (), **options: Any
    ) -> Iterator[str]:
        """Text of the answer, piece by piece, up to the first of ``stop_text``. ``options`` are
        :class:`~.generate.Sampling`'s fields and ``stop``."""
        ids = self.encode(prompt, chat=chat) if isinstance(prompt, str) else prompt
        stop = options.pop("stop", None)
        text = AnswerText(self.decode, stop_text)
        for step in self.generate_ids([ids], Sampling(**options), stop):
            if step[0] is not None and (piece := text.push(step[0])):
                yield piece
            if text.stopped:
                return
        if rest := text.end():
            yield rest

    def generate(self, prompt: str | Sequence[str], *, chat: bool = False, **options: Any) -> str | list[str]:
        """The answer to a prompt, or to several at once. ``options`` as in :meth:`stream`."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        stop = options.pop("stop", None)
        answers: list[list[int]] = [[] for _ in prompts]
        for step in self.generate_ids([self.encode(p, chat=chat) for p in prompts], Sampling(**options), stop):
            for answer, token in zip(answers, step, strict=True):
                if token is not None:
                    answer.append(token)
        texts = [self.decode(a) for a in answers]
        return texts[0] if isinstance(prompt, str) else texts
