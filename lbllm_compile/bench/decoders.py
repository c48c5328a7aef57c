"""Decoders to compare, each in a process of its own that does what it is asked, line by line.

    python -m lbllm_compile.bench.decoders      # reads JSON requests from stdin, answers each with a line of JSON

The first request says which decoder to load. :class:`Child` is the other end. Nothing here imports torch, unless it is
torch that decodes, or an artifact whose program is not stored yet: the memory of a process is the decoder's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lbllm_compile.bench import turns
from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.resident import memory

if TYPE_CHECKING:
    from lbllm_compile.native.language import InputBounds, LanguageModel
    from lbllm_compile.native.program import StoredProgram

MODULE = "lbllm_compile.bench.decoders"

NATIVE, TORCH, TORCH_BF16, LLAMA_CPP = "native", "torch", "torch-bf16", "llama.cpp"
"""Kinds of decoders."""


@dataclass(frozen=True)
class Loading:
    """Which decoder to load.

    Attributes:
        kind: one of :data:`LOADERS`.
        source: native: an artifact, or the folder of a native program; llama.cpp: a GGUF file; torch: a folder that
            transformers reads, or else what a compile takes.
        capacity: tokens to have room for.
        threads: to use, as the environment says as well.
        target: of an artifact.
    """

    kind: str
    source: str
    capacity: int
    threads: int
    target: str = "cpu"


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
    """An artifact as it runs: its native program, without torch, wherever there is one.

    Args:
        model: what runs.
        vocabulary: of its tokens.
        capacity: tokens of the KV state.
    """

    def __init__(self, model: LanguageModel, vocabulary: int, capacity: int):
        self._model = model
        self._capacity = capacity
        self.vocabulary = vocabulary
        self.reset()

    @classmethod
    def of_program(cls, program: StoredProgram, capacity: int) -> NativeDecoder:
        """A native program's."""
        model = program.model(None)
        return cls(model, _vocabulary(program.description.bounds, model.config), capacity)

    def reset(self) -> None:
        self._session = self._model.session(1, self._capacity)

    def feed(self, ids: np.ndarray) -> np.ndarray:
        return self._session.step(ids[None])[0]


class TorchDecoder:
    """A model in torch, called as ``generate`` of transformers calls it.

    Args:
        model: a causal language model of transformers.
    """

    def __init__(self, model: Any):
        self._model = model
        self.vocabulary = int(model.config.get_text_config().vocab_size)
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


def _vocabulary(bounds: InputBounds, config: Mapping[str, Any]) -> int:
    """How many tokens a model knows.

    Raises:
        LbllmError: nothing says that.
    """
    text = config.get("text_config") or config  # as get_text_config() of transformers finds it
    known = text.get("vocab_size") if bounds.vocabulary is None else bounds.vocabulary
    if not isinstance(known, int):
        raise LbllmError("neither the model's graph nor its configuration says how many tokens it knows")
    return known


def _native(loading: Loading) -> Decoder:
    """The native program of an artifact, which is prepared where none is stored; else its graph in torch."""
    from lbllm_compile.native import program as native

    source = Path(loading.source)
    if (source / native.LIBRARY).is_file():
        return NativeDecoder.of_program(native.NativeProgram(source), loading.capacity)
    stored = native.find(source, loading.target)
    if stored is not None:
        return NativeDecoder.of_program(stored, loading.capacity)
    from lbllm_compile import runtime
    from lbllm_compile.lowering.bounds import input_bounds
    from lbllm_compile.report.terminal import make_console, make_progress

    model = runtime.load(source, target=loading.target, progress=make_progress(make_console(stderr=True)))
    return NativeDecoder(model, _vocabulary(input_bounds(model.program), model.config), loading.capacity)


def _llama(loading: Loading) -> Decoder:
    from lbllm_compile.bench.llama import Decoder as LlamaDecoder

    return LlamaDecoder(Path(loading.source), loading.capacity, loading.threads)


def _torch(loading: Loading) -> Decoder:
    import torch

    torch.set_num_threads(loading.threads)
    return TorchDecoder(original(loading.source, loading.kind))


def original(source: str, kind: str = TORCH) -> Any:
    """The model of transformers that one of torch's kinds runs, from a folder or else from what a compile takes.

    Raises:
        LbllmError: there is no such model, or it is no language model.
    """
    import torch

    from lbllm_compile import frontend

    dtype = torch.bfloat16 if kind == TORCH_BF16 else torch.float32
    if _described(source).is_file():
        return frontend.load_directory(_described(source).parent, dtype)
    model = frontend.load(source)
    if model.kind != "causal-lm":
        raise LbllmError(f"'{source}' is no language model; name the one that the artifact was compiled from")
    # transformers itself refuses this for what was read from GGUF, although it is plain float32 by now
    return torch.nn.Module.to(model.module, dtype)


