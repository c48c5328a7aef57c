"""Tasks of lm-evaluation-harness: both models' scores, flips, and what is told of tasks that cannot be scored."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from test_errors import fails
from test_pretrained import words
from test_zoo import stages
from zoo import ZOO

import lbllm_compile
from lbllm_compile import artifact, evaluate, frontend, tasks
from lbllm_compile.evaluate import EvaluationError
from lbllm_compile.tasks import TaskError

DOCUMENTS = [
    {"prompt": "w5 w17 w42", "choices": ["w99 w3", "w8"], "label": 0},
    {"prompt": "w7", "choices": ["w30", "w7 w9"], "label": 1},
    {"prompt": "w7 w12 w61", "choices": ["w11", "w90"], "label": 1},
    {"prompt": "w33 w2", "choices": ["w54 w55", "w4 w80"], "label": 0},
]


def define(folder: Path) -> Path:
    """A folder that defines the task ``choice``: which of two continuations is likelier."""
    data = folder / "choice.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    (folder / "choice.yaml").write_text(
        "task: choice\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: '{{prompt}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: '{{label}}'\n"
        "metric_list: [{metric: acc}]\n"
    )
    return folder


@pytest.mark.slow
def test_both_models_are_scored_and_flips_are_documents_that_one_alone_gets_right(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "tasks"
    folder.mkdir()
    ZOO["llama"].build().save_pretrained(tmp_path / "original")
    words().save_pretrained(tmp_path / "original")
    original = frontend.load(tmp_path / "original")
    lock = {"model": frontend.program_hash(frontend.capture(original))}
    artifact.save(dataclasses.replace(stages("llama")[1], tokenizer=words()), tmp_path / "out", lock=lock)
    runtime = lbllm_compile.load(tmp_path / "out")
    state = torch.get_rng_state()

    figures = tasks.score(tmp_path / "out", ["choice"], folder=define(folder), teacher=str(tmp_path / "original"))

    assert torch.equal(torch.get_rng_state(), state)

    def right(logits_of, document) -> bool:
        scores = []
        for answer in document["choices"]:
            before = len(words()(document["prompt"])["input_ids"])
            ids = words()(f"{document['prompt']} {answer}")["input_ids"]
            logits = logits_of(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
            scores.append(float(sum(logits[i - 1, ids[i]] for i in range(before, len(ids)))))
        return scores.index(max(scores)) == document["label"]

    ours = [right(runtime.logits, document) for document in DOCUMENTS]
    theirs = [right(lambda ids: original.module(input_ids=ids).logits, document) for document in DOCUMENTS]
    (row,) = figures["tasks"]
    assert (row["task"], row["metric"], row["filter"], row["documents"]) == ("choice", "acc", "none", 4)
    assert row["compiled"] == sum(ours) / 4 and row["original"] == sum(theirs) / 4
    assert row["flips"] == sum(a != b for a, b in zip(ours, theirs, strict=True)) / 4

    limited = tasks.score(tmp_path / "out", [str(folder / "choice.yaml")], limit=3)
    (row,) = limited["tasks"]
    assert row["documents"] == 3 and row["compiled"] == sum(ours[:3]) / 3
    assert row["original"] is None and row["flips"] is None


def result(values: dict[str, list[float]], metric: str = "acc", filtered: str = "none") -> dict:
    """What the harness returns of tasks whose documents have these values."""
    return {
        "results": {
            task: {"alias": task, f"{metric},{filtered}": sum(v) / len(v), f"{metric}_stderr,{filtered}": "N/A"}
            for task, v in values.items()
        },
        "n-samples": {task: {"original": 9, "effective": len(v)} for task, v in values.items()},
        "samples": {
            task: [{"doc_id": i, "filter": filtered, metric: value} for i, value in enumerate(v)]
            for task, v in values.items()
        },
    }


def test_equal_accuracy_may_hide_flips():
    (row,) = tasks.rows(result({"t": [1, 0, 1, 0]}), result({"t": [0, 1, 1, 0]}))
    assert (row["compiled"], row["original"], row["flips"], row["stderr"]) == (0.5, 0.5, 0.5, None)


def test_a_metric_of_more_than_right_and_wrong_has_no_flips():
    (row,) = tasks.rows(result({"t": [0.5, 1.0]}, "f1"), result({"t": [1.0, 1.0]}, "f1"))
    assert (row["metric"], row["flips"]) == ("f1", None)


def test_a_group_has_figures_but_no_documents():
    compiled = result({"t": [1, 0]})
    compiled["results"]["group"] = {"alias": "group", "acc,none": 0.5, "acc_stderr,none": 0.25}
    row = tasks.rows(compiled, None)[1]
    assert (row["task"], row["documents"], row["compiled"], row["stderr"]) == ("group", None, 0.5, 0.25)
    assert row["original"] is None and row["flips"] is None


def test_a_table_names_filters_and_says_what_flips_are():
    figures = {"lm_eval": "0.4", "tasks": tasks.rows(result({"t": [1, 0]}, "exact_match", "strict"), None)}
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in tasks.render(Path("out"), figures):
        console.print(part)
    shown = console.export_text()
    assert "exact_match (strict)" in shown and "gets right and the other wrong" in shown


@pytest.mark.parametrize(
    ("names", "limit", "shots", "message"),
    [
        (["a", ""], None, None, "a name in --tasks is empty"),
        (["a"], 0, None, "--limit cannot be 0"),
        (["a"], None, -1, "--shots cannot be -1"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(names, limit, shots, message):
    with pytest.raises(TaskError, match=message):
        tasks.check(names, limit, shots)


def test_without_the_harness_its_extra_is_named(monkeypatch):
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TaskError, match=r"the package lm_eval; install it with `pip install 'lbllm-compile\[eval"):
        tasks.check(["arc_easy"], None, None)


def test_nothing_to_score_is_told():
    assert "give --text FILE, --tasks" in fails("eval", "somewhere")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "t", "--limit", "3"], "--limit has no effect without --tasks; give --tasks NAME"),
        (["--text", "t", "--shots", "0"], "--shots has no effect without --tasks"),
        (["--text", "t", "--task-folder", "f"], "--task-folder has no effect without --tasks"),
        (["--tasks", "arc_easy", "--seq-len", "9"], "--seq-len has no effect without --text; give --text FILE"),
        (["--tasks", "arc_easy", "--chunks", "32"], "--chunks has no effect without --text"),
        (["--tasks", "arc_easy", "--greedy-tokens", "0"], "--greedy-tokens has no effect without --text"),
    ],
)
def test_an_option_of_what_is_not_scored_is_refused(words, message):
    assert message in fails("eval", "somewhere", *words)


def test_a_wrong_task_or_folder_is_told_before_a_text_is_scored(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(evaluate, "evaluate", None)
    words = ("eval", "somewhere", "--text", "t", "--tasks", "arc_eazy")
    assert "is not a directory" in fails(*words, "--task-folder", str(tmp_path / "none"))
    known = SimpleNamespace(task_index={"arc_easy": None}, all_tasks=["arc_easy"])
    monkeypatch.setattr(tasks, "_manager", lambda folder: known)
    assert "no task 'arc_eazy' (did you mean 'arc_easy'?)" in fails(*words)


@pytest.mark.slow
def test_unknown_tasks_and_missing_folders_are_told_before_anything_is_loaded(tmp_path):
    pytest.importorskip("lm_eval")
    with pytest.raises(TaskError, match=r"no task 'arc_eazy' \(did you mean 'arc_easy'\?\).*--task-folder"):
        tasks.score(tmp_path / "none", ["arc_eazy"])
    with pytest.raises(TaskError, match=r"'.*none' is not a directory"):
        tasks.score(tmp_path / "none", ["arc_easy"], folder=tmp_path / "none")
    (tmp_path / "broken.yaml").write_text("task: broken\ndataset_path: json\ntest_split: test\n")
    with pytest.raises(artifact.ArtifactError):
        tasks.score(tmp_path / "none", [str(tmp_path / "broken.yaml")])


def test_what_tasks_lack_is_told_and_what_is_wrong_with_the_model_is_not_theirs(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    import lm_eval.evaluator
    import lm_eval.models.huggingface

    monkeypatch.setattr(artifact, "load", lambda directory: SimpleNamespace(program=None))
    monkeypatch.setattr(evaluate, "tokenizer_of", lambda program: None)
    monkeypatch.setattr(evaluate, "find_teacher", lambda *_: None)
    monkeypatch.setattr(lm_eval.models.huggingface, "HFLM", lambda model, **_: None)
    manager = SimpleNamespace(load=lambda names: None)

    def scored(error):
        def simple_evaluate(model, **options):
            raise error

        monkeypatch.setattr(lm_eval.evaluator, "simple_evaluate", simple_evaluate)
        return tasks.score(tmp_path, ["t"], manager=manager)

    with pytest.raises(TaskError, match="the tasks cannot be scored: no package rouge"):
        scored(ModuleNotFoundError("no package rouge"))
    for ours in (AttributeError("session"), IndexError("7"), RuntimeError("can't allocate memory"), MemoryError()):
        with pytest.raises(type(ours)):
            scored(ours)


def test_what_is_no_language_model_is_told(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    from test_artifact import lowered

    monkeypatch.setattr(tasks, "_manager", lambda folder: None)
    monkeypatch.setattr(tasks, "_check_names", lambda names, manager: None)
    artifact.save(lowered(), tmp_path / "out", lock={})
    with pytest.raises(EvaluationError, match="not a language model with a tokenizer"):
        tasks.score(tmp_path / "out", ["arc_easy"])
