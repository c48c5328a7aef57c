"""What code is generated for: a target string becomes a :class:`Target`."""

from __future__ import annotations

import difflib
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Protocol

from ..errors import TargetError
from . import arm, cuda, generic, host, x86

ENTRY_POINT_GROUP = "lbllm_compile.backends"
"""Installed packages name a function here, under the kind of their targets, that registers their backend."""


@dataclass(frozen=True)
class Target:
    """A machine to generate code for.

    Attributes:
        kind: what a target's text begins with: ``"cpu"``, ``"cuda"``, or the name of another backend.
        name: canonical text, e.g. ``"cpu:avx512-vnni"`` or ``"cuda:sm_90"``; :meth:`parse` takes it back.
        family: instruction set: on CPUs ``"generic"`` or one that :mod:`.x86` or :mod:`.arm` names.
        arch: LLVM ``mcpu`` or CUDA architecture.
        features: LLVM ``mattr``, empty for CUDA.
        triple: LLVM ``mtriple`` of an architecture that is not this machine's; empty for code that could run here.
        device: the number of the device that was asked for, where a machine may have several; None for any.
    """

    kind: str
    name: str
    family: str
    arch: str
    features: tuple[str, ...] = ()
    triple: str = ""
    device: int | None = None

    @property
    def llvm(self) -> dict[str, Any]:
        """TVM's target description of a CPU target."""
        description: dict[str, Any] = {"kind": "llvm"}
        if self.triple:
            description["mtriple"] = self.triple
        if self.arch:
            description["mcpu"] = self.arch
        if self.features:
            description["mattr"] = list(self.features)
        return description

    @property
    def runs_here(self) -> bool:
        """Whether kernels for it can be proven and used on this machine."""
        return _kind(self.kind).runs_here(self)

    def check_runs_here(self) -> None:
        """Refuses a target whose kernels cannot be proven and used on this machine.

        Raises:
            TargetError: this machine cannot run them.
        """
        if not self.runs_here:
            lacks = _kind(self.kind).lacks(self)
            raise TargetError(
                f"this machine cannot run {self.name}{lacks and f': {lacks}'}; its own targets:"
                f" {', '.join(runnable_targets())}"
            )

    @classmethod
    def parse(cls, text: str) -> Target:
        """Parses one target, e.g. ``cpu`` (the best family of this machine), ``cpu:FAMILY``, ``cuda`` (the device that
        is present), ``cuda:N`` (the device of that number) or ``cuda:sm_NN``.

        Raises:
            TargetError: unknown target, with the nearest known one; or this machine has no such device.
        """
        return _parse(text.strip())[0]


class TargetKind(Protocol):
    """The targets of one backend.

    Attributes:
        name: what their texts begin with.
    """

    name: str

    def parse(self, detail: str) -> Sequence[Target]:
        """What a text means whose part behind the colon is ``detail``; without one the usual targets, the best first.

        Raises:
            LookupError: there is no such target.
        """
        ...

    def known(self) -> Sequence[str]:
        """Texts that :meth:`parse` takes, the name included, to be offered and listed."""
        ...

    def runs_here(self, target: Target) -> bool:
        """Whether kernels for one of them can be proven and used on this machine."""
        ...

    def lacks(self, target: Target) -> str:
        """What this machine lacks to run one of them, in words; empty where its name says that."""
        ...


class CpuKind:
    """CPUs, by instruction set. Implements :class:`TargetKind`."""

    name = "cpu"

    def parse(self, detail: str) -> list[Target]:
        family = detail or host.families()[0]
        for cpu in (x86, arm):
            if family in cpu.ARCHITECTURES:
                arch, features = cpu.ARCHITECTURES[family]
                triple = "" if platform.machine() in cpu.MACHINES else cpu.TRIPLE
                return [Target(self.name, f"{self.name}:{family}", family, arch, features, triple)]
        if family == generic.FAMILY:
            return [Target(self.name, f"{self.name}:{family}", family, *generic.architecture())]
        raise LookupError(family)

    def known(self) -> list[str]:
        families = [*x86.ARCHITECTURES, *arm.ARCHITECTURES, generic.FAMILY]
        return [self.name, *(f"{self.name}:{family}" for family in families)]

    def runs_here(self, target: Target) -> bool:
        return target.family in host.families()

    def lacks(self, target: Target) -> str:
        return ""


