"""``gguf``: one file for llama.cpp and what is built on it.

A W(1+1) matrix is exact there: a group's levels are int8 numbers times one float16 scale, and a block of ``Q8_0`` is 32
int8 numbers times one float16 scale, so a group of 32, 64, 128 or 256 columns is one or more blocks with the same
scale. That takes 8.5 bits a weight instead of two and a fraction. Int8 rows of the embedding and the head become
blocks, too; their float32 scales are rounded to float16, and the largest relative error of that is stated. Norms and
biases are float32. Matrices whose rows are no multiple of 32 columns, and those kept dense, have the dtype that is
asked for.

Names and metadata are those of llama.cpp, by the package ``gguf``. LLaMA's queries and keys have their rows in another
order there: pairs of channels that the rotary embedding turns together are neighbours.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lbllm_compile.export.form import Form, round_weights, rounded
from lbllm_compile.export.original import ExportError, Original
from lbllm_compile.native.language import context_length
from lbllm_compile.passes.ir.program import Program

BLOCK = 32
"""Weights of a ``Q8_0`` block, which share one float16 scale."""

BLOCK_BYTES = 2 + BLOCK

TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""GGML's names of the dtypes of plain weights."""


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp has an architecture.

    Attributes:
        name: llama.cpp's.
        permuted: whether rows of queries and keys are in its order.
    """

    name: str
    permuted: bool = False


ARCHITECTURES = {
    "llama": Architecture("llama", permuted=True),
    "mistral": Architecture("llama", permuted=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
}
"""What can be written, by transformers' ``model_type``."""

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA_3 = "llama-bpe"
_SPLITS = {
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_WORDS}|\p{{N}}{{1,3}}|{_REST}": _LLAMA_3,
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_WORDS}|\p{{N}}|{_REST}": "qwen2",
}
"""llama.cpp's names of the patterns by which tokenizers split text into words."""


