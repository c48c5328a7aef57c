"""A compile that has been read and checked but not started: everything the user named, and where things go."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lbllm_compile import artifact, calibration, frontend, recipe
from lbllm_compile.calibration import CalibrationSet
from lbllm_compile.checkpoint import check_work_dir
from lbllm_compile.codegen.backend import backend_of
from lbllm_compile.codegen.errors import LbllmError, suggestion
from lbllm_compile.codegen.progress import NoProgress, Progress, warn
from lbllm_compile.codegen.targets import Target, parse_targets
from lbllm_compile.dumps import check_dump_dir
from lbllm_compile.frontend import UserModel
from lbllm_compile.options import CompileOptions, OptionError
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.base import Pass
from lbllm_compile.passes.ir.program import Program
from lbllm_compile.version import __version__

REHEARSAL_TOKENS = 64
"""Calibration tokens where passes only rehearse."""

_LONG_CHANGE = 200
"""Letters of a change that are too many for a line."""

Places = Callable[[str], tuple[Path, Path]]
"""A model's name to the directories for the result and for unfinished work, both checked."""


@dataclass(frozen=True)
class Job:
    """A compile that has been read and checked but not started.

    Attributes:
        choices: recipe, preset and options, the model's own recipe included.
        passes: the pipeline.
        targets: parsed ``options.target``.
        program: the captured model, before the first pass.
        out: where the artifact goes.
        work: where finished pieces of work are kept.
    """

    options: CompileOptions
    model: UserModel
    choices: recipe.Choices
    passes: list[Pass]
    targets: tuple[Target, ...]
    program: Program
    out: Path
    work: Path

    @property
    def preset(self) -> recipe.Preset:
        """How much work."""
        return recipe.preset(self.choices.preset)

    @property
    def device(self) -> torch.device:
        """Where calibrations compute."""
        return device_of(self.options)

    def calibration_data(self, progress: Progress) -> CalibrationSet:
        """The inputs that the passes calibrate on, as many as the preset says."""
        own = calibration.writes_own(self.model, self.options.calibration)
        return calibration.collect(
            self.model,
            self.program,
            self.options.calibration,
            tokens=self.preset.sequences_of(own) * self.preset.sequence_length,
            validation_tokens=self.preset.validation_sequences * self.preset.sequence_length,
            length=self.preset.sequence_length,
            seed=self.options.seed,
            device=self.device,
            progress=progress,
        )

    def rehearsal_data(self, progress: Progress) -> CalibrationSet:
        """As few inputs as passes take that only rehearse."""
        return calibration.collect(
            self.model,
            self.program,
            self.options.calibration,
            tokens=REHEARSAL_TOKENS,
            validation_tokens=REHEARSAL_TOKENS,
            length=REHEARSAL_TOKENS // 2,
            seed=self.options.seed,
            device=self.device,
            progress=progress,
        )

    def fingerprint(self, data: CalibrationSet) -> dict[str, str]:
        """Everything that decides the weights of the artifact, hashed or in words."""
        # What is slower depends on the kernels, which are a target's.
        fallback = {"fallback": f"{self.options.fallback} on {self.options.target}"} if self.options.fallback else {}
        return {
            "model": frontend.program_hash(self.program),
            "calibration": data.sha256,
            "pipeline": pipeline.render(self.passes, full=True),
            "seed": str(self.options.seed),
            "threads": str(torch.get_num_threads()),
            "device": self.device.type,
            "version": __version__,
            "torch": torch.__version__,
            **fallback,
        }

    @property
    def places(self) -> dict[str, str]:
        """Where the model (``source``) and the named text (``calibration``) are, as far as they are files."""
        named = {"source": None if self.model.in_memory else self.model.source, "calibration": self.options.calibration}
        return {key: str(Path(name).resolve()) for key, name in named.items() if name and Path(name).exists()}

    def lock(
        self,
        facts: Mapping[str, str],
        data: CalibrationSet,
        check: Mapping[str, Any],
        fallback: Sequence[Mapping[str, Any]] = (),
    ) -> dict[str, Any]:
        """The contents of ``lbllm.lock``: what it takes to repeat the compile, and the tokens it gave.

        Files stand in it by name and by what they hold, so that it is the same wherever they lie.

        Args:
            facts: see :meth:`fingerprint`.
            data: what the passes calibrate on.
            check: what the compile gave on the probe.
            fallback: what was measured to choose linears that stay float, see :func:`lbllm_compile.fallback.applied`.
        """
        text = self.options.calibration
        return {
            **facts,
            **({"fallback_times": [dict(row) for row in fallback]} if fallback else {}),
            "source": None if self.model.in_memory else _name(self.model.source),
            "calibration_source": _words(data.source, text or self.model.source),
            "calibration_text": None if text is None else _name(text),
            "calibration_object": self._calibration_object,
            "recipe": self.choices.recipe,
            "preset": self.choices.preset,
            "target": self.options.target,
            "versions": artifact.versions(),
            "check": dict(check),
        }

    @property
    def _calibration_object(self) -> str | None:
        """Which option gave what to calibrate on as objects, None where none did."""
        names = ("texts", "calibration_inputs")
        return next((name for name in names if getattr(self.options, name) is not None), None)

    def replaced(self, facts: Mapping[str, str], data: CalibrationSet) -> str:
        """What sets the artifact apart that this one will replace, in one line; empty where there is none.

        Args:
            facts: see :meth:`fingerprint`.
            data: what the passes calibrate on.
        """
        if not artifact.is_artifact(self.out):
            return ""
        older = f"'{self.out}' holds an artifact"
        newer = "this compile replaces it when it is done"
        try:
            stored = artifact.read_lock(self.out)
        except artifact.ArtifactError:
            return f"{older} that is damaged or of another version; {newer}"
        wanted = self.lock(facts, data, {})
        names = (*facts, "target")
        changes = [_change(name, stored, wanted) for name in names if stored.get(name) != wanted[name]]
        return f"{older} that was compiled {'with other ' + ', '.join(changes) if changes else 'alike'}; {newer}"


