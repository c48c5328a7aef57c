"""``--dump-dir``: the graph after every pass as numbered text files."""

from __future__ import annotations

import re
from pathlib import Path

from lbllm_compile.checkpoint import check_writable
from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.passes.ir import dump
from lbllm_compile.passes.ir.program import Program
from lbllm_compile.passes.pipeline import PassRecord

_DUMP = re.compile(r"\d{3}_[a-z0-9-]+\.txt")
"""Names of the files that :class:`Dumps` writes, and may delete."""


def check_dump_dir(path: Path) -> None:
    """Checks that dumps may be written to ``path``, where earlier dumps are replaced; writes nothing.

    Raises:
        LbllmError: it holds files that are not such dumps, or cannot be written.
    """
    if not check_writable(path, "directory for dumps", "--dump-dir"):
        return
    foreign = sorted(p.name for p in path.iterdir() if not _DUMP.fullmatch(p.name) or not p.is_file())
    if foreign:
        raise LbllmError(f"{path} holds other files ('{foreign[0]}'); pass an empty --dump-dir")


class Dumps:
    """Numbered text files of the graph after every pass, in place of those of an earlier compile.

    Raises:
        LbllmError: the directory holds files that are not such dumps, or cannot be written.
    """

    def __init__(self, directory: Path | None):
        self._directory = directory
        if directory is None:
            return
        check_dump_dir(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for old in directory.iterdir():
            old.unlink()

    def write(self, record: PassRecord, program: Program) -> None:
        if self._directory is None:
            return
        header = (
            f"after {record.text} ({record.seconds:.1f} s, {record.nodes_before} -> {record.nodes_after} nodes,"
            f" {record.contract}, probe error {record.error:.3g})"
        )
        (self._directory / f"{record.index:03d}_{record.name}.txt").write_text(
            dump.render(program, header), encoding="utf-8"
        )
