"""Finds the first pass, kernel or operator whose result drifts past its contract, and writes the piece that shows it.

The passes run on the whole model, one after the other, with the least work each can do (or all of it), and each is held
to its contract on probe tokens as in every compile. Where one breaks it, the smallest piece of the programs before and
after (:mod:`lbllm_compile.passes.ir.parting`) is written as a script that needs nothing but its own tensors.

Of the graph that comes out, or that an artifact has, every operator is held against the kernel that runs in its place
and against what it is translated into (:mod:`lbllm_compile.lowering.piecewise`), then the whole native program against
the graph. An artifact's passes are run again where what it was compiled from is to be found.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from rich.text import Text
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lbllm_compile import artifact, calibration, frontend, reproduce
from lbllm_compile.calibration import CalibrationSet
from lbllm_compile.checkpoint import check_writable
from lbllm_compile.codegen.backend import Kernels
from lbllm_compile.codegen.cache import write_failure
from lbllm_compile.codegen.errors import DisprovedError, LbllmError
from lbllm_compile.codegen.progress import Progress, warn
from lbllm_compile.frontend import language_model_inputs
from lbllm_compile.job import Job, read_job
from lbllm_compile.kernels import build_kernels
from lbllm_compile.lowering import piecewise
from lbllm_compile.lowering.bounds import input_bounds
from lbllm_compile.lowering.build import build_native, workshop
from lbllm_compile.lowering.compare import UNBOUNDED_VOCABULARY, DisagreementError, distances
from lbllm_compile.manifest import is_artifact
from lbllm_compile.options import CompileOptions
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.base import PassContext
from lbllm_compile.passes.contracts import ContractError, ReplacementError, describe
from lbllm_compile.passes.ir import dump
from lbllm_compile.passes.ir.compare import same_bits
from lbllm_compile.passes.ir.parting import Parting
from lbllm_compile.passes.ir.program import LAYER, Program
from lbllm_compile.passes.pipeline import PassRecord
from lbllm_compile.report import summary, terminal
from lbllm_compile.runtime import loader

SCRIPT, TENSORS = "fault.py", "fault.safetensors"

_FIRST_LINE = "# Written by lbllm-compile bisect."
"""Says of a script that it is ours, and may be replaced."""


class BisectError(LbllmError):
    """What the fault is to be written to is not free."""


@dataclass(frozen=True)
class Fault:
    """The first thing that is not as it should be.

    Attributes:
        where: the pass, as pipeline text; or the kernel or native operator.
        sentence: what is wrong.
        layer: its decoder layer; None outside of them.
        node: the node that shows it.
        source: the line of the model's source that it comes from, empty where that is not known.
        error, allowed: its relative error on the probe, given right inputs, and the largest that it may have.
        folder: where the script that shows it is; None where no piece of the graph shows it.
    """

    where: str
    sentence: str
    layer: int | None
    node: str
    source: str
    error: float
    allowed: float
    folder: Path | None


@dataclass(frozen=True)
class Check:
    """What was held against the graph that runs.

    Attributes:
        name: what it is.
        count: how many of them.
        error: the largest relative error.
        allowed: the largest that it may have.
    """

    name: str
    count: int
    error: float
    allowed: float


@dataclass(frozen=True)
class Findings:
    """What was run, and what was found.

    Attributes:
        subject: the model.
        records: the passes that kept their contracts.
        checks: what was held against the graph that runs.
        fault: the first that is not as it should be; None where all is.
    """

    subject: str
    records: Sequence[PassRecord]
    checks: Sequence[Check]
    fault: Fault | None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def bisect(options: CompileOptions, out: Path | None, *, whole: bool = False, progress: Progress) -> Findings:
    """Looks for the first fault in a compile, or in an artifact.

    Args:
        options: of the compile; or the artifact as its model, and nothing else.
        out: the folder for the script and its tensors; ``<name>-fault`` by default. Nothing is written where nothing is
            found.
        whole: the passes do all of their work, on all calibration tokens.
        progress: told what goes on.

    Raises:
        BisectError: the folder holds other files, or an option contradicts the artifact.
        ReproduceError: the folder lies in or over the artifact.
        ContractError: a pass left a graph that does not hold together, of which no piece can be run.
        LbllmError: something the user named is missing or wrong.
    """
    if isinstance(options.model, str) and is_artifact(Path(options.model)):
        if options != CompileOptions(options.model):
            raise BisectError(
                f"'{options.model}' is an artifact, which says how it was compiled; give no other options"
            )
        return _of_artifact(Path(options.model), out, whole, progress)
    return _of_model(options, out, whole, progress)


def _of_model(
    options: CompileOptions,
    out: Path | None,
    whole: bool,
    progress: Progress,
    *,
    lock: Mapping[str, Any] | None = None,
) -> Findings:
    """
    Args:
        lock: of the artifact that was compiled with these options, whose graph has been looked at; without one the
            graph that comes out is.

    Raises:
        ReproduceError: model or calibration data are not those of the lock.
    """

    def places(name: str) -> tuple[Path, Path]:
        folder = out or Path(f"{name}-fault")
        check_free(folder)
        return folder, folder

    job = read_job(options, progress, places)
    data = _data(job, whole, lock, progress)
    passes = job.passes if whole else [item.rehearsal() for item in job.passes]
    context = PassContext(
        calibration=data.calibration,
        validation=data.validation,
        probe=data.probe,
        target=options.target,
        seed=options.seed,
        device=job.device,
        progress=progress,
    )
    records: list[PassRecord] = []

    def after_pass(record: PassRecord, before: Program, after: Program) -> None:
        records.append(record)
        progress.note(summary.pass_line(record))

    try:
        program, _ = pipeline.run(job.program, passes, context, after_pass)
    except (ContractError, ReplacementError) as error:
        if error.parting is None:
            raise
        where = pipeline.render_pass(passes[len(records)])
        return Findings(job.model.name, records, [], _parted(where, str(error), error.parting, job.out))
    except DisprovedError as error:
        return Findings(job.model.name, records, [], _disproved(error))
    if lock is not None or "lower" not in [item.name for item in passes]:
        return Findings(job.model.name, records, [], None)
    try:
        kernels = build_kernels(program, job.targets, trials=0, progress=progress).host
    except DisprovedError as error:
        return Findings(job.model.name, records, [], _disproved(error))
    return Findings(job.model.name, records, *_held(program, kernels, data.probe, job.out, progress))


def _data(job: Job, whole: bool, lock: Mapping[str, Any] | None, progress: Progress) -> CalibrationSet:
    """What the passes run on.

    Raises:
        ReproduceError: model or calibration data are not those of the lock.
    """
    if lock is not None:
        _check_same(lock, {"model": frontend.program_hash(job.program), "calibration": str(lock.get("calibration"))})
    data = job.calibration_data(progress) if whole else job.rehearsal_data(progress)
    # What the model writes itself follows from the model, and writing all of it takes long.
    if lock is not None and data.source != calibration.OWN_SAMPLES:
        _check_same(lock, job.fingerprint(data if whole else job.calibration_data(progress)))
    return data


def _check_same(lock: Mapping[str, Any], facts: Mapping[str, str]) -> None:
    if changed := reproduce.changed_sources(lock, facts):
        raise reproduce.ReproduceError(changed[0].sentence)


def _of_artifact(directory: Path, out: Path | None, whole: bool, progress: Progress) -> Findings:
    folder = out or Path(f"{directory.resolve().name}-fault")
    reproduce.check_beside(directory, folder)
    check_free(folder)
    loaded = artifact.load(directory)
    try:
        kernels = loader.build_kernels(loaded, progress=progress)
    except DisprovedError as error:
        return Findings(str(directory), [], [], _disproved(error))
    checks, fault = _held(loaded.program, kernels, _probe(loaded.program), folder, progress)
    if fault is not None:
        return Findings(str(directory), [], checks, fault)
    try:
        options = reproduce.options_of(directory)
        found = _of_model(options, folder, whole, progress, lock=artifact.read_lock(directory))
    except (reproduce.ReproduceError, artifact.ArtifactError) as error:
        warn(progress, None, f"the passes were not run again: {error}")
        return Findings(str(directory), [], checks, None)
    return dataclasses.replace(found, subject=str(directory), checks=checks)


def _probe(program: Program) -> dict[str, Tensor]:
    """Random inputs that a stored program takes: a few tokens, or tensors of the shapes it says."""
    generator = torch.Generator().manual_seed(0)
    if program.kind == "causal-lm":
        bounds = input_bounds(program)
        length = min(most for most in (calibration.PROBE_SHAPE[1], bounds.positions, bounds.slots) if most is not None)
        shape = (calibration.PROBE_SHAPE[0], length)
        vocabulary = bounds.vocabulary or UNBOUNDED_VOCABULARY
        return dict(language_model_inputs(torch.randint(vocabulary, shape, generator=generator)))
    inputs = {}
    for node in program.placeholders():
        dtype, sizes = dump.read_shape(node.meta["shape"]) or (torch.float32, [])
        shape = [size if isinstance(size, int) else calibration.PROBE_SHAPE[0] for size in sizes]
        floats = torch.randn(shape, generator=generator)
        inputs[str(node.target)] = floats.to(dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)
    return inputs


def _held(
    program: Program, kernels: Kernels, probe: Mapping[str, Any], folder: Path, progress: Progress
) -> tuple[list[Check], Fault | None]:
    """Holds a lowered program's operators against what runs; stops at the first that is not as it should be."""
    checks: dict[str, Check] = {}
    for held in piecewise.hold(program, kernels, probe, progress):
        allowed = piecewise.ALLOWED[held.kind]
        older = checks.get(held.kind, Check(held.kind, 0, 0.0, allowed))
        checks[held.kind] = Check(held.kind, older.count + 1, max(older.error, held.error), allowed)
        if not held.error <= allowed:
            return list(checks.values()), _misrun(held, kernels, folder)
    if program.kind == "causal-lm":
        with workshop() as place:
            try:
                native = build_native(program, kernels, place, progress)
            except DisagreementError as error:
                sentence = f"{error}; every operator that keeps no state agrees by itself"
                return list(checks.values()), Fault("native program", sentence, None, "", "", math.nan, math.nan, None)
            if native is not None:
                distance, bound = distances(program, kernels, native)
                checks["native program"] = Check("native program", 1, distance, bound)
    return list(checks.values()), None


