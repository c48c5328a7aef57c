"""The process that compiles, checks and times candidates, so that one that crashes or hangs costs only itself.

Requests and replies are JSON, a line each, on the standard streams; whatever libraries print goes to standard error.
The first line it writes says ``{"threads": N}``, or ``{"failure": ...}`` where it cannot work.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from .. import prove
from ..backend import Bucket, backend_of, bucket_named
from ..errors import KernelError, LbllmError
from ..spec import LinearSpec
from ..targets import Target
from ..threads import thread_count
from ..tvm_api import compile_functions
from . import roofline
from .machine import COLD_BYTES, SYMBOL, Machine, RemoteMachine, Session, ThisMachine
from .measure import Limits, Outcome, RemoteDevice, Request
from .roofline import Roofline

ROUNDS = 4
"""Rounds in which the candidates of a request are timed in turn, so that other load meets all of them."""

CHECKED_COUNTS = 3
"""Token counts a candidate is checked at before it is timed; the proof of the winner checks all."""

READ_BYTES = (COLD_BYTES // 4, COLD_BYTES // 32)
"""Bytes of one call of the kernels that measure the bandwidth. The longer loses less to the launch; on a busy machine
the shorter is more likely to have all threads at once, as a small linear's call is."""

ROOFLINE_SECONDS = 0.02
"""How long each kernel that measures the machine runs."""

REMEMBERED = 64
"""Compiled candidates kept: a search measures its best ones again."""