class Gguf(Form):
    """A ``.gguf`` file."""

    suffix = ".gguf"

    def __init__(self, program: Program, original: Original, dtype: str):
        if importlib.util.find_spec("gguf") is None:
            raise ExportError(
                "writing GGUF needs the package gguf; install it with `pip install 'lbllm-compile[gguf]'`"
            )
        super().__init__(program, original, dtype)
        self._kind = program.config.get("model_type")
        if self._kind not in ARCHITECTURES:
            raise ExportError(
                f"GGUF is written for {', '.join(ARCHITECTURES)}, not for {self._kind}; use --format hf-dense, which"
                " llama.cpp's own converter reads"
            )
        self._architecture = ARCHITECTURES[self._kind]
        _refuse_variants(original.module.config)
        self._metadata = _Tokenizer.of(program.tokenizer)
        round_weights(original.module, self._rounded)

    def _rounded(self, path: str, tensor: Tensor) -> Tensor:
        if path in self.original.rows and self._in_blocks(path):
            rows, scale = self.original.rows[path]
            return rows.float() * _half(path, scale).float().unsqueeze(-1)
        exact = tensor.dim() < 2 or (path in self.original.bit and self._in_blocks(path))
        return tensor if exact else rounded(path, tensor, self.dtype)

    def _in_blocks(self, path: str) -> bool:
        """Whether a matrix is written as ``Q8_0``."""
        return (path in self.original.bit or path in self.original.rows) and not self._shape(path)[-1] % BLOCK

    def _shape(self, path: str) -> torch.Size:
        return self.original.module.get_parameter(path).shape

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(p, self._type(path)) for path, p in self.original.module.named_parameters())

    def _type(self, path: str) -> str:
        if self._in_blocks(path):
            return "Q8_0"
        return "F32" if len(self._shape(path)) < 2 else TYPES[self.dtype]

    def facts(self) -> Mapping[str, Any]:
        exact = sum(self._in_blocks(path) for path in self.original.bit)
        matrices = [path for path, parameter in self.original.module.named_parameters() if parameter.dim() > 1]
        integers = [path for path in matrices if path in self.original.rows]
        fit = sum(self._in_blocks(path) for path in integers)
        dense = len(matrices) - len(self.original.bit) - len(integers)
        facts: dict[str, Any] = {
            "W(1+1)_matrices_exact_in_Q8_0": f"{exact} of {len(self.original.bit)}, 8.5 bits a weight",
            "int8_matrices_in_Q8_0": f"{fit} of {len(integers)}, 8.5 bits a weight",
            f"dense_matrices_in_{self.dtype}": dense,
        }
        others = len(self.original.bit) - exact + len(integers) - fit
        if others:
            facts[f"others_in_{self.dtype}"] = f"{others}, because their rows are no multiple of {BLOCK} columns"
        errors = [_scale_error(path, scale) for path, (_, scale) in self.original.rows.items() if self._in_blocks(path)]
        if errors:
            facts["largest_error_of_an_int8_row's_scale_in_float16"] = max(errors)
        if self._metadata is None:
            facts["tokenizer"] = "the artifact has none"
        return facts

    def write(self, path: Path) -> None:
        import gguf

        config = self.original.module.config
        writer = gguf.GGUFWriter(path, self._architecture.name)
        try:
            _describe(writer, config, self.program)
            if self._metadata is None:
                writer.add_tokenizer_model("none")
            else:
                self._metadata.add_to(writer, config.vocab_size)
            for name, tensor, kind in self._tensors():
                writer.add_tensor(name, tensor, raw_dtype=gguf.GGMLQuantizationType[kind])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()

    def _tensors(self) -> Any:
        """Names, contents and GGML types of all tensors."""
        import gguf

        module, config = self.original.module, self.original.module.config
        kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == self._architecture.name)
        names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
        for path, parameter in module.named_parameters():
            name = names.get_name(path, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise ExportError(f"llama.cpp has no place for the weight '{path}' in {self._architecture.name}")
            order = self._order(path, len(parameter))
            if self._in_blocks(path):
                yield name, blocks(*self._integers(path, order)), "Q8_0"
            else:
                values = parameter.data[order].numpy()
                yield name, gguf.quants.quantize(values, gguf.GGMLQuantizationType[self._type(path)]), self._type(path)

    def _integers(self, path: str, order: Tensor) -> tuple[Tensor, Tensor]:
        """A matrix as int8 ``[N, K]`` and float16 scales ``[N, K / 32]``, its rows in an order."""
        if path in self.original.bit:
            weight = self.original.bit[path]
            scale = weight.scale.repeat_interleave(weight.group // BLOCK, -1)[:, : weight.in_features // BLOCK]
            return weight.integer_levels()[order], scale[order]
        rows, scale = self.original.rows[path]
        return rows[order], _half(path, scale)[order].unsqueeze(-1).expand(-1, rows.shape[1] // BLOCK)

    def _order(self, path: str, rows: int) -> Tensor:
        """Which row of the original a row of the file is."""
        order = torch.arange(rows)
        config = self.original.module.config
        projection = path.rpartition(".")[0].rpartition(".")[2]
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        if self._architecture.permuted and projection in heads:
            # halves of a head, which transformers turns against each other, become alternating rows
            return order.view(heads[projection], 2, -1).transpose(1, 2).reshape(-1)
        return order


def blocks(integers: Tensor, scale: Tensor) -> np.ndarray:
    """``Q8_0`` blocks, uint8 ``[N, K / 32 * 34]``: each a float16 scale and 32 int8 numbers.

    Args:
        integers: int8 ``[N, K]``, ``K`` a multiple of 32.
        scale: float16 ``[N, K / 32]``.
    """
    numbers = integers.contiguous().view(torch.uint8).unflatten(-1, (-1, BLOCK))
    scales = scale.contiguous().unsqueeze(-1).view(torch.uint8)
    return torch.cat([scales, numbers], -1).flatten(-2).numpy()


def _nbytes(parameter: Tensor, kind: str) -> int:
    if kind == "Q8_0":
        return parameter.numel() // BLOCK * BLOCK_BYTES
    return parameter.numel() * (4 if kind == "F32" else 2)


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


def _refuse_variants(config: Any) -> None:
    """Refuses what llama.cpp would compute otherwise without a word.

    Raises:
        ExportError: naming it.
    """
    rope = config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear"):
        raise ExportError(f"GGUF is not written for rotary embeddings of the type '{kind}'; use --format hf-dense")
    windows = getattr(config, "layer_types", None) or []
    if "sliding_attention" in windows or (config.model_type == "mistral" and config.sliding_window):
        raise ExportError(
            f"GGUF is not written for the sliding window of {config.model_type}, which llama.cpp ignores in this"
            " architecture; use --format hf-dense"
        )
    if config.hidden_act != "silu":
        raise ExportError(f"GGUF is not written for the activation '{config.hidden_act}'; use --format hf-dense")


def _describe(writer: Any, config: Any, program: Program) -> None:
    """The metadata that llama.cpp builds the model from."""
    import gguf

    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(program.name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_length(program.config) or config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.rope_parameters.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])


@dataclass(frozen=True)
class _Tokenizer:
    """A byte-level BPE tokenizer as llama.cpp has it.

    Attributes:
        tokenizer: transformers'.
        splits: llama.cpp's name of the way it splits text into words.
    """

    tokenizer: Any
    splits: str

    @classmethod
    def of(cls, tokenizer: Any) -> _Tokenizer | None:
        """The tokenizer of an artifact; None where it has none.

        Raises:
            ExportError: llama.cpp has no tokenizer that would do the same, as far as is known here.
        """
        if tokenizer is None:
            return None
        backend = getattr(tokenizer, "backend_tokenizer", None)
        described = json.loads(backend.to_str()) if backend is not None else {}
        steps = _pre_tokenizers(described)
        splits = _splits(steps)
        if splits is None or not _merges_alike(described.get("model") or {}, splits):
            raise ExportError(
                "GGUF is written for byte-level BPE tokenizers that split words as those of GPT-2, SmolLM, LLaMA 3 or"
                " Qwen 2, and the artifact has another; use --format hf-dense"
            )
        _refuse_changes_of_text(described, steps)
        return cls(tokenizer, splits)

    def add_to(self, writer: Any, size: int) -> None:
        """Writes tokens, merges, special tokens and the chat template.

        Args:
            size: rows of the embedding; those without a token get a name that no text has.
        """
        import gguf

        by_id = {number: text for text, number in self.tokenizer.get_vocab().items()}
        added = self.tokenizer.added_tokens_decoder
        texts, kinds = [], []
        for number in range(size):
            texts.append(by_id.get(number, f"[PAD{number}]"))
            if number not in by_id:
                kinds.append(gguf.TokenType.UNUSED)
            elif number in added:
                special = added[number].special
                kinds.append(gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED)
            else:
                kinds.append(gguf.TokenType.NORMAL)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.splits)
        writer.add_token_list(texts)
        writer.add_token_types(kinds)
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder)
            special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=size)
        begins = self.tokenizer("a")["input_ids"][:1] == [self.tokenizer.bos_token_id]
        special.add_special_token = {"bos": begins, "eos": False}
        special.add_to_gguf(writer, quiet=True)


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
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    plain = model.get("type") == "BPE" and not any(model.get(option) for option in options)
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
