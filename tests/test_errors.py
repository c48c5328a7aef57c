"""Every mistake of a user gets one sentence that says what to do, exit code 2 and no traceback."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rtn
import tokenizers
import torch
import transformers
import zoo
from lbllm_compile.codegen.cpu.build import KernelSet
from lbllm_compile.codegen.spec import LinearSpec
from lbllm_compile.passes import PassContext, pipeline
from safetensors import SafetensorError
from safetensors.torch import load, save
from typer.testing import CliRunner

from lbllm_compile import artifact, checkpoint, cli, frontend, preflight

ROOT = Path(__file__).resolve().parent.parent

LINEAR = """
import torch
def build_model():
    return torch.nn.Sequential(torch.nn.Linear(40, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
def example_inputs():
    return torch.ones(2, 40)
"""

LANGUAGE = """
import tokenizers, torch, transformers
def build_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=40, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=64))
def tokenizer():
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(40)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
"""


def fails(*args: str, exit_code: int = 2) -> str:
    """Runs a command that must fail; returns its one sentence."""
    result = CliRunner().invoke(cli.app, list(args), prog_name="lbllm-compile")
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    sentences = [line for line in result.stderr.splitlines() if line.startswith("lbllm-compile: ")]
    assert len(sentences) == 1, result.stderr
    assert result.stderr.splitlines()[-1] == sentences[0]
    assert "this is a bug" not in sentences[0]
    assert 20 < len(sentences[0]) < 500
    return sentences[0]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with its own cache, a good ``linear.py``, ``language.py`` and ``words.txt``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "linear.py").write_text(LINEAR)
    (tmp_path / "language.py").write_text(LANGUAGE)
    (tmp_path / "words.txt").write_text("w1 w2")
    return tmp_path


# The model

MODELS = {
    "a syntax error": ("def build_model(:\n", ["syntax error", "line 1"]),
    "an import that fails": ("import no_such_package\n", ["no_such_package", "model.py:1"]),
    "no build_model": ("def build():\n    pass\n", ["has no function build_model()"]),
    "build_model raises": ("def build_model():\n    return 1 / 0\n", ["build_model()", "model.py:2"]),
    "build_model returns no module": ("def build_model():\n    return {}\n", ["must return a torch.nn.Module"]),
    "no linear": (
        "import torch\ndef build_model():\n    return torch.nn.ReLU()\n"
        "def example_inputs():\n    return torch.ones(2)\n",
        ["nothing to quantize"],
    ),
    "no example_inputs": ("import torch\ndef build_model():\n    return torch.nn.Linear(8, 8)\n", ["example_inputs()"]),
    "inputs that do not fit": (LINEAR.replace("ones(2, 40)", "ones(2, 41)"), ["40"]),
    "NaN weights": (
        LINEAR.replace("    return torch.nn.Seq", "    return nan(torch.nn.Seq").replace(
            "Linear(8, 4))", "Linear(8, 4)))"
        )
        + "def nan(model):\n    model[0].weight.data[3, 5] = float('nan')\n    return model\n",
        ["'0.weight'", "NaN"],
    ),
    "an import that exits": ("import sys\nsys.exit(0)\n", ["cannot be imported", "SystemExit", "model.py:2"]),
    "build_model exits": ("import sys\ndef build_model():\n    sys.exit()\n", ["build_model()", "model.py:3"]),
    "a tokenizer that is a text": (
        LANGUAGE + "def tokenizer():\n    return 'w'\n",
        ["tokenizer()", "str", "transformers tokenizer"],
    ),
    "weights that are nowhere": (
        "import torch\ndef build_model():\n    return torch.nn.Linear(8, 8, device='meta')\n"
        "def example_inputs():\n    return torch.ones(2, 8)\ndef weights():\n    pass\n",
        ["weights()", "returned None", ".safetensors"],
    ),
    "NaN inputs": (LINEAR.replace("ones(2, 40)", "full((2, 40), torch.nan)"), ["'input'", "example_inputs()", "NaN"]),
    "a recipe that is no dict": (LINEAR + "recipe = 'quick'\n", ["'recipe'", "dict"]),
    "a recipe with an unknown option": (LINEAR + "recipe = {'grup': 64}\n", ["grup", "group"]),
    "a forward that depends on data": (
        "import torch\n"
        "class Model(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.linear = torch.nn.Linear(8, 8)\n"
        "    def forward(self, x):\n"
        "        return self.linear(x) if x.sum() > 0 else x\n"
        "def build_model():\n    return Model()\ndef example_inputs():\n    return torch.ones(2, 8)\n",
        ["model.py:7", "depends on the values"],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(here: Path, name: str) -> None:
    text, expected = MODELS[name]
    (here / "model.py").write_text(text)
    sentence = fails("model.py")
    assert [part for part in expected if part not in sentence] == [], sentence


def test_a_mistyped_path_is_not_looked_up_on_the_network(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
    for verb in ("compile", "plan", "preflight"):
        sentence = fails(verb, "modles/llama")
        assert "there is no file or directory 'modles/llama'" in sentence and "hf:ORG/NAME" in sentence


def test_files_that_are_no_model(here: Path) -> None:
    assert "there is no file or directory 'missing.py'" in fails("missing.py")
    (here / "notes.txt").write_text("hello")
    assert "neither a .py nor a .gguf" in fails("notes.txt")
    (here / "broken.gguf").write_bytes(b"GGML" + bytes(64))
    assert "not a GGUF file" in fails("broken.gguf")
    (here / "cut.gguf").write_bytes(b"GGUF" + bytes(8))
    assert "cut.gguf" in fails("cut.gguf")
    (here / "empty").mkdir()
    assert "has no config.json" in fails("empty")
    (here / "empty" / "config.json").write_text("{")
    assert "'empty/config.json' is not a model configuration" in fails("empty")


HOOKS = {
    "text that raises": (LANGUAGE, "def calibration_text():\n    return 1 / 0\n", ["calibration_text()", "model.py:"]),
    "text that is nothing": (LANGUAGE, "def calibration_text():\n    pass\n", ["calibration_text()", "returned None"]),
    "text that is one string": (LANGUAGE, "def calibration_text():\n    return 'w1'\n", ["returned a str", "list"]),
    "text that breaks off": (
        LANGUAGE,
        "def calibration_text():\n    yield 'w1'\n    raise OSError('no disk')\n",
        ["calibration_text()", "no disk", "model.py:"],
    ),
    "text that is no string": (LANGUAGE, "def calibration_text():\n    yield 3\n", ["int instead of strings"]),
    "text that exits": (LANGUAGE, "def calibration_text():\n    yield 'w1'\n    exit()\n", ["calibration_text()"]),
    "inputs that raise": (
        LINEAR,
        "def calibration_inputs():\n    yield 1 / 0\n",
        ["calibration_inputs()", "model.py:"],
    ),
    "inputs of another width": (
        LINEAR,
        "def calibration_inputs():\n    for _ in range(4): yield torch.ones(2, 41)\n",
        ["calibration_inputs()", "(2, 41)", "(2, 40)"],
    ),
    "inputs of another dtype": (
        LINEAR,
        "def calibration_inputs():\n    return [torch.ones(2, 40).double()] * 4\n",
        ["float64", "float32"],
    ),
    "inputs that are NaN": (
        LINEAR,
        "def calibration_inputs():\n    return [torch.full((2, 40), torch.nan)] * 4\n",
        ["calibration_inputs()", "NaN"],
    ),
    "inputs that are no tensors": (
        LINEAR,
        "def calibration_inputs():\n    return [3] * 4\n",
        ["gives an int", "tensor"],
    ),
}


@pytest.fixture
def unrehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares the rehearsal, which comes before the calibration data."""
    monkeypatch.setattr(preflight, "rehearse", lambda *_, **__: None)


