"""A compile repeated from its lock: what is equal, what is said to differ, and what it needs to be repeated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from lbllm_compile.codegen.spec import LinearSpec
from lbllm_compile.passes.ir.compare import same_bits
from safetensors.torch import load_file, save_file
from stages import Notes
from test_cli import invoke

from lbllm_compile import artifact, driver, origin, reproduce
from lbllm_compile.manifest import MANIFEST
from lbllm_compile.options import CompileOptions

MODEL = """
import torch

recipe = {"group": 32, "preset": "quick"}

class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(40, 24), torch.nn.Linear(24, 8)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))

def build_model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return Two()

def example_inputs():
    return torch.linspace(-1, 1, 160).reshape(4, 40)

def calibration_inputs():
    return [torch.linspace(-1, i, 160).reshape(4, 40) for i in range(1, 6)]
"""

PIPELINE = "canonicalize,annotate,observe,ptq{group=32},activate{group=32,bits=8,steps=0},lower,cleanup"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LBLLM_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, cache: None) -> Path:
    """An artifact, and the model.py that it is from in another folder."""
    folder = tmp_path_factory.mktemp("reproduce")
    (folder / "models").mkdir()
    (folder / "models" / "two.py").write_text(MODEL.replace("SEED", "1"))
    return driver.compile(CompileOptions(folder / "models" / "two.py", pipeline=PIPELINE, out=folder / "out")).out


def texts(value: object) -> list[str]:
    """All strings of a JSON document, keys included."""
    if isinstance(value, dict):
        return [text for key, item in value.items() for text in (key, *texts(item))]
    if isinstance(value, list):
        return [text for item in value for text in texts(item)]
    return [value] if isinstance(value, str) else []


def test_a_lock_names_no_places(compiled: Path) -> None:
    lock = json.loads((compiled / "lbllm.lock").read_text())
    assert (lock["source"], lock["calibration_source"]) == ("two.py", "calibration_inputs() of two.py")
    assert not [text for text in texts(lock) if str(compiled.parent) in text or text.startswith("/")]
    recorded = artifact.compiled_from(artifact.load(compiled).digest)
    assert recorded == {"source": str(compiled.parent / "models" / "two.py")}


def test_the_same_compile_gives_the_same_model(compiled: Path, tmp_path: Path) -> None:
    before = (compiled / MANIFEST).read_bytes()
    result = invoke("reproduce", str(compiled), "--out", str(tmp_path / "again"), "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["same"] and document["graphs"] == 8 and document["tensors"] > 8
    # A search may end with another schedule.
    assert {d["kind"] for d in document["differences"]} <= {"machine", "kernel"}
    assert not any(d["decides"] for d in document["differences"])
    files = [artifact.listed_files(place) for place in (compiled, tmp_path / "again")]
    for name in ("lbllm.lock", "model.safetensors", "graph.json", "measured.json"):
        assert files[0][name] == files[1][name]
    assert (compiled / MANIFEST).read_bytes() == before


def test_a_changed_model_is_said_first_and_what_became_of_it(compiled: Path, tmp_path: Path) -> None:
    other = tmp_path / "two.py"
    other.write_text(MODEL.replace("SEED", "2"))
    notes = Notes()
    result = reproduce.reproduce(compiled, model=str(other), progress=notes)
    (first,) = [text for text in notes.said if "is not what it was" in text]
    assert "the model (two.py) is not what it was" in first
    kinds = {d.kind for d in result.differences}
    assert not result.same and {"source", "tensor", "output"} <= kinds and "graph" not in kinds and result.out is None
    weights = {d.name: d for d in result.differences if d.kind == "tensor"}
    assert weights["first.bias"].error and weights["first.bias"].error > 0.1
    old = load_file(compiled / "model.safetensors")
    assert f"of {old['first.bias'].numel()} differ, by " in weights["first.bias"].now
    assert not (compiled.parent / "out.lbllm-work").exists()


def relist(place: Path, contents: dict[str, str]) -> None:
    """Puts other contents into files of an artifact."""
    manifest = json.loads((place / MANIFEST).read_text())
    for name, text in contents.items():
        (place / name).write_text(text)
        manifest["files"][name] = artifact._entry(place / name)
    (place / MANIFEST).write_text(json.dumps(manifest))


def edited(compiled: Path, place: Path) -> Path:
    """A copy with another bias in the last place, another graph, another schedule and other versions."""
    shutil.copytree(compiled, place)
    weights = load_file(place / "model.safetensors")
    weights["second.bias"][3] += 0.5
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    file = next((place / "passes").glob("*_lower.json"))
    file.write_text(file.read_text().replace("aten.relu.default", "aten.sigmoid.default"))
    lock = json.loads((place / "lbllm.lock").read_text())
    lock["versions"]["torch"] = "1.0"
    (place / "lbllm.lock").write_text(json.dumps(lock))
    tuning = json.loads((place / "tuning.json").read_text())
    tuning[0]["schedule"]["layout"] = "another"
    (place / "tuning.json").write_text(json.dumps(tuning))
    manifest = json.loads((place / MANIFEST).read_text())
    for name in manifest["files"]:
        manifest["files"][name] = artifact._entry(place / name)
    (place / MANIFEST).write_text(json.dumps(manifest))
    return place


def test_every_difference_has_its_name_and_size(compiled: Path, tmp_path: Path) -> None:
    result = reproduce.compare(compiled, edited(compiled, tmp_path / "edited"))
    found = {d.kind: d for d in result.differences}
    assert found["tensor"].name == "second.bias" and found["tensor"].now == "1 of 8 differ, by 0.5 at most"
    bias = load_file(compiled / "model.safetensors")["second.bias"].double()
    assert found["tensor"].error == pytest.approx(0.5 / float(bias.norm()), rel=1e-5)
    assert found["graph"].name.startswith("after lower, the first that differs: 1 nodes, first 'relu")
    assert found["graph"].then.startswith("aten.relu") and found["graph"].now.startswith("aten.sigmoid")
    assert (found["version"].name, found["version"].now) == ("torch", "1.0") and "another" in found["kernel"].now
    decides = {kind: d.decides for kind, d in found.items()}
    assert decides == {"tensor": True, "graph": True, "version": False, "kernel": False}


@pytest.mark.parametrize("inside", ["", "/within", "/.."])
def test_the_artifact_is_never_written_over(compiled: Path, inside: str) -> None:
    result = invoke("reproduce", str(compiled), "--out", f"{compiled}{inside}")
    assert result.exit_code == 2 and "lies in or over the artifact" in result.stderr
    assert artifact.load(compiled)


def test_code_of_an_artifact_from_elsewhere_is_not_run(compiled: Path, tmp_path: Path) -> None:
    foreign = edited(compiled, tmp_path / "foreign")
    (tmp_path / "two.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    result = invoke("reproduce", str(foreign))
    assert result.exit_code == 2 and "is code, and this user's cache" in result.stderr and "--model" in result.stderr
    assert not (tmp_path / "ran").exists()


def test_a_lock_that_says_too_little_is_told(compiled: Path, tmp_path: Path) -> None:
    place = shutil.copytree(compiled, tmp_path / "out")
    relist(place, {"lbllm.lock": "{}"})
    result = invoke("reproduce", str(place))
    assert result.exit_code == 2 and "does not say its pipeline; compile the model again" in result.stderr


def test_threads_are_those_of_the_compile_and_come_back(compiled: Path) -> None:
    before = torch.get_num_threads()
    with reproduce._torch_threads(str(before + 1)):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with reproduce._torch_threads("1000000"):
        assert torch.get_num_threads() == before


def test_an_artifacts_passes_are_run_again_where_its_model_is(compiled: Path, tmp_path: Path) -> None:
    result = invoke("bisect", str(compiled), "--out", str(tmp_path / "fault"), "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert [record["name"] for record in document["records"]][-3:] == ["activate", "lower", "cleanup"]
    assert {check["name"]: check["error"] for check in document["checks"]} == {"kernel": 0.0}
    assert document["fault"] is None and not (tmp_path / "fault").exists()


CHANGES = {
    "model (two.py)": ("manual_seed(1)", "manual_seed(2)"),
    "calibration (calibration_inputs() of two.py)": ("linspace(-1, i, 160)", "linspace(-2, i, 160)"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_passes_are_not_run_again_on_another_model(compiled: Path, tmp_path: Path, what: str) -> None:
    source = compiled.parent / "models" / "two.py"
    text = source.read_text()
    assert CHANGES[what][0] in text
    source.write_text(text.replace(*CHANGES[what]))
    try:
        result = invoke("bisect", str(compiled), "--out", str(tmp_path / "fault"), "--json")
    finally:
        source.write_text(text)
    assert result.exit_code == 0, result.stderr
    assert f"the passes were not run again: the {what} is not what it was" in result.stderr
    document = json.loads(result.stdout)
    assert document["records"] == [] and document["checks"]


OBJECTS = {
    "texts": (
        {"calibration_object": "texts", "calibration_text": None},
        "objects in memory; name it with --calibration",
    ),
    "inputs": (
        {"calibration_object": "calibration_inputs"},
        "give --model a model.py whose calibration_inputs() has them",
    ),
    "an older lock": (
        {"calibration_source": "text.txt"},
        "which text it was calibrated on; name it with --calibration",
    ),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_other_data_never_take_the_place_of_what_was_an_object(tmp_path: Path, name: str) -> None:
    lock, sentence = OBJECTS[name]
    with pytest.raises(reproduce.ReproduceError) as caught:
        reproduce._calibration(tmp_path, "0" * 64, lock, None)
    assert sentence in str(caught.value)


def test_what_needs_no_text_is_asked_for_none(tmp_path: Path) -> None:
    for lock in ({"calibration_text": None}, {"calibration_source": "the model's own samples"}):
        assert reproduce._calibration(tmp_path, "0" * 64, lock, None) is None
    assert reproduce._calibration(tmp_path, "0" * 64, {"calibration_object": "calibration_inputs"}, "two.py") is None


def test_sources_are_where_they_were_or_else_beside_the_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, beside = tmp_path / "there", tmp_path / "beside"
    for folder in (there, beside):
        (folder / "model").mkdir(parents=True)
        for name in ("two.py", "text.txt"):
            (folder / name).write_text("")
    places: dict[str, str] = {}
    monkeypatch.setattr(artifact, "compiled_from", lambda digest: places)

    def found(source: str) -> list[str | None]:
        places.update(source=str(there / source), calibration=str(there / "text.txt"))
        lock = {"source": source, "calibration_text": "text.txt"}
        text = origin.calibration_of(beside / "out", "", lock)
        return [str(Path(place).parent) for place in (origin.source_of(beside / "out", "", lock), text) if place]

    assert found("model") == found("two.py") == [str(there)] * 2
    (there / "model").rmdir()
    (there / "text.txt").unlink()
    assert found("model") == [str(beside)] * 2
    (there / "two.py").unlink()  # what lies beside the artifact under its name is not what was compiled here
    with pytest.raises(origin.OriginError, match="is code"):
        found("two.py")
    (beside / "text.txt").unlink()
    with pytest.raises(origin.OriginError, match="is not on this machine"):
        found("model")


def test_linears_that_differ_in_anything_are_told_apart() -> None:
    specs = [
        LinearSpec("bit", 64, 128, 32),
        LinearSpec("bit", 64, 128, 64),
        LinearSpec("bit", 64, 128, 32, 8),
        LinearSpec("bit", 64, 128, 32, per_token=True),
        LinearSpec("bit", 64, 128, 32, bias=True),
        LinearSpec("int8", 64, 128, 32),
    ]
    assert len({reproduce._linear(spec) for spec in specs}) == len(specs)


def test_other_passes_are_named_and_the_graph_that_runs_is_compared(compiled: Path, tmp_path: Path) -> None:
    place = shutil.copytree(compiled, tmp_path / "renamed")
    old = next((place / "passes").glob("*_activate.json"))
    new = old.rename(old.with_name(old.name.replace("activate", "smooth")))
    manifest = json.loads((place / MANIFEST).read_text())
    manifest["files"][f"passes/{new.name}"] = manifest["files"].pop(f"passes/{old.name}")
    (place / MANIFEST).write_text(json.dumps(manifest))
    relist(
        place, {"graph.json": (place / "graph.json").read_text().replace("aten.relu.default", "aten.sigmoid.default")}
    )
    passes, runs = [d for d in reproduce.compare(compiled, place).differences if d.kind == "graph"]
    count = len(list((place / "passes").glob("*.json")))
    assert passes.name == "passes" and passes.then.startswith(f"{count} passes, number ")
    assert passes.then.endswith(": activate") and passes.now.endswith(": smooth")
    assert runs.name.startswith("the graph that runs: 1 nodes, first 'relu")


def test_equal_is_equal_to_the_bit() -> None:
    nan, zero = torch.tensor([float("nan"), 1.0]), torch.zeros(())
    assert same_bits(nan, nan.clone()) and same_bits(zero, zero.clone())
    assert not same_bits(zero, -zero) and not same_bits(nan, nan[:1])
    assert not same_bits(zero, torch.zeros((), dtype=torch.int32))