def _described(source: str) -> Path:
    """The configuration of a model that is a folder."""
    return Path(source).expanduser() / "config.json"


Loader = Callable[[Loading], Decoder]

LOADERS: Mapping[str, Loader] = {NATIVE: _native, TORCH: _torch, TORCH_BF16: _torch, LLAMA_CPP: _llama}
"""What loads the decoders of each kind; raises an LbllmError where it cannot."""


def turn(decoder: Decoder, prompt: int, steps: int, vocabulary: int | None = None) -> dict[str, Any]:
    """Times a prompt and the tokens behind it, drawn at random, the same for all that draw from as many tokens.

    Args:
        decoder: what is timed.
        prompt, steps: how many tokens.
        vocabulary: tokens to draw from; all that the decoder knows by default. Decoders that are compared get the
            smallest of theirs.

    Returns:
        ``prefill`` and ``steps``: seconds of the prompt and of each token behind it.
    """
    ids = np.random.default_rng(0).integers(0, vocabulary or decoder.vocabulary, prompt + steps)
    decoder.reset()
    times = []
    for piece in (ids[:prompt], *ids[prompt:, None]):
        start = time.perf_counter()
        decoder.feed(piece)
        times.append(time.perf_counter() - start)
    return {"prefill": times[0], "steps": times[1:]}


def _prepare_imports(loading: Loading) -> None:
    """Imports the packages of a decoder, so that loading it is loading the model and not Python."""
    if loading.kind in (TORCH, TORCH_BF16):
        import transformers

        # What is wrong with a configuration, loading says.
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError, ImportError):
            for name in json.loads(_described(loading.source).read_bytes())["architectures"]:
                getattr(transformers, name)  # imports its module
    elif loading.kind == LLAMA_CPP:
        import llama_cpp as llama_cpp  # pyright: ignore[reportMissingImports]
    else:
        from lbllm_compile.native import program as program


def serve(loaders: Mapping[str, Loader] = LOADERS) -> None:
    """Loads a decoder and answers requests until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this process ends it
    requests, replies = sys.stdin, sys.stdout
    sys.stdin, sys.stdout = io.StringIO(), sys.stderr  # a model.py reads no requests, and what it prints is no answer
    loading = Loading(**json.loads(requests.readline()))
    try:
        _prepare_imports(loading)
        bare = memory()
        start = time.perf_counter()
        decoder = loaders[loading.kind](loading)
    except LbllmError as error:
        print(json.dumps({"failure": str(error)}), file=replies, flush=True)
        return
    seconds = time.perf_counter() - start
    answer: dict[str, Any] = {"load_seconds": seconds, "bare": bare, "vocabulary": decoder.vocabulary}
    print(json.dumps(answer), file=replies, flush=True)
    for line in requests:
        request = json.loads(line)
        answer = memory() if request == "memory" else turn(decoder, **request)
        print(json.dumps(answer), file=replies, flush=True)


class Child:
    """A decoder in a child process; use it in a ``with`` block.

    Args:
        loading: what to load.
        module: the child's, which calls :func:`serve`.

    Attributes:
        loaded: ``load_seconds``, from the imported packages to a model that can be fed, ``bare``, the :func:`memory`
            before it, and ``vocabulary``, how many tokens it knows.

    Raises:
        LbllmError: it cannot be loaded.
    """

    def __init__(self, loading: Loading, module: str = MODULE):
        self._loading = loading
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            env=turns.environment(loading.threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self.loaded = self.ask(dataclasses.asdict(loading))
        except BaseException as error:
            self.__exit__(type(error))
            raise

    def ask(self, request: Any) -> Any:
        """Sends a request, ``"memory"`` or arguments of :func:`turn`; returns the answer.

        Raises:
            LbllmError: the process cannot do it, or ended.
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
        answer = json.loads(line)
        if "failure" in answer:
            raise LbllmError(answer["failure"])
        return answer

    def __enter__(self) -> Child:
        return self

    def __exit__(self, error: type[BaseException] | None = None, *_: object) -> None:
        if error is not None:
            self._process.terminate()
        assert self._process.stdin and self._process.stdout
        try:
            with contextlib.suppress(BrokenPipeError):  # a request that it did not read before it ended
                self._process.stdin.close()
        finally:
            self._process.wait()
            self._process.stdout.close()


if __name__ == "__main__":
    serve()
