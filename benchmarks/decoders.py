"""Decoders to compare, each in a process of its own that does what it is asked, line by line.

    python -m benchmarks.decoders      # reads JSON requests from stdin, answers each with a line of JSON

The first request says which decoder to load. :class:`Child` is the other end. Nothing here imports torch, unless it is
torch that decodes: the memory of a process is the decoder's own.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from lbllm_compile.codegen.errors import LbllmError

from . import harness

STATUS = Path("/proc/self/status")
"""Where Linux says how much memory a process uses."""

WITHOUT_FEW = "native, without functions for few tokens"
"""The native program, in which prompts of a few tokens run on the kernels for long ones."""

MEMORY_FIELDS = {"VmRSS": "resident", "VmHWM": "peak", "RssAnon": "anonymous", "RssFile": "file"}


@dataclass(frozen=True)
class Loading:
    """Which decoder to load.

    Attributes:
        kind: ``"native"``, :data:`WITHOUT_FEW`, ``"llama.cpp"``, ``"torch fp32"`` or ``"torch bf16"``.
        source: native: an artifact, or the folder of a native program; llama.cpp: a GGUF file; torch: what
            :func:`benchmarks.subjects.original` takes.
        capacity: tokens to have room for.
        threads: to use, as the environment says as well.
    """

    kind: str
    source: str
    capacity: int
    threads: int


class Decoder(Protocol):
    """A language model with a KV cache for one sequence."""

    vocabulary: int

    def reset(self) -> None:
        """Forgets all tokens."""
        ...

    def feed(self, ids: np.ndarray) -> np.ndarray:
        """Feeds token ids ``[S]``; returns the logits behind the last one, ``[V]``."""
        ...


class NativeDecoder:
    """A native program, as it runs without torch.

    Args:
        source: an artifact that was prepared on this machine, or the folder of a program.
        capacity: tokens of the KV state.
        few: call the functions that are for few tokens.
    """

    def __init__(self, source: Path, capacity: int, few: bool = True):
        from lbllm_compile.native import program as native

        program = native.NativeProgram(source) if (source / native.LIBRARY).is_file() else native.find(source)
        if program is None:
            raise LbllmError(f"the artifact '{source}' has no native program here")
        if not few:
            functions = tuple(f for f in program.description.functions if f.most is None)
            program.description = dataclasses.replace(program.description, functions=functions)
        self._model = native.NativeModel(program, tokenizer=None)
        self._capacity = capacity
        self.vocabulary = program.description.bounds.vocabulary
        self.reset()

    def reset(self) -> None:
        self._session = self._model.session(1, self._capacity)

    def feed(self, ids: np.ndarray) -> np.ndarray:
        return self._session.step(ids[None])[0]


class TorchDecoder:
    """The original model in torch, called as ``generate`` of transformers calls it.

    Args:
        model: a causal language model of transformers.
    """

    def __init__(self, model: Any):
        self._model = model
        self.vocabulary = int(model.config.vocab_size)
        self.reset()

    def reset(self) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self._model.config)

    def feed(self, ids: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            out = self._model(
                input_ids=torch.from_numpy(ids[None]), past_key_values=self._cache, use_cache=True, logits_to_keep=1
            )
        return out.logits[0, -1].float().numpy()


def load(loading: Loading) -> Decoder:
    """The decoder that is asked for.

    Raises:
        LbllmError: it cannot be loaded.
    """
    if loading.kind in ("native", WITHOUT_FEW):
        return NativeDecoder(Path(loading.source), loading.capacity, few=loading.kind != WITHOUT_FEW)
    if loading.kind == "llama.cpp":
        from .llama import Decoder as LlamaDecoder

        return LlamaDecoder(Path(loading.source), loading.capacity, loading.threads)
    import torch

    from .subjects import original

    torch.set_num_threads(loading.threads)
    dtype = torch.bfloat16 if loading.kind == "torch bf16" else torch.float32
    # transformers itself refuses this for what was read from GGUF, although it is plain float32 by now
    return TorchDecoder(torch.nn.Module.to(original(loading.source), dtype))


def memory() -> dict[str, int]:
    """Bytes of this process: ``resident`` now, ``peak`` of it so far, and its ``anonymous`` and ``file`` parts.

    Empty where the system does not say.
    """
    if not STATUS.is_file():
        return {}
    lines = (line.partition(":") for line in STATUS.read_text().splitlines())
    return {MEMORY_FIELDS[name]: 1024 * int(text.split()[0]) for name, _, text in lines if name in MEMORY_FIELDS}


def turn(decoder: Decoder, prompt: int, steps: int) -> dict[str, Any]:
    """Times a prompt and the tokens behind it, all drawn at random but the same for everyone.

    Returns:
        ``prefill`` and ``steps``: seconds of the prompt and of each token behind it.
    """
    ids = np.random.default_rng(0).integers(0, decoder.vocabulary, prompt + steps)
    decoder.reset()
    times = []
    for piece in (ids[:prompt], *ids[prompt:, None]):
        start = time.perf_counter()
        decoder.feed(piece)
        times.append(time.perf_counter() - start)
    return {"prefill": times[0], "steps": times[1:]}


def _prepare_imports(kind: str) -> None:
    """Imports the packages of a decoder, so that loading it is loading the model and not Python."""
    if kind in ("native", WITHOUT_FEW):
        from lbllm_compile.native import program as program
    elif kind == "llama.cpp":
        import llama_cpp as llama_cpp


def serve() -> None:
    """Loads a decoder and answers requests until there are no more."""
    loading = Loading(**json.loads(sys.stdin.readline()))
    _prepare_imports(loading.kind)
    bare = memory()
    start = time.perf_counter()
    try:
        decoder = load(loading)
    except LbllmError as error:
        sys.exit(str(error))
    answer: dict[str, Any] = {"load_seconds": time.perf_counter() - start, "bare": bare}
    print(json.dumps(answer), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = memory() if request == "memory" else turn(decoder, **request)
        print(json.dumps(answer), flush=True)


class Child:
    """A decoder in a child process; use it in a ``with`` block.

    Attributes:
        loaded: ``load_seconds``, from the imported packages to a model that can be fed, and ``bare``: the
            :func:`memory` before it.
    """

    def __init__(self, loading: Loading):
        self._loading = loading
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.decoders"],
            env=harness.environment(loading.threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self.loaded = self.ask(dataclasses.asdict(loading))
        except LbllmError:
            self.__exit__()
            raise

    def ask(self, request: Any) -> Any:
        """Sends a request, ``"memory"`` or arguments of :func:`turn`; returns the answer.

        Raises:
            LbllmError: the process ended.
        """
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise LbllmError(f"the process of {self._loading.kind} ended; what it printed says why")
        return json.loads(line)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate()


if __name__ == "__main__":
    serve()
