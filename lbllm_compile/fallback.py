"""``--fallback dense``: quantized linears whose kernels are slower than float ones on this machine stay float.

Which they are is measured before the first stage, because the shapes of all kernels are known once the linears are
annotated, and no stage has to be done for linears that stay float. Linears that ``merge`` will join are one kernel; its
time, with the quantizer in front of it, is held against the time that their float products take one after the other.
Both are for one token, as in decoding. Where the middle halves of the times overlap, linears are quantized.

The choice is a finished piece of work like the layers of a stage: a compile that was interrupted goes on with it. The
pipeline says it from then on, as ``annotate{slower=…}``.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lbllm_compile.bench.linears import DENSE, OWN, Floats, Linear, Timer, names
from lbllm_compile.bench.turns import Spread
from lbllm_compile.codegen import levels as level_rules
from lbllm_compile.codegen.backend import backend_of
from lbllm_compile.codegen.progress import NoProgress, Progress
from lbllm_compile.codegen.sizes import product_group
from lbllm_compile.codegen.spec import LinearSpec, QuantizeSpec
from lbllm_compile.codegen.targets import Target
from lbllm_compile.frontend import language_model_inputs
from lbllm_compile.lowering.translate import translates
from lbllm_compile.options import OptionError
from lbllm_compile.passes.activate import Activate, quantizer_scheme
from lbllm_compile.passes.annotate import Annotate, decoder_linears, shared_scheme
from lbllm_compile.passes.base import Checkpoints, Pass, PassContext
from lbllm_compile.passes.ir.annotations import LINEAR, LinearInfo
from lbllm_compile.passes.ir.program import Program
from lbllm_compile.passes.ir.rewrite import Node, bias_of, operands_of
from lbllm_compile.passes.ir.scheme import Scheme
from lbllm_compile.passes.merge import Merge, joined_linears
from lbllm_compile.passes.outliers import Outliers
from lbllm_compile.passes.ptq import Ptq
from lbllm_compile.recipe import Preset

STAGE = "fallback"
"""Name of the finished piece of work."""

TOKENS = 1
"""At once, in the calls that are compared."""

PROBE_TOKENS = 8
"""Tokens on which passes look at shapes."""


@dataclass(frozen=True)
class Together:
    """Linears that one kernel will compute.

    Attributes:
        linear: of all their rows.
        parts: what each is as a float product.
    """

    linear: Linear
    parts: tuple[Linear, ...]


class _Unheard(NoProgress):
    """Of passes that say the same again when the compile runs them."""


def check(passes: Sequence[Pass], targets: Sequence[Target]) -> Target:
    """The target whose kernels decide.

    Raises:
        OptionError: no target runs here, or the pipeline makes no kernels of linears that are known before it runs.
    """
    target = next((target for target in targets if backend_of(target).eager), None)
    if target is None:
        raise OptionError("--fallback dense times kernels, and none of the targets runs on this machine; leave it out")
    missing = {"annotate", "ptq", "activate", "lower"} - {item.name for item in passes}
    if missing:
        raise OptionError(f"--fallback dense needs the pass '{sorted(missing)[0]}' in the pipeline; leave it out")
    if any(item.name == "budget" for item in passes):
        raise OptionError(
            "--fallback dense times kernels before the compile, and a budget (--bits, --max-kl) chooses groups, which"
            " kernels depend on, in it; leave one of them out"
        )
    return target


def applied(
    program: Program,
    passes: Sequence[Pass],
    targets: Sequence[Target],
    preset: Preset,
    checkpoints: Checkpoints,
    progress: Progress,
) -> tuple[list[Pass], list[dict[str, Any]]]:
    """The pipeline in which linears whose kernels are slower stay float, and what was measured.

    Args:
        program: as captured.
        passes: the pipeline that was asked for.
        targets: of the compile.
        preset: how long schedules are searched.
        checkpoints: has the choice of an interrupted compile.
        progress: told what goes on.

    Returns:
        The passes; and a row for each kind of kernel, JSON-able: ``linears``, their paths with a star for the layer;
        ``paths``; ``shape``; ``microseconds`` and ``dense_microseconds``; ``slower``, whether they stay float.

    Raises:
        OptionError: nothing can be timed.
        KernelError: a kernel cannot be built.
    """
    target = check(passes, targets)
    stored = checkpoints.load(STAGE, 0)
    if stored is not None:
        rows = stored[1]["rows"]
    else:
        found = candidates(program, passes)
        floats = Floats.of(program.kind, _becomes_native(program, passes, target))
        rows = measured(found, target, preset, progress, floats)
        checkpoints.save(STAGE, 0, {}, {"rows": rows})
    slower = tuple(path for row in rows if row["slower"] for path in row["paths"])
    return [
        dataclasses.replace(item, slower=(*item.slower, *slower)) if isinstance(item, Annotate) else item
        for item in passes
    ], rows


def _becomes_native(program: Program, passes: Sequence[Pass], target: Target) -> bool:
    """Whether a captured program becomes a native program.

    What a pipeline puts in the place of linears always can; so this looks at what it makes of the rest, all linears
    being float, for which nothing has to be calibrated.
    """
    if program.kind != "causal-lm":
        return False
    probe = language_model_inputs(torch.arange(PROBE_TOKENS)[None])
    context = PassContext(probe=probe, progress=_Unheard())
    for item in passes:
        if isinstance(item, Annotate):
            program = Annotate(keep_dense=("*",)).apply(program, context).program
        elif item.name in ("canonicalize", "lower", "cache", "cleanup"):
            program = item.apply(program, context).program
    return translates(program, backend_of(target).build([], [], target, trials=0))


def candidates(program: Program, passes: Sequence[Pass]) -> dict[Together, list[LinearInfo]]:
    """What kernels a pipeline makes of a captured program's decoder linears, each with the linears it is of."""
    ptq = next(item for item in passes if isinstance(item, Ptq))
    activate = next(item for item in passes if isinstance(item, Activate))
    merges = any(isinstance(item, Merge) for item in passes)
    outliers = next((item for item in passes if isinstance(item, Outliers)), Outliers(columns=0))
    for item in passes[: next(i for i, item in enumerate(passes) if isinstance(item, Annotate)) + 1]:
        program = item.apply(program, PassContext()).program
    found: dict[Together, list[LinearInfo]] = defaultdict(list)
    for behind in decoder_linears(program.graph).values():
        keeps = ptq.outliers and outliers.left(program, behind) is None
        quantized = quantizer_scheme(shared_scheme(behind), activate.bits, activate.group, activate.ranges)
        bits, group = quantized.act_bits, quantized.act_group
        tables = {name: quantized.codebook == name for name in ("knees", "planes")}
        assert bits is not None and group is not None

        def scheme_of(node: Node, quantized: Scheme = quantized) -> Scheme:
            """What the linear will be quantized by."""
            own: Scheme = node.meta[LINEAR].scheme
            return dataclasses.replace(quantized, group=own.group or ptq.group, levels=own.levels, bits=own.bits)

        for joined in joined_linears(behind, scheme_of) if merges else [[node] for node in behind]:
            scheme = scheme_of(joined[0])
            weight_group, rule = scheme.group, level_rules.get(scheme.levels)
            assert weight_group is not None
            parts = [Linear(*operands_of(node)[1].meta["val"].shape[-2:]) for node in joined]
            # The product of the outliers is added; it is not part of what is timed.
            columns = parts[0].columns - (outliers.count(parts[0].columns) if keeps else 0)
            quantizer = QuantizeSpec(columns, group, bits, **tables)
            spec = LinearSpec(
                "int4" if scheme.bits == 4 else "bit",
                sum(part.rows for part in parts),
                columns,
                product_group(weight_group, group),
                quantizer.value_bits,
                per_token=group == 0,
                bias=bias_of(joined[0]) is not None,
                additive=quantizer.value_bits == 4 and rule.additive,
            )
            together = Together(Linear(spec.out_features, columns, spec, quantizer), tuple(parts))
            found[together] += [node.meta[LINEAR] for node in joined]
    return found


