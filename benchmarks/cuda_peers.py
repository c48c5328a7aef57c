"""What kernels and programs on a GPU are compared with: cuBLAS, torch and llama.cpp, where they are.

cuBLAS is called through its library alone. Each is absent from a machine that lacks it, and the reason is told.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from ctypes import byref, c_float, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from lbllm_compile.codegen.errors import LbllmError

from lbllm_compile.bench.turns import Runs

from .cuda_timing import Bench

CUBLAS = tuple(f"libcublas.so.{major}" for major in (13, 12, 11))
"""Libraries of cuBLAS, the newest first."""

_BF16, _COMPUTE_32F, _DEFAULT, _N, _T = 14, 68, -1, 0, 1
"""``CUDA_R_16BF``, ``CUBLAS_COMPUTE_32F``, ``CUBLAS_GEMM_DEFAULT``, ``CUBLAS_OP_N`` and ``CUBLAS_OP_T``."""

_WORKSPACE = 32 << 20
"""Bytes; a workspace that is given keeps cuBLAS from allocating during a capture."""

LLAMA_BENCH = "llama-bench"
LLAMA_TIMEOUT_S = 120


class Cublas:
    """cuBLAS on a device, bf16 in and out and fp32 sums.

    Args:
        bench: the device.

    Raises:
        LbllmError: there is no such library, or it refuses something.
    """

    def __init__(self, bench: Bench):
        self._bench = bench
        self._library = _first_library()
        self._handle = c_void_p()
        bench.driver.synchronize()  # makes the context current, which the library takes for its own
        self._call("cublasCreate_v2", byref(self._handle))
        self._call("cublasSetStream_v2", self._handle, bench.stream)
        workspace = bench.driver.allocate(_WORKSPACE)
        self._call("cublasSetWorkspace_v2", self._handle, c_void_p(workspace), c_size_t(_WORKSPACE))
        self._one, self._zero = c_float(1.0), c_float(0.0)

    def linear(self, rows: int, columns: int, tokens: int) -> tuple[Runs, list[int]]:
        """Seconds of a product ``[tokens, columns] x [columns, rows]`` and the buffers to give back."""
        bench = self._bench
        size = 2 * rows * columns
        weights = [bench.driver.allocate(size) for _ in range(bench.copies(size))]
        x, out = bench.driver.allocate(2 * tokens * columns), bench.driver.allocate(2 * tokens * rows)
        # Zeros would cost less power than weights do, and a GPU's clock follows its power.
        noise = np.random.default_rng(0).integers(0x3C00, 0x3F80, rows * columns, np.uint16)
        for pointer, count in [*((weight, rows * columns) for weight in weights), (x, tokens * columns)]:
            bench.driver.call("cuMemcpyHtoD_v2", pointer, noise[:count].ctypes.data, 2 * min(count, noise.size))

        def launch(number: int) -> None:
            # Row-major ``[rows, columns]`` is column-major ``[columns, rows]``.
            weight = c_void_p(weights[number % len(weights)])
            product = (_T, _N, rows, tokens, columns, byref(self._one), weight, _BF16, columns)
            others = (c_void_p(x), _BF16, columns, byref(self._zero), c_void_p(out), _BF16, rows)
            self._call("cublasGemmEx", self._handle, *product, *others, _COMPUTE_32F, _DEFAULT)

        launch(0)  # loads its kernels, which a capture does not allow
        bench.driver.synchronize()
        return bench.replayed(launch), [*weights, x, out]

    def close(self) -> None:
        """Gives the library's own memory back."""
        self._call("cublasDestroy_v2", self._handle)

    def _call(self, name: str, *arguments: Any) -> None:
        failed = getattr(self._library, name)(*arguments)
        if failed:
            raise LbllmError(f"cuBLAS refuses {name}: status {failed}")


def _first_library() -> ctypes.CDLL:
    reasons = []
    for name in CUBLAS:
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            reasons.append(str(error))
    raise LbllmError(f"there is no cuBLAS: {reasons[0]}")


def torch_device() -> str:
    """The device of torch.

    Raises:
        LbllmError: torch is not installed, or sees no GPU.
    """
    try:
        import torch
    except ImportError as error:
        raise LbllmError(f"there is no torch ({error})") from error
    if not torch.cuda.is_available():
        raise LbllmError(f"torch {torch.__version__} sees no CUDA device")
    return "cuda"


