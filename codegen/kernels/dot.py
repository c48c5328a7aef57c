"""The two loops all dot-product kernels share: GEMV for one token, GEMM for more.

A *row vector* is as many weight rows as the instruction set has 32-bit lanes, a *slab* 16 columns of 16 rows: four
*fields* of 4 columns, each 64 bytes once decoded (byte ``4 * row + column``). A family supplies an :class:`Operand`
that knows where a slab lies in its packed weights and how it becomes bytes.

Every call first *stages* the activations: padded to slabs, group after group, so that no tail is left in the loops,
with ``-128 * sum(values)`` per group, which takes back the offset of the weight bytes. Where an instruction multiplies
several tokens at once (:attr:`.isa.InstructionSet.tokens_per_dot`), these lie interleaved.

The output is, per group, one explicit fused multiply-add of the exact int32 dot product, as the reference defines it.
It is an intrinsic because TVM lets LLVM contract ordinary multiplies and adds.
"""

# No postponed annotations here: TVMScript evaluates the annotations of its functions itself.
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from ..sizes import group_count
from ..tvm_api import PrimFunc, T, pure_intrinsic
from .isa import InstructionSet
from .memory import prefetch_line, scratch

SLAB = 16
"""Columns of a slab, and rows of a block."""

FIELDS = 4
"""Fields of a slab."""

VECTOR_BYTES = 64
"""Bytes of one decoded field of 16 rows."""