def measured(
    found: Mapping[Together, Sequence[LinearInfo]],
    target: Target,
    preset: Preset,
    progress: Progress,
    floats: Floats,
) -> list[dict[str, Any]]:
    """Rows of :func:`applied`.

    Args:
        found: see :func:`candidates`.
        target: whose kernels are timed; their schedules are searched as long as the preset says.
        preset: of the compile.
        progress: told what goes on.
        floats: what computes linears that stay float.

    Raises:
        KernelError: a kernel cannot be built.
    """
    kernels = backend_of(target).build(
        [together.linear.spec for together in found if together.linear.spec],
        [together.linear.quantizer for together in found if together.linear.quantizer],
        target,
        trials=preset.tune_trials,
        budget_s=preset.tune_seconds,
        progress=progress,
    )
    timer = Timer(kernels, floats)
    rows = []
    with progress.task("Quantized or float, the faster", len(found)) as task:
        for together, infos in found.items():
            times = timer.against_dense(together.linear, together.parts, TOKENS)
            rows.append(row(together, infos, times[OWN], times[DENSE]))
            task.advance(rows[-1]["shape"])
    return rows


def row(together: Together, infos: Sequence[LinearInfo], own: Spread, dense: Spread) -> dict[str, Any]:
    """A row of :func:`applied` from seconds of calls."""
    return {
        "linears": names(infos),
        "paths": [info.path for info in infos],
        "shape": f"{together.linear.rows}x{together.linear.columns}",
        "microseconds": 1e6 * own.median,
        "dense_microseconds": 1e6 * dense.median,
        "slower": own.median > dense.median and not own.meets(dense),
    }
