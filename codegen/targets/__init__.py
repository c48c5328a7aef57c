"""What code is generated for: a target string becomes a :class:`Target`."""

from __future__ import annotations

import difflib
import platform
from dataclasses import dataclass
from typing import Any

from ..errors import TargetError
from . import arm, cuda, generic, host, x86


@dataclass(frozen=True)
class Target:
    """A machine to generate code for.

    Attributes:
        kind: ``"cpu"`` or ``"cuda"``.
        name: canonical text, e.g. ``"cpu:avx512-vnni"`` or ``"cuda:sm_90"``; :meth:`parse` takes it back.
        family: instruction set: ``"generic"``, ``"cuda"``, or one that :mod:`.x86` or :mod:`.arm` names.
        arch: LLVM ``mcpu`` or CUDA architecture.
        features: LLVM ``mattr``, empty for CUDA.
        triple: LLVM ``mtriple`` of an architecture that is not this machine's; empty for code that could run here.
    """

    kind: str
    name: str
    family: str
    arch: str
    features: tuple[str, ...] = ()
    triple: str = ""

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
        """Whether this machine's CPU has the instructions (always False for CUDA, which is asked for elsewhere)."""
        return self.kind == "cpu" and self.family in host.families()

    def check_runs_here(self) -> None:
        """Refuses a target whose kernels cannot be proven and used on this machine.

        Raises:
            TargetError: this machine's CPU cannot run them.
        """
        if not self.runs_here:
            raise TargetError(f"this machine cannot run {self.name}; its own targets: {', '.join(runnable_targets())}")

    @classmethod
    def parse(cls, text: str) -> Target:
        """Parses one target: ``cpu`` (the best family of this machine), ``cpu:FAMILY``, ``cuda`` or ``cuda:sm_NN``.

        Raises:
            TargetError: unknown target, with the nearest known one.
        """
        kind, _, detail = text.strip().partition(":")
        if kind == "cpu":
            family = detail or host.families()[0]
            for cpu in (x86, arm):
                if family in cpu.ARCHITECTURES:
                    arch, features = cpu.ARCHITECTURES[family]
                    triple = "" if platform.machine() in cpu.MACHINES else cpu.TRIPLE
                    return cls("cpu", f"cpu:{family}", family, arch, features, triple)
            if family == generic.FAMILY:
                return cls("cpu", f"cpu:{family}", family, *generic.architecture())
        if kind == "cuda":
            arch = detail or cuda.DEFAULT_ARCHITECTURES[0]
            if arch in cuda.ARCHITECTURES:
                return cls("cuda", f"cuda:{arch}", "cuda", arch)
        near = difflib.get_close_matches(text.strip(), known_targets(), 1, 0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise TargetError(f"unknown target {text.strip()!r}; {hint}known targets: {', '.join(known_targets())}")


def parse_targets(text: str) -> tuple[Target, ...]:
    """Parses a comma-separated list of targets, duplicates removed.

    A plain ``cuda`` stands for the usual architectures, and ``cuda:sm_80,sm_90`` names two.

    Raises:
        TargetError: an unknown or missing target.
    """
    targets: list[Target] = []
    for part in (p.strip() for p in text.split(",")):
        if part.startswith(("cuda", "sm_")):
            targets += [Target.parse(f"cuda:{arch}") for arch in cuda.parse_architectures(part)]
        else:
            targets.append(Target.parse(part))
    return tuple(dict.fromkeys(targets))


def known_targets() -> list[str]:
    """Every text :meth:`Target.parse` accepts."""
    families = [*x86.ARCHITECTURES, *arm.ARCHITECTURES, generic.FAMILY]
    return ["cpu", *(f"cpu:{f}" for f in families), "cuda", *(f"cuda:{a}" for a in cuda.ARCHITECTURES)]


def runnable_targets() -> list[str]:
    """The CPU targets whose kernels this machine runs, best first."""
    return [f"cpu:{family}" for family in host.families()]
