"""Tasks of lm-evaluation-harness: what an artifact answers, beside what the original model answers.

The harness (package ``lm_eval``, the extra ``eval``) has hundreds of tasks, takes tasks of one's own as YAML files, and
scores a compiled model through transformers' interface, so on the kernels that ``run`` uses. Two models of equal
accuracy may still answer differently: a *flip* is a document that one of the two gets right and the other wrong (arXiv
2407.09141).
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from lbllm_compile import artifact, evaluate
from lbllm_compile.codegen.errors import LbllmError, first_line, suggestion
from lbllm_compile.codegen.progress import NoProgress, Progress
from lbllm_compile.report import terminal

BATCH = 8
"""Requests that are scored together."""


_UNSEEDED: dict[str, Any] = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed"))
"""Keeps the harness from seeding the process."""


_FAULTS_OF_TASKS = (OSError, ValueError, KeyError, ImportError)
"""What the harness raises while it scores, for a task's own reasons: data that cannot be read or has no such column, a
metric whose package is missing. Anything else is the model's, and ours to mend."""


class TaskError(LbllmError):
    """A task is not known, or cannot be loaded or scored."""


def score(
    directory: str | Path,
    names: Sequence[str],
    *,
    folder: Path | None = None,
    manager: Any = None,
    limit: int | None = None,
    shots: int | None = None,
    teacher: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Scores an artifact and the original model on tasks.

    Args:
        directory: the artifact.
        names: tasks, groups and tags of the harness, or paths of YAML files that define tasks.
        folder: where more tasks are defined, as YAML files.
        manager: what :func:`check` gave; without it, everything is checked here.
        limit: documents of each task at most, from its start; all by default.
        shots: examples in front of each question; the task's own number by default.
        teacher: the original model, see :func:`.evaluate.find_teacher`.
        progress: told what goes on.

    Returns:
        ``lm_eval``, the harness's version, and ``tasks``: of every task and metric ``task``, ``metric``, ``filter``,
        ``documents``, ``compiled`` and ``stderr``, ``original`` and ``original_stderr``, and ``flips``, the share of
        documents at which one of the two is right and the other wrong. What there is not is None: figures of a missing
        original, standard errors of metrics without one, flips of metrics that are more than right or wrong.

    Raises:
        TaskError: the harness is not installed, a task is unknown or cannot be scored.
        EvaluationError: the artifact is no language model with a tokenizer, or the teacher does not fit.
        ArtifactError: the artifact cannot be loaded.
    """
    progress = progress or NoProgress()
    manager = manager or check(names, limit, shots, folder)
    loaded = artifact.load(directory)
    evaluate.tokenizer_of(loaded.program)  # refused without one
    with _one_sentence("loaded"):
        manager.load(list(names))

    from lm_eval import __version__ as version  # pyright: ignore[reportMissingImports]
    from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    wrapped: Any = HFLM

    def answers(model: Any, **options: Any) -> Any:
        with _one_sentence("scored", _FAULTS_OF_TASKS):
            return simple_evaluate(
                wrapped(model, backend="causal", batch_size=BATCH, **options),
                tasks=list(names),
                task_manager=manager,
                limit=limit,
                num_fewshot=shots,
                **_UNSEEDED,
            )

    original = evaluate.find_teacher(loaded, teacher, progress)
    before = None
    if original is not None:
        progress.note("scoring the original model")
        before = answers(original.module, tokenizer=original.tokenizer)
    progress.note("scoring the compiled model")
    after = answers(str(directory), device="cpu")
    return {"lm_eval": version, "tasks": rows(after, before)}


def check(names: Sequence[str], limit: int | None, shots: int | None, folder: Path | None = None) -> Any:
    """Checks what needs no model; arguments as in :func:`score`.

    Returns:
        the harness's manager of tasks.

    Raises:
        TaskError: a number is out of range, no task is named or one is unknown, there is no such folder, or the harness
            is not installed.
    """
    if not names or not all(names):
        raise TaskError("a name in --tasks is empty; give names of tasks joined by commas, e.g. arc_easy,hellaswag")
    if limit is not None and limit < 1:
        raise TaskError(f"--limit cannot be {limit}; ask for at least 1 document of each task")
    if shots is not None and shots < 0:
        raise TaskError(f"--shots cannot be {shots}; 0 puts no example in front of a question")
    if importlib.util.find_spec("lm_eval") is None:
        raise TaskError("scoring tasks needs the package lm_eval; install it with `pip install 'lbllm-compile[eval]'`")
    manager = _manager(folder)
    _check_names(names, manager)
    return manager


def rows(compiled: Mapping[str, Any], original: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """A row of every task and metric from what the harness returns of both models; see :func:`score`."""
    made = []
    for task, figures in compiled["results"].items():
        for key, value in figures.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr"):
                continue
            before = None if original is None else original["results"][task]
            made.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": filtered,
                    "documents": compiled["n-samples"].get(task, {}).get("effective"),
                    "compiled": value,
                    "stderr": _number(figures.get(f"{metric}_stderr,{filtered}")),
                    "original": None if before is None else before[key],
                    "original_stderr": None if before is None else _number(before.get(f"{metric}_stderr,{filtered}")),
                    "flips": None if original is None else _flips(compiled, original, task, metric, filtered),
                }
            )
    return made


def _number(value: Any) -> float | None:
    """The harness writes ``N/A`` where a metric has no standard error."""
    return float(value) if isinstance(value, (int, float)) else None


def _flips(
    compiled: Mapping[str, Any], original: Mapping[str, Any], task: str, metric: str, filtered: str
) -> float | None:
    """The share of documents that one of two models gets right and the other wrong; None where the metric is not that
    of single documents, or tells more than right from wrong."""
    ours, theirs = (_verdicts(result, task, metric, filtered) for result in (compiled, original))
    if not ours or not theirs or ours.keys() != theirs.keys():
        return None
    return sum(ours[document] != theirs[document] for document in ours) / len(ours)


def _verdicts(result: Mapping[str, Any], task: str, metric: str, filtered: str) -> dict[int, bool] | None:
    """Which documents a model gets right; None where the metric does not say."""
    samples = [s for s in result["samples"].get(task, ()) if s["filter"] == filtered and metric in s]
    values = {sample["doc_id"]: sample[metric] for sample in samples}
    if not all(isinstance(value, (bool, int, float)) and value in (0, 1) for value in values.values()):
        return None
    return {document: bool(value) for document, value in values.items()}


def render(directory: Path, figures: Mapping[str, Any]) -> list[RenderableType]:
    """What :func:`score` gave, for people."""
    columns = ["task", "metric", "documents", "compiled", "±", "original", "±", "flips"]
    names = ("documents", "compiled", "stderr", "original", "original_stderr", "flips")
    table = []
    for row in figures["tasks"]:
        metric = row["metric"] if row["filter"] == "none" else f"{row['metric']} ({row['filter']})"
        table.append([row["task"], metric, *(row[name] for name in names)])
    caption = (
        f"lm-evaluation-harness {figures['lm_eval']}; ± is one standard error. Flips: share of documents that one of"
        " the two gets right and the other wrong."
    )
    return [terminal.table(f"{directory} on tasks", columns, table), Text(caption)]


def _manager(folder: Path | None) -> Any:
    """What knows the harness's tasks and those of a folder.

    Raises:
        TaskError: there is no such folder.
    """
    if folder is not None and not folder.is_dir():
        raise TaskError(f"--task-folder '{folder}' is not a directory; name one with tasks as YAML files")
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    with _one_sentence("listed"):
        return TaskManager(include_path=None if folder is None else str(folder))


def _check_names(names: Sequence[str], manager: Any) -> None:
    """Checks that every task is known or a file.

    Raises:
        TaskError: one is neither.
    """
    for name in names:
        if name not in manager.task_index and not Path(name).is_file():
            raise TaskError(
                f"there is no task '{name}'{suggestion(name, manager.all_tasks)}; `lm-eval ls tasks` lists them, and"
                " --task-folder names a folder with your own"
            )


@contextlib.contextmanager
def _one_sentence(done: str, faults: tuple[type[Exception], ...] = (Exception,)) -> Iterator[None]:
    """What the harness raises meanwhile, a data set that cannot be read or a metric whose package is missing, is the
    user's to mend, as far as it is one of ``faults``.

    Raises:
        TaskError: in its place.
    """
    try:
        yield
    except LbllmError:
        raise
    except faults as error:
        raise TaskError(f"the tasks cannot be {done}: {first_line(error)}") from error