class CudaKind:
    """NVIDIA GPUs, by architecture or as the devices of this machine. Implements :class:`TargetKind`."""

    name = "cuda"

    def parse(self, detail: str) -> list[Target]:
        number = int(detail) if detail.isdecimal() else None
        if number is not None:
            found: Sequence[str] = [cuda.device(number).arch]
        elif detail:
            found = [detail]
        else:
            known = [device.arch for device in cuda.present().devices if device.arch in cuda.ARCHITECTURES]
            found = known[:1] or cuda.DEFAULT_ARCHITECTURES
        cuda.check_architectures(found)
        return [Target(self.name, f"{self.name}:{arch}", self.name, arch, device=number) for arch in found]

    def known(self) -> list[str]:
        # PTX is left out, which few ask for: messages have this list.
        details = (*range(len(cuda.present().devices)), *cuda.ARCHITECTURES)
        return [self.name, *(f"{self.name}:{detail}" for detail in details)]

    def runs_here(self, target: Target) -> bool:
        return cuda.ordinal(target.arch, target.device) is not None

    def lacks(self, target: Target) -> str:
        found = cuda.present()
        return found.missing or f"its CUDA devices are {cuda.described(found.devices)}"


_KINDS: dict[str, TargetKind] = {"cpu": CpuKind(), "cuda": CudaKind()}


def register_kind(kind: TargetKind) -> None:
    """Makes a kind of targets known; one of the same name is replaced."""
    _KINDS[kind.name] = kind


def _kind(name: str) -> TargetKind:
    """The kind of that name, of an installed package's backend too.

    Raises:
        LookupError: there is none.
    """
    if name not in _KINDS:
        for point in entry_points(group=ENTRY_POINT_GROUP, name=name):
            point.load()()
    return _KINDS[name]


def _kinds() -> list[TargetKind]:
    """The kinds that are built in or registered, then those of installed packages."""
    points = sorted(point.name for point in entry_points(group=ENTRY_POINT_GROUP))
    return [_kind(name) for name in dict.fromkeys([*_KINDS, *points])]


def parse_targets(text: str) -> tuple[Target, ...]:
    """Parses a comma-separated list of targets, duplicates removed.

    A plain ``cuda`` stands for the usual architectures. What names no kind belongs to the one in front of it, so
    ``cuda:sm_80,sm_90`` names two.

    Raises:
        TargetError: an unknown or missing target.
    """
    targets: list[Target] = []
    kind = ""
    for part in (p.strip() for p in text.split(",")):
        if part and ":" not in part and kind and not _is_kind(part):
            targets += _parse(f"{kind}:{part}")
        else:
            targets += _parse(part)
            kind = part.partition(":")[0]
    return tuple(dict.fromkeys(targets))


def _is_kind(name: str) -> bool:
    return name in _KINDS or bool(entry_points(group=ENTRY_POINT_GROUP, name=name))


def _parse(text: str) -> Sequence[Target]:
    """What one text means, the best first.

    Raises:
        TargetError: unknown target, with the nearest known one.
    """
    name, colon, detail = text.partition(":")
    try:
        if colon and not detail:
            raise LookupError(text)
        return _kind(name).parse(detail)
    except LookupError:
        known = known_targets()
        near = difflib.get_close_matches(text, known, 1, 0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise TargetError(f"unknown target {text!r}; {hint}known targets: {', '.join(known)}") from None


def known_targets() -> list[str]:
    """Every text :meth:`Target.parse` accepts."""
    return [text for kind in _kinds() for text in kind.known()]


def runnable_targets() -> list[str]:
    """The CPU targets whose kernels this machine runs, best first."""
    return [f"cpu:{family}" for family in host.families()]
