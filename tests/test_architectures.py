"""The table of architectures: its tiny models are compiled right, or refused in one sentence."""

from __future__ import annotations

import re

import pytest

from benchmarks import architectures
from benchmarks.architectures import ARCHITECTURES, PAGE, Architecture, Finding, examine, page, stated


@pytest.mark.parametrize(
    "name",
    ["phi 3, long rope", "llama, dynamic rope", "lfm 2", "roformer", "openai gpt", "gemma 2", "gpt-oss"],
)
def test_what_once_was_refused_is_right(name: str) -> None:
    finding = examine(name, native=False)
    assert finding.verdict == "right", finding.line
    assert 0 < finding.error <= architectures.TOLERANCE


@pytest.mark.parametrize("name", ["lfm 2", "mixtral", "xlm", pytest.param("deepseek 2", marks=pytest.mark.slow)])
def test_what_once_ran_in_torch_alone_runs_natively(name: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path))
    finding = examine(name)
    assert finding.verdict == "right" and finding.native, finding.line


def test_recurrences_are_refused_in_one_sentence() -> None:
    finding = examine("mamba", native=False)
    assert finding.verdict == "refused" and "recurrent state" in finding.message and "\n" not in finding.message
    where = re.search(r"\((aten\.\w+\.\w+) at \S*/modeling_mamba\.py:(\d+) `(.+)`\)", finding.message)
    assert where is not None, finding.message
    assert "ssm_state" in where[3] or "[:, :, i" in where[3]


def test_other_logits_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled model of other weights is not taken for right."""
    compiled, llama = architectures._compiled, ARCHITECTURES["llama"]
    other = Architecture(llama.model, llama.config, seed=1)
    monkeypatch.setattr(architectures, "_compiled", lambda name, model, *rest: compiled(name, other.build(), *rest))
    assert examine("llama", native=False).verdict == "wrong"


def test_the_page_says_what_was_found() -> None:
    text = page([Finding("llama", "right", True, 1e-4), Finding("mamba", "refused", message="a|b\nc")])
    assert "1 are right" in text and "1 are refused" in text
    assert "| llama | `LlamaForCausalLM` | right | native |" in text
    assert "| mamba | `MambaForCausalLM` | refused: a\\|b c |  |" in text
    assert stated(text) == {"llama": ("right", "native"), "mamba": ("refused", "")}


def test_the_page_lists_every_architecture_as_right_or_refused() -> None:
    rows = stated(PAGE.read_text(encoding="utf-8"))
    assert list(rows) == list(ARCHITECTURES)
    assert {verdict for verdict, _ in rows.values()} == {"right", "refused"}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_what_the_page_says(name: str) -> None:
    finding = examine(name)
    assert "\n" not in finding.message
    assert stated(PAGE.read_text(encoding="utf-8"))[name] == (finding.verdict, finding.runs_on), finding.line