def percentile(times: Sequence[float]) -> float:
    """The fifth percentile, which other load hardly moves."""
    return sorted(times)[len(times) // 20]


@functools.lru_cache(maxsize=1)
def _cases(spec: LinearSpec) -> list[prove.LinearCase]:
    return prove.linear_cases(spec)


def _implementation(spec: LinearSpec, target: Target, layout: str) -> Any:
    """What generates and packs for the kernels that read a layout."""
    space = backend_of(target).space()
    return space.of_layout(space.implementations(spec, target), layout)


@functools.lru_cache(maxsize=2)
def _packed(spec: LinearSpec, target: str, layout: str) -> list[torch.Tensor]:
    implementation = _implementation(spec, Target.parse(target), layout)
    return [implementation.pack(case.weight, case.bias) for case in _cases(spec)]


@functools.lru_cache(maxsize=REMEMBERED)
def _compiled(spec: LinearSpec, target: str, schedule: str) -> Any:
    """The library of a candidate, or the error that says why there is none."""
    parsed = Target.parse(target)
    try:
        chosen = backend_of(parsed).space().schedule_from(json.loads(schedule))
        function = _implementation(spec, parsed, chosen.layout).function(chosen)
        return compile_functions({SYMBOL: function}, parsed.llvm)
    except KernelError as error:
        return error


@functools.cache
def _compiled_readers(target: str, count: int) -> tuple[Any, Any]:
    """Libraries that write and read so many bytes."""
    llvm = Target.parse(target).llvm
    filler, reader = (compile_functions({SYMBOL: make(count)}, llvm) for make in (roofline.filler, roofline.reader))
    return filler, reader


@functools.cache
def _compiled_multiplier(target: str, act_bits: int, tile: tuple[int, int] | None) -> Any:
    """The library of a register tile of vectors, or of tile registers where none is given."""
    parsed = Target.parse(target)
    isa = roofline.instructions(parsed, act_bits)
    assert isa
    if tile is None:
        assert isa.tiles
        return compile_functions({SYMBOL: roofline.tile_multiplier(isa.tiles)}, parsed.llvm)
    return compile_functions({SYMBOL: roofline.multiplier(isa, *tile)}, parsed.llvm)


def measure_bandwidth(session: Session, target: str) -> float:
    """Bytes per second that the machine's threads read from memory, at best."""
    best = 0.0
    for count in READ_BYTES:
        filler, reader = (session.load(library) for library in _compiled_readers(target, count))
        slices = [session.allocate(count) for _ in range(COLD_BYTES // count)]
        for data in slices:
            filler.times([(data,)], 0)
        sums = session.place(torch.empty(roofline.PARTS * roofline.READ_LANES, dtype=torch.int32))
        best = max(best, count / min(reader.times([(sums, data) for data in slices], ROOFLINE_SECONDS)))
    return best


def measure_products(session: Session, target: str, act_bits: int) -> float | None:
    """8-bit multiply-adds per second of the best way to multiply, None where the target has no dot product."""
    isa = roofline.instructions(Target.parse(target), act_bits)
    if isa is None:
        return None
    ways: list[tuple[tuple[int, int] | None, tuple[int, int, int], int]] = [
        (tile, roofline.multiplier_sizes(isa, *tile), roofline.multiplications(isa, *tile))
        for tile in roofline.tiles(isa)
    ]
    if isa.tiles:
        ways.append((None, roofline.tile_multiplier_sizes(), roofline.tile_multiplications()))
    best = 0.0
    for tile, (weights, values, sums), multiplications in ways:
        operands = (
            session.place(torch.full((weights,), 129, dtype=torch.uint8)),
            session.place(torch.ones(values, dtype=torch.int8)),
            session.place(torch.empty(sums, dtype=torch.int32)),
        )
        kernel = session.load(_compiled_multiplier(target, act_bits, tile))
        best = max(best, multiplications / min(kernel.times([operands], ROOFLINE_SECONDS)))
    return best


class Worker:
    """Measures requests on a machine."""

    def __init__(self, machine: Machine):
        self._machine = machine
        self._bandwidth = 0.0
        self._products: dict[tuple[str, int], float | None] = {}

    def measure(self, request: Request) -> tuple[list[Outcome], Limits]:
        """Compiles, checks and times every candidate of a request."""
        forms = [json.dumps(schedule, sort_keys=True) for schedule in request.schedules]
        # Nothing is timed while these threads run. TVM lets go of Python's lock while it compiles.
        with ThreadPoolExecutor(thread_count()) as pool:
            libraries = list(pool.map(lambda form: _compiled(request.spec, request.target, form), forms))
        with self._machine.session(len(forms)) as session:
            return self._measured_in(session, request, libraries)

    def _measured_in(
        self, session: Session, request: Request, libraries: Sequence[Any]
    ) -> tuple[list[Outcome], Limits]:
        bucket = _bucket(request)
        counts = prove.token_counts(bucket.lowest, bucket.highest)[-CHECKED_COUNTS:]
        cases = _cases(request.spec)
        layouts = [schedule["layout"] for schedule in request.schedules]
        placed = {
            layout: [session.place(packed) for packed in _packed(request.spec, request.target, layout)]
            for layout in dict.fromkeys(layouts)
        }
        kernels = {}
        failures = {}
        for i, library in enumerate(libraries):
            if isinstance(library, KernelError):
                failures[i] = str(library)
                continue
            kernel = session.load(library)
            pairs = zip(cases, placed[layouts[i]], strict=True)
            wrong = (prove.linear_failure(kernel, packed, case, counts) for case, packed in pairs)
            if failure := next(filter(None, wrong), None):
                failures[i] = failure
            else:
                kernels[i] = kernel
        cycles = {layout: session.cycle(packed[0]) for layout, packed in placed.items()}
        arguments = {
            layout: _arguments(session, cases[0], copies, bucket.probe) for layout, (copies, _) in cycles.items()
        }
        times: dict[int, list[float]] = {i: [] for i in kernels}
        for _ in range(ROUNDS):
            for i, kernel in kernels.items():
                times[i] += kernel.times(arguments[layouts[i]], request.seconds / ROUNDS)
        outcomes = [
            Outcome(1e6 * percentile(times[i])) if i in times else Outcome(None, failures[i])
            for i in range(len(libraries))
        ]
        return outcomes, self._limits(session, request, all(cold for _, cold in cycles.values()))

    def _limits(self, session: Session, request: Request, cold: bool) -> Limits:
        """What bounds a request's calls.

        The machine is measured with every request, and its best counts: a bandwidth that other load held down must not
        end a search.
        """
        spec, bucket = request.spec, _bucket(request)
        self._bandwidth = max(self._bandwidth, measure_bandwidth(session, request.target))
        products = None
        if bucket.probe > 1:
            key = request.target, spec.act_bits
            fresh = measure_products(session, *key)
            products = self._products[key] = fresh and max(fresh, self._products.get(key) or 0.0)
        layouts = {schedule["layout"] for schedule in request.schedules}
        weights = min(_packed(spec, request.target, layout)[0].numel() for layout in layouts)
        measured = Roofline(self._bandwidth, products)
        least = measured.microseconds(weights if cold else 0, spec.out_features * spec.in_features * bucket.probe)
        return Limits(least, weights, measured.bandwidth, measured.products)


def _bucket(request: Request) -> Bucket:
    """The token counts of a request."""
    return bucket_named(request.bucket, backend_of(Target.parse(request.target)).space().buckets)


def _arguments(session: Session, case: prove.LinearCase, copies: Sequence[Any], tokens: int) -> list[tuple[Any, ...]]:
    """The arguments of calls with so many tokens, for each copy of the weights."""
    repeats = -(-tokens // case.values.shape[0])
    values = session.place(case.values.repeat(repeats, 1)[:tokens].contiguous())
    x_scale = session.place(case.x_scale.repeat(repeats, 1)[:tokens].contiguous())
    out = session.place(torch.empty(tokens, case.expected.shape[1]))
    return [(values, x_scale, weights, out) for weights in copies]


def _machine(setup: str | None) -> Machine:
    if setup is None:
        return ThisMachine()
    fields = json.loads(setup)
    device = RemoteDevice(**fields["device"])
    return RemoteMachine(device, Target.parse(fields["target"]), fields["seconds"])


def main() -> None:
    """Answers requests until the input ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    try:
        machine = _machine(sys.argv[1] if len(sys.argv) > 1 else None)
    except LbllmError as error:
        print(json.dumps({"failure": str(error)}), file=replies)
        return
    print(json.dumps({"threads": machine.threads}), file=replies)
    worker = Worker(machine)
    for line in sys.stdin:
        outcomes, limits = worker.measure(Request.from_json(line))
        reply = {"outcomes": [dataclasses.asdict(o) for o in outcomes], "limits": dataclasses.asdict(limits)}
        print(json.dumps(reply), file=replies)


if __name__ == "__main__":
    main()
