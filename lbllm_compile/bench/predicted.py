"""How long a token of an artifact would take on devices that are not here: a prediction, not a measurement."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from lbllm_compile import artifact
from lbllm_compile.bench.linears import distinct
from lbllm_compile.codegen.backend import Prediction, predictions
from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.codegen.spec import LinearSpec


def predicted(directory: Path) -> tuple[list[Prediction], int]:
    """What the backends that can tell predict of an artifact's linears, and how many this leaves out: those that stay
    float.

    Raises:
        ArtifactError: the artifact cannot be loaded.
        KernelError: there is no kernel for one of its linears or quantizers.
        LbllmError: it is no language model, or has experts, of which a token takes some.
    """
    program = artifact.load(directory).program
    found = distinct(program)
    if program.kind != "causal-lm" or any(info.experts for infos in found.values() for info in infos):
        raise LbllmError(f"--predict is of language models without experts, and '{directory}' is none")
    linears: Counter[LinearSpec] = Counter()
    without = 0
    for linear, infos in found.items():
        if linear.spec is not None:
            linears[linear.spec] += len(infos)
        else:
            without += len(infos)
    quantizers = {linear.quantizer for linear in found if linear.quantizer is not None}
    layers = {info.layer for infos in found.values() for info in infos if info.layer is not None}
    return predictions(linears, quantizers, len(layers)), without
