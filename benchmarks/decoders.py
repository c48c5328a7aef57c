"""Decoders for benchmarks alone, beside those of :mod:`lbllm_compile.bench.decoders`.

python -m benchmarks.decoders      # the child of both
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lbllm_compile.codegen.errors import LbllmError

from lbllm_compile.bench.decoders import LOADERS, Decoder, Loading, NativeDecoder, serve

MODULE = "benchmarks.decoders"

WITHOUT_FEW = "native, without functions for few tokens"
"""The native program, in which prompts of a few tokens run on the kernels for long ones."""


def without_few(loading: Loading) -> Decoder:
    """The native program of an artifact, or of a folder, that never calls the functions that are for few tokens.

    Raises:
        LbllmError: there is none.
    """
    from lbllm_compile.native import program as native

    source = Path(loading.source)
    program = native.NativeProgram(source) if (source / native.LIBRARY).is_file() else native.find(source)
    if program is None:
        raise LbllmError(f"the artifact '{source}' has no native program here")
    functions = tuple(f for f in program.description.functions if f.most is None)
    program.description = dataclasses.replace(program.description, functions=functions)
    return NativeDecoder.of_program(program, loading.capacity)


if __name__ == "__main__":
    serve({**LOADERS, WITHOUT_FEW: without_few})
