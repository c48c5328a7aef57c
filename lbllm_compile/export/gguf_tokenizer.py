"""Tokenizers as llama.cpp has them."""

from __future__ import annotations

import itertools
import json
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lbllm_compile.export.original import ExportError

_SPACE = "\u2581"
"""What SentencePiece has in place of a space."""

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")

_OPTIONS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
"""Of BPE models, which llama.cpp has not."""

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA_3 = "llama-bpe"
_SPLITS = {
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_WORDS}|\p{{N}}{{1,3}}|{_REST}": _LLAMA_3,
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_WORDS}|\p{{N}}|{_REST}": "qwen2",
}
"""llama.cpp's names of the patterns by which tokenizers split text into words."""


@dataclass(frozen=True)
class Tokenizer(ABC):
    """A tokenizer as llama.cpp has it.

    Attributes:
        tokenizer: transformers'.
    """

    tokenizer: Any

    @classmethod
    def of(cls, tokenizer: Any) -> Tokenizer | None:
        """The tokenizer of an artifact; None where it has none.

        Raises:
            ExportError: llama.cpp has no tokenizer that would do the same, as far as is known here.
        """
        if tokenizer is None:
            return None
        backend = getattr(tokenizer, "backend_tokenizer", None)
        described = json.loads(backend.to_str()) if backend is not None else {}
        model = described.get("model") or {}
        found = _pieces(tokenizer, described) if model.get("byte_fallback") else _byte_level(tokenizer, described)
        if found is None:
            raise ExportError(
                "GGUF is written for byte-level BPE tokenizers that split words as those of GPT-2, SmolLM, LLaMA 3 or"
                " Qwen 2, and for SentencePiece's as Gemma or the first LLaMA have them, and the artifact has another;"
                " use --format hf-dense"
            )
        return found

    @abstractmethod
    def describe(self, writer: Any, texts: Sequence[str]) -> None:
        """Writes what belongs to the kind of tokenizer.

        Args:
            writer: a ``gguf.GGUFWriter``.
            texts: of all tokens by their ids.
        """

    @property
    @abstractmethod
    def has_merges(self) -> bool:
        """Whether llama.cpp reads merges."""

    def add_to(self, writer: Any, size: int) -> None:
        """Writes tokens, what makes tokens of text, special tokens and the chat template.

        Args:
            writer: a ``gguf.GGUFWriter``.
            size: rows of the embedding; those without a token get a name that no text has.
        """
        import gguf

        by_id = {number: text for text, number in self.tokenizer.get_vocab().items()}
        texts = [by_id.get(number, f"[PAD{number}]") for number in range(size)]
        kinds = [self._kind(number, number in by_id, text) for number, text in enumerate(texts)]
        self.describe(writer, texts)
        writer.add_token_list([self._written(text, kind) for text, kind in zip(texts, kinds, strict=True)])
        writer.add_token_types(kinds)
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder)
            special = gguf.SpecialVocab(folder, load_merges=self.has_merges, n_vocab=size)
        begins = self.tokenizer("a")["input_ids"][:1] == [self.tokenizer.bos_token_id]
        special.add_special_token = {"bos": begins, "eos": False}
        special.add_to_gguf(writer, quiet=True)

    def _written(self, text: str, kind: int) -> str:
        """A token's text as llama.cpp has it."""
        return text

    def _kind(self, number: int, known: bool, text: str) -> int:
        """GGUF's kind of a token."""
        import gguf

        added = self.tokenizer.added_tokens_decoder
        if not known:
            return gguf.TokenType.UNUSED
        if number in added:
            return gguf.TokenType.CONTROL if added[number].special else gguf.TokenType.USER_DEFINED
        return gguf.TokenType.NORMAL


@dataclass(frozen=True)
class ByteLevel(Tokenizer):
    """BPE over bytes.

    Attributes:
        splits: llama.cpp's name of the way it splits text into words.
    """

    splits: str

    @property
    def has_merges(self) -> bool:
        return True

    def describe(self, writer: Any, texts: Sequence[str]) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.splits)


@dataclass(frozen=True)
class Pieces(Tokenizer):
    """SentencePiece's BPE over characters, with bytes for those that are no token.

    Attributes:
        order: the tokens that merges make, those that are made first in front.
        prefixed: whether a space is put before text.
    """

    order: Sequence[str]
    prefixed: bool

    @property
    def has_merges(self) -> bool:
        return False

    def describe(self, writer: Any, texts: Sequence[str]) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(self.prefixed)
        # llama.cpp makes the token with the highest score first, out of any two that give it.
        scores = {text: -1.0 - place for place, text in enumerate(self.order)}
        writer.add_token_scores([scores.get(text, 0.0) for text in texts])

    def _written(self, text: str, kind: int) -> str:
        import gguf

        # llama.cpp looks for added tokens in the text before it puts anything in place of spaces.
        return text.replace(_SPACE, " ") if kind == gguf.TokenType.USER_DEFINED else text

    def _kind(self, number: int, known: bool, text: str) -> int:
        import gguf

        if text == self.tokenizer.unk_token:
            return gguf.TokenType.UNKNOWN
        return gguf.TokenType.BYTE if _BYTE.fullmatch(text) else super()._kind(number, known, text)


