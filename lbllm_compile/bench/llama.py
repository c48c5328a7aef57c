"""llama.cpp, through the libraries that the optional package ``llama-cpp-python`` brings.

Needs no torch, whose memory would count as llama.cpp's.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lbllm_compile.codegen.errors import LbllmError

SUCCESS = 0

MOST_TOKENS = 512
"""That one call takes."""


def missing() -> str:
    """Why llama.cpp cannot be compared with here, empty if it can."""
    return "" if importlib.util.find_spec("llama_cpp") else "install the extra 'bench' (llama-cpp-python)"


def facts() -> dict[str, str]:
    """Version of the package, and which instructions its libraries were built for."""
    import llama_cpp  # pyright: ignore[reportMissingImports]

    features = llama_cpp.llama_print_system_info().decode()
    return {"llama-cpp-python": llama_cpp.__version__, "llama.cpp": features.strip(" |")}


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """llama.cpp talks on standard error, whatever it is told."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class Decoder:
    """A model in llama.cpp with a KV cache for one sequence.

    Args:
        path: a GGUF file.
        capacity: tokens of the cache.
        threads: to use.

    Raises:
        LbllmError: llama.cpp cannot load the file.
    """

    def __init__(self, path: Path, capacity: int, threads: int):
        import llama_cpp  # pyright: ignore[reportMissingImports]

        try:
            with silenced():
                self._model = llama_cpp.Llama(
                    str(path),
                    n_ctx=capacity,
                    n_batch=MOST_TOKENS,
                    n_threads=threads,
                    n_threads_batch=threads,
                    verbose=False,
                )
        except ValueError as error:
            raise LbllmError(f"llama.cpp cannot load '{path}': {error}") from error
        self._llama, self._context = llama_cpp, self._model.ctx
        self.vocabulary = self._model.n_vocab()

    def reset(self) -> None:
        """Forgets all tokens."""
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)

    def feed(self, ids: np.ndarray) -> np.ndarray:
        """Feeds token ids ``[S]``, at most 512; returns the logits behind the last one, ``[V]``, until the next call.

        Raises:
            LbllmError: llama.cpp failed.
        """
        tokens = (ctypes.c_int32 * len(ids))(*ids.tolist())
        if self._llama.llama_decode(self._context, self._llama.llama_batch_get_one(tokens, len(ids))) != SUCCESS:
            raise LbllmError(f"llama.cpp failed to process {len(ids)} tokens")
        return np.ctypeslib.as_array(self._llama.llama_get_logits(self._context), (self.vocabulary,))
