"""``lbllm-compile tune``: searches without a model, results that travel, and mistakes answered in one sentence."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from lbllm_compile.codegen.spec import LinearSpec
from lbllm_compile.codegen.targets import Target
from lbllm_compile.codegen.threads import thread_count
from lbllm_compile.codegen.tune.database import Database, Key, Result
from lbllm_compile.codegen.tvm_api import VERSION
from test_errors import fails, good
from typer.testing import CliRunner

from lbllm_compile import cli, recipe, tune

__all__ = ["good"]

SEARCH = ["tune", "--target", "cpu:generic", "--group", "32", "--trials", "4"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, and a working directory beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def succeeds(*args: str) -> str:
    """Runs a command; returns its standard output."""
    result = CliRunner().invoke(cli.app, list(args), prog_name="lbllm-compile")
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("2m", 120), ("0.5h", 1800), ("45", 45), (" 1.5 m ", 90), ("1 s", 1)]
)
def test_times_have_units(text: str, seconds: float) -> None:
    assert tune.parse_duration(text) == seconds


def test_shapes_are_output_by_input() -> None:
    assert tune.parse_shapes("4096x11008, 576X1536,4096x11008") == [(4096, 11008), (576, 1536)]


MISTAKES = {
    "a shape of one number": (["--shapes", "4096"], "shape '4096' is not understood; write OUTxIN"),
    "a shape of three": (["--shapes", "4x4x4"], "'4x4x4'"),
    "an empty matrix": (["--shapes", "0x16"], "'0x16'"),
    "no shapes": (["--shapes", ""], "shape ''"),
    "nothing to tune": (["--trials", "3"], "give either --shapes"),
    "two things to tune": (["dir", "--shapes", "4x4"], "give either --shapes"),
    "no artifact": (["dir"], "no artifact at 'dir'"),
    "an artifact's own options": (["dir", "--act-bits", "8"], "drop --act-bits"),
    "an unknown target": (["--shapes", "4x4", "--target", "cpu:avx3"], "unknown target 'cpu:avx3'"),
    "a GPU": (["--shapes", "4x4", "--target", "cuda"], "are not searched"),
    "an unknown kind": (["--shapes", "4x4", "--kind", "float"], "--kind 'float'"),
    "a group that does not exist": (["--shapes", "4x4", "--group", "7"], "group size 7"),
    "bits that do not exist": (["--shapes", "4x4", "--act-bits", "3"], "3-bit activations"),
    "an unknown token range": (["--shapes", "4x4", "--tokens", "1,5"], "no token range is named '5'; use one of 1, 2"),
    "no trials": (["--shapes", "4x4", "--trials", "0"], "--trials 0"),
    "a time without meaning": (["--shapes", "4x4", "--budget", "2 parsecs"], "90s, 2m or 1h"),
    "no time": (["--shapes", "4x4", "--budget", "0s"], "--budget '0s'"),
    "a tracker without a port": (["--shapes", "4x4", "--rpc", "host", "--key", "k"], "HOST:PORT"),
    "a tracker without a key": (["--shapes", "4x4", "--rpc", "host:9190"], "needs --key"),
    "a key with spaces": (["--shapes", "4x4", "--rpc", "host:9190", "--key", "a b"], "without spaces"),
    "a key without a tracker": (["--shapes", "4x4", "--key", "k"], "add --rpc"),
    "a linker without a tracker": (["--shapes", "4x4", "--cc", "gcc"], "add --rpc"),
    "an import of nothing": (["import", "missing.jsonl"], "cannot read the tuning results 'missing.jsonl'"),
    "an import without a file": (["import"], "missing argument"),
    "an export of nothing": (["export", "file.jsonl"], "no tuning results are stored"),
    "an export of an unknown target": (["export", "file.jsonl", "--target", "gpu"], "unknown target 'gpu'"),
    "an option that does not exist": (["--shape", "4x4"], "there is no option --shape (did you mean --shapes?)"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    args, expected = MISTAKES[name]
    sentence = fails("tune", *args)
    assert expected in sentence, sentence


def test_a_tracker_that_does_not_answer() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # not listening, so that a connection is refused
        port = taken.getsockname()[1]
        sentence = fails("tune", "--shapes", "4x4", "--rpc", f"127.0.0.1:{port}", "--key", "board")
    assert f"no TVM RPC tracker answers at 127.0.0.1:{port}" in sentence and "tvm.exec.rpc_tracker" in sentence


def test_a_search_is_reported_stored_and_not_repeated(cache: Path) -> None:
    document = json.loads(succeeds(*SEARCH, "--shapes", "40x64", "--tokens", "1,2-16", "--json"))
    assert (document["target"], len(document["results"])) == ("cpu:generic", 2)
    assert document["bandwidth_gb_per_s"] > 0 and document["products_g_per_s"] is None
    for row, tokens in zip(document["results"], ("1", "2-16"), strict=True):
        assert (row["shape"], row["tokens"], row["source"]) == ("40x64", tokens, "search")
        assert 0 < row["microseconds"] <= row["default_microseconds"] and 0 <= row["gain"] < 1
    assert len((cache / "tuning.jsonl").read_text().splitlines()) == 2
    table = succeeds(*SEARCH, "--shapes", "40x64", "--tokens", "1")
    assert "40x64" in table and "stored" in table and "W(1+1) g32" in table


def test_a_search_says_how_it_goes() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.lines: list[str] = []

        def task(self, title: str, total: int) -> Recorder:
            self.lines.append(f"{title} {total}")
            return self

        def advance(self, note: str = "") -> None:
            self.lines.append(note)

        def note(self, text: str) -> None:
            self.lines.append(text)

        def __enter__(self) -> Recorder:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    recorder = Recorder()
    options = tune.TuneOptions("600x640", target="cpu:generic", tokens="1", trials=4, budget="60s")
    report = tune.tune(options, recorder)
    assert recorder.lines[:2] == ["tune kernels 1", "600x640, 1 token 4"]
    assert len(recorder.lines) == 7
    assert all(line.startswith("best ") and "% of the memory bandwidth" in line for line in recorder.lines[2:6])
    assert recorder.lines[6].startswith("600x640, 1 token: ") and report.limits.weight_bytes > 600 * 640 / 4


def store(cache: Path) -> None:
    """Puts a result into the database of a cache folder."""
    from lbllm_compile.codegen.cpu import space as cpu

    key = Key.here(
        LinearSpec("bit", 40, 64, 32), "1", Target.parse("cpu:generic"), thread_count(), VERSION, cpu.SCHEDULE_VERSION
    )
    Database(cache).add(key, Result({"layout": "portable", "rows": 8, "parallel": False}, 5.0, 4, 4))


def test_results_travel(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(cache)
    assert "1 results written to out.jsonl" in succeeds("tune", "export", "out.jsonl", "--target", "cpu:generic")
    assert "no tuning results of cpu:avx2" in fails("tune", "export", "out.jsonl", "--target", "cpu:avx2")
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path / "elsewhere"))
    merged = json.loads(succeeds("tune", "import", "out.jsonl", "out.jsonl", "--json"))
    assert merged == {"added": 1, "replaced": 0, "kept": 1}
    document = json.loads(succeeds(*SEARCH, "--shapes", "40x64", "--tokens", "1", "--json"))
    assert (document["results"][0]["source"], document["results"][0]["microseconds"]) == ("stored", 5.0)
    assert (tmp_path / "elsewhere" / "tuning.jsonl").read_text() == (cache / "tuning.jsonl").read_text()


def test_a_damaged_import_changes_nothing(cache: Path) -> None:
    store(cache)
    succeeds("tune", "export", "good.jsonl")
    good = Path("good.jsonl").read_text()
    Path("bad.jsonl").write_text(good.replace('"out_features": 40', '"out_features": 41') + good[:50] + "\n")
    Path("odd.jsonl").write_text(good.replace('"rows"', '"cows"'))
    before = (cache / "tuning.jsonl").read_text()
    assert "line 2 of 'bad.jsonl' is not a tuning result" in fails("tune", "import", "good.jsonl", "bad.jsonl")
    assert "schedule of no known kind (cows, layout, parallel)" in fails("tune", "import", "odd.jsonl")
    assert (cache / "tuning.jsonl").read_text() == before


def test_an_artifact_says_what_to_tune(good: Path, cache: Path) -> None:
    results = json.loads(
        succeeds("tune", str(good), "--target", "cpu:generic", "--trials", "1", "--tokens", "1", "--json")
    )
    assert {"bit"} <= {row["kind"] for row in results["results"]}
    assert len(results["results"]) == len((cache / "tuning.jsonl").read_text().splitlines()) > 1
    assert Database(cache).path.is_file()


def test_shapes_are_tuned_in_the_groups_of_a_compile():
    """What is searched without a model has to be what a compile then asks for."""
    (spec,) = tune.specs_of(tune.TuneOptions(shapes="64x96"))
    (ptq,) = (item for item in recipe.passes(recipe.Choices(), "cpu") if item.name == "ptq")
    assert spec.group == ptq.group
