"""``gguf``: one file for llama.cpp and what is built on it.

A W(1+1) matrix is exact there: a group's levels are int8 numbers times one float16 scale, and a block of ``Q8_0`` is 32
int8 numbers times one float16 scale, so a group of 32, 64, 128 or 256 columns is one or more blocks with the same
scale. That takes 8.5 bits a weight instead of two and a fraction. A 4-bit embedding or head is exact, too. Int8 rows
of these become blocks, too; their float32 scales are rounded to float16, and the largest relative error of that is
stated. Norms, biases and expert routers are float32. Matrices whose rows are no multiple of 32 columns, and those kept
dense, have the dtype that is asked for. The W(1+1) matrices may have another type (:mod:`.ggml`), and where that is a
floating-point one, int8 rows and 4-bit codes have it, too: llama.cpp rounds what it multiplies with blocks to 8 bits,
and with a floating-point matrix to no less than that matrix has.

Names and metadata are those of llama.cpp, by the package ``gguf``. LLaMA's queries and keys have their rows in another
order there: pairs of channels that the rotary embedding turns together are neighbours. Experts are stacked there, too,
but gates and what they multiply are apart.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbllm_compile.export import ggml
from lbllm_compile.export.form import Form, round_weights, rounded
from lbllm_compile.export.gguf_architecture import architecture_of, describe
from lbllm_compile.export.gguf_tokenizer import Tokenizer
from lbllm_compile.export.original import ExportError, Original
from lbllm_compile.native.language import context_length
from lbllm_compile.passes.ir import spool
from lbllm_compile.passes.ir.program import Program

_ROUTER = ".mlp.gate.weight"
"""How paths of matrices end that choose experts. They are small, and a choice is not to change by rounding."""

_GATES = ".gate_up_proj"
"""How paths end of stacked matrices whose first half of rows are gates."""


class Gguf(Form):
    """A ``.gguf`` file."""

    suffix = ".gguf"
    types = tuple(ggml.TYPES)

    def __init__(self, program: Program, original: Original, dtype: str, kind: str | None):
        if importlib.util.find_spec("gguf") is None:
            raise ExportError(
                "writing GGUF needs the package gguf; install it with `pip install 'lbllm-compile[gguf]'`"
            )
        super().__init__(program, original, dtype, kind)
        self._chosen = ggml.TYPES[kind or self.types[0]]
        self._architecture = architecture_of(original.module.config)
        self._tokenizer = Tokenizer.of(program.tokenizer)
        self._types = {path: self._type(path, p) for path, p in original.module.named_parameters()}
        self._blocks = spool.mapped((path, self._in_blocks(path)) for path in self._types if self._has_blocks(path))
        self._lost = self._length = 0.0
        round_weights(original.module, self._rounded)

    @classmethod
    def dtype_with(cls, kind: str | None) -> str | None:
        return ggml.TYPES[kind].dtype if kind else None

    def _type(self, path: str, parameter: Tensor) -> str:
        """GGML's name of the type that a tensor of the module is written in."""
        if parameter.dim() < 2 or path.endswith(_ROUTER):
            return "F32"
        if path in self.original.bit or path in self.original.int4 or path in self.original.rows:
            if self._chosen.dtype:
                return self._chosen.name
            if not parameter.shape[-1] % ggml.BLOCK:
                return self._chosen.name if path in self.original.bit else "Q8_0"
        return ggml.OF_DTYPE[self.dtype]

    def _has_blocks(self, path: str) -> bool:
        return self._types[path] not in ggml.DTYPE_OF

    def _in_blocks(self, path: str) -> Tensor:
        """A matrix, or stacked ones, as blocks: uint8 ``[..., N, bytes]``."""
        if path in self.original.rows:
            rows, scale = self.original.rows[path]
            scales = _half(path, scale).unsqueeze(-1).expand(-1, rows.shape[1] // ggml.BLOCK)
            return ggml.integer_blocks(rows, scales)
        if path in self.original.int4:
            return ggml.exact_blocks(self.original.int4[path])
        weight = self.original.bit[path]
        steps = self._chosen.steps
        return ggml.fitted_blocks(path, weight, steps) if steps else ggml.exact_blocks(weight)

    def _rounded(self, path: str, tensor: Tensor) -> Tensor:
        if path in self._blocks:
            written = ggml.read_blocks(self._blocks[path], self._types[path])
        else:
            written = rounded(path, tensor, ggml.DTYPE_OF[self._types[path]])
        if path in self.original.bit:
            self._lost += float((written - tensor).square().sum(dtype=torch.float64))
            self._length += float(tensor.square().sum(dtype=torch.float64))
        return written

    @property
    def nbytes(self) -> int:
        return sum(
            ggml.nbytes(parameter.numel(), self._types[path])
            for path, parameter in self.original.module.named_parameters()
        )

    def facts(self) -> Mapping[str, Any]:
        bit, int4, rows = self.original.bit, self.original.int4, self.original.rows
        matrices = {path for path, parameter in self.original.module.named_parameters() if parameter.dim() > 1}
        dense = matrices - {*bit, *int4, *rows}
        routers = {path for path in dense if path.endswith(_ROUTER)}
        chosen, of_rows = self._chosen, self._chosen if self._chosen.dtype else ggml.TYPES["q8_0"]
        kept = [path for path in bit if self._types[path] == chosen.name]
        fit, coded = ([path for path in paths if self._types[path] == of_rows.name] for paths in (rows, int4))
        exact = "_exact" if chosen.exact else ""
        facts: dict[str, Any] = {
            f"W(1+1)_matrices{exact}_in_{chosen.name}": f"{len(kept)} of {len(bit)}, {chosen.bits:g} bits a weight",
            f"int8_matrices_in_{of_rows.name}": f"{len(fit)} of {len(rows)}, {of_rows.bits:g} bits a weight",
            f"dense_matrices_in_{self.dtype}": len(dense - routers),
        }
        if routers:
            facts["router_matrices_in_F32"] = len(routers)
        if int4:
            exact = "_exact" if of_rows.exact else ""
            share = f"{len(coded)} of {len(int4)}"
            facts[f"4-bit_matrices{exact}_in_{of_rows.name}"] = f"{share}, {of_rows.bits:g} bits a weight"
        if others := len(bit) - len(kept) + len(rows) - len(fit) + len(int4) - len(coded):
            facts[f"others_in_{self.dtype}"] = f"{others}, because their rows are no multiple of {ggml.BLOCK} columns"
        if self._lost:
            facts["relative_error_of_W(1+1)_weights"] = (self._lost / self._length) ** 0.5
        errors = [_scale_error(path, scale) for path, (_, scale) in rows.items() if path in self._blocks]
        if errors:
            facts["largest_error_of_an_int8_row's_scale_in_float16"] = max(errors)
        if self._tokenizer is None:
            facts["tokenizer"] = "the artifact has none"
        return facts

    def write(self, path: Path) -> None:
        import gguf

        config = self.original.module.config
        writer = gguf.GGUFWriter(path, self._architecture.name)
        try:
            writer.add_name(self.program.name)
            writer.add_file_type(ggml.file_type(self._chosen.name))
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            writer.add_context_length(context_length(self.program.config) or config.max_position_embeddings)
            describe(writer, self._architecture, config)
            if self._tokenizer is None:
                writer.add_tokenizer_model("none")
            else:
                self._tokenizer.add_to(writer, config.vocab_size)
            for name, tensor, kind in self._tensors():
                writer.add_tensor(name, tensor, raw_dtype=gguf.GGMLQuantizationType[kind])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()

    def _tensors(self) -> Iterator[tuple[str, Any, str]]:
        """Names, contents and GGML types of all tensors."""
        import gguf

        module, config = self.original.module, self.original.module.config
        kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == self._architecture.name)
        names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
        for path, parameter in module.named_parameters():
            offset = self._architecture.norm_offset if path.endswith("norm.weight") else 0.0
            stored = self._blocks.get(path)
            for part, rows in self._parts(path, parameter):
                stem, dot, field = part.rpartition(".")
                named = dot + field if field in ("weight", "bias") else ".weight"
                name = names.get_name(stem if field in ("weight", "bias") else part)
                if name is None:
                    raise ExportError(f"llama.cpp has no place for the weight '{path}' in {self._architecture.name}")
                if stored is None:
                    values = (parameter.data + offset).index_select(-min(2, parameter.dim()), rows)
                    tensor = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType[self._types[path]])
                else:
                    tensor = stored.index_select(-2, rows).numpy()
                yield name + named, tensor, self._types[path]

    def _parts(self, path: str, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The paths that llama.cpp's names follow from, and which rows of a tensor each has, in what order."""
        count = parameter.shape[-min(2, parameter.dim())]
        rows = torch.arange(count)
        if path.endswith(_GATES):
            stem = path.removesuffix(_GATES)
            yield f"{stem}.gate_proj", rows[: count // 2]
            yield f"{stem}.up_proj", rows[count // 2 :]
            return
        config = self.original.module.config
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        projection = path.rpartition(".")[0].rpartition(".")[2]
        if self._architecture.permuted and projection in heads:
            # halves of a head, which transformers turns against each other, become alternating rows
            rows = rows.view(heads[projection], 2, -1).transpose(1, 2).reshape(-1)
        yield path, rows


def _half(path: str, scale: Tensor) -> Tensor:
    """Scales in float16.

    Raises:
        ExportError: one is too large.
    """
    half = scale.half()
    if not bool(torch.isfinite(half).all()):
        raise ExportError(f"a scale of '{path}' is too large for float16; compile with head{{bits=16}}")
    return half


def _scale_error(path: str, scale: Tensor) -> float:
    """Largest relative error of scales in float16."""
    used = scale[scale > 0].double()
    return float(((_half(path, used.float()).double() - used) / used).abs().max()) if len(used) else 0.0
