"""The shell's completion, through the environment variable by which shells ask for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from lbllm_compile.codegen.targets import known_targets
from lbllm_compile.passes import registry
from typer.testing import CliRunner

from lbllm_compile import cli, completion, recipe
from lbllm_compile.inspect import FORMATS
from lbllm_compile.manifest import FORMAT, VERSION

ROOT = Path(__file__).resolve().parent.parent


def completed(line: str) -> list[str]:
    """What bash is offered for the last word of a line."""
    words = line.split(" ")
    asked = {
        "_LBLLM_COMPILE_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    result = CliRunner().invoke(cli.app, [], env=asked, prog_name="lbllm-compile")
    assert result.exit_code == 0, result.output
    return result.stdout.split()


def test_verbs_and_options_are_completed() -> None:
    assert completed("lbllm-compile insp") == ["inspect"]
    assert {"compile", "run", "chat", "serve", "tune"} <= set(completed("lbllm-compile "))
    assert completed("lbllm-compile tune exp") == ["export"]
    assert completed("lbllm-compile run demo --max") == ["--max-tokens"]
    # A first word that is no verb is a model to compile.
    assert completed("lbllm-compile model.py --keep") == ["--keep-dense"]


@pytest.mark.parametrize(
    "line, words",
    [
        ("model.py --preset ", list(recipe.PRESETS)),
        ("plan model.py --recipe ", list(recipe.RECIPES)),
        ("model.py --preset q", ["quick"]),
        ("model.py --kv-bits ", ["4", "8", "16"]),
        ("tune --group ", ["32", "64", "128", "256"]),
        ("model.py --device ", ["auto", "cpu", "cuda"]),
        ("run demo --target ", known_targets()),
        ("model.py --target cpu,cuda", [f"cpu,{t}" for t in known_targets() if t.startswith("cuda")]),
        ("model.py --print-after fi", ["finetune"]),
        ("passes ", registry.names()),
        ("inspect demo --format ", list(FORMATS)),
        ("export demo --format h", ["hf-dense"]),
    ],
)
def test_values_are_completed(line: str, words: list[str]) -> None:
    assert completed(f"lbllm-compile {line}") == words


def test_passes_of_the_artifact_on_the_line_are_completed(tmp_path: Path) -> None:
    files = {name: {} for name in ("graph.json", "passes/001_canonicalize.json", "passes/002_ptq.json")}
    manifest = {"format": FORMAT, "version": VERSION, "files": files}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert completed(f"lbllm-compile inspect {tmp_path} --pass ") == ["canonicalize", "ptq"]
    assert completed(f"lbllm-compile inspect {tmp_path} --pass p") == ["ptq"]
    assert completed(f"lbllm-compile inspect {tmp_path / 'nowhere'} --pass ") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_is_shown_for_every_shell(monkeypatch: pytest.MonkeyPatch, shell: str) -> None:
    monkeypatch.setattr("typer.completion._get_shell_name", lambda: shell)
    result = CliRunner().invoke(cli.app, ["--show-completion"], prog_name="lbllm-compile")
    assert result.exit_code == 0, result.output
    assert "_LBLLM_COMPILE_COMPLETE" in result.stdout


def test_completion_imports_nothing_heavy() -> None:
    """A shell waits for it at every press of a key."""
    heavy = {"torch", "transformers", "tvm", "pydantic", "numpy"}
    code = (
        "import sys\nfrom lbllm_compile import cli, completion\ncompletion.pass_names('')\ncompletion.targets('')\n"
        f"print(sorted({heavy} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_targets_are_completed_behind_a_comma() -> None:
    assert completion.targets("cpu:generic,cpu:avx512-v") == [
        f"cpu:generic,{t}" for t in known_targets() if t.startswith("cpu:avx512-v")
    ]
