"""How precisely calibration multiplies matrices.

Parameters, normalizations and sums stay float32; only matrix products are taken in bfloat16, in decoder layers and in
the output head, never for masks and rotary tables. Held-out errors are always measured in float32.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor

from ..ir.program import CPU

Precision = Literal["auto", "float32", "bfloat16"]
"""``auto`` is bfloat16 where the device multiplies it natively, else float32."""


def uses_bfloat16(precision: Precision, device: torch.device = CPU) -> bool:
    """Whether products are taken in bfloat16."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def matrix_products(precision: Precision, device: torch.device = CPU) -> AbstractContextManager[object]:
    """A context in which matrix products on a device have the given precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bfloat16(precision, device))


def restored(value: Any, precision: Precision) -> Any:
    """A stage's output as float32 where its last operation was a bfloat16 product."""
    lowered = isinstance(value, Tensor) and value.dtype is torch.bfloat16 and uses_bfloat16(precision, value.device)
    return value.float() if lowered else value