def torch_linear(
    bench: Bench, rows: int, columns: int, tokens: int, *, compiled: bool, device: str, backend: str = "inductor"
) -> Runs:
    """Seconds of torch's bf16 linear, replayed as a graph on a GPU.

    Args:
        bench: how much to do.
        rows, columns, tokens: the shape.
        compiled: with ``torch.compile``.
        device: torch's.
        backend: of ``torch.compile``.
    """
    import torch

    size = 2 * rows * columns
    weights = [torch.randn(rows, columns, device=device, dtype=torch.bfloat16) for _ in range(bench.copies(size))]
    x = torch.randn(tokens, columns, device=device, dtype=torch.bfloat16)
    function: Callable[..., Any] = torch.nn.functional.linear
    if compiled:
        options = {"mode": "max-autotune-no-cudagraphs"} if backend == "inductor" else {}
        function = torch.compile(lambda x, w: torch.nn.functional.linear(x, w), backend=backend, **options)

    def all_launches() -> None:
        for number in range(bench.launches):
            function(x, weights[number % len(weights)])

    with torch.no_grad():
        all_launches()
        if device != "cuda":
            return _wall(all_launches, bench.launches)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            all_launches()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def run(count: int) -> list[float]:
        found = []
        for _ in range(count):
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            found.append(1e-3 * start.elapsed_time(end) / bench.launches)
        return found

    return run


def _wall(work: Callable[[], object], launches: int) -> Runs:
    def run(count: int) -> list[float]:
        found = []
        for _ in range(count):
            start = time.perf_counter()
            work()
            found.append((time.perf_counter() - start) / launches)
        return found

    return run


class TorchDecoder:
    """A LLaMA of random weights in torch, bf16, greedy, with a KV cache of fixed size.

    Args:
        config: of transformers.
        capacity: tokens of the cache.
        device: torch's.
        compiled: with ``torch.compile``, which replays CUDA graphs.
        backend: of ``torch.compile``.
    """

    def __init__(
        self, config: Mapping[str, Any], capacity: int, device: str, compiled: bool, backend: str = "inductor"
    ):
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        self._torch, self._device, self._capacity = torch, device, capacity
        with torch.device(device):
            torch.manual_seed(0)
            self._model = LlamaForCausalLM(LlamaConfig(**config)).eval().requires_grad_(False).to(torch.bfloat16)
        self._forward: Callable[..., Any] = self._model
        if compiled:
            options = {"mode": "reduce-overhead"} if backend == "inductor" else {}
            self._forward = torch.compile(self._model, backend=backend, dynamic=False, **options)
        self.reset()

    def reset(self) -> None:
        """Forgets all tokens."""
        from transformers import StaticCache

        # One cache for all: a compiled graph holds its addresses.
        if not hasattr(self, "_cache"):
            self._cache = StaticCache(config=self._model.config, max_cache_len=self._capacity)
        self._cache.reset()
        self._past = 0

    def feed(self, ids: np.ndarray) -> int:
        """Feeds token ids ``[S]``; returns the likeliest next one, so that the device has finished."""
        torch = self._torch
        length = len(ids)
        model = self._forward if length == 1 else self._model
        # Not in inference mode, outside of which the cache could not be reset.
        with torch.no_grad():
            tokens = torch.from_numpy(np.asarray(ids, np.int64))[None].to(self._device)
            positions = torch.arange(self._past, self._past + length, device=self._device)
            out = model(
                input_ids=tokens,
                position_ids=positions[None],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
            self._past += length
            return int(out.logits[0, -1].argmax())


def llama_bench(folder: Path | None) -> Path:
    """llama.cpp's own benchmark, carried in ``folder`` or on the search path.

    Raises:
        LbllmError: there is none.
    """
    carried = folder / "llama.cpp" / LLAMA_BENCH if folder else None
    if carried and carried.is_file():
        return carried
    found = shutil.which(LLAMA_BENCH)
    if found is None:
        raise LbllmError(f"there is no {LLAMA_BENCH}, neither carried in llama.cpp/ nor on the search path")
    return Path(found)


def llama_run(program: Path, model: Path, prompt: int, steps: int) -> dict[str, float]:
    """Seconds that llama.cpp takes for a token: of decoding, ``decode``, and of a prompt, ``prefill``.

    Raises:
        LbllmError: it fails, or does not run on a GPU.
    """
    command = [str(program), "-m", str(model), "-p", str(prompt), "-n", str(steps), "-r", "1", "-ngl", "99"]
    libraries = os.pathsep.join([str(program.parent), os.environ.get("LD_LIBRARY_PATH", "")])
    done = subprocess.run(
        [*command, "-o", "json"],
        capture_output=True,
        text=True,
        timeout=LLAMA_TIMEOUT_S,
        env=os.environ | {"LD_LIBRARY_PATH": libraries},
        check=False,
    )
    if done.returncode:
        raise LbllmError(f"{program.name} fails on {model.name}: {done.stderr.strip()[-300:]}")
    rows = json.loads(done.stdout)
    if not all("CUDA" in str(row.get("backends")) for row in rows):
        raise LbllmError(f"{program} was built without CUDA")
    return {"decode" if row["n_gen"] else "prefill": 1 / row["avg_ts"] for row in rows}
