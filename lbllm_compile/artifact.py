"""The artifact: a directory of safetensors and JSON that holds a compiled model and everything that made it.

========================  =============================================================================================
``manifest.json``         format, version, and size and SHA-256 of every other file
``program.json``          kind and name of the program, and facts that passes recorded
``graph.json``            the lowered graph (:mod:`lbllm_compile.passes.ir.graph_json`)
``passes/NNN_name.json``  the graph after every pass
``measured.json``         what the passes measured: errors per layer, flip rates of planes
``model.safetensors``     weights in canonical form, under their original module paths (several shards if large, with
                          ``model.safetensors.index.json``)
``config.json``           the model's configuration, with ``lbllm`` as its quantization method; tokenizer files lie
                          beside it
``lbllm.lock``            what made it: hashes of model and calibration, pipeline, versions, seed
``tuning.json``           schedules that the search found
``kernels/``              generated kernels, for reading only; never compiled or loaded from here
``report.json``           what the compile took and gave (:class:`lbllm_compile.records.CompileReport`), measured on the
                          finished artifact and therefore not in the manifest, whose SHA-256 it names
``report.html``           the same for people, and more (:mod:`lbllm_compile.html_report`); not in the manifest either
========================  =============================================================================================

Nothing in an artifact is code, and nothing in it is trusted: every file is checked against the manifest, every weight
against the format, every graph against an allow-list of operators.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lbllm_compile.codegen import operators
from lbllm_compile.codegen.cache import (
    cache_directory,
    exchange,
    known_sha256,
    read_sha256,
    sha256,
    sync,
    write_atomically,
    write_failure,
)
from lbllm_compile.codegen.errors import LbllmError, first_line
from lbllm_compile.codegen.operators import Arguments
from lbllm_compile.codegen.operators.lbllm.linears import INT8_WEIGHT
from lbllm_compile.codegen.operators.registry import OperatorError
from lbllm_compile.codegen.tune.database import check_schedule, spec_from_fields
from lbllm_compile.manifest import (
    FORMAT,
    MANIFEST,
    QUANT_METHOD,
    TOKENIZER_PREFIXES,
    VERSION,
    ArtifactError,
    check_file,
    check_files,
    is_artifact,
    read_manifest,
)
from lbllm_compile.passes.contracts import Propagation, describe
from lbllm_compile.passes.ir import dump, graph_json
from lbllm_compile.passes.ir.program import STATE, Program
from lbllm_compile.passes.ir.rewrite import calls, constant, is_stored
from lbllm_compile.passes.lower import check_weights
from lbllm_compile.plain import plain
from lbllm_compile.records import CompileReport, MeasuredPass

QUANTIZATION = "quantization_config"
"""Key of a stored configuration under which transformers looks for how weights are quantized."""

INDEX = "model.safetensors.index.json"
"""The file that says which shard a weight is in, where there are several."""

MEASUREMENTS = "measured.json"
REPORT, REPORT_FORMAT = "report.json", "lbllm-report"
SHARD_BYTES = 2 << 30
"""Weights beyond this go into several safetensors files."""

MAX_COMPUTED = 1 << 30
"""Bytes of all tensors that a graph may make of a few tokens or a small batch, beside what its weights account for."""

_PROBES = ((2, 3, 4), (11, 5, 1))
"""Sequences, new tokens and past ones that a graph is tried for. The two have no factor in common, so that no size is
right by chance, and neither has more tokens than any model takes."""

_MAX_JSON = 64 << 20
_OURS = re.compile(
    rf"(passes|kernels)/|({'|'.join(TOKENIZER_PREFIXES)})[^/]*$|model(-\d+-of-\d+)?\.safetensors$"
    r"|model\.safetensors\.index\.json$"
    r"|(manifest|program|graph|measured|tuning)\.json$|lbllm\.lock$"
)
"""Names that files of an artifact have."""


@dataclass(frozen=True)
class Artifact:
    """A checked artifact in memory.

    Attributes:
        directory: where it was read from.
        program: the lowered program with its tokenizer and canonical weights.
        lock: contents of ``lbllm.lock``.
        records: tuning records: what was built, and the schedule that was found for it.
        digest: SHA-256 of the manifest, which stands for the whole artifact.
    """

    directory: Path
    program: Program
    lock: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]] = ()
    digest: str = ""


def versions() -> dict[str, str]:
    """Versions of everything that decides what a compile gives."""
    found = {"python": platform.python_version()}
    for package in ("lbllm-compile", "torch", "apache-tvm", "apache-tvm-ffi", "transformers", "safetensors", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def check_destination(directory: Path) -> None:
    """Checks that an artifact may be written to ``directory``, before anything else is done.

    A symbolic link stands for what it points to. Files of the user's beside an older artifact are kept, so only those
    are in the way that have the name of a file an artifact may have.

    Raises:
        ArtifactError: it is a file, holds something that is not ours, or cannot be written.
    """
    directory = _real(directory)
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise ArtifactError(f"cannot write the artifact to '{directory}': it is not a directory; pass another --out")
    if directory.is_dir() and any(directory.iterdir()):
        if not is_artifact(directory):
            raise ArtifactError(
                f"'{directory}' holds files that are not an lbllm artifact; pass another --out or an empty directory"
            )
        for name in sorted(_kept(directory)):
            if _OURS.match(name):
                raise ArtifactError(
                    f"'{directory}' holds '{name}', which is not part of the artifact there but could be of the new"
                    " one; move it away or pass another --out"
                )
    parent = directory.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ArtifactError(
            f"cannot write the artifact to '{directory}': '{parent}' is not writable; pass another --out"
        )


def save(
    program: Program,
    directory: Path,
    *,
    lock: Mapping[str, Any],
    history: Sequence[tuple[str, Program]] = (),
    passes: Sequence[MeasuredPass] = (),
    records: Sequence[Mapping[str, Any]] = (),
    sources: Mapping[str, str] | None = None,
    binaries: Mapping[str, bytes] | None = None,
    places: Mapping[str, str] | None = None,
) -> str:
    """Writes an artifact. It appears complete or not at all; an older artifact in its place is replaced.

    When this returns the artifact survives a crash of the machine, and what it was made from is no longer needed. Files
    of the user's beside an older artifact stay where they are.

    Args:
        program: the lowered program.
        lock: what made it, JSON-able.
        history: ``(pass name, program after it)`` in order.
        passes: what the passes measured.
        records: tuning records, JSON-able.
        sources, binaries: generated kernels by file name, for reading.
        places: where this machine has what the artifact was made from, for :func:`compiled_from`; not in the artifact.

    Returns:
        SHA-256 of the manifest, which stands for the whole artifact.

    Raises:
        ArtifactError: the destination is not ours to write.
        GraphFormatError: the graph uses what a stored graph may not use.
    """
    directory = _real(directory)
    _recover(directory)
    check_destination(directory)
    partial = directory.with_name(f".{directory.name}.lbllm-partial")
    for leftover in (partial, _replaced(directory)):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        state = dict(program.parameters())
        graph = graph_json.dumps(program.module)
        graph_json.loads(graph, state)
        _write(partial / "graph.json", graph)
        for index, (name, after) in enumerate(history, start=1):
            _write(partial / "passes" / f"{index:03d}_{name}.json", graph_json.dumps(after.module))
        _write_json(partial / MEASUREMENTS, [asdict(item) for item in passes])
        _write_weights(partial, state)
        _write_json(partial / "program.json", {"kind": program.kind, "name": program.name, **_facts(program)})
        _write_json(partial / "lbllm.lock", dict(lock))
        _write_json(partial / "tuning.json", list(records))
        for name, source in (sources or {}).items():
            _write(partial / "kernels" / _kernel_name(name, ".py"), source)
        for name, binary in (binaries or {}).items():
            _write(partial / "kernels" / _kernel_name(name, ".bin"), binary)
        if program.tokenizer is not None:
            program.tokenizer.save_pretrained(str(partial))
        _write_json(partial / "config.json", _stored_config(program))
        files = {name: _entry(partial / name) for name in sorted(_files(partial))}
        _write_json(partial / MANIFEST, {"format": FORMAT, "version": VERSION, "files": files})
        sync(partial / MANIFEST)
        digest = sha256(partial / MANIFEST)
        if is_artifact(directory):
            _carry_over(directory, partial)
        for folder, _, _ in os.walk(partial):
            sync(Path(folder))
        _put(partial, directory)
        _remember(digest, places or {})
        return digest
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"cannot write the artifact to '{directory}': {write_failure(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load(directory: str | Path) -> Artifact:
    """Reads and checks an artifact.

    Raises:
        ArtifactError: it is truncated, altered, foreign or of another version.
    """
    directory = Path(directory)
    _recover(_real(directory))
    files, digest = check_files(directory, read_sha256)
    for needed in ("program.json", "graph.json", "config.json", "lbllm.lock", "tuning.json"):
        if needed not in files:
            raise ArtifactError(f"'{directory}' has no {needed}; compile the model again")
    described = _read_json(directory / "program.json")
    config, lock = _read_json(directory / "config.json"), _read_json(directory / "lbllm.lock")
    if not all(isinstance(v, dict) for v in (described, config, lock)) or described.get("kind") not in (
        "causal-lm",
        "module",
    ):
        raise ArtifactError(f"'{directory}' does not describe a program; compile the model again")
    config.pop(QUANTIZATION, None)
    state = _read_weights(directory, [f for f in files if f.endswith(".safetensors")])
    try:
        module = graph_json.loads((directory / "graph.json").read_bytes(), state)
        program = Program(
            module=module,
            kind=described["kind"],
            name=str(described.get("name", "model")),
            config=config,
            metadata={k: v for k, v in described.items() if k not in ("kind", "name")},
        )
        _check_weights(program, state)
        _check_graph(program, state)
    except LbllmError as error:
        raise ArtifactError(f"the artifact '{directory}' is damaged: {error}") from error
    if any(f in files for f in ("tokenizer.json", "tokenizer_config.json")):
        program = _with_tokenizer(program, directory)
    return Artifact(directory, program, lock, read_records(directory), digest)


def read_file(directory: Path, name: str) -> bytes:
    """One file of an artifact, checked against the manifest.

    Raises:
        ArtifactError: the directory is no artifact, or the file is not in it, altered or truncated.
    """
    files = listed_files(directory)
    if name not in files:
        raise ArtifactError(f"'{directory}' has no {name}; compile the model again")
    check_file(directory, name, files[name])
    return (directory / name).read_bytes()


def read_object(directory: Path, name: str) -> dict[str, Any]:
    """One file of an artifact that holds a JSON object.

    Raises:
        ArtifactError: the directory is no artifact, or the file is not in it, altered or no JSON object.
    """
    try:
        found = json.loads(read_file(directory, name))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"'{directory / name}' is not JSON; compile the model again") from error
    if not isinstance(found, dict):
        raise ArtifactError(f"'{directory / name}' is not a JSON object; compile the model again")
    return found


def read_lock(directory: Path) -> dict[str, Any]:
    """The contents of ``lbllm.lock``.

    Raises:
        ArtifactError: the directory is no artifact, or the file is not in it, altered or no JSON object.
    """
    return read_object(directory, "lbllm.lock")


def measured_passes(directory: Path) -> list[MeasuredPass]:
    """What the passes of an artifact measured; nothing where the artifact does not say.

    Raises:
        ArtifactError: the directory is no artifact, or the file is altered or not as a compile writes it.
    """
    if MEASUREMENTS not in listed_files(directory):
        return []
    kinds = {"name": str, "text": str, "contract": str, "rows": list, "summary": dict}
    try:
        stored = json.loads(read_file(directory, MEASUREMENTS))
        if not all(isinstance(entry[key], kind) for entry in stored for key, kind in kinds.items()):
            raise ValueError
        if not all(isinstance(row, dict) for entry in stored for row in entry["rows"]):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"'{directory / MEASUREMENTS}' is damaged; copy or compile the artifact again") from error
    return [MeasuredPass(**{key: entry[key] for key in kinds}) for entry in stored]


def write_report(digest: str, report: CompileReport) -> bool:
    """Puts the report of a compile beside its artifact; False, and nothing is done, where a file of the user's is.

    Args:
        digest: of the artifact, as :func:`save` gave it.
        report: on the artifact at ``report.out``.
    """
    path = report.out / REPORT
    if os.path.lexists(path) and not _is_report(path):
        return False
    document = plain({"format": REPORT_FORMAT, "artifact": digest, **report.to_json()})
    write_atomically(path, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
    path.chmod((report.out / MANIFEST).stat().st_mode & 0o777)
    return True


def _is_report(path: Path) -> bool:
    try:
        return not path.is_symlink() and _read_json(path).get("format") == REPORT_FORMAT
    except (ArtifactError, OSError, AttributeError):
        return False


def read_report(directory: Path) -> CompileReport | None:
    """What the compile of an artifact took and gave; None where that is not known.

    Raises:
        ArtifactError: the directory is no artifact, or its report is damaged.
    """
    _, digest = read_manifest(directory)
    path = directory / REPORT
    if not _is_report(path):
        return None
    document = _read_json(path)
    if document.get("artifact") != digest:
        return None  # of an older artifact in this place
    try:
        return CompileReport.from_json(directory, document)
    except ValueError as error:
        raise ArtifactError(f"'{path}' is damaged; remove it, or compile the artifact again") from error


def listed_files(directory: Path) -> dict[str, Any]:
    """What the manifest says of every file, by its name.

    Raises:
        ArtifactError: the directory is no artifact of this version.
    """
    return read_manifest(directory)[0]["files"]


def weight_files(directory: Path) -> dict[str, str]:
    """Which file of the artifact holds each weight, by the weight's path. Of several files none is read.

    Raises:
        ArtifactError: the directory is no artifact of this version, or what says so is altered or damaged.
    """
    files = listed_files(directory)
    shards = [name for name in files if name.endswith(".safetensors")]
    if len(shards) > 1:
        try:
            places = json.loads(read_file(directory, INDEX))["weight_map"]
            if not set(places.values()) <= set(shards):
                raise ValueError("a file that is not in the artifact")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ArtifactError(f"'{directory / INDEX}' does not say where weights are; compile again") from error
        return dict(places)
    places = {}
    for name in shards:
        check_file(directory, name, files[name], known_sha256)
        with safe_open(str(directory / name), framework="pt") as shard:
            places |= dict.fromkeys(shard.keys(), name)
    return places


def compiled_from(digest: str) -> dict[str, str] | None:
    """Where an artifact's ``source`` and ``calibration`` are on this machine, as far as they are in files; None where
    this user's cache does not record that it was written here. What is recorded is the user's word.

    Args:
        digest: of the artifact.
    """
    try:
        content = (_own_artifacts() / digest).read_text(encoding="utf-8")
        recorded = json.loads(content) if content else {}
    except (OSError, ValueError):
        return None
    return recorded if isinstance(recorded, dict) and all(isinstance(v, str) for v in recorded.values()) else None


def _own_artifacts() -> Path:
    return cache_directory() / "compiled"


def _remember(digest: str, places: Mapping[str, str]) -> None:
    """Notes that an artifact was written here. Without a writable home it is merely not remembered."""
    with contextlib.suppress(OSError):
        _own_artifacts().mkdir(parents=True, exist_ok=True)
        write_atomically(_own_artifacts() / digest, json.dumps(dict(places)).encode())


def _stored_config(program: Program) -> dict[str, Any]:
    """The model's configuration, which says of what transformers knows that its weights are not plain ones."""
    config = dict(program.config)
    return config | {QUANTIZATION: {"quant_method": QUANT_METHOD}} if "model_type" in config else config