def _disproved(error: DisprovedError) -> Fault:
    """A kernel that its proof refuses, on inputs of the proof's own, so that no piece of the graph shows it."""
    return Fault(piecewise.KERNEL, str(error), None, "", "", math.nan, math.nan, None)


def check_free(folder: Path) -> None:
    """Checks that a script may be written to ``folder``, where an older one of ours is replaced; writes nothing.

    Raises:
        BisectError: it holds other files, or cannot be written.
    """
    if not check_writable(folder, "folder for the script", "--out"):
        return
    ours = (SCRIPT, TENSORS) if _is_ours(folder / SCRIPT) else ()
    foreign = sorted(p.name for p in folder.iterdir() if p.name not in ours or not p.is_file())
    if foreign:
        raise BisectError(f"'{folder}' holds other files ('{foreign[0]}'); pass an empty --out")


def _is_ours(script: Path) -> bool:
    try:
        with script.open("rb") as file:
            return file.readline(len(_FIRST_LINE) + 2).rstrip() == _FIRST_LINE.encode()
    except OSError:
        return False


def _parted(where: str, sentence: str, parting: Parting, folder: Path) -> Fault:
    """Writes the piece that shows what a pass did wrong; returns what is to be said of it."""
    sides = [dict(piece.parameters()) for piece in (parting.before, parting.after)]
    # What both have alike is stored once.
    changed = {path: t for path, t in sides[1].items() if path not in sides[0] or not same_bits(t, sides[0][path])}
    text = _PARTED.format(
        title=_quoted(sentence),
        where=_quoted(where),
        allowed=_number(parting.allowed),
        numbers=_numbers(parting.inputs),
        before=dump.render(parting.before).lstrip("\n"),
        after=dump.render(parting.after).lstrip("\n"),
        tensors=TENSORS,
    )
    tensors: dict[str, Mapping[str, Any]] = {"input": parting.inputs, "before": sides[0], "after": changed}
    if parting.counted is not None:
        tensors["counted"] = {"places": parting.counted}
    _write(folder, text, tensors)
    node, source = parting.node.name, dump.source_line(parting.origin)
    return Fault(where, sentence, parting.layer, node, source, parting.error, parting.allowed, folder)


