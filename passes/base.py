"""What a pass is: a frozen dataclass with a name, typed options and a numeric contract."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Protocol

import torch
from pydantic import Field
from torch import Tensor

from ..codegen.errors import LbllmError
from ..codegen.progress import NoProgress, Progress
from .ir.program import CPU, Program


class PassError(LbllmError):
    """A pass refuses the program: a precondition does not hold. The message names the node and the way out."""


@dataclass(frozen=True)
class Contract:
    """What a pass promises about the program's outputs on the probe batch.

    ``exact``: bit-equal. ``bounded``: relative error (Frobenius norm of the difference over that of the output before)
    at most ``bound``. ``calibrating``: changes the model on purpose; the change is reported, not judged.

    A ``bounded`` pass may promise more of what it replaces: a relative error of at most ``each`` between a node and
    what takes its place, on the same inputs. It holds its result to that by :func:`.contracts.check_replaced`. Where
    that holds of some nodes alone, ``of`` says which, in words.
    """

    kind: str
    bound: float = 0.0
    each: float = math.inf
    of: str = ""

    def __str__(self) -> str:
        if self.kind != "bounded":
            return self.kind
        each = f", each {self.each:g}" if math.isfinite(self.each) else ""
        return f"bounded({self.bound:g}{each}{f' of {self.of}' if self.of else ''})"


EXACT = Contract("exact")
CALIBRATING = Contract("calibrating")


def bounded(bound: float, each: float = math.inf, of: str = "") -> Contract:
    return Contract("bounded", bound, each, of)


class Checkpoints(Protocol):
    """Finished pieces of work that survive a kill, by ``(stage, index)``; what is stored is never half-written."""

    def load(self, stage: str, index: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """``(tensors, metrics)`` of a finished piece, or None."""
        ...

    def save(self, stage: str, index: int, tensors: Mapping[str, Tensor], metrics: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class PassCheckpoints:
    """The checkpoints of one pass of a pipeline, which may name a pass twice.

    Attributes:
        kept: where they are.
        prefix: in front of every stage's name.
    """

    kept: Checkpoints
    prefix: str

    def load(self, stage: str, index: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return self.kept.load(self.prefix + stage, index)

    def save(self, stage: str, index: int, tensors: Mapping[str, Tensor], metrics: Mapping[str, Any]) -> None:
        self.kept.save(self.prefix + stage, index, tensors, metrics)


class NoCheckpoints:
    """Keeps nothing."""

    def load(self, stage: str, index: int) -> None:
        return None

    def save(self, stage: str, index: int, tensors: Mapping[str, Tensor], metrics: Mapping[str, Any]) -> None:
        pass


@dataclass
class PassContext:
    """What passes share besides the program.

    Attributes:
        teacher: the captured, unquantized program that calibrations imitate. Set by the driver after capture.
        calibration: the calibration set, one mapping from placeholder name to value per batch of equally long
            sequences (a language model's ``input_ids``, ``attention_mask``, ``position_ids``; a plain module's inputs).
        validation: held-out batches of the same kind, never trained on.
        probe: one small batch on which contracts are measured.
        target: target string, e.g. ``"cpu"``.
        seed: start of every generator a pass makes; passes never touch the global one.
        device: where calibrations compute. Programs, and what passes return, are on the CPU.
        progress, checkpoints: see the protocols.
        channel_weights: what errors in the layers' outputs weigh (:mod:`.calibrate.sensitivity`), by output, as the
            last pass before measured it that trains layer by layer (``distill``, or ``activate`` with epochs); passes
            that train all layers together (``activate`` without epochs, ``finetune``) measure the layers by it. Empty
            where no pass before has.
    """

    teacher: Program | None = None
    calibration: Sequence[Mapping[str, Any]] = ()
    validation: Sequence[Mapping[str, Any]] = ()
    probe: Mapping[str, Any] = field(default_factory=dict)
    target: str = "cpu"
    seed: int = 0
    device: torch.device = CPU
    progress: Progress = field(default_factory=NoProgress)
    checkpoints: Checkpoints = field(default_factory=NoCheckpoints)
    channel_weights: Mapping[str, Tensor] = field(default_factory=dict)

    def generator(self, stream: int) -> torch.Generator:
        """A generator of its own for ``stream`` (a layer index, say), a function of the seed alone."""
        return torch.Generator(device="cpu").manual_seed(self.seed * 1_000_003 + stream)


Count = Annotated[int, Field(ge=0)]
"""Type of an option that counts and may be 0."""

Positive = Annotated[int, Field(ge=1)]
"""Type of an option that counts from 1."""

Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""Type of an option for a learning rate or a weight; 0 switches it off."""

Share = Annotated[float, Field(ge=0, le=1)]
"""Type of an option for a share of the whole."""


@dataclass(frozen=True)
class PassResult:
    """What a pass gives back.

    Attributes:
        program: the rewritten program.
        rows: one JSON-able mapping per layer or site, for the report (errors, flip rates, ...).
        summary: JSON-able figures of the whole pass.
        channel_weights: for the passes behind, where this one measured them: see :class:`PassContext`.
    """

    program: Program
    rows: Sequence[Mapping[str, Any]] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)
    channel_weights: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Pass(ABC):
    """One rewrite. Subclasses are frozen dataclasses whose fields are the options of the pipeline text.

    Class attributes:
        name: kebab-case name in pipeline text.
        contract: see :class:`Contract`.
        sets_teacher: whether the program it returns is what calibrations imitate from then on.
    """

    name: ClassVar[str]
    contract: ClassVar[Contract] = EXACT
    sets_teacher: ClassVar[bool] = False

    def rehearsal(self) -> Pass:
        """The same pass with the least work that shows whether it would go through."""
        return self

    @abstractmethod
    def apply(self, program: Program, context: PassContext) -> PassResult:
        """Returns a new program; the one given stays as it was.

        Raises:
            PassError: a precondition does not hold; the message names the node.
        """


def batches_of(batch: Mapping[str, Any], size: int) -> Iterator[dict[str, Any]]:
    """Cuts a batch along its first dimension into pieces of at most ``size``."""
    count = next(v.shape[0] for v in batch.values() if isinstance(v, Tensor))
    for start in range(0, count, size):
        yield {k: v[start : start + size] if isinstance(v, Tensor) else v for k, v in batch.items()}