@dataclass(frozen=True)
class Problem:
    """What a kernel computes: ``[M, K]`` values times ``[N, K]`` weights.

    Attributes:
        rows: ``N``.
        columns: ``K``.
        group: columns per int32 accumulator and scale.
        per_token: activations have one scale per token instead of one per group.
        bias: the packed weights end with a bias.
    """

    rows: int
    columns: int
    group: int
    per_token: bool
    bias: bool

    @property
    def groups(self) -> int:
        return group_count(self.columns, self.group)

    @property
    def full_groups(self) -> int:
        return self.columns // self.group

    @property
    def group_slabs(self) -> int:
        """Slabs of a full group."""
        return -(-self.group // SLAB)

    @property
    def tail_slabs(self) -> int:
        """Slabs of the short last group, 0 without one."""
        return -(-(self.columns % self.group) // SLAB)

    @property
    def slabs(self) -> int:
        """Slabs of a row block."""
        return self.full_groups * self.group_slabs + self.tail_slabs

    @property
    def row_blocks(self) -> int:
        """Blocks of 16 rows, padded to an even number."""
        return -(-self.rows // 32) * 2


class Operand(Protocol):
    """Where a family's packed weights lie and how they become offset bytes."""

    @property
    def problem(self) -> Problem:
        """What the weights are of."""
        ...

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed matrix without bias."""
        ...

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of 16 rows."""
        ...

    @property
    def group_bytes(self) -> int:
        """Bytes of one full group of one row block."""
        ...

    def bytes_of(self, slabs: int) -> int:
        """Bytes of a group of so many slabs of one row block."""
        ...

    @property
    def decodes(self) -> bool:
        """Whether a GEMM of several token tiles should keep decoded slabs in a buffer, instead of reading them anew."""
        ...

    def tables(self, isa: InstructionSet, packed: Any, address: Any, slabs: int) -> Any:
        """What :meth:`fields` needs once per group of a row vector."""
        ...

    def fields(self, isa: InstructionSet, packed: Any, address: Any, slab: Any, tables: Any) -> list[Any]:
        """The four fields of a slab as offset bytes."""
        ...

    def scale(self, isa: InstructionSet, packed: Any, block: Any, address: Any, half: int, slabs: int) -> Any:
        """The fp32 scales of a row vector in the group at ``address``; ``half`` is its first row in the block."""
        ...


def fused_multiply_add(isa: InstructionSet, a: Any, b: Any, c: Any) -> Any:
    """One correctly rounded ``a * b + c`` per lane."""
    return pure_intrinsic(isa.float32, "llvm.fma", a, b, c)


def load_float32(isa: InstructionSet, packed: Any, address: Any) -> Any:
    """``lanes`` fp32 numbers from a byte buffer."""
    return T.reinterpret(isa.float32, packed[T.ramp(address, 1, 4 * isa.lanes)])


BURST_LINES = 36
"""Lines of a group that are asked for at once; those of a larger one are, slab by slab, as it is read."""


def prefetch_group(operand: Operand, packed: Any, address: Any, slabs: int, ahead: int) -> None:
    """Asks for what lies ``ahead`` bytes behind a group of a row block, where the group is small."""
    size = operand.bytes_of(slabs)
    if ahead and size <= BURST_LINES * VECTOR_BYTES:
        for start in range(0, size, VECTOR_BYTES):
            prefetch_line(packed, address + start + ahead)


def prefetch_slab(operand: Operand, packed: Any, address: Any, slabs: int, slab: Any, ahead: int) -> None:
    """Asks for what lies ``ahead`` bytes behind a slab of a group at ``address``, where the group is large."""
    size = operand.bytes_of(slabs)
    if ahead and size > BURST_LINES * VECTOR_BYTES:
        for start in range(0, size // slabs, VECTOR_BYTES):
            prefetch_line(packed, address + slab * (size // slabs) + start + ahead)


def _stage_group(
    values: Any,
    staged: Any,
    correction: Any,
    *,
    token: Any,
    source: Any,
    width: int,
    target: Callable[[Any], Any],
    padded: int,
    index: Any,
    offset: int,
) -> None:
    """Copies ``width`` values of one token and group to ``staged``, pads with zeros, and forms the correction.

    ``target`` gives the address of a column in ``staged``.
    """
    total = scratch(1, "int32")
    T.buffer_store(total, 0, [0])
    with T.serial(width) as i:
        T.buffer_store(staged, values[token, source + i], [target(i)])
        T.buffer_store(total, total[0] + T.cast(values[token, source + i], "int32"), [0])
    with T.serial(padded - width) as i:
        T.buffer_store(staged, T.int8(0), [target(width + i)])
    T.buffer_store(correction, total[0] * (-offset), [index])


def _stage_token(
    p: Problem,
    isa: InstructionSet,
    values: Any,
    staged: Any,
    correction: Any,
    token: Any,
    slot: Any,
    slots: Any,
    together: int,
) -> None:
    """Stages one token: groups are outermost in ``staged`` and ``correction``, then come the ``slots`` tokens.

    ``together`` tokens are interleaved: as many columns of each in turn as one multiplication takes.
    """
    piece = 4 * isa.pairs_per_dot

    def place(start: Any, padded: int) -> Callable[[Any], Any]:
        """The address of a column, for groups of ``padded`` bytes a token that start at ``start``."""
        if together == 1:
            return lambda column: start + slot * padded + column
        first = start + slot // together * (together * padded) + slot % together * piece
        return lambda column: first + column // piece * (together * piece) + column % piece

    width, tail = p.group_slabs * SLAB, p.columns % p.group
    with T.serial(p.full_groups) as g:
        _stage_group(
            values,
            staged,
            correction,
            token=token,
            source=g * p.group,
            width=p.group,
            target=place(g * width * slots, width),
            padded=width,
            index=g * slots + slot,
            offset=isa.offset,
        )
    if tail:
        padded = p.tail_slabs * SLAB
        _stage_group(
            values,
            staged,
            correction,
            token=token,
            source=p.full_groups * p.group,
            width=tail,
            target=place(p.full_groups * width * slots, padded),
            padded=padded,
            index=p.full_groups * slots + slot,
            offset=isa.offset,
        )


def row_vectors(isa: InstructionSet, rows: int) -> list[tuple[int, int]]:
    """``(block, first row within the block)`` of the row vectors of ``rows`` rows."""
    return [(row // SLAB, row % SLAB) for row in range(0, rows, isa.lanes)]


def gemv(operand: Operand, isa: InstructionSet, rows: int, chains: int, prefetch: int, parallel: bool) -> PrimFunc:
    """One token: every step multiplies ``rows`` rows, streaming their packed bytes once.

    Args:
        operand: the packed weights.
        isa: the vector instructions.
        rows: rows per step, a multiple of 16 that divides the padded rows.
        chains: independent int32 accumulators per row vector (1, 2 or 4), which hide the dot's latency.
        prefetch: distance of the software prefetch in bytes, 0 for none.
        parallel: split the steps over the thread pool.
    """
    p = operand.problem
    lanes, vectors = isa.lanes, row_vectors(isa, rows)
    steps = p.row_blocks * SLAB // rows
    blocks = rows // SLAB
    group_width, tail = p.group_slabs * SLAB, p.columns % p.group
    loop = T.parallel if parallel else T.serial
    packed_bytes = operand.packed_bytes + (4 * SLAB * p.row_blocks if p.bias else 0)
    scales = 1 if p.per_token else p.groups

    def slice_(index: int) -> Any:
        return T.ramp(index * lanes, 1, lanes)

    def group(packed, staged, correction, x_scale, partial, total, step, g, slabs) -> None:
        """Adds one group of all row vectors to ``total``."""
        addresses = [
            T.Bind((step * blocks + block) * operand.block_bytes + g * operand.group_bytes) for block, _ in vectors
        ]
        tables = []
        for v, (_, half) in enumerate(vectors):
            if half == 0:
                prefetch_group(operand, packed, addresses[v], slabs, prefetch)
            tables.append(operand.tables(isa, packed, addresses[v] + 4 * half, slabs))
            for chain in range(chains):
                start = isa.broadcast(correction[g] if chain == 0 and isa.offset else 0)
                T.buffer_store(partial, start, [slice_(v * chains + chain)])
        with T.serial(slabs) if slabs > SLAB else T.unroll(slabs) as t:
            for v, (_, half) in enumerate(vectors):
                if half == 0:
                    prefetch_slab(operand, packed, addresses[v], slabs, t, prefetch)
                fields = operand.fields(isa, packed, addresses[v] + 4 * half, t, tables[v])
                source = g * group_width + t * SLAB
                pairs = [(w, isa.quad(staged, source, f)) for f, w in enumerate(fields)]
                for chain in range(chains):
                    where = slice_(v * chains + chain)
                    T.buffer_store(partial, isa.dot(partial[where], pairs[chain::chains]), [where])
        x = T.Bind(T.broadcast(x_scale[0, 0 if p.per_token else g], lanes))
        for v, (block, half) in enumerate(vectors):
            accumulator = partial[slice_(v * chains)]
            for chain in range(1, chains):
                accumulator = accumulator + partial[slice_(v * chains + chain)]
            scale = operand.scale(isa, packed, step * blocks + block, addresses[v], half, slabs)
            y = fused_multiply_add(isa, T.cast(accumulator, isa.float32), x * scale, total[slice_(v)])
            T.buffer_store(total, y, [slice_(v)])

    def store(packed, out, total, step) -> None:
        for v in range(len(vectors)):
            row = T.Bind(step * rows + v * lanes)
            y = total[slice_(v)]
            if p.bias:
                y = y + load_float32(isa, packed, operand.packed_bytes + row * 4)
            store_row_vector(isa, p.rows, out, 0, row, y)

    @T.prim_func(s_tir=True)
    def kernel(values_: T.handle, x_scale_: T.handle, packed_: T.handle, out_: T.handle):
        T.func_attr({"tirx.noalias": True})
        values = T.match_buffer(values_, (1, p.columns), "int8", align=1)
        x_scale = T.match_buffer(x_scale_, (1, scales), "float32", align=4)
        packed = T.match_buffer(packed_, (packed_bytes,), "uint8", align=64)
        out = T.match_buffer(out_, (1, p.rows), "float32", align=4)
        staged = scratch(p.slabs * SLAB, "int8")
        correction = scratch(p.groups, "int32")
        _stage_token(p, isa, values, staged, correction, 0, 0, 1, 1)
        for step in loop(steps):
            total = scratch(rows, "float32")
            partial = scratch(rows * chains, "int32")
            for v in T.unroll(len(vectors)):
                total[T.ramp(v * lanes, 1, lanes)] = T.broadcast(T.float32(0), lanes)
            for g in T.serial(p.full_groups):
                group(packed, staged, correction, x_scale, partial, total, step, g, p.group_slabs)
            if tail > 0:
                group(packed, staged, correction, x_scale, partial, total, step, p.full_groups, p.tail_slabs)
            store(packed, out, total, step)

    return kernel


def store_row_vector(isa: InstructionSet, rows: int, out: Any, token: Any, row: Any, y: Any) -> None:
    """Writes ``y`` to ``out[token, row : row + lanes]``, only as far as there are rows."""
    if rows % isa.lanes == 0 and rows % 32 == 0:
        T.buffer_store(out, y, [token, T.ramp(row, 1, isa.lanes)])
        return
    spill = scratch(isa.lanes, "float32")
    T.buffer_store(spill, y, [T.ramp(0, 1, isa.lanes)])
    with T.serial(T.max(T.min(isa.lanes, rows - row), 0)) as lane:
        T.buffer_store(out, spill[lane], [token, row + lane])


def gemm(
    operand: Operand,
    isa: InstructionSet,
    rows: int,
    tokens: int,
    chunk: int,
    prefetch: int,
    parallel: bool,
    parallel_stage: bool,
) -> PrimFunc:
    """Any number of tokens: weights are decoded once per group and row step and reused for a chunk of tokens.

    Where a chunk is a single tile, decoded weights are used at once instead of being kept, and a tile of half the width
    takes the tokens that it has room for.

    Args:
        operand: the packed weights.
        isa: the vector instructions.
        rows: rows per step, a multiple of 16 that divides the padded rows.
        tokens: tokens of the register tile, a multiple of the instructions' ``tokens_per_dot``.
        chunk: tokens whose fp32 sums are kept at once, a multiple of ``tokens``.
        prefetch: distance of the software prefetch in bytes, 0 for none.
        parallel: split the row steps over the thread pool.
        parallel_stage: split the staging of the tokens over the thread pool, too.
    """
    p = operand.problem
    lanes, vectors = isa.lanes, row_vectors(isa, rows)
    steps = p.row_blocks * SLAB // rows
    blocks = rows // SLAB
    group_width, tail = p.group_slabs * SLAB, p.columns % p.group
    loop = T.parallel if parallel else T.serial
    stage_loop = T.parallel if parallel_stage else T.serial
    packed_bytes = operand.packed_bytes + (4 * SLAB * p.row_blocks if p.bias else 0)
    scales = 1 if p.per_token else p.groups
    slab_bytes = FIELDS * len(vectors) * 4 * lanes
    together = isa.tokens_per_dot
    single = chunk == tokens
    # Fields that must be arranged are worth keeping, too.
    keeps = (operand.decodes and not single) or together > 1
    decoded_bytes = max(p.group_slabs, p.tail_slabs) * slab_bytes if keeps else 1
    narrow = tokens // 2 if single and tokens // 2 % together == 0 else 0
    last = scales - 1

    def decode(packed, decoded, step, g, slabs) -> None:
        """Fills ``decoded``: slab after slab, field after field, row vector after row vector."""
        for v, (block, half) in enumerate(vectors):
            address = T.Bind((step * blocks + block) * operand.block_bytes + g * operand.group_bytes)
            if half == 0:
                prefetch_group(operand, packed, address, slabs, prefetch)
            tables = operand.tables(isa, packed, address + 4 * half, slabs)
            with T.serial(slabs) as t:
                if half == 0:
                    prefetch_slab(operand, packed, address, slabs, t, prefetch)
                for f, w in enumerate(isa.arrange(operand.fields(isa, packed, address + 4 * half, t, tables))):
                    where = t * slab_bytes + (f * len(vectors) + v) * 4 * lanes
                    T.buffer_store(decoded, w, [T.ramp(where, 1, 4 * lanes)])

    def slab_fields(packed, decoded, addresses, tables, slabs, t) -> list[list[Any]]:
        """The fields of every row vector: ``[field][vector]``."""
        if keeps:
            return [
                [
                    decoded[T.ramp(t * slab_bytes + (f * len(vectors) + v) * 4 * lanes, 1, 4 * lanes)]
                    for v in range(len(vectors))
                ]
                for f in range(FIELDS)
            ]
        columns = []
        for (_, half), address, table in zip(vectors, addresses, tables, strict=True):
            if half == 0:
                prefetch_slab(operand, packed, address, slabs, t, prefetch)
            columns.append(operand.fields(isa, packed, address + 4 * half, t, table))
        return [list(field) for field in zip(*columns, strict=True)]

    def tile(
        packed, staged, correction, scale_stage, decoded, partial, sums, step, g, slabs, padded, first, local, width
    ) -> None:
        """One register tile: ``width`` tokens from ``first`` on times one group of all row vectors."""

        def where(m: int, v: int) -> Any:
            return T.ramp((m * len(vectors) + v) * lanes, 1, lanes)

        def total(m: int, v: int) -> Any:
            """The int32 sums of a token and row vector."""
            first, i = m // together * together, m % together
            return isa.by_token([partial[where(first + k, v)] for k in range(together)])[i]

        for m in range(width):
            start = T.Bind(isa.broadcast(correction[g * padded + first + m] if isa.offset else 0))
            for v in range(len(vectors)):
                T.buffer_store(partial, start, [where(m, v)])
        base = T.Bind(g * group_width * padded + first * (slabs * SLAB))
        addresses = [
            T.Bind((step * blocks + block) * operand.block_bytes + g * operand.group_bytes) for block, _ in vectors
        ]
        tables = []
        for (_, half), address in () if keeps else zip(vectors, addresses, strict=True):
            if half == 0:
                prefetch_group(operand, packed, address, slabs, prefetch)
            tables.append(operand.tables(isa, packed, address + 4 * half, slabs))
        with T.serial(slabs) as t:
            fields = slab_fields(packed, decoded, addresses, tables, slabs, t)
            for f in range(0, FIELDS, isa.pairs_per_dot):
                used = range(f, f + isa.pairs_per_dot)
                weights = {(k, v): T.Bind(fields[k][v]) for k in used for v in range(len(vectors))}
                for m in range(0, width, together):
                    source = base + m * (slabs * SLAB) + t * (SLAB * together)
                    quads = [T.Bind(quad) for quad in isa.load_values(staged, source, f)]
                    for v in range(len(vectors)):
                        places = [where(m + i, v) for i in range(together)]
                        totals = isa.multiply([partial[i] for i in places], [weights[k, v] for k in used], quads)
                        for place, y in zip(places, totals, strict=True):
                            T.buffer_store(partial, y, [place])
        scale = [
            T.Bind(operand.scale(isa, packed, step * blocks + block, address, half, slabs))
            for (block, half), address in zip(vectors, addresses, strict=True)
        ]
        for m in range(width):
            x = T.Bind(T.broadcast(scale_stage[T.min(g, last) * padded + first + m], lanes))
            for v in range(len(vectors)):
                target = T.ramp(((local + m) * len(vectors) + v) * lanes, 1, lanes)
                dot = T.cast(total(m, v), isa.float32)
                T.buffer_store(sums, fused_multiply_add(isa, dot, x * scale[v], sums[target]), [target])

    def multiply(
        packed, staged, correction, scale_stage, decoded, partial, sums, step, padded, start, count, left
    ) -> None:
        """A chunk of ``count`` tokens, of which ``left`` are no padding, times all groups of all row vectors."""

        def group(g, slabs, width) -> None:
            if keeps:
                decode(packed, decoded, step, g, slabs)
            with T.serial(1 if single else count // tokens) as i:
                tile(
                    packed, staged, correction, scale_stage, decoded, partial, sums,
                    step, g, slabs, padded, start + i * tokens, i * tokens, width,
                )  # fmt: skip

        def groups(width) -> None:
            with T.serial(p.full_groups) as g:
                group(g, p.group_slabs, width)
            if tail:
                group(p.full_groups, p.tail_slabs, width)

        if not narrow:
            groups(tokens)
            return
        with T.If(left > narrow):
            with T.Then():
                groups(tokens)
            with T.Else():
                groups(narrow)

    def store(packed, out, sums, step, token, local) -> None:
        for v in range(len(vectors)):
            row = T.Bind(step * rows + v * lanes)
            y = sums[T.ramp((local * len(vectors) + v) * lanes, 1, lanes)]
            if p.bias:
                y = y + load_float32(isa, packed, operand.packed_bytes + row * 4)
            store_row_vector(isa, p.rows, out, token, row, y)

    @T.prim_func(s_tir=True)
    def kernel(values_: T.handle, x_scale_: T.handle, packed_: T.handle, out_: T.handle):
        T.func_attr({"tirx.noalias": True})
        m_count = T.int32()
        values = T.match_buffer(values_, (m_count, p.columns), "int8", align=1)
        x_scale = T.match_buffer(x_scale_, (m_count, scales), "float32", align=4)
        packed = T.match_buffer(packed_, (packed_bytes,), "uint8", align=64)
        out = T.match_buffer(out_, (m_count, p.rows), "float32", align=4)
        padded: T.let = (m_count + tokens - 1) // tokens * tokens
        staged = T.alloc_buffer((p.slabs * SLAB * padded,), "int8")
        correction = T.alloc_buffer((p.groups * padded,), "int32")
        scale_stage = T.alloc_buffer((scales * padded,), "float32")
        for m in stage_loop(padded):
            row: T.let = T.min(m, m_count - 1)
            for s in T.serial(scales):
                scale_stage[s * padded + m] = x_scale[row, s]
            _stage_token(p, isa, values, staged, correction, row, m, padded, together)
        for step in loop(steps):
            sums = scratch(chunk * rows, "float32")
            decoded = scratch(decoded_bytes, "uint8")
            partial = scratch(tokens * rows, "int32")
            for part in T.serial((padded + chunk - 1) // chunk):
                start: T.let = part * chunk
                count: T.let = T.min(chunk, padded - start)
                for i in T.serial(count * len(vectors)):
                    sums[T.ramp(i * lanes, 1, lanes)] = T.broadcast(T.float32(0), lanes)
                multiply(
                    packed, staged, correction, scale_stage, decoded, partial, sums,
                    step, padded, start, count, m_count - start,
                )  # fmt: skip
                for i in T.serial(T.min(count, m_count - start)):
                    store(packed, out, sums, step, start + i, i)

    return kernel