def _byte_level(tokenizer: Any, described: Mapping[str, Any]) -> ByteLevel | None:
    """A tokenizer over bytes; None where llama.cpp has none that does the same.

    Raises:
        ExportError: it changes text before it splits it.
    """
    steps = _pre_tokenizers(described)
    splits = _splits(steps)
    if splits is None or not _merges_alike(described.get("model") or {}, splits):
        return None
    _refuse_changes_of_text(described, steps)
    return ByteLevel(tokenizer, splits)


def _pieces(tokenizer: Any, described: Mapping[str, Any]) -> Pieces | None:
    """A tokenizer of SentencePiece's; None where llama.cpp would make other tokens."""
    model, prefixed = described["model"], _prefixed(described)
    vocabulary = model["vocab"]
    has_bytes = all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    if prefixed is None or model.get("type") != "BPE" or not has_bytes or any(model.get(o) for o in _OPTIONS):
        return None
    order = _order(model, {str(token) for token in tokenizer.added_tokens_decoder.values()})
    return None if order is None else Pieces(tokenizer, order, prefixed)


def _prefixed(described: Mapping[str, Any]) -> bool | None:
    """Whether a space is put before text; None where text is changed or split otherwise than SentencePiece does."""
    given = described.get("normalizer")
    normalizers = given.get("normalizers", [given]) if given else []
    steps = [step for step in _pre_tokenizers(described) if step and not _without_effect(step)]
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if not steps and normalizers == [spaces]:
        return False
    if not steps and normalizers == [{"type": "Prepend", "prepend": _SPACE}, spaces]:
        return True
    kind = {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": "never", "split": False}
    return False if not normalizers and steps == [kind] else None


def _without_effect(step: Mapping[str, Any]) -> bool:
    """Whether a step splits at spaces, of which there are none any more."""
    return step.get("type") == "Split" and step.get("pattern") == {"String": " "}


def _order(model: Mapping[str, Any], added: Collection[str]) -> list[str] | None:
    """Tokens in the order in which merges make them, but for added ones, which are found before anything is merged.

    None where the order is not one of tokens, or where not all pairs that give a token are merged: llama.cpp has scores
    of tokens in place of merges, and so merges every such pair.
    """
    vocabulary = model["vocab"]
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    merges = {pair: None for pair in pairs if "".join(pair) not in added}
    order = [text for text, _ in itertools.groupby("".join(pair) for pair in merges)]
    for text in vocabulary.keys() - added:
        for place in () if _BYTE.fullmatch(text) else range(1, len(text)):
            pair = text[:place], text[place:]
            if pair not in merges and all(len(part) == 1 or part in vocabulary for part in pair):
                return None
    return order if len(order) == len(set(order)) else None


def _pre_tokenizers(described: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The steps in which a tokenizer splits text."""
    steps = described.get("pre_tokenizer") or {}
    return steps.get("pretokenizers", [steps])


def _splits(steps: Sequence[Mapping[str, Any]]) -> str | None:
    """llama.cpp's name for how text is split into words in some steps; None where it has none that is known here."""
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        apart = steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
        return _SPLITS.get(steps[0].get("pattern", {}).get("Regex")) if apart else None
    return None


def _merges_alike(model: Mapping[str, Any], splits: str) -> bool:
    """Whether a model makes tokens of words as llama.cpp does of those that it splits in a way.

    It takes a word that is a token as that, whatever the merges say, where it splits like LLaMA 3.
    """
    plain = model.get("type") == "BPE" and not any(model.get(option) for option in _OPTIONS)
    return plain and bool(model.get("ignore_merges")) == (splits == _LLAMA_3)


def _refuse_changes_of_text(described: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> None:
    """Refuses a tokenizer that changes text before it splits it, which llama.cpp would leave out without a word.

    NFC, which Qwen 2's does and llama.cpp does not, is let through: nearly all text has that form.

    Raises:
        ExportError: naming the change.
    """
    normalizer = described.get("normalizer") or {"normalizers": []}
    kinds = [step.get("type") for step in normalizer.get("normalizers", [normalizer])]
    change = next((f"normalize text with {kind}" for kind in kinds if kind != "NFC"), None)
    if any(step.get("add_prefix_space") for step in steps):
        change = "put a space before text"
    if change is not None:
        raise ExportError(
            f"GGUF is not written for tokenizers that {change}, which llama.cpp does not; use --format hf-dense"
        )
