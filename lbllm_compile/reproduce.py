"""Compiles an artifact again from its ``lbllm.lock``, and says what of the result is not as it was.

An artifact is its graphs, weights, configuration and tokenizer, and the output that its compile recorded: where these
are equal the model is the same. Schedules of kernels, which all give the same bits, versions of packages and the
machine are said where they differ, because they explain other differences, and make no other model by themselves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import RenderableType
from rich.text import Text
from safetensors import safe_open
from torch import Tensor

from lbllm_compile import artifact, driver, origin
from lbllm_compile.artifact import ArtifactError
from lbllm_compile.codegen.cache import cache_directory
from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.codegen.progress import Progress, warn
from lbllm_compile.codegen.spec import LinearSpec
from lbllm_compile.inspect import stored_passes
from lbllm_compile.job import check_apart
from lbllm_compile.manifest import check_files, read_manifest
from lbllm_compile.native.language import COMPILED_CONTEXT
from lbllm_compile.options import CompileOptions
from lbllm_compile.passes.ir import spool
from lbllm_compile.passes.ir.compare import relative_error, same_bits
from lbllm_compile.report import terminal

SHOWN = 20
"""Rows of a kind that are shown to people; a document has all."""

_Found = TypeVar("_Found")

_MOST_THREADS = 256
"""As many threads of torch as a lock may ask for."""

_SOURCES = {"model": "source", "calibration": "calibration_source"}
"""Hashes in a lock, and what of it names what they are of."""

_SETTINGS = ("pipeline", "seed", "target", "threads", "device")
"""What else of a lock decides, or may decide, the result."""

_TEXTS = ("pipeline", "seed", "target", "preset", "recipe", "model", "calibration", "threads", "device")
"""What a lock must say for a compile to be repeated."""


class ReproduceError(LbllmError):
    """An artifact cannot be compiled again from what its lock says."""


@dataclass(frozen=True)
class Difference:
    """Something that is not as it was.

    Attributes:
        kind: ``source``, ``graph``, ``tensor``, ``file``, ``output``, ``setting``, ``measurement``, ``kernel``,
            ``version`` or ``machine``.
        name: which of its kind.
        then, now: what it was and is, in words.
        error: of a tensor of the same dtype and shape, the relative error (Frobenius norm); None otherwise.
        decides: it is another model for that.
    """

    kind: str
    name: str
    then: str
    now: str
    error: float | None = None

    @property
    def decides(self) -> bool:
        return self.kind in ("source", "graph", "tensor", "file", "output")

    @property
    def sentence(self) -> str:
        """What there is to say of it in one line."""
        return f"the {self.name} is not what it was ({self.then}, now {self.now})"


@dataclass(frozen=True)
class Reproduction:
    """What came of compiling an artifact again.

    Attributes:
        directory: the artifact.
        out: the new one; None where it was not kept.
        graphs, tensors: how many of them were compared.
        differences: what is not as it was.
    """

    directory: Path
    out: Path | None
    graphs: int
    tensors: int
    differences: Sequence[Difference]

    @property
    def same(self) -> bool:
        """Whether it is the same model."""
        return not any(d.decides for d in self.differences)

    def to_json(self) -> dict[str, Any]:
        rows = [{**dataclasses.asdict(d), "decides": d.decides} for d in self.differences]
        return {**dataclasses.asdict(self), "differences": rows, "same": self.same}


def reproduce(
    directory: Path,
    out: Path | None = None,
    *,
    model: str | None = None,
    calibration: str | None = None,
    work_dir: Path | None = None,
    fresh: bool = False,
    progress: Progress,
) -> Reproduction:
    """Compiles an artifact again and compares.

    Args:
        directory: the artifact, which is not changed.
        out: where the new artifact goes; None keeps it nowhere.
        model: what it was compiled from, as a compile takes it; by default what it was compiled from here.
        calibration: the text it was calibrated on, where one was named; by default that of the compile here.
        work_dir: where finished layers are kept until this is done; by default in the cache directory.
        fresh: start over instead of taking over what an interrupted run finished.
        progress: told what goes on; first of all, which of the sources have changed.

    Raises:
        ReproduceError: what the artifact was made from is not to be found, or ``out`` lies over it.
        ArtifactError: the directory is no whole artifact, or its lock does not say enough.
        LbllmError: what stops a compile.
    """
    if out is not None:
        check_beside(directory, out)
    lock, options = artifact.read_lock(directory), options_of(directory, model, calibration)
    work = work_dir or cache_directory() / "reproduce" / read_manifest(directory)[1][:32]
    options = dataclasses.replace(options, work_dir=work, fresh=fresh, no_sheet=True)

    def changed(facts: Mapping[str, str]) -> None:
        for difference in changed_sources(lock, facts):
            warn(progress, None, f"{difference.sentence}, so the result will differ")

    with contextlib.ExitStack() as stack:
        stack.enter_context(_torch_threads(lock["threads"]))
        if (place := out) is None:
            unkept = tempfile.TemporaryDirectory(prefix="lbllm-reproduce-", dir=spool.directory())
            place = Path(stack.enter_context(unkept)) / "out"
        driver.compile(dataclasses.replace(options, out=place), progress=progress, check=changed)
        return dataclasses.replace(compare(directory, place), out=out)


def options_of(directory: Path, model: str | None = None, calibration: str | None = None) -> CompileOptions:
    """The options of the compile that an artifact's lock tells; ``model`` and ``calibration`` as :func:`reproduce`.

    Raises:
        ReproduceError: what the artifact was made from is not to be found, or not to be used unless it is named.
        ArtifactError: the directory is no whole artifact, or its lock does not say enough.
    """
    _, digest = check_files(directory)
    lock, config = artifact.read_lock(directory), artifact.read_object(directory, "config.json")
    if missing := [name for name in _TEXTS if not isinstance(lock.get(name), str)]:
        raise ArtifactError(f"the lbllm.lock of '{directory}' does not say its {missing[0]}; compile the model again")
    if not lock["seed"].isdecimal():
        raise ArtifactError(f"the lbllm.lock of '{directory}' has the seed '{lock['seed'][:50]}'; compile again")
    return CompileOptions(
        model=model or _found(lambda: origin.source_of(directory, digest, lock), "--model"),
        target=lock["target"],
        recipe=lock["recipe"],
        preset=lock["preset"],
        pipeline=lock["pipeline"],
        calibration=calibration or _calibration(directory, digest, lock, model),
        context=config.get(COMPILED_CONTEXT),
        device="cuda" if lock["device"] == "cuda" and torch.cuda.is_available() else "cpu",
        seed=int(lock["seed"]),
    )


def _calibration(directory: Path, digest: str, lock: Mapping[str, Any], model: str | None) -> str | None:
    """The text to calibrate on again; None for what the model brings, or writes itself."""
    if lock.get("calibration_object") != "calibration_inputs":
        return _found(lambda: origin.calibration_of(directory, digest, lock), "--calibration")
    if model is None:  # one that is named brings them, and where they are others it is said
        raise ReproduceError(
            "what the artifact was made from is not used: its calibration inputs were objects in memory; give --model"
            " a model.py whose calibration_inputs() has them"
        )
    return None


def check_beside(directory: Path, out: Path) -> None:
    """Checks that what is to be written does not lie in or over an artifact.

    Raises:
        ReproduceError: it does.
    """
    try:
        check_apart(directory, None, out)
    except LbllmError:
        raise ReproduceError(f"'{out}' lies in or over the artifact '{directory}'; pass another --out") from None


def _found(find: Callable[[], _Found], option: str) -> _Found:
    """What the artifact was made from.

    Raises:
        ReproduceError: it is not to be found; the message names the option that names it.
    """
    try:
        return find()
    except origin.OriginError as error:
        raise ReproduceError(f"what the artifact was made from is not used: {error}; name it with {option}") from error


@contextlib.contextmanager
def _torch_threads(count: str) -> Iterator[None]:
    """As many threads of torch as the compile had, which decide in which order it sums."""
    before = torch.get_num_threads()
    if count.isdecimal() and 1 <= int(count) <= _MOST_THREADS:
        torch.set_num_threads(int(count))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compare(then: Path, now: Path) -> Reproduction:
    """What sets two artifacts apart.

    Raises:
        ArtifactError: one of them is not whole.
    """
    locks = artifact.read_lock(then), artifact.read_lock(now)
    graphs, found_graphs = _graphs(then, now)
    tensors, found_tensors = _tensors(then, now)
    differences = [
        *changed_sources(*locks),
        *found_graphs,
        *found_tensors,
        *_files(then, now),
        *_values("output", [_texts(lock.get("check")) for lock in locks]),
        *_values("setting", [{name: str(lock.get(name)) for name in _SETTINGS} for lock in locks]),
        *_kernels(then, now),
        *_values("version", [_texts(lock.get("versions")) for lock in locks]),
        *_machines(then, now),
    ]
    return Reproduction(then, now, graphs, tensors, differences)


def _texts(values: Any) -> dict[str, str]:
    """What a lock has under a name, if that is an object, with its values as texts."""
    return {key: str(value) for key, value in values.items()} if isinstance(values, Mapping) else {}


def _values(kind: str, sides: Sequence[Mapping[str, str]]) -> list[Difference]:
    """Named values that differ; what one side does not have is nothing there."""
    then, now = sides
    names = dict.fromkeys([*then, *now])
    rows = [(name, then.get(name, "nothing"), now.get(name, "nothing")) for name in names]
    return [Difference(kind, name, old, new) for name, old, new in rows if old != new]


def _machines(then: Path, now: Path) -> list[Difference]:
    """What the two were compiled on, where both say it."""
    reports = [artifact.read_report(directory) for directory in (then, now)]
    known = [report.machine for report in reports if report is not None]
    return _values("machine", known) if len(known) == 2 else []


def changed_sources(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """Of model and calibration data, what has another hash.

    Args:
        then: contents of a lock.
        now: of another; or what a compile is decided by (:meth:`.job.Job.fingerprint`).
    """
    rows = []
    for name, words in _SOURCES.items():
        if then.get(name) != now.get(name):
            old, new = (f"{str(lock.get(name))[:12]}…" for lock in (then, now))
            rows.append(Difference("source", f"{name} ({then.get(words) or 'an object'})", old, new))
    return rows


def _graphs(then: Path, now: Path) -> tuple[int, list[Difference]]:
    """How many graphs there are, and the first one that differs, with the nodes that do; and the one that runs."""
    listed = [artifact.listed_files(directory) for directory in (then, now)]
    files = [p.file for p in stored_passes(then)]
    others = [p.file for p in stored_passes(now)]
    if files != others:
        pairs = enumerate(zip_longest(files, others), 1)
        number, first = next((number, pair) for number, pair in pairs if pair[0] != pair[1])
        names = ("none" if name is None else Path(name).stem[4:] for name in first)
        old, new = (
            f"{len(of)} passes, number {number}: {name}" for of, name in zip((files, others), names, strict=True)
        )
        rows, files = [Difference("graph", "passes", old, new)], []
    else:
        rows = []
    unlike = [name for name in (*files, "graph.json") if listed[0][name] != listed[1][name]]
    for name in dict.fromkeys([*unlike[:1], *(n for n in unlike if n == "graph.json")]):
        nodes = [{node["name"]: node for node in artifact.read_object(d, name)["nodes"]} for d in (then, now)]
        apart = [n for n in dict.fromkeys([*nodes[0], *nodes[1]]) if nodes[0].get(n) != nodes[1].get(n)]
        old, new = (_node_words(side.get(apart[0])) if apart else "the same nodes" for side in nodes)
        after = f"after {Path(name).stem[4:]}, the first that differs"
        label = "the graph that runs" if name == "graph.json" else after
        rows.append(Difference("graph", f"{label}: {len(apart)} nodes, first '{(apart or ['none'])[0]}'", old, new))
    return len(files) + 1, rows


def _node_words(node: Mapping[str, Any] | None) -> str:
    return "nothing" if node is None else f"{node['target']}({json.dumps(node.get('args', []))[1:-1][:80]})"


def _tensors(then: Path, now: Path) -> tuple[int, list[Difference]]:
    """How many weights there are, and those that differ, the most different first."""
    places = [artifact.weight_files(directory) for directory in (then, now)]
    rows = []
    names = list(dict.fromkeys([*places[0], *places[1]]))
    for name in names:
        old, new = (_tensor(d, files.get(name), name) for d, files in zip((then, now), places, strict=True))
        kinds = [_kind(old), _kind(new)]
        if old is None or new is None or kinds[0] != kinds[1]:
            rows.append(Difference("tensor", name, kinds[0], kinds[1]))
        elif not same_bits(old, new):
            count = int((old != new).sum())
            greatest = float((old.double() - new.double()).abs().max())
            words = f"{count} of {old.numel()} differ, by {greatest:.3g} at most"
            rows.append(Difference("tensor", name, kinds[0], words, relative_error(old, new)))
    return len(names), sorted(rows, key=lambda row: -float("inf") if row.error is None else -row.error)


def _tensor(directory: Path, file: str | None, name: str) -> Tensor | None:
    if file is None:
        return None
    with safe_open(str(directory / file), framework="pt") as stored:
        return stored.get_tensor(name)


def _kind(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _files(then: Path, now: Path) -> list[Difference]:
    """Files that differ besides graphs, weights, the lock and what is of kernels."""
    listed = [artifact.listed_files(directory) for directory in (then, now)]
    rows = []
    for name in dict.fromkeys([*listed[0], *listed[1]]):
        compared = name.startswith(("passes/", "kernels/")) or name in ("graph.json", "lbllm.lock", "tuning.json")
        old, new = (files.get(name) for files in listed)
        if compared or ".safetensors" in name or old == new:
            continue
        kind = "measurement" if name == artifact.MEASUREMENTS else "file"
        then_words, now_words = ("nothing" if entry is None else f"{entry['sha256'][:12]}…" for entry in (old, new))
        rows.append(Difference(kind, name, then_words, now_words))
    return rows


def _kernels(then: Path, now: Path) -> list[Difference]:
    """Schedules that differ, and how many of the kernels' texts."""
    sides = []
    for directory in (then, now):
        chosen = {}
        for record in artifact.read_records(directory):
            linear = _linear(LinearSpec(**record["spec"]))
            name = f"{linear}, {record['tokens']} tokens, {record['target']}, {record.get('threads', '?')} threads"
            chosen[name] = json.dumps(record["schedule"], sort_keys=True)
        sides.append(chosen)
    rows = _values("kernel", sides)
    listed = [artifact.listed_files(directory) for directory in (then, now)]
    texts = [{name: entry for name, entry in files.items() if name.startswith("kernels/")} for files in listed]
    unlike = [name for name in texts[0].keys() | texts[1].keys() if texts[0].get(name) != texts[1].get(name)]
    if unlike:
        rows.append(Difference("kernel", "generated texts", f"{len(texts[0])} files", f"{len(unlike)} of them differ"))
    return rows


