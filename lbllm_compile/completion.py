"""What a shell offers for the values of options and arguments: names that are known without importing torch or TVM."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import typer

from lbllm_compile.codegen.targets import known_targets
from lbllm_compile.manifest import ArtifactError, read_manifest
from lbllm_compile.passes import registry

Completion = Callable[[str], list[str]]
"""From what was typed so far to what it may become."""

_STORED_PASS = re.compile(r"passes/\d{3}_([a-z0-9-]+)\.json")


def one_of(choices: Iterable[Any]) -> Completion:
    """Completes one of some values."""
    words = [str(choice) for choice in choices]

    def complete(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return complete


def targets(incomplete: str) -> list[str]:
    """Completes the last of the targets that stand there, joined by commas."""
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{target}" for target in known_targets() if target.startswith(last)]


def pass_names(incomplete: str) -> list[str]:
    """Completes the name of a pass."""
    return one_of(registry.names())(incomplete)


def stored_passes(ctx: typer.Context, incomplete: str) -> list[str]:
    """Completes the name of a pass whose graph the artifact on the command line keeps; nothing where there is none."""
    # In front of a value that is yet to come, a line is no whole one, and its words are left as they are.
    for word in (ctx.params.get("directory"), *ctx.args):
        try:
            manifest, _ = read_manifest(Path(word or ""))
        except ArtifactError:
            continue
        names = (match[1] for name in sorted(manifest["files"]) if (match := _STORED_PASS.fullmatch(name)))
        return one_of(names)(incomplete)
    return []
