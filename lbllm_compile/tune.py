"""The schedule search without a model: tunes kernels of given shapes, here or on a device behind a tracker."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from lbllm_compile import artifact
from lbllm_compile.codegen.backend import Bucket, SearchSpace, backend_named, backend_of, bucket_named
from lbllm_compile.codegen.cache import cache_directory
from lbllm_compile.codegen.errors import KernelError, LbllmError, TargetError
from lbllm_compile.codegen.progress import NoProgress, Progress
from lbllm_compile.codegen.sizes import DEFAULT_GROUP
from lbllm_compile.codegen.spec import KINDS, LinearSpec, weights_in_words
from lbllm_compile.codegen.targets import Target, host, runnable_targets
from lbllm_compile.codegen.threads import in_words, thread_count
from lbllm_compile.codegen.tune.database import Database, Key, Merged, read_results
from lbllm_compile.codegen.tune.measure import Limits, Measurer, RemoteDevice
from lbllm_compile.native import program as native
from lbllm_compile.report import terminal

if TYPE_CHECKING:
    from lbllm_compile.codegen.tune.tuner import Choice

_SHAPE = re.compile(r"(\d{1,9})[xX](\d{1,9})")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h)?")
_SECONDS = {"s": 1, "m": 60, "h": 3600}


class TuneError(LbllmError):
    """What to tune, or where, is not understood."""


@dataclass(frozen=True)
class TuneOptions:
    """What to tune.

    Attributes:
        shapes: ``OUTxIN`` texts joined by commas.
        directory: an artifact whose linears to tune instead.
        target: a CPU target.
        kind, group, act_bits: of the shapes; None for W(1+1) weights, groups as of a compile, and 4 bits (8
            for int4 and int8).
        tokens: names of token buckets joined by commas; None for all.
        trials: most candidates measured per linear and token bucket.
        budget: most time for all searches, e.g. ``90s``.
        rpc: address ``HOST:PORT`` of a TVM RPC tracker.
        key: what the device to tune on is registered under there.
        cc: C compiler that links for the device.
    """

    shapes: str | None = None
    directory: Path | None = None
    target: str = "cpu"
    kind: str | None = None
    group: int | None = None
    act_bits: int | None = None
    tokens: str | None = None
    trials: int = 32
    budget: str | None = None
    rpc: str | None = None
    key: str | None = None
    cc: str | None = None


@dataclass(frozen=True)
class TuneReport:
    """What a tuning run chose.

    Attributes:
        target: canonical target.
        cpu: name of the CPU, or the remote device's key.
        threads: size of the thread pool.
        choices: one per linear and token bucket.
        limits: what the machine was measured to do; of its last search.
    """

    target: str
    cpu: str
    threads: int
    choices: Sequence[Choice]
    limits: Limits = field(default_factory=Limits)

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "cpu": self.cpu,
            "threads": self.threads,
            "bandwidth_gb_per_s": self.limits.bandwidth / 1e9 or None,
            "products_g_per_s": self.limits.products and self.limits.products / 1e9,
            "results": [_row(choice) for choice in self.choices],
        }


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """``4096x11008,576x1536`` as ``(out_features, in_features)`` pairs, duplicates removed.

    Raises:
        TuneError: a shape is not ``OUTxIN``.
    """
    shapes: dict[tuple[int, int], None] = {}
    for part in (p.strip() for p in text.split(",")):
        match = _SHAPE.fullmatch(part)
        if not match or "0" in match.groups():
            raise TuneError(f"shape {part!r} is not understood; write OUTxIN, for example 4096x11008,576x1536")
        shapes[int(match[1]), int(match[2])] = None
    return list(shapes)


def parse_duration(text: str) -> float:
    """``90s``, ``2m``, ``0.5h`` or plain seconds, in seconds.

    Raises:
        TuneError: it is none of these, or nothing.
    """
    match = _DURATION.fullmatch(text.strip())
    seconds = float(match[1]) * _SECONDS[match[2] or "s"] if match else 0.0
    if not seconds:
        raise TuneError(f"--budget {text!r} is not understood; write a time such as 90s, 2m or 1h")
    return seconds


def parse_device(rpc: str | None, key: str | None, cc: str | None) -> RemoteDevice | None:
    """The remote device that the options name, None for this machine.

    Raises:
        TuneError: they contradict each other, or the address is none.
    """
    if rpc is None:
        if key or cc:
            raise TuneError(f"{'--key' if key else '--cc'} is for a remote device; add --rpc HOST:PORT of its tracker")
        return None
    name, _, port = rpc.rpartition(":")
    if not name or not port.isdigit() or not 0 < int(port) < 65536:
        raise TuneError(f"--rpc {rpc!r} is not understood; write the tracker's HOST:PORT, for example 10.0.0.5:9190")
    if not key or any(c.isspace() or c == ":" for c in key):
        raise TuneError("--rpc needs --key, the name without spaces that the device is registered under")
    return RemoteDevice(name.strip("[]"), int(port), key, cc)


def specs_of(options: TuneOptions) -> list[LinearSpec]:
    """The linears to tune.

    Raises:
        TuneError: none or two sources of shapes, or options that an artifact decides.
        KernelError: a linear that does not exist.
        ArtifactError: the directory is no artifact.
    """
    if (options.shapes is None) == (options.directory is None):
        raise TuneError("give either --shapes OUTxIN,... or the directory of an artifact to say what is to be tuned")
    if options.directory is not None:
        given = [name for name in ("kind", "group", "act_bits") if getattr(options, name) is not None]
        if given:
            raise TuneError(f"an artifact says what its linears are; drop --{given[0].replace('_', '-')}")
        from lbllm_compile.lowering.executor import requirements

        return list(requirements(artifact.load(options.directory).program).linears)
    kind = options.kind or "bit"
    if kind not in KINDS:
        raise TuneError(f"--kind {kind!r} does not exist; use {', '.join(KINDS)}")
    bits = options.act_bits or (4 if kind == "bit" else 8)
    return [
        LinearSpec(kind, rows, columns, options.group or DEFAULT_GROUP, bits)
        for rows, columns in parse_shapes(options.shapes or "")
    ]


def tune(options: TuneOptions, progress: Progress | None = None) -> TuneReport:
    """Searches schedules and stores the results in the user's database.

    An artifact that is named is prepared anew with them when it is loaded next.

    Raises:
        TuneError, KernelError, ArtifactError: the options, see :func:`specs_of` and :func:`parse_device`.
        TargetError: no CPU target, or one that this machine cannot run and no remote device was named for.
        KernelError: no candidate works, or the remote device cannot be reached.
    """
    target = Target.parse(options.target)
    device = parse_device(options.rpc, options.key, options.cc)
    backend = backend_of(target)
    if not backend.searches:
        raise TargetError(
            f"schedules of {target.name} are not searched; those of this machine's targets are:"
            f" {', '.join(runnable_targets())}"
        )
    if device is None and not target.runs_here:
        raise TargetError(
            f"this machine cannot run {target.name}; name a device that can with --rpc and --key, or tune one of"
            f" {', '.join(runnable_targets())}"
        )
    if options.trials < 1:
        raise TuneError(f"--trials {options.trials} measures nothing; give at least 1")
    budget = None if options.budget is None else parse_duration(options.budget)
    specs, layouts = specs_of(options), _layouts(options, target)

    # TVM takes seconds to import; what is wrong with the options is said before.
    from lbllm_compile.codegen.tune.tuner import Wanted, choose
    from lbllm_compile.codegen.tvm_api import VERSION

    space = backend.space()
    buckets = _buckets(options.tokens, space)
    with Measurer(target=target.name, device=device) as measurer:
        name = device.key if device else host.cpu_name()
        threads = measurer.threads() if device else thread_count()
        wanted = []
        for spec in specs:
            candidates = space.implementations(spec, target)
            if spec in layouts:
                candidates = [space.of_layout(candidates, layouts[spec])]
            for bucket in buckets:
                stored = space.measured_as(target, bucket)
                key = Key.on(name, spec, bucket.name, stored, threads, VERSION, space.version)
                wanted.append(Wanted(candidates, bucket, key))
        choices = choose(
            wanted,
            target,
            Database(cache_directory()),
            measurer,
            trials=options.trials,
            budget_s=budget,
            progress=progress or NoProgress(),
        )
        if device is None and options.directory is not None:
            native.forget(options.directory, target.name)
        return TuneReport(target.name, name, threads, choices, measurer.limits)


def _layouts(options: TuneOptions, target: Target) -> dict[LinearSpec, str]:
    """Layouts that an artifact's weights must keep, because its schedules for other numbers of tokens stay."""
    if options.directory is None or options.tokens is None:
        return {}
    space = backend_of(target).space()
    ours = {(bucket.name, space.measured_as(target, bucket).name) for bucket in space.buckets}
    return {
        LinearSpec(**record["spec"]): record["schedule"]["layout"]
        for record in artifact.read_records(options.directory)
        if (record["tokens"], record["target"]) in ours and "layout" in record["schedule"]
    }