def _misrun(held: piecewise.Held, kernels: Kernels, folder: Path) -> Fault:
    """Writes the operator that something else runs in the place of; returns what is to be said of it."""
    piece, node = held.piece, held.piece.node
    allowed = piecewise.ALLOWED[held.kind]
    bound = f"rounding explains {allowed:g}" if allowed else "they must be equal to the bit"
    sentence = f"the {held.kind} of {describe(node)} differs from it by {held.error:.3g}, where {bound}"
    text = _MISRUN.format(
        title=_quoted(sentence),
        kind=held.kind,
        allowed=_number(allowed),
        numbers=_numbers(piece.inputs),
        graph=dump.render(piece.program).lstrip("\n"),
        target=kernels.target.name,
        records=json.loads(json.dumps(kernels.records())),
        run={piecewise.KERNEL: "on_kernels", piecewise.NATIVE: "natively"}[held.kind],
        tensors=TENSORS,
    )
    _write(folder, text, {"input": piece.inputs, "weight": dict(piece.program.parameters())})
    layer, source = node.meta.get(LAYER), dump.source_line(node)
    return Fault(held.kind, sentence, layer, node.name, source, held.error, allowed, folder)


def _write(folder: Path, text: str, tensors: Mapping[str, Mapping[str, Any]]) -> None:
    """Puts a script and the tensors that it reads, in groups, into a folder."""
    named = {
        f"{kind}/{name}": value.detach().clone(memory_format=torch.contiguous_format)
        for kind, values in tensors.items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The script first: it says that what lies beside it is ours.
        (folder / SCRIPT).write_text(f"{_FIRST_LINE}\n{text}", encoding="utf-8")
        save_file(named, folder / TENSORS)
    except (OSError, SafetensorError) as error:
        raise BisectError(
            f"cannot write the script to '{folder}': {write_failure(error)}; pass another --out"
        ) from error


def _quoted(text: str) -> str:
    """A text as it can stand in a docstring."""
    return text.replace("\\", "/").replace('"', "'")


def _number(value: float) -> str:
    return repr(value) if math.isfinite(value) else f'float("{value}")'


def _numbers(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if not isinstance(value, Tensor)}


_PARTED = '''\
"""{title}

The smallest piece of the graph that shows it, before and after {where}, on the same inputs.
Run it with python where torch and lbllm_compile are installed; exit code 1 says that the two still part.
"""

import sys
from pathlib import Path

from safetensors.torch import load_file

from lbllm_compile.passes.ir import exact
from lbllm_compile.passes.ir.parse import parse
from lbllm_compile.passes.ir.parting import difference, first_output

ALLOWED = {allowed}
NUMBERS = {numbers!r}

BEFORE = r"""
{before}"""

AFTER = r"""
{after}"""

stored = load_file(Path(__file__).with_name({tensors!r}))


def part(kind):
    return {{name.removeprefix(kind): value for name, value in stored.items() if name.startswith(kind)}}


def output(text, weights):
    # A graph may change its state, so each gets inputs of its own.
    inputs = {{name: value.clone() for name, value in part("input/").items()}}
    program = parse(text, weights, "module")
    return first_output(exact.run(program, {{**NUMBERS, **inputs}}))


before = output(BEFORE, part("before/"))
after = output(AFTER, {{**part("before/"), **part("after/")}})
# Places of the elements that count, where not all of them do: values at padding mean nothing.
error = difference(before, after, stored.get("counted/places"))
print(f"before: {{before.flatten()[:4].tolist()}} ...")
print(f"after:  {{after.flatten()[:4].tolist()}} ...")
print(f"relative error {{error:.3g}}, allowed {{ALLOWED:.3g}}")
sys.exit(not error <= ALLOWED)
'''

_MISRUN = '''\
"""{title}

The operator alone, on the inputs that it had, and the {kind} that runs in its place on {target}.
Run it with python where torch and lbllm_compile are installed; exit code 1 says that the two still differ.
"""

import sys
from pathlib import Path

from safetensors.torch import load_file

from lbllm_compile.codegen.backend import backend_of
from lbllm_compile.codegen.targets import Target
from lbllm_compile.lowering import piecewise
from lbllm_compile.lowering.executor import requirements
from lbllm_compile.passes.ir.parse import parse
from lbllm_compile.passes.ir.parting import difference

ALLOWED = {allowed}
NUMBERS = {numbers!r}
SCHEDULES = {records!r}

GRAPH = r"""
{graph}"""

stored = load_file(Path(__file__).with_name({tensors!r}))


def part(kind):
    return {{name.removeprefix(kind): value for name, value in stored.items() if name.startswith(kind)}}


program = parse(GRAPH, part("weight/"), "module")
inputs = {{**NUMBERS, **part("input/")}}
expected = program.run(inputs).float()
needed, target = requirements(program), Target.parse({target!r})
kernels = backend_of(target).build(needed.linears, needed.quantizers, target, trials=0, records=SCHEDULES)
found = piecewise.{run}(program, inputs, kernels).float()
error = difference(expected, found)
print(f"expected: {{expected.flatten()[:4].tolist()}} ...")
print(f"found:    {{found.flatten()[:4].tolist()}} ...")
print(f"relative error {{error:.3g}}, allowed {{ALLOWED:.3g}}")
sys.exit(not error <= ALLOWED)
'''


def render(findings: Findings) -> list[RenderableType]:
    """What was found, for people."""
    parts: list[RenderableType] = []
    if findings.records:
        parts += [terminal.pass_table(findings.records, times=False), Text()]
    if findings.checks:
        rows: list[list[Any]] = [
            [c.name, c.count, c.error or "bit-equal", c.allowed or "bit-equal"] for c in findings.checks
        ]
        parts += [terminal.table("What runs", ["", "held against the graph", "largest error", "allowed"], rows), Text()]
    fault = findings.fault
    if fault is None:
        return [*parts, Text(f"Nothing in '{findings.subject}' drifts past its contract.")]
    parts += [Text(f"Found: {fault.sentence}")]
    if fault.folder is None:
        return parts
    rows = [
        ["where", fault.where],
        ["decoder layer", fault.layer],
        ["node", fault.node],
        ["source", fault.source or None],
        ["error, given right inputs", fault.error],
        ["allowed", fault.allowed or "bit-equal"],
        ["to see it", f"python {fault.folder / SCRIPT}"],
    ]
    return [*parts, Text(), terminal.table("", ["", ""], rows)]
