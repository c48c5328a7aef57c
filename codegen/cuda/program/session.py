"""Runs a launch list on a device: a sequence, token by token, each step one graph that replays with no update. Another
such graph takes a part of a prompt at once.

Between two steps the host writes the next token of a prompt, a draw, or nothing: the token that a step has chosen is
the input of the next one already. Any number of sequences share the weights and the kernels; each has a state, an arena
and a stream of its own. The driver is all that is needed; there is neither torch nor TVM here.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterable, Sequence
from ctypes import c_void_p
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ...backend import StateTensor
from ...errors import KernelError
from ...sampling import Draw
from ...sizes import CAPACITY_MULTIPLE, FIXED_STATE, PAST, STATE, WEIGHTS
from ..driver import Driver, Number, reserved
from ..text import begins
from .launches import PART, Arena, Argument, LaunchList, Place, Result

TOKEN, MASK, POSITION, SAMPLING, ARENA = "input_ids", "attention_mask", "position_ids", "sampling", "arena"

WORTH_A_PART = 8
"""Fewer tokens than this are fed one by one. A part computes all its tokens, padding included; from where on that takes
less time has not been measured."""

Launched = tuple[Any, tuple[int, int, int], tuple[int, int, int], list[Number]]
"""A launch in a session: the function, its block and grid, and its arguments."""


class DeviceProgram:
    """A launch list, its kernels and its weights in a device's memory.

    Attributes:
        overlaps: launches of replays may begin before those in front of them have ended.

    Args:
        driver: the device.
        launches: what a step is.
        cubin: the compiled :meth:`~.launches.LaunchList.source`.
        weights: the block of weights from its beginning to its end, in pieces.
        state: the tensors of the KV state; without them no sequence grows.

    Raises:
        OutOfMemoryError: the device has no room for the weights.
        KernelError: the driver reports another error.
    """

    def __init__(
        self,
        driver: Driver,
        launches: LaunchList,
        cubin: bytes,
        weights: Iterable[memoryview],
        state: Sequence[StateTensor] = (),
    ):
        self.driver, self.launches, self.state = driver, launches, state
        self.overlaps = driver.overlaps and all(begins(kernel.source) for kernel in launches.all_kernels())
        module = driver.module(cubin)
        self.functions = {k.symbol: (driver.function(module, k.symbol), k.block) for k in launches.all_kernels()}
        with reserved(driver, {WEIGHTS: launches.weights}, "the model's weights take") as (blocks, _):
            self.weights = blocks[WEIGHTS]
            self._fill(weights)
        # They are copied on a stream that those of sequences do not wait for.
        driver.synchronize()

    def sequence(self, capacity: int, overlapping: bool = True) -> DecodeSession:
        """An empty sequence with room for so many tokens at least.

        Args:
            capacity: how many.
            overlapping: let the launches of its replays overlap, where they can.

        Raises:
            OutOfMemoryError: the device has no room for its state.
        """
        return DecodeSession(self, capacity, overlapping)

    def _fill(self, pieces: Iterable[memoryview]) -> None:
        """Copies the weights."""
        whole, at = self.launches.weights, 0
        for piece in pieces:
            part = np.frombuffer(piece, np.uint8)
            if at + part.nbytes > whole:
                raise KernelError(f"a program of {whole} bytes of weights is given more")
            if part.nbytes:
                self.driver.call("cuMemcpyHtoD_v2", self.weights + at, part.ctypes.data, part.nbytes)
            at += part.nbytes
        if at != whole:
            raise KernelError(f"a program of {whole} bytes of weights is given {at}")


@dataclass
class _Room:
    """A sequence's memory, and what runs in it.

    Attributes:
        capacity: tokens that there is room for.
        sizes: bytes of the blocks, by name.
        own: the blocks.
        work: the launches of a step and, where there are parts, of a part.
        graphs: the same, captured.
    """

    capacity: int
    sizes: dict[str, int]
    own: dict[str, int]
    work: list[list[Launched]]
    graphs: list[c_void_p]


class DecodeSession:
    """A sequence in a device's memory; implements :class:`...backend.DecodedSequence`.

    Attributes:
        capacity: tokens that there is room for.
        past: tokens decoded so far.

    Args:
        program: what decodes it.
        capacity: tokens that there is room for at least.
        overlapping: let the launches of replays overlap, where they can.

    Raises:
        OutOfMemoryError: the device has no room for it.
        KernelError: the driver reports another error.
    """

    def __init__(self, program: DeviceProgram, capacity: int, overlapping: bool = True):
        self.program, self.driver, self.launches = program, program.driver, program.launches
        self._overlapping = overlapping and program.overlaps
        self.past = 0
        self._draw: Draw | None = None
        self._stream = self.driver.new_stream()
        try:
            room = self._reserved(capacity)
        except BaseException:
            self.driver.forget(stream=self._stream)
            raise
        self._take(room)
        self._write(MASK, np.ones(1, np.int64))

    def _reserved(self, capacity: int) -> _Room:
        """Memory for so many tokens or a few more, all of it zeros, and the graphs of a step and of a part in it.

        Steps and parts share an arena, of which the logits are the beginning.
        """
        launches = self.launches
        # Tensors of the state lie at a number of bytes a token that may be odd, and have elements of several bytes.
        capacity = -(-capacity // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE
        arenas = [found.arena(capacity) for found in launches.lists]
        sizes = {
            STATE: launches.state * capacity,
            FIXED_STATE: launches.fixed_state,
            ARENA: max(arena.bytes for arena in arenas),
            **{name: size.at(capacity) for found in launches.lists for name, size in found.inputs.items()},
        }
        purpose = f"a sequence with room for {capacity} tokens takes"
        with reserved(self.driver, sizes, purpose, self._stream) as (own, graphs):
            blocks = {WEIGHTS: self.program.weights, **own}
            work = [
                [
                    (
                        *self.program.functions[launch.symbol],
                        launch.grid(capacity),
                        [_argument(argument, blocks, arena, capacity) for argument in launch.arguments],
                    )
                    for launch in found.started(capacity)
                ]
                for found, arena in zip(launches.lists, arenas, strict=True)
            ]
            for launched in work:
                graphs.append(
                    self.driver.captured(self._stream, partial(self._launch_all, launched, self._overlapping))
                )
        return _Room(capacity, sizes, own, work, graphs)

    def _take(self, room: _Room) -> None:
        self.capacity, self._sizes, self._blocks = room.capacity, room.sizes, room.own
        self._work, self._graphs = room.work, room.graphs
        memory = list(room.own.values())
        self._end = weakref.finalize(self, self.driver.leave, room.graphs, self._stream, memory)
        self._end.atexit = False

    def grow(self, capacity: int) -> None:
        """Makes room for more tokens at least; keeps those that there are, and what was chosen behind them.

        Raises:
            OutOfMemoryError: the device has no room for it.
            KernelError: the driver reports another error. Nothing has changed then, either.
        """
        graphs, blocks, end = self._graphs, self._blocks, self._end
        room = self._reserved(capacity)
        try:
            for tensor in self.program.state:
                for head in range(tensor.heads):
                    target, source = (
                        at + tensor.offset * slots + head * slots * tensor.bytes
                        for at, slots in ((room.own[STATE], room.capacity), (blocks[STATE], self.capacity))
                    )
                    self._copy_on_device(target, source, self.past * tensor.bytes)
            kept = {name: self._sizes[name] for name in (FIXED_STATE, TOKEN, POSITION, PAST, SAMPLING)}
            for name, size in {**kept, ARENA: 4 * self.launches.vocabulary}.items():
                self._copy_on_device(room.own[name], blocks[name], size)
            self._copy(room.own[MASK], _mask(self.past, room.capacity))
        except BaseException:
            self.driver.forget(room.graphs, memory=room.own.values())
            raise
        end.detach()
        self._take(room)
        self.driver.forget(graphs, memory=blocks.values())

    def step(self, token: int | None = None, draw: Draw | None = None) -> None:
        """Decodes one token by a replay of the graph.

        Args:
            token: the input; what the step before has chosen where None.
            draw: chooses the next token; the most likely one where None.

        Raises:
            KernelError: there is no room for it.
        """
        self._begin(token, draw)
        self.driver.replay(self._graphs[0], self._stream)
        self.past += 1

    def step_by_launch(self, token: int | None = None, draw: Draw | None = None) -> None:
        """As :meth:`step`, with the same launches, one behind the end of the other."""
        self._begin(token, draw)
        self._launch_on_stream(self._work[0])
        self.past += 1

    def feed(self, tokens: Sequence[int], draw: Draw | None = None) -> None:
        """Decodes several tokens: in parts, each by a replay of its graph, and the rest by steps.

        Args:
            tokens: to feed.
            draw: how the device chooses the token behind the last one; None for the most likely.

        Raises:
            KernelError: there is no room for them.
        """
        self._feed(tokens, draw, self.step, lambda: self.driver.replay(self._graphs[1], self._stream))

    def feed_by_launch(self, tokens: Sequence[int], draw: Draw | None = None) -> None:
        """As :meth:`feed`, with the same launches, one behind the end of the other."""
        self._feed(tokens, draw, self.step_by_launch, lambda: self._launch_on_stream(self._work[1]))

    def _feed(
        self,
        tokens: Sequence[int],
        draw: Draw | None,
        step: Callable[[int, Draw | None], None],
        part: Callable[[], None],
    ) -> None:
        self._check_room(len(tokens))
        most, begin = 0 if self.launches.part is None else self.launches.part.tokens, 0
        while most and len(tokens) - begin >= WORTH_A_PART:
            taken = tokens[begin : begin + most]
            begin += len(taken)
            self._begin_part(taken, most, draw if begin == len(tokens) else None)
            part()
            self.past += len(taken)
        for number, token in enumerate(tokens[begin:], begin + 1):
            step(token, draw if number == len(tokens) else None)

    def _begin_part(self, tokens: Sequence[int], most: int, draw: Draw | None) -> None:
        """Tells the device a part, of which the last tokens are these, and the others padding.

        Its last launch is that of a step, which ends with one token more than there were: the last of the part's.
        """
        count, end = len(tokens), self.past + len(tokens)
        ids, positions = (np.zeros(most, np.int64) for _ in range(2))
        ids[most - count :], positions[most - count :] = tokens, np.arange(self.past, end)
        given = [ids, positions, np.array([self.past, count], np.int32)]
        self._write(PART.name, np.concatenate([values.view(np.uint8) for values in given]))
        self._count(end - 1)
        self.past = end - count
        self._write_draw(draw)

    def _launch_on_stream(self, work: list[Launched]) -> None:
        self.driver.stream = self._stream
        try:
            self._launch_all(work, overlapping=False)
        finally:
            self.driver.stream = None

    def token(self) -> int:
        """The token that the last step has chosen: a drawn one, or that of the greatest logit, the first of equal ones
        and before all others one that is no number."""
        return int(np.frombuffer(self._read(TOKEN, 0, 8), np.int64)[0])

    def choice(self) -> tuple[int, float]:
        """As :meth:`token`, with the logit, which is all that is copied."""
        token = self.token()
        return token, float(np.frombuffer(self._read(ARENA, 4 * token, 4), np.float32)[0])

    def logits(self) -> np.ndarray:
        """The last step's logits, float32 ``[V]``; zeros before the first one."""
        return np.frombuffer(self._read(ARENA, 0, 4 * self.launches.vocabulary), np.float32)

    def state(self) -> bytes:
        """The whole KV state."""
        return self._read(STATE, 0, self._sizes[STATE])

    def rewind(self, past: int) -> None:
        """Forgets all tokens but the first ones.

        Raises:
            KernelError: there are not so many.
        """
        if not 0 <= past <= self.past:
            raise KernelError(f"a conversation of {self.past} tokens cannot be cut to {past}")
        self._count(past)

    def _count(self, past: int) -> None:
        """Tells the device how many tokens there are."""
        self.past = past
        self._write(MASK, _mask(past, self.capacity))
        self._write(PAST, np.array([past], np.int32))
        self._write(POSITION, np.array([past], np.int64))

    def _begin(self, token: int | None, draw: Draw | None) -> None:
        self._check_room(1)
        if token is not None:
            self._write(TOKEN, np.array([token], np.int64))
        self._write_draw(draw)

    def _write_draw(self, draw: Draw | None) -> None:
        if draw != self._draw:
            values = (0.0,) * 4 if draw is None else (draw.scale, draw.top_k, draw.top_p, draw.place)
            self._write(SAMPLING, np.array(values, np.float64))
            self._draw = draw

    def _check_room(self, tokens: int) -> None:
        if self.past + tokens > self.capacity:
            raise KernelError(f"the KV state has room for {self.capacity} tokens, and no more can be decoded")

    def _launch_all(self, work: list[Launched], overlapping: bool) -> None:
        for number, (function, block, grid, arguments) in enumerate(work):
            # What is in front of the first one may be no launch.
            self.driver.launch(function, grid, block, arguments, overlapping and number > 0)

    def _write(self, block: str, values: np.ndarray) -> None:
        self._copy(self._blocks[block], values)

    def _copy(self, target: int, values: np.ndarray) -> None:
        if values.nbytes:
            self.driver.call("cuMemcpyHtoDAsync_v2", target, values.ctypes.data, values.nbytes, self._stream)
            # The driver may read pageable memory later, and this may be gone.
            self.driver.call("cuStreamSynchronize", self._stream)

    def _copy_on_device(self, target: int, source: int, size: int) -> None:
        if size:
            self.driver.call("cuMemcpyDtoDAsync_v2", target, source, size, self._stream)

    def _read(self, block: str, offset: int, size: int) -> bytes:
        buffer = np.empty(size, np.uint8)
        source = self._blocks[block] + offset
        self.driver.call("cuMemcpyDtoHAsync_v2", buffer.ctypes.data, source, size, self._stream)
        self.driver.call("cuStreamSynchronize", self._stream)
        return buffer.tobytes()


def _argument(argument: Argument, blocks: dict[str, int], arena: Arena, capacity: int) -> Number:
    if isinstance(argument, Place):
        return ctypes.c_uint64(blocks[argument.block] + argument.offset.at(capacity))
    if isinstance(argument, Result):
        return ctypes.c_uint64(blocks[ARENA] + arena.offsets[argument.number])
    number = argument.value.at(capacity)
    return ctypes.c_int64(number) if argument.bytes == 8 else ctypes.c_int(number)


def _mask(past: int, capacity: int) -> np.ndarray:
    """Which slots a step behind ``past`` tokens sees: int64 ``[capacity]``."""
    return (np.arange(capacity) <= past).astype(np.int64)