def _buckets(names: str | None, space: SearchSpace) -> list[Bucket]:
    if names is None:
        return list(space.buckets)
    return list(dict.fromkeys(bucket_named(name.strip(), space.buckets) for name in names.split(",")))


def render(report: TuneReport) -> list[RenderableType]:
    """The report as a table."""
    rows = [
        {
            "linear": row["shape"],
            "weights": weights_in_words(row["kind"], row["group"]),
            "input": f"A{row['act_bits']}",
            "tokens": row["tokens"],
            "us": _figure(row["microseconds"]),
            "default us": _figure(row["default_microseconds"]),
            "gain": None if row["gain"] is None else f"{100 * row['gain']:.0f} %",
            "of roofline": None if row["roofline"] is None else f"{100 * row['roofline']:.0f} %",
            "trials": row["trials"],
            "from": row["source"],
            "schedule": row["schedule"],
        }
        for row in map(_row, report.choices)
    ]
    title = f"Schedules of {report.target} on {report.cpu}, {in_words(report.threads)}"
    return [terminal.rows_table(title, rows)]


def _figure(microseconds: float | None) -> float | None:
    """A time with as many digits as are worth reading."""
    return microseconds if microseconds is None or microseconds < 1000 else round(microseconds)


def _row(choice: Choice) -> dict[str, Any]:
    """One choice, JSON-able. ``gain`` is the share of the default's time that is saved."""
    spec, result = choice.spec, choice.result
    row: dict[str, Any] = {
        "shape": f"{spec.out_features}x{spec.in_features}",
        **{name: getattr(spec, name) for name in ("kind", "group", "act_bits", "per_token", "bias")},
        "tokens": choice.bucket.name,
        "schedule": dataclasses.asdict(choice.schedule),
        "source": choice.source,
    }
    times = {} if result is None else dataclasses.asdict(result)
    row |= {n: times.get(n) for n in ("microseconds", "default_microseconds", "roofline_microseconds", "trials")}
    best, default, roofline = (row[f"{n}microseconds"] for n in ("", "default_", "roofline_"))
    row["gain"] = 1 - best / default if default else None
    row["roofline"] = roofline / best if roofline else None
    return row


