"""What can be asked of a compile. No heavy imports: the command line builds its options from here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.codegen.sizes import MAX_SEED


class OptionError(LbllmError):
    """An option has a value it cannot have, or two options contradict each other."""


@dataclass(frozen=True)
class CompileOptions:
    """What the command line of a compile can say.

    Attributes:
        model: a ``model.py``, a Hugging Face directory, a ``.gguf`` file or a hub id as ``hf:ORG/NAME``.
        target: what to generate kernels for; several separated by commas.
        out: the directory to write; ``<model name>-lbllm`` by default.
        recipe, preset: see :mod:`lbllm_compile.recipe`.
        pipeline: pipeline text instead of the recipe's.
        calibration: calibration text; the model's own samples by default.
        group, act_bits, kv_bits, keep_dense: override the recipe's.
        context: tokens that a language model shall attend to at most, see :func:`lbllm_compile.frontend.capture`.
        device: where calibrations compute and the model samples its calibration text: ``auto``, ``cpu`` or ``cuda``.
        work_dir: where finished layers are kept until the compile is done; ``<out>.lbllm-work`` by default.
        seed: of every random choice.
        dump_dir: where to write the graph after every pass, as text.
        fresh: start over instead of resuming.
    """

    model: str
    target: str = "cpu"
    out: Path | None = None
    recipe: str | None = None
    preset: str | None = None
    pipeline: str | None = None
    calibration: str | None = None
    group: int | None = None
    act_bits: int | None = None
    kv_bits: int | None = None
    keep_dense: tuple[str, ...] = ()
    context: int | None = None
    device: str = "auto"
    work_dir: Path | None = None
    seed: int = 0
    dump_dir: Path | None = None
    print_after: tuple[str, ...] = ()
    time_passes: bool = False
    fresh: bool = False

    def __post_init__(self) -> None:
        """Takes paths as text and text as paths.

        Raises:
            OptionError: the seed is out of range.
        """
        object.__setattr__(self, "model", str(self.model))
        for name in ("out", "work_dir", "dump_dir"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, Path(getattr(self, name)))
        if not 0 <= self.seed <= MAX_SEED:
            raise OptionError(f"--seed cannot be {self.seed}; choose 0 to {MAX_SEED}")