def _name(source: str) -> str:
    """A file or folder without the folders it is in; what names something else as it is."""
    return Path(source).resolve().name if Path(source).exists() else source


def _words(text: str, source: str) -> str:
    """What is said of calibration data, which may end with a file, without the folders that this is in."""
    return text.removesuffix(source) + _name(source) if text.endswith(source) else text


def given(options: CompileOptions) -> frontend.Given:
    """What comes with the model as objects."""
    return frontend.Given(options.tokenizer, options.texts, options.example_inputs, options.calibration_inputs)


_IN_WORDS = {"model": "source", "calibration": "calibration_source"}
"""Facts that are hashes, and what of a lock says them in words."""


def _change(name: str, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """How a fact of a lock differs from that of another, e.g. ``seed (1, now 0)``; the name alone where words fail."""
    old, new = (str(lock.get(_IN_WORDS.get(name, name))) for lock in (stored, wanted))
    if name == "pipeline":
        with contextlib.suppress(LbllmError):
            passes = [[pipeline.render_pass(item) for item in pipeline.parse(text)] for text in (old, new)]
            old, new = (
                ",".join(item for item in ours if item not in theirs) or "without it"
                for ours, theirs in (passes, passes[::-1])
            )
    return name if old == new or len(old) + len(new) > _LONG_CHANGE else f"{name} ({old}, now {new})"


def read_job(options: CompileOptions, progress: Progress | None = None, places: Places | None = None) -> Job:
    """Reads everything the user named and captures the model; nothing is written.

    Args:
        options: of the compile, or of something like it.
        progress: told what goes on.
        places: where the results of something like a compile go; those of a compile go where its options say.

    Raises:
        LbllmError: something the user named is missing or wrong.
    """
    progress = progress or NoProgress()
    targets = parse_targets(options.target)
    if places is None:
        places = _compile_places(options, targets)
    choices = recipe.choices(options)
    passes = recipe.passes(choices, options.target)
    check_named(options, passes)
    device_of(options)  # a wrong one before the model is read
    with progress.task("reading and capturing the model", 2) as task:
        model = frontend.load_given(options.model, given(options))
        task.advance("read")
        if model.recipe:
            choices = recipe.choices(options, model.recipe)
            passes = recipe.passes(choices, options.target)
        check_print_after(options, passes)
        out, work = places(model.name)
        program = frontend.capture(model, options.context)
        task.advance("captured")
    if "context" in program.metadata:
        warn(progress, None, program.metadata["context"])
    model = dataclasses.replace(model, config=program.config)
    return Job(options, model, choices, passes, targets, program, out, work)


def _compile_places(options: CompileOptions, targets: Sequence[Target]) -> Places:
    """Where a compile puts things, after checks that need no model.

    Raises:
        TargetError: this machine cannot prove the kernels of a target.
        ArtifactError: the artifact may not be written where it was asked for.
    """
    for target in targets:
        backend_of(target).check(target)
    if options.out is not None:
        artifact.check_destination(options.out)

    def places(name: str) -> tuple[Path, Path]:
        out = options.out or Path(f"{name}-lbllm")
        artifact.check_destination(out)
        work = options.work_dir or out.with_name(out.name + ".lbllm-work")
        check_apart(out, work, options.dump_dir)
        return out, work

    return places


def check_named(options: CompileOptions, passes: Sequence[Pass]) -> None:
    """Checks the calibration text, the directories and the passes to print after, as far as no model is needed.

    Nothing is written, no text is tokenized and the network is not asked.

    Args:
        passes: the pipeline of the command line.

    Raises:
        CalibrationError: the text is missing, of no known kind or unreadable, or a package that reads it is missing.
        WorkDirError: the work directory holds other things or cannot be written.
        LbllmError: the directory for dumps does, or one of the directories lies inside another.
        OptionError: a pass to print after is not in the pipeline.
    """
    if options.calibration is not None:
        texts = calibration.read_texts(options.calibration)
        # The first document says whether the rest can be read. That of a data set comes from the network, unless the
        # package that would fetch it is missing.
        if not options.calibration.startswith(frontend.HUB) or importlib.util.find_spec("datasets") is None:
            next(iter(texts), None)
    if options.work_dir is not None:
        check_work_dir(options.work_dir)
    if options.dump_dir is not None:
        check_dump_dir(options.dump_dir)
    check_apart(options.out, options.work_dir, options.dump_dir)
    # A model.py may bring a recipe with another pipeline.
    if options.pipeline is not None or not str(options.model).endswith(".py"):
        check_print_after(options, passes)


def check_apart(out: Path | None, work: Path | None, dumps: Path | None) -> None:
    """Checks that artifact, work directory and dumps do not lie inside one another; None is not known yet or not asked.

    Raises:
        LbllmError: two of them do.
    """
    roles = {"the artifact": out, "the work directory": work, "the dumps": dumps}
    placed = [(role, path, path.resolve()) for role, path in roles.items() if path is not None]
    for (role, path, place), (other_role, other, other_place) in itertools.combinations(placed, 2):
        if place == other_place or place in other_place.parents or other_place in place.parents:
            raise LbllmError(
                f"{role} '{path}' and {other_role} '{other}' would lie inside one another; choose --out, --work-dir"
                " and --dump-dir apart"
            )


def check_print_after(options: CompileOptions, passes: Sequence[Pass]) -> None:
    """Checks that every pass to print after is run.

    Raises:
        OptionError: one is not in the pipeline.
    """
    names = [p.name for p in passes]
    for name in options.print_after:
        if name not in names:
            raise OptionError(
                f"--print-after {name}: the pipeline has no pass '{name}'{suggestion(name, names)}; it has"
                f" {', '.join(names)}"
            )


def device_of(options: CompileOptions) -> torch.device:
    """Where calibrations compute.

    Raises:
        LbllmError: there is no such device here.
    """
    name = options.device
    if name not in ("auto", "cpu", "cuda"):
        hint = suggestion(name, ("auto", "cpu", "cuda"))
        raise LbllmError(f"--device cannot be '{name}'{hint}; choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise LbllmError("--device cuda: torch sees no CUDA device here; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