def _linear(spec: LinearSpec) -> str:
    """A linear in words, others in other words."""
    scales = "token" if spec.per_token else "group"
    words = f"{spec.out_features}x{spec.in_features} {spec.kind}, group {spec.group}"
    words += ", additive levels" if spec.additive else ""
    return f"{words}, {spec.act_bits} bits with a scale a {scales}{', bias' if spec.bias else ''}"


def render(result: Reproduction) -> list[RenderableType]:
    """What came of it, for people: a sentence, and a table of what differs."""
    deciding = [d for d in result.differences if d.decides]
    what = f"{result.graphs} graphs, {result.tensors} tensors"
    if not deciding:
        said = f"The same model: {what}, configuration and recorded output are equal."
    else:
        counts = [f"{sum(d.kind == kind for d in deciding)} {kind}" for kind in dict.fromkeys(d.kind for d in deciding)]
        said = f"Another model: of {what}, configuration and recorded output these differ: {', '.join(counts)}."
    parts: list[RenderableType] = [Text(said)]
    for title, decides in (("What differs", True), ("What differs and makes no other model", False)):
        rows: list[list[Any]] = []
        for kind in dict.fromkeys(d.kind for d in result.differences if d.decides == decides):
            of_kind = [d for d in result.differences if d.kind == kind]
            rows += [[d.kind, d.name, d.then, d.now, d.error] for d in of_kind[:SHOWN]]
            if more := len(of_kind) - SHOWN:
                rows += [[kind, f"and {more} more (--json has all)", None, None, None]] if more > 0 else []
        if rows:
            parts += [Text(), terminal.table(title, ["", "which", "then", "now", "relative error"], rows)]
    if result.out is not None:
        parts += [Text(), Text(f"Written: {result.out}")]
    return parts
