"""An independent eager copy of a quantized model: the original modules, their linears replaced by the reference.

No graph, no pass and no kernel takes part. Every quantized ``nn.Linear``, ``Conv1D`` and expert matrix calls
``codegen.reference`` on the stored weights; embedding and head are int8 rows; attention quantizes keys and values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from lbllm_compile.codegen import reference
from lbllm_compile.codegen.format import QuantizedWeight
from lbllm_compile.passes.ir.program import Program
from lbllm_compile.passes.lower import stored_weights
from rtn import CLIP
from torch import Tensor, nn
from transformers import PreTrainedModel


class Oracle:
    """The eager model that a lowered program (of :func:`rtn.simulate`) must agree with.

    Args:
        model: a fresh copy of the original; it is changed.
        program: gives the stored weights, nothing else.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        program: Program,
        *,
        bits: int = 4,
        kv: int = 4,
        group: int = 32,
        knees: Tensor | None = None,
    ):
        self.model, self.bits, self.kv, self.group, self.knees = model, bits, kv, group, knees
        self.weights = stored_weights(program)
        self.replaced = 0
        state = dict(program.parameters())
        rows = {
            path.removesuffix(".rows"): (tensor, state[path.removesuffix("rows") + "row_scale"])
            for path, tensor in state.items()
            if path.endswith(".rows")
        }
        for path, module in model.named_modules():
            if f"{path}.weight" in self.weights:
                self._replace_linear(module, self.weights[f"{path}.weight"])
            elif f"{path}.gate_up_proj" in self.weights:
                self._replace_experts(module, self.weights[f"{path}.gate_up_proj"], self.weights[f"{path}.down_proj"])
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        tied = head.weight is embedding.weight
        names = {id(m): n for n, m in model.named_modules()}
        embedding_rows, head_rows = (
            rows.get(f"{names[id(m)]}.weight") or next(iter(rows.values())) for m in (embedding, head)
        )
        assert len(rows) == (1 if tied else 2)
        embedding.weight = nn.Parameter(embedding_rows[0].float() * embedding_rows[1][:, None], requires_grad=False)
        head.forward = lambda x: self._int8(x, head_rows)

    def _bit(self, x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
        values, scale = reference.quantize_activation(x, torch.tensor(CLIP), self.bits, self.group, self.knees)
        return reference.bit_linear(values, scale, weight, bias)

    @staticmethod
    def _int8(x: Tensor, rows: tuple[Tensor, Tensor]) -> Tensor:
        values, scale = reference.quantize_activation(x, torch.ones(2), 8, 64)
        return reference.int8_linear(values, scale, *rows, None, 64)

    def _replace_linear(self, module: nn.Module, weight: QuantizedWeight) -> None:
        bias = getattr(module, "bias", None)
        module.forward = lambda x: self._bit(x, weight, bias)
        self.replaced += 1

    def _replace_experts(self, module: nn.Module, gate_up: QuantizedWeight, down: QuantizedWeight) -> None:
        def expert(weight: QuantizedWeight, e: int) -> QuantizedWeight:
            parts = (weight.sign[e], weight.bitmap[e], weight.levels[e], weight.scale[e])
            return QuantizedWeight(*parts, weight.in_features, weight.group)

        def forward(hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
            out = torch.zeros_like(hidden)
            for e in range(gate_up.sign.shape[0]):
                token, slot = torch.where(chosen == e)
                if len(token):
                    gate, up = self._bit(hidden[token], expert(gate_up, e), None).chunk(2, -1)
                    y = self._bit(module.act_fn(gate) * up, expert(down, e), None)
                    out.index_add_(0, token, y * shares[token, slot, None])
            return out

        module.forward = forward
        self.replaced += 2 * gate_up.sign.shape[0]

    @contextlib.contextmanager
    def _quantized_attention(self) -> Iterator[None]:
        plain = F.scaled_dot_product_attention

        def attention(query: Tensor, key: Tensor, value: Tensor, *args: object, **kwargs: object) -> Tensor:
            key, value = (
                reference.dequantize_kv(*reference.quantize_kv(t, self.kv), self.kv, t.shape[-1]) for t in (key, value)
            )
            return plain(query, key, value, *args, **kwargs)

        F.scaled_dot_product_attention = attention
        try:
            yield
        finally:
            F.scaled_dot_product_attention = plain

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Logits ``[B, S, V]``, without a cache."""
        with self._quantized_attention():
            return self.model(**inputs, use_cache=False).logits