@pytest.mark.parametrize("name", HOOKS)
def test_calibration_hooks(here: Path, unrehearsed: None, name: str) -> None:
    model, hook, expected = HOOKS[name]
    (here / "model.py").write_text(model + hook)
    sentence = fails("model.py", "--preset", "quick")
    assert [part for part in expected if part not in sentence] == [], sentence


# Options

OPTIONS = {
    "unknown target": (["--target", "cpu:avx3"], "did you mean 'cpu:avx2'"),
    "no target": (["--target", ""], "unknown target"),
    "unknown preset": (["--preset", "quik"], "did you mean 'quick'"),
    "unknown recipe": (["--recipe", "lblm"], "did you mean 'lbllm'"),
    "impossible group": (["--group", "48"], "choose 32, 64, 128, 256"),
    "group of the wrong type": (["--group", "many"], "--group"),
    "impossible bits": (["--act-bits", "5"], "choose 4, 8, 16"),
    "impossible cache bits": (["--kv-bits", "3"], "choose 4, 8, 16"),
    "unknown option": (["--presett", "quick"], "did you mean --preset?"),
    "unknown device": (["--device", "gpu"], "choose auto, cpu or cuda"),
    "malformed pipeline": (["--pipeline", "annotate,ptq{group=64"], "pipeline text: expected ',' or '}' at column 22"),
    "unknown pass": (["--pipeline", "anotate"], "did you mean 'annotate'"),
    "unknown pass option": (["--pipeline", "ptq{grup=64}"], "did you mean 'group'"),
    "pass option of the wrong type": (["--pipeline", "ptq{damp=much}"], "cannot be 'much'"),
    "pass option out of range": (["--pipeline", "ptq{group=48},lower"], "48"),
    "pipeline without lower": (["--pipeline", "canonicalize,annotate,observe,ptq"], "add 'lower' behind it"),
    "empty pipeline": (["--pipeline", ""], "pipeline text: expected a pass name"),
    "contradiction": (["--pipeline", "annotate", "--group", "64"], "contradict"),
    "print after an unknown pass": (["--print-after", "lowr"], "did you mean 'lower'"),
    "dense pattern that matches nothing": (["--keep-dense", "layers.*"], "matches no linear"),
    "passes in a wrong order": (["--pipeline", "canonicalize,annotate,lower"], "ptq"),
    "output is a file": (["--out", "linear.py"], "not a directory"),
    "output below a file": (["--out", "linear.py/out"], "cannot write"),
    "output holds other things": (["--out", "."], "not an lbllm artifact"),
    "dumps over other files": (["--dump-dir", "."], "pass an empty --dump-dir"),
    "work directory is a file": (["--work-dir", "linear.py"], "linear.py"),
    "work directory in the output": (["--work-dir", "o/work", "--out", "o"], "would lie inside one another"),
    "dumps into the output": (["--dump-dir", "o", "--out", "o"], "would lie inside one another"),
    "a seed out of range": (["--seed", str(2**70)], "--seed cannot be"),
    "a negative seed": (["--seed", "-1"], "--seed cannot be -1"),
    "lowering twice": (
        ["--pipeline", "canonicalize,annotate,observe,ptq,activate{steps=0},lower,lower"],
        "run 'lower' once",
    ),
    "text for a model without a vocabulary": (["--calibration", "words.txt"], "no language model"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(here: Path, name: str) -> None:
    options, expected = OPTIONS[name]
    sentence = fails("linear.py", "--preset", "quick", *options)
    assert expected in sentence, sentence


UNREAD = {
    "missing text": (["--calibration", "/nonexistent.txt"], "no calibration file '/nonexistent.txt'"),
    "text of an unknown kind": (["--calibration", "linear.py"], "must end in .txt, .jsonl or .parquet"),
    "text that is not UTF-8": (["--calibration", "latin.txt"], "not UTF-8"),
    "text that is no JSON lines": (["--calibration", "broken.jsonl"], "line 1 of 'broken.jsonl' is not JSON"),
    "data set without the package": (["--calibration", "hf:wikitext"], "needs the package datasets"),
    "work directory is a file": (["--work-dir", "linear.py"], "cannot use linear.py as work directory"),
    "work directory below a file": (["--work-dir", "linear.py/w"], "cannot use linear.py/w as work directory"),
    "work directory holds other things": (["--work-dir", "."], "not a work directory"),
    "a pass that the pipeline lacks": (
        ["--pipeline", "canonicalize,annotate", "--print-after", "ptq"],
        "--print-after ptq: the pipeline has no pass 'ptq'; it has canonicalize, annotate",
    ),
}


@pytest.mark.parametrize(
    ("name", "verb"),
    [
        (name, verb)
        for name, (options, _) in UNREAD.items()
        for verb in ("compile", "plan", "preflight")
        if verb == "compile" or "--calibration" in options
    ],
)
def test_what_can_be_refused_without_the_model_is(
    here: Path, monkeypatch: pytest.MonkeyPatch, name: str, verb: str
) -> None:
    options, expected = UNREAD[name]
    (here / "model.py").write_text("open('ran', 'w')\n" + LANGUAGE)
    (here / "latin.txt").write_bytes("ä".encode("latin-1"))
    (here / "broken.jsonl").write_text("{")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *rest: None if n == "datasets" else found(n, *rest))
    before = sorted(here.iterdir())
    sentence = fails(verb, "model.py", *options)
    assert expected in sentence, sentence
    assert sorted(here.iterdir()) == before


def test_a_pass_to_print_after_must_be_in_the_pipeline(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "model.gguf").write_bytes(b"not read")
    (here / "model.py").write_text(LINEAR + "recipe = {'pipeline': 'canonicalize,annotate'}\n")
    monkeypatch.setattr(frontend, "capture", None)
    assert "--print-after finetune: the pipeline has no pass" in fails(
        "model.gguf", "--preset", "quick", "--print-after", "finetune"
    )
    assert "it has canonicalize, annotate" in fails("model.py", "--print-after", "ptq")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(here: Path) -> None:
    assert "no CUDA device" in fails("linear.py", "--device", "cuda")


# Calibration text

TEXTS: dict[str, tuple[str, bytes | None, str]] = {
    "missing": ("text.txt", None, "text.txt"),
    "empty": ("text.txt", b"", "text.txt"),
    "not UTF-8": ("text.txt", b"w1 w2 \xff\xfe w3", "UTF-8"),
    "too short": ("text.txt", b"w1 w2", "token"),
    "broken JSON lines": ("text.jsonl", b'{"text": "w1"}\n{"text": \n', "line 2"),
    "JSON lines without text": ("text.jsonl", b'{"words": "w1"}\n', "text"),
    "unknown kind": ("text.docx", b"w1", "text.docx"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_calibration_texts(here: Path, unrehearsed: None, name: str) -> None:
    file, content, expected = TEXTS[name]
    if content is not None:
        (here / file).write_bytes(content)
    sentence = fails("language.py", "--preset", "quick", "--calibration", file)
    assert expected in sentence, sentence


# Artifacts


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small artifact of a language model with a tokenizer, without calibration."""
    model = zoo.user_model("llama")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"w{i}": i for i in range(zoo.VOCABULARY)}, unk_token="w0")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    program = frontend.capture(model)
    context = PassContext(probe=frontend.language_model_inputs(torch.arange(10).reshape(2, 5)))
    history = []
    for item in pipeline.parse("canonicalize,annotate"):
        program = item.apply(program, context).program
        history.append((item.name, program))
    program = rtn.simulate(program)
    for item in pipeline.parse("head{group=32},merge,lower,cache,cleanup"):
        program = item.apply(program, context).program
        history.append((item.name, program))
    directory = tmp_path_factory.mktemp("artifact") / "good"
    artifact.save(dataclasses.replace(program, tokenizer=tokenizer), directory, lock={}, history=history)
    return directory


def rewrite(directory: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Changes a file and corrects the manifest, as someone who wants to pass the checks would."""
    content = change((directory / name).read_bytes())
    (directory / name).write_bytes(content)
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (directory / "manifest.json").write_text(json.dumps(manifest))


def weights(directory: Path) -> Path:
    (file,) = directory.glob("*.safetensors")
    return file


def truncate(directory: Path) -> None:
    content = weights(directory).read_bytes()
    weights(directory).write_bytes(content[: len(content) // 2])


def flip(directory: Path) -> None:
    content = bytearray(weights(directory).read_bytes())
    content[-1] ^= 1
    weights(directory).write_bytes(content)


def foreign_operator(directory: Path) -> None:
    rewrite(directory, "graph.json", lambda text: text.replace(b'"aten.silu.default"', b'"aten.from_file.default"'))


def forged_weights(directory: Path) -> None:
    rewrite(directory, weights(directory).name, lambda content: content[: len(content) // 2])


def change_weight(directory: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Changes one stored tensor, the first whose path ends so, and corrects the manifest."""
    state = load(weights(directory).read_bytes())
    path = next(p for p in state if p.endswith(name))
    state[path] = change(state[path])
    rewrite(directory, weights(directory).name, lambda _: save(state, metadata={"format": "pt"}))


def spoil(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


def lacking_argument(directory: Path) -> None:
    def change(text: bytes) -> bytes:
        document = json.loads(text)
        node = next(n for n in document["nodes"] if n["target"] == "aten.mul.Tensor")
        node["args"] = node["args"][:1]
        return json.dumps(document).encode()

    rewrite(directory, "graph.json", change)


def records(text: bytes) -> Callable[[Path], None]:
    return lambda directory: rewrite(directory, "tuning.json", lambda _: text)


def tuning_record(**changes: Any) -> Callable[[Path], None]:
    """A record of which the linear has other fields, or that has another linear or schedule."""
    spec = dataclasses.asdict(LinearSpec("bit", out_features=8, in_features=32, group=32))
    record = {"spec": spec, "tokens": "1", "target": "cpu:generic", "threads": 1, "schedule": {"rows": 4}}
    whole = {name: value for name, value in changes.items() if name in record}
    spec.update({name: value for name, value in changes.items() if name not in record})
    return records(json.dumps([{**record, **whole}]).encode())


def other_version(directory: Path) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated weights": (truncate, "bytes instead of"),
    "a flipped byte": (flip, "was altered"),
    "another version": (other_version, "format version 99"),
    "a missing file": (lambda d: (d / "config.json").unlink(), "is missing"),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "has no manifest.json"),
    "a manifest that is no JSON": (lambda d: (d / "manifest.json").write_text("{"), "is damaged"),
    "an operator outside the allow-list": (foreign_operator, "from_file"),
    "a graph that is no JSON": (lambda d: rewrite(d, "graph.json", lambda _: b"["), "not JSON"),
    "forged weights": (forged_weights, "not a safetensors file"),
    "tuning records of something else": (records(b'[{"a": 1}]'), "does not hold tuning records"),
    "tuning records that are numbers": (records(b"[3]"), "does not hold tuning records"),
    "a tuning record of half a linear": (tuning_record(spec={"kind": "bit"}), "the fields of a LinearSpec are kind"),
    "a tuning record of a linear that has a list": (tuning_record(bias=[]), "bias must be bool"),
    "a tuning record of a schedule that has a list": (tuning_record(schedule={"rows": []}), "plain values"),
    "a norm of another shape": (lambda d: change_weight(d, "norm.weight", lambda t: t[:-1].clone()), "does not run at"),
    "a NaN norm": (lambda d: change_weight(d, "norm.weight", spoil(float("nan"))), "NaN or infinite"),
    "an infinite norm": (lambda d: change_weight(d, "norm.weight", spoil(-float("inf"))), "NaN or infinite"),
    "a NaN clip factor": (lambda d: change_weight(d, "input_clip", spoil(float("nan"))), "NaN or infinite"),
    "an operator that lacks an argument": (lacking_argument, "lacks the argument 'other'"),
}


LOOKED_INTO = {
    "a truncated graph": (lambda p: p.write_bytes(p.read_bytes()[:-5]), [], "graph.json"),
    "an altered graph": (lambda p: p.write_text(p.read_text().replace("1", "2", 1)), [], "graph.json"),
    "a truncated graph of a pass": (lambda p: p.write_bytes(b"{"), ["--pass", "merge"], "passes/004_merge.json"),
    "a graph that is gone": (lambda p: p.unlink(), ["--pass", "merge"], "passes/004_merge.json"),
}


@pytest.mark.parametrize("name", LOOKED_INTO)
def test_damaged_graphs_are_not_shown(good: Path, here: Path, name: str) -> None:
    damage, options, file = LOOKED_INTO[name]
    shutil.copytree(good, here / "copy")
    damage(here / "copy" / file)
    assert f"'copy/{file}'" in fails("inspect", "copy", *options)


def test_a_forged_graph_is_named(good: Path, here: Path) -> None:
    shutil.copytree(good, here / "copy")
    rewrite(here / "copy", "passes/004_merge.json", lambda _: b"[")
    assert "'copy/passes/004_merge.json' is damaged" in fails("inspect", "copy", "--pass", "merge")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["run", "--prompt", ""], "the prompt is empty"),
        (["run", "--prompt", "w1 " * 200], "context holds 128"),
        (["run", "--prompt", "w1", "--seed", "-1"], "the seed is -1"),
        (["eval", "--text", "words.txt", "--chunks", "0"], "--chunks at least 1"),
        (["eval", "--text", "words.txt", "--seq-len", "4096"], "--seq-len cannot be 4096"),
    ],
)
def test_what_needs_no_kernels_is_refused_before_they_are_built(
    good: Path, here: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], expected: str
) -> None:
    monkeypatch.setattr(KernelSet, "build", None)
    assert expected in fails(args[0], str(good), *args[1:])


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_artifacts(good: Path, here: Path, name: str) -> None:
    damage, expected = DAMAGES[name]
    shutil.copytree(good, here / "copy")
    damage(here / "copy")
    sentence = fails("run", "copy", "--prompt", "w1")
    assert expected in sentence, sentence


def test_what_is_no_artifact(good: Path, here: Path) -> None:
    assert "no artifact at 'nowhere'" in fails("run", "nowhere", "--prompt", "w1")
    assert "not an lbllm artifact" in fails("run", ".", "--prompt", "w1")
    assert "not an lbllm artifact" in fails("inspect", ".")
    assert "missing option '--prompt'" in fails("run", str(good))
    assert "no graph of a pass 'lowr' (did you mean 'lower'?)" in fails("inspect", str(good), "--pass", "lowr")
    assert "no decoder layer 7" in fails("inspect", str(good), "--layer", "7")


@pytest.mark.parametrize(
    ("content", "options", "expected"),
    [
        (None, [], "text.txt"),
        (b"", [], "is empty"),
        (b"\xff\xfe", [], "not UTF-8"),
        (b"w1 w2", [], "fewer than one chunk"),
        (b"w1 w2", ["--seq-len", "1"], "--seq-len"),
        (b"w1 w2 w3 w4", ["--seq-len", "4", "--teacher", "linear.py"], "linear.py"),
    ],
)
def test_texts_to_score(good: Path, here: Path, content: bytes | None, options: list[str], expected: str) -> None:
    if content is not None:
        (here / "text.txt").write_bytes(content)
    assert expected in fails("eval", str(good), "--text", "text.txt", *options)


def test_a_good_artifact_can_be_looked_into(good: Path) -> None:
    result = CliRunner().invoke(cli.app, ["inspect", str(good), "--pass", "lower", "--layer", "1", "--json"])
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["passes"] == ["canonicalize", "annotate", "head", "merge", "lower", "cache", "cleanup"]
    assert {row["weights"] for row in document["linears"]} == {"W(1+1) g32"}
    assert {row["input"] for row in document["linears"]} == {"A4 per token and 32"}
    assert {line["sign"] for block in document["graph"] for line in block["lines"]} == {"+", "-", " "}
    text = CliRunner().invoke(cli.app, ["inspect", str(good)])
    assert text.exit_code == 0, text.stderr
    assert "decoder layers 0-1 (2 alike)" in text.stdout and "1  canonicalize" in text.stdout


# The machine


def test_a_full_disk_while_work_is_kept(here: Path, unrehearsed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert "the disk is full; make room" in fails("linear.py", "--preset", "quick")
    assert not list(here.rglob("*.partial"))


def test_a_full_disk_while_the_artifact_is_written(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: File too large (os error 27)")

    monkeypatch.setattr(artifact, "save_file", full)
    with pytest.raises(artifact.ArtifactError, match=r"cannot write the artifact to .*: the disk is full"):
        artifact.save(artifact.load(good).program, tmp_path / "out", lock={})
    assert list(tmp_path.iterdir()) == []


def test_a_work_directory_whose_record_is_no_record(here: Path, unrehearsed: None) -> None:
    (here / "w").mkdir()
    (here / "w" / "fingerprint.json").write_text("[]")
    assert "is damaged; pass --fresh" in fails("linear.py", "--preset", "quick", "--work-dir", "w")


# The real command


@pytest.mark.parametrize(
    "args", [["missing.py"], ["linear.py", "--group", "7"], ["run", "nowhere", "--prompt", "x"], ["plan", "--nonsense"]]
)
def test_the_process_says_the_same(here: Path, args: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from lbllm_compile.cli import main; main()", *args],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(here)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("lbllm-compile: ")
    assert done.stderr.count("\n") == 1