def _facts(program: Program) -> dict[str, Any]:
    return {k: v for k, v in program.metadata.items() if k not in ("kind", "name")}


def _files(directory: Path) -> Iterator[str]:
    """Relative paths of all files below a directory; links are not followed."""
    for root, folders, names in os.walk(directory):
        for name in (*names, *(f for f in folders if (Path(root) / f).is_symlink())):
            yield (Path(root) / name).relative_to(directory).as_posix()


def _real(directory: Path) -> Path:
    """The directory that a path names, through links; it need not exist."""
    return Path(os.path.realpath(directory))


def _kept(directory: Path) -> set[str]:
    """Files and links in an artifact's directory that are not the artifact's."""
    listed = json.loads((directory / MANIFEST).read_bytes()).get("files")
    return set(_files(directory)) - {MANIFEST, *(listed if isinstance(listed, dict) else ())}


def _carry_over(older: Path, newer: Path) -> None:
    """Gives the newer artifact what users have put beside the older one: the same files, under a second name.

    Raises:
        ArtifactError: one has the name of a file of the newer artifact.
    """
    kept = _kept(older)
    for name in sorted(kept):
        source, place = older / name, newer / name
        if os.path.lexists(place):
            raise ArtifactError(
                f"'{older}' holds '{name}', which is not part of the artifact there but is of the new one; move it"
                " away or pass another --out"
            )
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, place, follow_symlinks=False)
        except OSError:  # a file system without second names
            shutil.copy2(source, place, follow_symlinks=False)
    for folder, _, _ in os.walk(older):
        within = newer / Path(folder).relative_to(older)
        if not within.exists() and not any(Path(folder).iterdir()):
            within.mkdir(parents=True)
    shutil.copymode(older, newer)


