"""Linears for any LLVM target, 16-bit activations included: plain loops, left to LLVM's vectorizer.

Packed layout of W(1+1) weights: row after row, group after group; per group, of ``w`` columns and ``q = ceil(w / 4)``:

* ``q`` bytes of codes: the 2-bit field ``f`` of byte ``i`` is column ``f * q + i``;
* 4 int8 levels;
* the scale, fp32, because not every target converts fp16.

4-bit weights: likewise, with ``q = ceil(w / 2)`` bytes of two codes each and no levels of the group; the 16 levels of
the matrix follow the rows. Int8 weights: the rows as they are, then their fp32 scales. The bias, fp32, comes last.
"""

# No postponed annotations here: TVMScript evaluates the annotations of its functions itself.
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..format import TABLE_LEVELS, Int4Weight, QuantizedWeight, Weight
from ..reference import value_dtype
from ..sizes import group_count
from ..spec import LinearSpec
from ..tvm_api import PrimFunc, T, pure_intrinsic
from .memory import scratch

LEVEL_BYTES = 4
SCALE_BYTES = 4


@dataclass(frozen=True)
class PortableLinear:
    """Layout and code of one linear.

    Attributes:
        spec: what is computed.
    """

    spec: LinearSpec

    @property
    def group(self) -> int:
        return self.spec.group or self.spec.in_features

    @property
    def group_bytes(self) -> int:
        """Bytes of a full group of a row."""
        return self._bytes_of(self.group)

    @property
    def row_bytes(self) -> int:
        tail = self.spec.in_features % self.group
        return self.spec.in_features // self.group * self.group_bytes + (self._bytes_of(tail) if tail else 0)

    @property
    def fields(self) -> int:
        """Codes in a byte."""
        return {"bit": 4, "int4": 2, "int8": 1}[self.spec.kind]

    def _bytes_of(self, width: int) -> int:
        """Bytes of a group of a row."""
        count = group_count(width, self.fields)
        return count + {"bit": LEVEL_BYTES + SCALE_BYTES, "int4": SCALE_BYTES, "int8": 0}[self.spec.kind]

    @property
    def side_start(self) -> int:
        """Where the row scales of int8 weights or the levels of 4-bit weights start, in bytes."""
        return self.spec.out_features * self.row_bytes

    @property
    def bias_start(self) -> int:
        sides = {"bit": 0, "int4": TABLE_LEVELS, "int8": SCALE_BYTES * self.spec.out_features}
        return self.side_start + sides[self.spec.kind]

    @property
    def packed_bytes(self) -> int:
        return self.bias_start + (SCALE_BYTES * self.spec.out_features if self.spec.bias else 0)

    def pack(self, weight: Weight, bias: Tensor | None) -> Tensor:
        """The layout above, ``uint8 [packed_bytes]``."""
        if isinstance(weight, QuantizedWeight):
            pieces = [self._pack_codes(weight.codes(), weight.levels.contiguous().view(torch.uint8), weight.scale)]
        elif isinstance(weight, Int4Weight):
            codes = weight.codes()
            none = codes.new_empty((*weight.scale.shape, 0))
            pieces = [self._pack_codes(codes, none, weight.scale), weight.table.view(torch.uint8)]
        else:
            pieces = [weight[0].contiguous().view(torch.uint8).flatten(), weight[1].float().view(torch.uint8)]
        if bias is not None:
            pieces.append(bias.float().contiguous().view(torch.uint8))
        return torch.cat(pieces)

    def _pack_codes(self, codes: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
        """Codes ``[N, K]`` and, of their groups, bytes ``[N, G, L]`` and scales ``[N, G]`` as ``uint8 [bytes]``."""
        split = self.spec.in_features // self.group
        columns = split * self.group
        parts = []
        if split:
            parts.append(_pack_groups(codes[:, :columns], levels[:, :split], scale[:, :split], self.fields))
        if columns < self.spec.in_features:
            parts.append(_pack_groups(codes[:, columns:], levels[:, split:], scale[:, split:], self.fields))
        return torch.cat(parts, 1).flatten()

    def function(self, rows: int, parallel: bool) -> PrimFunc:
        """The kernel ``(values, x_scale, packed, out)`` for any number of tokens.

        Args:
            rows: rows per step.
            parallel: split the steps over the thread pool.
        """
        spec, group = self.spec, self.group
        n, k = spec.out_features, spec.in_features
        full, tail = k // group, k % group
        scales = spec.x_scales
        row_bytes, group_bytes = self.row_bytes, self.group_bytes
        dtype = str(value_dtype(spec.act_bits)).removeprefix("torch.")
        loop = T.parallel if parallel else T.serial
        steps = -(-n // rows)
        decoded_bytes = self.fields * group_count(min(group, k), self.fields)

        def decode(packed: Any, decoded: Any, start: Any, width: int) -> Any:
            """Fills ``decoded`` with a group's weights and returns its scale."""
            if spec.kind == "int8":
                with T.serial(width) as i:
                    T.buffer_store(decoded, T.reinterpret("int8", packed[start + i]), [i])
                return None
            quarter = group_count(width, self.fields)
            if spec.kind == "int4":
                for field in range(2):
                    with T.serial(quarter) as i:
                        code = T.Bind((packed[start + i] >> T.uint8(4 * field)) & T.uint8(15))
                        level = packed[self.side_start + T.cast(code, "int32")]
                        T.buffer_store(decoded, T.reinterpret("int8", level), [field * quarter + i])
                return _float_at(packed, start + quarter)
            levels = [T.Bind(T.reinterpret("int8", packed[start + quarter + code])) for code in range(4)]
            for field in range(4):
                with T.serial(quarter) as i:
                    code = T.Bind((packed[start + i] >> T.uint8(2 * field)) & T.uint8(3))
                    lower = T.Select(code == T.uint8(0), levels[0], levels[1])
                    upper = T.Select(code == T.uint8(2), levels[2], levels[3])
                    T.buffer_store(decoded, T.Select(code < T.uint8(2), lower, upper), [field * quarter + i])
            return _float_at(packed, start + quarter + LEVEL_BYTES)

        def accumulate(values, x_scale, packed, out, decoded, total, tokens, row, g, width) -> None:
            """Adds one group of one row to every token's output."""
            scale = decode(packed, decoded, T.Bind(row * row_bytes + g * group_bytes), width)
            if scale is None:
                scale = _float_at(packed, self.side_start + row * SCALE_BYTES)
            scale = T.Bind(scale)
            with T.serial(tokens) as m:
                T.buffer_store(total, 0, [0])
                with T.serial(width) as i:
                    product = T.cast(values[m, g * group + i], "int32") * T.cast(decoded[i], "int32")
                    T.buffer_store(total, total[0] + product, [0])
                x = T.Bind(x_scale[m, 0 if scales == 1 else g] * scale)
                dot = T.cast(total[0], "float32")
                T.buffer_store(out, pure_intrinsic("float32", "llvm.fma", dot, x, out[m, row]), [m, row])

        @T.prim_func(s_tir=True)
        def kernel(values_: T.handle, x_scale_: T.handle, packed_: T.handle, out_: T.handle):
            T.func_attr({"tirx.noalias": True})
            tokens = T.int32()
            values = T.match_buffer(values_, (tokens, k), dtype, align=1)
            x_scale = T.match_buffer(x_scale_, (tokens, scales), "float32", align=4)
            packed = T.match_buffer(packed_, (self.packed_bytes,), "uint8", align=4)
            out = T.match_buffer(out_, (tokens, n), "float32", align=4)
            for step in loop(steps):
                decoded = scratch(decoded_bytes, "int8")
                total = scratch(1, "int32")
                for r in T.serial(T.min(rows, n - step * rows)):
                    row: T.let = step * rows + r
                    for m in T.serial(tokens):
                        out[m, row] = T.float32(0)
                    for g in T.serial(full):
                        accumulate(values, x_scale, packed, out, decoded, total, tokens, row, g, group)
                    if tail > 0:
                        accumulate(values, x_scale, packed, out, decoded, total, tokens, row, full, tail)
                    if spec.bias:
                        for m in T.serial(tokens):
                            out[m, row] = out[m, row] + _float_at(packed, self.bias_start + row * SCALE_BYTES)

        return kernel


def _float_at(packed: Any, address: Any) -> Any:
    """An unaligned fp32 number in a byte buffer."""
    return T.reinterpret("float32", packed[T.ramp(address, 1, 4)])


def _pack_groups(codes: Tensor, levels: Tensor, scale: Tensor, count: int) -> Tensor:
    """Equal groups, ``count`` codes a byte: ``codes [N, G * width]``, ``levels`` as bytes ``[N, G, L]``,
    ``scale [N, G]`` to ``uint8 [N, bytes]``."""
    n, groups = scale.shape
    width = codes.shape[1] // groups
    fields = F.pad(codes.reshape(n, groups, width), (0, -width % count)).reshape(n, groups, count, -1)
    packed = fields[:, :, 0]
    for field in range(1, count):
        packed = packed | (fields[:, :, field] << (8 // count * field))
    scales = scale.float().contiguous().view(torch.uint8).reshape(n, groups, SCALE_BYTES)
    return torch.cat([packed, levels, scales], -1).flatten(1)
