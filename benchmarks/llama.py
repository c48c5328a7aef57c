"""llama.cpp as a yardstick, through the libraries that the optional package ``llama-cpp-python`` brings.

:class:`Products` times ggml's matrix products; :func:`write_gguf`, :func:`quantize`, :func:`export_artifact`,
:func:`bits_per_weight` and :class:`Scorer` are for whole models, which :mod:`lbllm_compile.bench.llama` runs.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lbllm_compile.codegen.errors import LbllmError

from lbllm_compile.bench.llama import SUCCESS, missing, silenced

if TYPE_CHECKING:
    import torch

TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "q2_k": 10, "tq2_0": 35}
"""ggml's tensor types."""

FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "q2_k": 10, "tq2_0": 37}
"""llama.cpp's file types: the type most of a file's tensors are asked to get."""

EXACT = "q8_0"
"""The file type that has the weights of an artifact as they are."""

BLOCK = 256
"""Columns of a ``q2_k`` or ``tq2_0`` block; rows that it does not divide fall back to a larger type."""

NODES = 8
"""Nodes and tensors to have room for, for each product of a graph."""


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_init": (ctypes.c_void_p, (_InitParams,)),
    "ggml_free": (None, (ctypes.c_void_p,)),
    "ggml_tensor_overhead": (ctypes.c_size_t, ()),
    "ggml_graph_overhead_custom": (ctypes.c_size_t, (ctypes.c_size_t, ctypes.c_bool)),
    "ggml_new_tensor_2d": (ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)),
    "ggml_get_data": (ctypes.c_void_p, (ctypes.c_void_p,)),
    "ggml_mul_mat": (ctypes.c_void_p, (ctypes.c_void_p,) * 3),
    "ggml_new_graph_custom": (ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_bool)),
    "ggml_build_forward_expand": (None, (ctypes.c_void_p,) * 2),
    "ggml_row_size": (ctypes.c_size_t, (ctypes.c_int, ctypes.c_int64)),
    "ggml_quantize_chunk": (
        ctypes.c_size_t,
        (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *(ctypes.c_int64,) * 3, ctypes.c_void_p),
    ),
    "ggml_backend_cpu_init": (ctypes.c_void_p, ()),
    "ggml_backend_cpu_set_n_threads": (None, (ctypes.c_void_p, ctypes.c_int)),
    "ggml_backend_graph_compute": (ctypes.c_int, (ctypes.c_void_p,) * 2),
    "ggml_backend_free": (None, (ctypes.c_void_p,)),
}


@functools.cache
def _functions() -> dict[str, Any]:
    """The functions of ggml named above, typed.

    Raises:
        LbllmError: the package is not there, or has another ggml than this module knows.
    """
    if why := missing():
        raise LbllmError(f"llama.cpp is not there; {why}")
    spec = importlib.util.find_spec("llama_cpp")
    assert spec and spec.origin
    folder = Path(spec.origin).parent / "lib"
    libraries = [ctypes.CDLL(str(folder / f"lib{name}.so"), ctypes.RTLD_GLOBAL) for name in ("ggml-base", "ggml-cpu")]
    found: dict[str, Any] = {}
    for name, (result, arguments) in _SIGNATURES.items():
        function = next((getattr(library, name) for library in libraries if hasattr(library, name)), None)
        if function is None:
            raise LbllmError(f"this llama-cpp-python has no {name}; install the version of constraints.txt")
        function.restype, function.argtypes = result, arguments
        found[name] = function
    return found


def row_bytes(kind: str, columns: int) -> int:
    """Bytes of one row of a matrix of a type."""
    return _functions()["ggml_row_size"](TYPES[kind], columns)


class Products:
    """ggml graphs that multiply fp32 activations with quantized matrices.

    Args:
        matrices: ``(type, rows, columns)``, with types of :data:`TYPES`; the products of one graph, independent of
            each other.
        tokens: ``M``.
        copies: graphs, each with matrices of its own.
        threads: of ggml's pool.

    Attributes:
        calls: one function a graph, which computes it.
    """

    def __init__(self, matrices: Sequence[tuple[str, int, int]], tokens: int, copies: int, threads: int):
        import torch

        ggml = self._ggml = _functions()
        sizes = [row_bytes(kind, columns) * rows for kind, rows, columns in matrices]
        nodes = NODES * len(matrices)
        each = sum(sizes) + sum(4 * tokens * (rows + columns) + 4096 for _, rows, columns in matrices)
        each += nodes * ggml["ggml_tensor_overhead"]() + ggml["ggml_graph_overhead_custom"](nodes, False)
        self._context = ggml["ggml_init"](_InitParams(each * copies, None, False))
        self._backend = ggml["ggml_backend_cpu_init"]()
        if not self._context or not self._backend:
            raise LbllmError("ggml could not allocate its matrices")
        ggml["ggml_backend_cpu_set_n_threads"](self._backend, threads)
        packed = {
            matrix: self._quantized(*matrix, size) for matrix, size in dict(zip(matrices, sizes, strict=True)).items()
        }
        generator = torch.Generator().manual_seed(0)
        self.calls: list[Callable[[], None]] = []
        for _ in range(copies):
            graph = ggml["ggml_new_graph_custom"](self._context, nodes, False)
            for (kind, rows, columns), size in zip(matrices, sizes, strict=True):
                matrix = ggml["ggml_new_tensor_2d"](self._context, TYPES[kind], columns, rows)
                ctypes.memmove(ggml["ggml_get_data"](matrix), packed[kind, rows, columns].data_ptr(), size)
                inputs = ggml["ggml_new_tensor_2d"](self._context, TYPES["f32"], columns, tokens)
                x = torch.randn(tokens, columns, generator=generator)
                ctypes.memmove(ggml["ggml_get_data"](inputs), x.data_ptr(), 4 * x.numel())
                ggml["ggml_build_forward_expand"](graph, ggml["ggml_mul_mat"](self._context, matrix, inputs))
            self.calls.append(functools.partial(self._compute, graph))

    def _quantized(self, kind: str, rows: int, columns: int, size: int) -> torch.Tensor:
        """A random matrix as bytes."""
        import torch

        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
        packed = torch.empty(size, dtype=torch.uint8)
        self._ggml["ggml_quantize_chunk"](TYPES[kind], weight.data_ptr(), packed.data_ptr(), 0, rows, columns, None)
        return packed

    def _compute(self, graph: Any) -> None:
        if self._ggml["ggml_backend_graph_compute"](self._backend, graph) != SUCCESS:
            raise LbllmError("ggml failed to compute a product")

    def __del__(self) -> None:
        if getattr(self, "_backend", None):
            self._ggml["ggml_backend_free"](self._backend)
        if getattr(self, "_context", None):
            self._ggml["ggml_free"](self._context)