def export_results(file: Path, target: str | None = None) -> int:
    """Writes the user's tuning results to a file; returns how many.

    Raises:
        TuneError: there are none.
        TargetError: the target is unknown.
        OSError: the file cannot be written.
    """
    name = Target.parse(target).name if target else None
    database = Database(cache_directory())
    count = database.export(file, name)
    if not count:
        which = f" of {name}" if name else ""
        raise TuneError(
            f"no tuning results{which} are stored in {database.path}; 'lbllm-compile tune --shapes OUTxIN' finds some"
        )
    return count


def import_results(files: Sequence[Path]) -> Merged:
    """Takes over the results of exported files, all or, where a line is no result, none.

    Raises:
        TuningFileError: a file cannot be read, or a line is no result.
        TuneError: a schedule is of no kind that this version knows.
        OSError: the database cannot be written.
    """
    results = [pair for file in files for pair in read_results(file)]
    for key, result in results:
        space = backend_named(key.target.partition(":")[0]).space()
        if key.version == space.version:
            try:
                space.schedule_from(result.schedule)
            except KernelError as error:
                raise TuneError(
                    f"a result for {key.spec} has a schedule of no known kind ({', '.join(sorted(result.schedule))});"
                    " export it again, nothing was imported"
                ) from error
    return Database(cache_directory()).merge(results)