def _put(fresh: Path, directory: Path) -> None:
    """Gives a directory its final name, in place of what has it, so that a kill at any time leaves one of the two.

    Where names cannot be swapped at once, there is a moment in which what is replaced has another name, under which
    :func:`_recover` finds it.
    """
    if not is_artifact(directory):
        fresh.rename(directory)  # fails where something else has come there
        sync(directory.parent)
        return
    if not exchange(fresh, directory):
        replaced = _replaced(directory)
        directory.rename(replaced)
        fresh.rename(directory)
        fresh = replaced
    sync(directory.parent)
    shutil.rmtree(fresh, ignore_errors=True)


def _replaced(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.lbllm-replaced")


def _recover(directory: Path) -> None:
    """Gives an artifact its name back that a kill in :func:`_put` has left without."""
    if not os.path.lexists(directory) and _replaced(directory).is_dir():
        with contextlib.suppress(OSError):  # another process was faster, or may write here where this one may not
            _replaced(directory).rename(directory)


def _kernel_name(name: str, suffix: str) -> str:
    """A kernel's key as a file name."""
    clean = re.sub(r"[^A-Za-z0-9._+-]", "_", name).lstrip("._+-") or "kernel"
    return clean[:120] if "." in clean else clean[:120] + suffix


def _write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def _write_json(path: Path, value: Any) -> None:
    _write(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def _write_weights(directory: Path, state: Mapping[str, Tensor]) -> None:
    """Weights in graph order, a new shard whenever one is full."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for path, tensor in state.items():
        nbytes = tensor.numel() * tensor.element_size()
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        # a copy of its own: safetensors refuses tensors that share memory
        shards[-1][path] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        size += nbytes
    places: dict[str, str] = {}
    for index, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, str(directory / name), metadata={"format": "pt"})
        # safetensors lets nobody else read its files, which may be what runs the model
        shutil.copymode(directory / MEASUREMENTS, directory / name)
        places |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        total = sum(t.numel() * t.element_size() for t in state.values())
        _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def _entry(path: Path) -> dict[str, Any]:
    """What the manifest says of a written file, which is on disk then."""
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _read_json(path: Path) -> Any:
    if path.stat().st_size > _MAX_JSON:
        raise ArtifactError(f"'{path}' is larger than any file of its kind; compile the model again")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"'{path}' is not JSON; copy or compile the artifact again") from error


_RECORD = {"spec": dict, "tokens": str, "target": str, "schedule": dict}
"""What a tuning record must have; whether a target has such a schedule is for those to say who use it."""


def read_records(directory: Path) -> list[Mapping[str, Any]]:
    """The tuning records of an artifact.

    Raises:
        ArtifactError: they are none.
    """
    path = directory / "tuning.json"
    records = _read_json(path)
    try:
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise ValueError("not a list of objects")
        for number, record in enumerate(records):
            if wrong := [name for name, kind in _RECORD.items() if not isinstance(record.get(name), kind)]:
                raise ValueError(f"record {number} has no {wrong[0]}")
            spec_from_fields(record["spec"])
            check_schedule(record["schedule"])
    except (ValueError, LbllmError) as error:
        raise ArtifactError(f"'{path}' does not hold tuning records ({error}); compile the model again") from error
    return records


def _read_weights(directory: Path, names: Sequence[str]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name in names:
        try:
            with safe_open(str(directory / name), framework="pt") as file:
                for path in file.keys():  # noqa: SIM118 - not a mapping
                    if path in state:
                        raise ArtifactError(f"the weight '{path}' is stored twice in '{directory}'")
                    state[path] = file.get_tensor(path)
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"'{directory / name}' is not a safetensors file: {str(error)[:100]}") from error
    return state


def _check_weights(program: Program, state: Mapping[str, Tensor]) -> None:
    """Every weight is used and keeps the rules of its format.

    Raises:
        ArtifactError, FormatError: naming the weight.
    """
    used = {path for path, _ in program.parameters()}
    unused = sorted(set(state) - used)
    if unused:
        raise ArtifactError(f"the graph does not use the stored weight '{unused[0]}'")
    check_weights(program)
    for path, tensor in state.items():
        # A constant of several dimensions may be a mask, which hides with minus infinity.
        values = (
            tensor.masked_fill(tensor == -torch.inf, 0) if tensor.is_floating_point() and tensor.dim() > 1 else tensor
        )
        if not bool(torch.isfinite(values).all()):
            raise ArtifactError(f"the weight '{path}' has NaN or infinite values")
    for node in calls(program.graph, torch.ops.lbllm.int8_linear.default):
        _check_rows(program, *Arguments(node).pick(*INT8_WEIGHT))
    for node in calls(program.graph, torch.ops.lbllm.int8_embedding.default):
        _check_rows(program, *Arguments(node).pick("weight", "scale"))


def _check_graph(program: Program, state: Mapping[str, Tensor]) -> None:
    """Every operator takes what it gets, as far as shapes, dtypes and constants tell, and nothing of it is huge.

    Raises:
        ArtifactError, OperatorError: naming the node that does not.
    """
    for node in program.state_placeholders():
        if program.kind != "causal-lm":
            raise ArtifactError(f"the graph of a module has the state '{node.target}'")
        known = [operators.find(user.target) for user in node.users]
        if not known or not all(operator is not None and operator.updates for operator in known):
            raise ArtifactError(f"the state '{node.target}' is read by what does not keep it, or by nothing")
    for probe in _PROBES:
        _check_shapes(program, state, probe)


def _check_shapes(program: Program, state: Mapping[str, Tensor], probe: tuple[int, int, int]) -> None:
    """:func:`_check_graph` for inputs of the sizes of a probe."""
    inputs = _token_inputs(program, *probe) if program.kind == "causal-lm" else _module_inputs(program, probe[0])
    propagation = Propagation(program.module)
    try:
        propagation.shapes(program, inputs)
    except OperatorError:
        raise
    except Exception as error:
        raise ArtifactError(
            f"the graph does not run at {describe(propagation.current)}: {first_line(error)[:200]}"
        ) from error
    if propagation.computed > MAX_COMPUTED + 16 * sum(t.nbytes for t in state.values()):
        raise ArtifactError(f"the graph makes {propagation.computed >> 20} MiB of tensors of a few numbers")
    output, dimensions = propagation.result, 3 if program.kind == "causal-lm" else None
    if not isinstance(output, Tensor) or (dimensions and (output.dim() != dimensions or output.shape[:2] != probe[:2])):
        raise ArtifactError("the graph gives something else than " + ("logits" if dimensions else "one tensor"))


def _token_inputs(program: Program, batch: int, length: int, past: int) -> dict[str, Any]:
    """``length`` tokens of ``batch`` sequences, behind ``past`` others where the graph has a state."""
    names = [str(n.target) for n in program.placeholders() if STATE not in n.meta]
    if foreign := sorted(set(names) - {"input_ids", "attention_mask", "position_ids", "past"}):
        raise ArtifactError(f"the graph has the input '{foreign[0]}', which no language model has")
    past = past if "past" in names else 0
    ids = torch.zeros((batch, length), dtype=torch.int64)
    mask = torch.ones((batch, past + length), dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": ids, "past": past}


def _module_inputs(program: Program, free: int) -> dict[str, Tensor]:
    """Tensors of the dtypes and shapes that the graph says its inputs have; a size that is free is ``free``.

    Raises:
        ArtifactError: an input has none, or is huge.
    """
    inputs = {}
    for node in program.placeholders():
        found = dump.read_shape(node.meta.get("shape", ""))
        if found is None:
            raise ArtifactError(f"the graph does not say the dtype and shape of its input '{node.target}'")
        dtype, sizes = found
        shape = [free if isinstance(size, str) else size for size in sizes]
        if math.prod(shape) > MAX_COMPUTED // 16:
            raise ArtifactError(f"the graph's input '{node.target}' has {math.prod(shape)} elements, which is too many")
        inputs[str(node.target)] = torch.empty(shape, dtype=dtype)
    return inputs


def _check_rows(program: Program, weight: Any, scales: Any) -> None:
    if not (is_stored(weight) and is_stored(scales)):
        raise ArtifactError("the graph computes an int8 matrix that should be stored")
    rows, scale = (constant(program.module, n) for n in (weight, scales))
    good = (
        rows.dtype == torch.int8
        and rows.dim() == 2
        and scale.dtype == torch.float32
        and scale.shape == rows.shape[:1]
        and bool(torch.isfinite(scale).all())
        and not bool((scale < 0).any())
    )
    if not good:
        raise ArtifactError(f"the weight '{weight.target}' is not int8 rows with finite scales")


def _with_tokenizer(program: Program, directory: Path) -> Program:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        tokenizer.decode(tokenizer("a")["input_ids"], skip_special_tokens=True)  # some settings are looked at only here
    except Exception as error:
        raise ArtifactError(f"the tokenizer in '{directory}' cannot be read: {first_line(error)[:200]}") from error
    return replace(program, tokenizer=tokenizer)