def write_gguf(model: torch.nn.Module, path: Path) -> None:
    """Writes a ``LlamaForCausalLM`` as fp16 GGUF without a tokenizer, which speed does not depend on.

    Raises:
        LbllmError: it is another architecture.
    """
    import gguf

    config: Any = model.config
    if config.model_type != "llama":
        raise LbllmError(f"only llama models are written as GGUF here, not {config.model_type}")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_file_type(FILE_TYPES["f16"])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        array = tensor.float().numpy()
        for part, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if part in name:  # llama.cpp rotates neighbouring channels, transformers those half a head apart
                array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        target = names.get_name(name, try_suffixes=(".weight",))
        if target is None:
            raise LbllmError(f"GGUF has no name for {name}")
        writer.add_tensor(target, array.astype(np.float32 if array.ndim == 1 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, destination: Path, kind: str, threads: int) -> None:
    """Writes another file type of a GGUF file.

    Args:
        source: a file of any type.
        destination: replaced if it exists.
        kind: one of :data:`FILE_TYPES`.
        threads: to use.

    Raises:
        LbllmError: llama.cpp's libraries are not here, or cannot do it.
    """
    if why := missing():
        raise LbllmError(f"llama.cpp's libraries, which make {kind} of a GGUF file, are not here; {why}")
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread, parameters.allow_requantize = FILE_TYPES[kind], threads, True
    with silenced():
        status = llama_cpp.llama_model_quantize(str(source).encode(), str(destination).encode(), parameters)
    if status:
        raise LbllmError(f"llama.cpp could not quantize {source} to {kind}")


def export_artifact(artifact: Path, kinds: Sequence[str], threads: int, folder: Path) -> dict[str, Path]:
    """GGUF files of an artifact, by their types: what ``export`` writes, and what llama.cpp makes of that.

    Args:
        artifact: the directory.
        kinds: of :data:`FILE_TYPES`; ``f32`` has the weights as they are, too.
        threads: to use.
        folder: where the files go.

    Raises:
        LbllmError: GGUF cannot hold it, or llama.cpp cannot make a type of it.
    """
    from lbllm_compile.export import export

    folder.mkdir(exist_ok=True)
    exact = folder / f"{EXACT}.gguf"
    export(artifact, "gguf", exact)
    files = {kind: folder / f"{kind}.gguf" for kind in kinds}
    for kind, file in files.items():
        if kind != EXACT:
            quantize(exact, file, kind, threads)
    return files


def bits_per_weight(path: Path) -> tuple[float, dict[str, float]]:
    """Bits per weight of the decoder linears of a GGUF file, as stored.

    Returns:
        The average, and the share of the weights that each tensor type has: small models do not get the type that their
        file is named after where its blocks do not divide a row.
    """
    import gguf

    linears = [t for t in gguf.GGUFReader(str(path)).tensors if t.name.startswith("blk.") and len(t.shape) == 2]
    weights = sum(int(t.n_elements) for t in linears)
    shares: dict[str, float] = {}
    for tensor in linears:
        name = tensor.tensor_type.name
        shares[name] = shares.get(name, 0.0) + int(tensor.n_elements) / weights
    return 8 * sum(int(t.n_bytes) for t in linears) / weights, shares


class Scorer:
    """A model in llama.cpp that gives the logits of all tokens.

    Args:
        path: a GGUF file.
        most: tokens of a sequence.
        threads: to use.
    """

    def __init__(self, path: Path, most: int, threads: int):
        import llama_cpp

        options = {"n_threads": threads, "n_threads_batch": threads, "logits_all": True, "verbose": False}
        with silenced():
            self._model = llama_cpp.Llama(str(path), n_ctx=most, **options)

    def tokens(self, text: str) -> list[int]:
        """Of a text, special tokens read as such and none put in front."""
        return self._model.tokenize(text.encode(), add_bos=False, special=True)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Of every token of a sequence, ``[S, V]``."""
        self._model.reset()
        self._model.eval(ids)
        return np.array(self._model.scores[: len(ids)], np.float32)

    def close(self) -> None:
        """Gives its memory back."""
        self._model.close()
