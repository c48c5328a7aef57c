"""The launch list of a program: what one step of decoding starts, in order, and where every argument lies; and
beside it the list of a part of a prompt.

It holds no token, no position and no length: those are in the device's memory, where the last kernel of a step leaves
them for the next one. So every step starts the same kernels with the same arguments, and a CUDA graph of them replays
without an update. The only number that a list leaves open is the capacity of the KV state, which may decide which of
two kernels is started; a session chooses it once.

This module needs neither torch nor TVM.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...backend import EntryPoint
from ...errors import KernelError
from ...sizes import ALIGNMENT
from ..text import OVERLAPPING, PREAMBLE

TOKEN = EntryPoint("token", 1, 1, True, "1", blocks=True, joined=False, static=True)
"""The function of a program that decodes one token."""

PART = EntryPoint("part", 1, 64, True, "17+", blocks=True, joined=False, static=True)
"""The function that takes a part of a prompt: so many tokens, of which the first may be padding."""


@dataclass(frozen=True)
class Size:
    """``fixed + slots * capacity``: a count that the capacity of the KV state decides."""

    fixed: int
    slots: int = 0

    def at(self, capacity: int) -> int:
        """The count for a capacity."""
        return self.fixed + self.slots * capacity


@dataclass(frozen=True)
class Place:
    """An argument that points into a block, ``offset`` bytes behind its beginning."""

    block: str
    offset: Size


@dataclass(frozen=True)
class Result:
    """An argument that points at a result of a kernel, which lies in the arena."""

    number: int


@dataclass(frozen=True)
class Number:
    """An argument that is passed by value, in ``bytes`` bytes."""

    value: Size
    bytes: int


Argument = Place | Result | Number


@dataclass(frozen=True)
class ProgramKernel:
    """One kernel of a program.

    Attributes:
        symbol: its name in the text, unique within the program.
        source: its CUDA text, from ``extern "C"`` on.
        block: threads along x, y, z.
    """

    symbol: str
    source: str
    block: tuple[int, int, int]


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        symbol: the kernel's.
        work: items that the launch shares out among thread blocks, along x.
        per_block: items of a thread block.
        arguments: in the order of the kernel's parameters.
        above, most: the capacities for which it is started: greater ones, and up to this one, where there is one.
    """

    symbol: str
    work: Size
    per_block: int
    arguments: tuple[Argument, ...]
    above: int = 0
    most: int | None = None

    def starts(self, capacity: int) -> bool:
        """Whether it is started where the KV state has so many slots."""
        return self.above < capacity and (self.most is None or capacity <= self.most)

    def grid(self, capacity: int) -> tuple[int, int, int]:
        """Thread blocks along x, y, z."""
        return -(-self.work.at(capacity) // self.per_block), 1, 1


@dataclass(frozen=True)
class LaunchList:
    """A step of decoding, or what takes a part of a prompt.

    Attributes:
        kernels: what is started.
        launches: in order; which of them are started for a capacity, :meth:`started` says.
        results: bytes of every result, which one kernel writes and later ones read.
        inputs: bytes of the blocks that steps hand on, token, mask, position, length; of a part, of those it has more.
        logits: number of the result that the next token is chosen from.
        vocabulary: how many logits there are.
        weights: bytes of the block of weights.
        state: bytes of the KV state per slot.
        fixed_state: bytes of the state of fixed size.
        tokens: how many it takes.
        part: the list of a part of a prompt, on the same blocks; none where there is a state that padding would change.
    """

    kernels: tuple[ProgramKernel, ...]
    launches: tuple[Launch, ...]
    results: tuple[Size, ...]
    inputs: Mapping[str, Size]
    logits: int
    vocabulary: int
    weights: int
    state: int
    fixed_state: int
    tokens: int = 1
    part: LaunchList | None = None

    @property
    def lists(self) -> list[LaunchList]:
        """The list itself and that of a part."""
        return [self] if self.part is None else [self, self.part]

    def all_kernels(self) -> list[ProgramKernel]:
        """The kernels of :attr:`lists`, each once."""
        return [*{kernel.symbol: kernel for found in self.lists for kernel in found.kernels}.values()]

    def source(self) -> str:
        """The text of all kernels, one compilation unit."""
        return "\n".join([PREAMBLE, OVERLAPPING, *(kernel.source for kernel in self.all_kernels())])

    def started(self, capacity: int) -> list[Launch]:
        """The launches where the KV state has so many slots, in order."""
        return [launch for launch in self.launches if launch.starts(capacity)]

    def arena(self, capacity: int) -> Arena:
        """Lays the results of what is started out so that none of two that are needed at the same time overlap.

        The logits are its beginning, and stay until the next step writes them.
        """
        spans = self._spans(self.started(capacity))
        sizes = [-(-size.at(capacity) // ALIGNMENT) * ALIGNMENT for size in self.results]
        offsets: dict[int, int] = {}
        # Large ones first: small ones then fit between them.
        for number in sorted(spans, key=lambda n: (n != self.logits, -sizes[n], n)):
            first, last = spans[number]
            taken = sorted(
                (offsets[other], offsets[other] + sizes[other])
                for other in offsets
                if spans[other][0] <= last and first <= spans[other][1]
            )
            offset = 0
            for begin, end in taken:
                if offset + sizes[number] <= begin:
                    break
                offset = max(offset, end)
            offsets[number] = offset
        return Arena(offsets, max((offsets[n] + sizes[n] for n in offsets), default=0))

    def _spans(self, launches: Sequence[Launch]) -> dict[int, tuple[int, int]]:
        """By result: the first and the last launch that it is an argument of."""
        spans: dict[int, tuple[int, int]] = {}
        for index, launch in enumerate(launches):
            for argument in launch.arguments:
                if isinstance(argument, Result):
                    spans[argument.number] = spans.get(argument.number, (index, index))[0], index
        if self.logits in spans:
            spans[self.logits] = spans[self.logits][0], len(launches)
        return spans

    def to_json(self) -> str:
        """Everything, the kernels' text included."""
        fields = {**vars(self), "launches": [_launch_fields(launch) for launch in self.launches]}
        fields["kernels"] = [asdict(kernel) for kernel in self.kernels]
        fields["results"] = [_size_fields(size) for size in self.results]
        fields["inputs"] = {name: _size_fields(size) for name, size in self.inputs.items()}
        fields["part"] = None if self.part is None else self.part.to_json()
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str) -> LaunchList:
        """What :meth:`to_json` wrote.

        Raises:
            KernelError: it did not write that.
        """
        try:
            fields = json.loads(text)
            fields["kernels"] = tuple(
                ProgramKernel(k["symbol"], k["source"], (k["block"][0], k["block"][1], k["block"][2]))
                for k in fields["kernels"]
            )
            fields["launches"] = tuple(_launch_from(launch) for launch in fields["launches"])
            fields["results"] = tuple(Size(*size) for size in fields["results"])
            fields["inputs"] = {name: Size(*size) for name, size in fields["inputs"].items()}
            fields["part"] = None if fields["part"] is None else cls.from_json(fields["part"])
            return cls(**fields)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise KernelError(f"the launch list of a program is damaged ({error})") from error


@dataclass(frozen=True)
class Arena:
    """Where results lie.

    Attributes:
        offsets: by number of the result, in bytes.
        bytes: of the whole arena.
    """

    offsets: Mapping[int, int]
    bytes: int


def _size_fields(size: Size) -> list[int]:
    return [size.fixed, size.slots]


def _launch_fields(launch: Launch) -> list[Any]:
    arguments = [_argument_fields(argument) for argument in launch.arguments]
    return [launch.symbol, _size_fields(launch.work), launch.per_block, arguments, launch.above, launch.most]


def _argument_fields(argument: Argument) -> list[Any]:
    if isinstance(argument, Place):
        return ["place", argument.block, _size_fields(argument.offset)]
    if isinstance(argument, Result):
        return ["result", argument.number]
    return ["number", _size_fields(argument.value), argument.bytes]


def _launch_from(fields: Sequence[Any]) -> Launch:
    symbol, work, per_block, arguments, above, most = fields
    given = tuple(_argument_from(*argument) for argument in arguments)
    return Launch(symbol, Size(*work), per_block, given, above, most)


def _argument_from(kind: str, *fields: Any) -> Argument:
    if kind == "place":
        block, offset = fields
        return Place(block, Size(*offset))
    if kind == "result":
        return Result(*fields)
    if kind == "number":
        value, size = fields
        return Number(Size(*value), size)
    raise KernelError(f"the launch list of a program has an argument of the unknown kind {kind!r}")
