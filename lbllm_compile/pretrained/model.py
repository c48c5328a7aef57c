"""A compiled model as transformers has models: tensors in, logits out, ``generate``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.generation import GenerationMixin
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from lbllm_compile.pretrained.errors import PretrainedError
from lbllm_compile.runtime import CompiledModel


class Past:
    """A conversation in progress as ``past_key_values``: the runtime holds its keys and values.

    Args:
        session: a session of the compiled model.
    """

    is_compileable = False

    def __init__(self, session: Any):
        self.session = session
        self.tokens = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens fed so far, padding included."""
        return self.tokens

    def feed(self, ids: Tensor, mask: Tensor, last: bool) -> Tensor:
        """Feeds ``[B, S]`` more token ids; returns logits ``[B, S, V]``, or ``[B, 1, V]`` of the last one.

        Args:
            mask: ``[B, tokens + S]``, zero where a token is padding.
        """
        given = ids.numpy()
        new = mask[:, self.tokens :].numpy()
        if self.tokens == 0 or not new.all():
            self.session.start(new)
        self.tokens += ids.shape[1]
        logits = self.session.step(given)[:, None] if last else self.session.logits(given)
        return torch.from_numpy(np.array(logits))  # a copy: the runtime may use the memory again

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise PretrainedError("a compiled model keeps one conversation a sequence; use num_beams=1")

    def crop(self, max_length: int) -> None:
        raise PretrainedError("a compiled model does not take tokens back; leave out assisted generation")


class CompiledForCausalLM(PreTrainedModel, GenerationMixin):
    """An artifact behind the interface of transformers; has no parameters, runs on the artifact's kernels.

    ``AutoModelForCausalLM.from_pretrained(DIR)`` makes one. It is for inference on CPUs.

    Attributes:
        compiled: the model in lbllm-compile's own interface.
    """

    main_input_name = "input_ids"
    _keys_to_ignore_on_load_unexpected = [r".*"]  # noqa: RUF012 - transformers' own form
    _is_stateful = True  # states cannot be rolled back, which rules assisted generation out
    _supports_sdpa = True  # what the original model was asked for; nothing here computes attention
    compiled: CompiledModel

    def __init__(self, config: Any):
        super().__init__(config)
        self.post_init()

    @classmethod
    def take_the_place_of(cls, model: Any) -> None:
        """Makes a compiled model, which :meth:`attach` completes, of one that transformers has built without weights.

        Its class changes with all that it holds, so that nothing of the original's forward is left to be used by
        mistake.
        """
        fresh = vars(cls(model.config))
        kept = {name: getattr(model, name) for name in ("is_quantized", "quantization_method")}
        vars(model).clear()
        model.__class__ = cls
        vars(model).update(fresh, **kept)

    def attach(self, compiled: CompiledModel) -> None:
        """Gives the model what runs it."""
        vars(self)["compiled"] = compiled

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the runtime makes its own state

    def get_input_embeddings(self) -> Any:
        raise NotImplementedError("a compiled model has no embedding of its own; give it token ids")

    def get_output_embeddings(self) -> None:
        return None

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Past | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **_: Any,
    ) -> Any:
        """Logits of token ids ``[B, S]``, behind those of ``past_key_values`` where these are given.

        Positions follow from the mask: every token that is not padding counts. ``position_ids`` that say otherwise
        cannot be taken, nor embeddings.

        Args:
            attention_mask: ``[B, past + S]``; by default all ones.
            labels: ``[B, S]``, for the loss.
            use_cache: give ``past_key_values`` back.
            logits_to_keep: 1 for the last token's logits alone; 0 for all.

        Raises:
            PretrainedError: an input cannot be taken.
            GenerationError: a token is outside the vocabulary, or there are too many.
        """
        if input_ids is None or inputs_embeds is not None:
            raise PretrainedError("a compiled model takes token ids; pass input_ids")
        _check_devices(input_ids, attention_mask, position_ids, labels, logits_to_keep)
        past = Past(self.compiled.session(*input_ids.shape)) if past_key_values is None else past_key_values
        if not isinstance(past, Past):
            raise PretrainedError("a compiled model keeps its own state; pass the past_key_values that it returned")
        length = past.tokens + input_ids.shape[1]
        mask = torch.ones((len(input_ids), length), dtype=torch.int64) if attention_mask is None else attention_mask
        if mask.shape != (len(input_ids), length):
            raise PretrainedError(f"attention_mask is {[*mask.shape]} instead of {[len(input_ids), length]}")
        if position_ids is not None:
            _check_positions(position_ids, mask, past.tokens)
        last = isinstance(logits_to_keep, int) and logits_to_keep == 1
        logits = past.feed(input_ids, mask.to(torch.int64), last)
        loss = None if labels is None else ForCausalLMLoss(logits, labels, logits.shape[-1])
        if not last and (not isinstance(logits_to_keep, int) or logits_to_keep):
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = logits[:, keep]
        kept = None if use_cache is False else past
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=kept)  # pyright: ignore
        return output if return_dict is not False else output.to_tuple()


def _check_devices(*inputs: Any) -> None:
    """Checks that tensors are where the kernels run.

    Raises:
        PretrainedError: one is on another device.
    """
    others = [one.device for one in inputs if isinstance(one, Tensor) and one.device.type != "cpu"]
    if others:
        raise PretrainedError(f"a compiled model runs on the CPU, and an input is on '{others[0]}'; move it to the CPU")


def _check_positions(given: Tensor, mask: Tensor, past: int) -> None:
    """Checks that positions are those of the tokens that are no padding.

    Raises:
        PretrainedError: they are others.
    """
    seen = mask[:, past:] != 0
    expected = ((mask != 0).cumsum(-1) - 1)[:, past:]
    if not torch.equal(given.expand_as(expected)[seen], expected[seen]):
        raise PretrainedError("position_ids are not the numbers of the tokens; leave them out and give attention_mask")
