"""Running compiled models: executor, KV state, generation."""

from lbllm_compile.runtime.generate import GenerationError, Sampling, check_prompts, encode
from lbllm_compile.runtime.load import load
from lbllm_compile.runtime.model import CompiledModel, Session

__all__ = ["CompiledModel", "GenerationError", "Sampling", "Session", "check_prompts", "encode", "load"]
