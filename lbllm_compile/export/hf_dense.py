"""``hf-dense``: a folder of transformers' form, with plain weights in place of planes and levels.

Configuration, tokenizer and ``model.safetensors`` are what the original model's folder has, so whatever reads that
reads this. Weights have 16 bits instead of two and a fraction: it is for engines, not for disks. transformers writes
the files, experts one by one as checkpoints have them.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lbllm_compile.export.form import DTYPES, Form, round_weights, rounded
from lbllm_compile.export.original import Original
from lbllm_compile.frontend.loading import quiet_transformers
from lbllm_compile.passes.ir.program import Program


class HfDense(Form):
    """A folder that transformers' ``from_pretrained`` reads, and every engine that reads such folders."""

    def __init__(self, program: Program, original: Original, dtype: str, kind: str | None = None):
        super().__init__(program, original, dtype, kind)
        round_weights(original.module, lambda path, tensor: rounded(path, tensor, dtype))

    @property
    def nbytes(self) -> int:
        return sum(p.numel() for p in self.original.module.parameters()) * DTYPES[self.dtype].itemsize

    def facts(self) -> Mapping[str, Any]:
        return {"weights": f"all in {self.dtype}"}

    def write(self, path: Path) -> None:
        module = self.original.module.to(DTYPES[self.dtype])
        # Left out by what loaded the module, which had no checkpoint to convert: how checkpoints of it are laid out.
        vars(module).pop("_weight_conversions", None)
        with quiet_transformers():
            module.save_pretrained(path)
            if self.program.tokenizer is not None:
                self.program.tokenizer.save_pretrained(path)
        for file in path.glob("*.safetensors"):
            shutil.copymode(path / "config.json", file)  # safetensors lets nobody else read its files
