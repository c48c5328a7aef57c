"""An artifact's manifest: which files belong to it, and whether they are the files that were written.

Needs no torch, so that what is stored for an artifact can be trusted before anything heavy is imported.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lbllm_compile.codegen.cache import sha256
from lbllm_compile.codegen.errors import LbllmError

FORMAT = "lbllm-artifact"
VERSION = 1

MANIFEST = "manifest.json"
"""The file of an artifact that lists all others."""

QUANT_METHOD = "lbllm"
"""What the configuration of an artifact names as its quantization method, for libraries that read those."""

TOKENIZER_PREFIXES = (
    "tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template", "spiece", "config", "generation",
)  # fmt: skip
"""Starts of file names that a tokenizer library reads when it finds them; only listed ones may be there."""

_MAX_MANIFEST = 4 << 20
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,150}")
_HASH = re.compile(r"[0-9a-f]{64}")


class ArtifactError(LbllmError):
    """A directory that is not a whole, unaltered artifact of a version this build reads, or cannot be written."""


def is_artifact(directory: Path) -> bool:
    """Whether a directory says that it is one of ours (of any version)."""
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes()[:_MAX_MANIFEST])
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def read_manifest(directory: Path) -> tuple[dict[str, Any], str]:
    """The manifest of an artifact, and its SHA-256, which stands for the whole artifact.

    Raises:
        ArtifactError: the directory is no artifact of this version.
    """
    path = directory / MANIFEST
    if not directory.is_dir():
        raise ArtifactError(f"there is no artifact at '{directory}'; name the directory that a compile wrote")
    if path.is_symlink() or not path.is_file():
        raise ArtifactError(f"'{directory}' is not an lbllm artifact (it has no {MANIFEST})")
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_MANIFEST + 1)
        manifest = json.loads(content)
    except OSError as error:
        raise ArtifactError(f"cannot read '{path}': {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"'{path}' is damaged; copy or compile the artifact again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArtifactError(f"'{directory}' is not an lbllm artifact")
    if manifest.get("version") != VERSION:
        raise ArtifactError(
            f"'{directory}' has format version {str(manifest.get('version'))[:20]}, this build reads version {VERSION};"
            " compile the model again or use the matching lbllm-compile"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise ArtifactError(f"'{path}' lists no files; copy or compile the artifact again")
    return manifest, hashlib.sha256(content).hexdigest()


def check_file(directory: Path, name: str, entry: Any, checksum: Callable[[Path], str] = sha256) -> None:
    """One file of the manifest: inside the directory, no link, and with the size and hash that are listed.

    Args:
        directory: the artifact.
        name, entry: of the file in the manifest.
        checksum: gives a file's SHA-256.

    Raises:
        ArtifactError: it is another file, or missing.
    """
    parts = name.split("/")
    if len(parts) > 4 or any(not _PART.fullmatch(p) for p in parts):
        raise ArtifactError(f"'{directory}' lists the file {name[:100]!r}, which is not a plain name inside it")
    path = directory
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise ArtifactError(f"'{path}' is a link; an artifact consists of plain files")
    if not isinstance(entry, dict) or not isinstance(entry.get("bytes"), int) or not _is_hash(entry.get("sha256")):
        raise ArtifactError(f"'{directory / MANIFEST}' is damaged at {name!r}; copy or compile the artifact again")
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ArtifactError(f"'{path}' is no plain file; copy or compile the artifact again")
        size = found.st_size
        if size != entry["bytes"]:
            raise ArtifactError(
                f"'{path}' has {size} bytes instead of {entry['bytes']}; copy or compile the artifact again"
            )
        if checksum(path) != entry["sha256"]:
            raise ArtifactError(f"'{path}' was altered (its SHA-256 differs); copy or compile the artifact again")
    except FileNotFoundError as error:
        raise ArtifactError(f"'{path}' is missing; copy or compile the artifact again") from error
    except OSError as error:
        raise ArtifactError(f"cannot read '{path}': {error.strerror or error}") from error


def check_files(directory: Path, checksum: Callable[[Path], str] = sha256) -> tuple[dict[str, Any], str]:
    """What the manifest says of every file, and the manifest's SHA-256, after a check of all files.

    Args:
        directory: the artifact.
        checksum: gives a file's SHA-256.

    Raises:
        ArtifactError: the directory is no whole, unaltered artifact of this version.
    """
    manifest, digest = read_manifest(directory)
    files = manifest["files"]
    for name, entry in files.items():
        check_file(directory, name, entry, checksum)
    for path in directory.iterdir():
        if path.name not in files and path.name.startswith(TOKENIZER_PREFIXES):
            raise ArtifactError(f"'{path}' is not part of the artifact; remove it")
    return files, digest


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and _HASH.fullmatch(value) is not None
