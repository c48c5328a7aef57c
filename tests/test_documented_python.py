"""The documentation's Python that uses compiled models runs, on a small one."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import talker
import transformers
from lbllm_compile.passes.ir.parse import parse
from test_serving import serving

import lbllm_compile
from lbllm_compile.runtime import CompiledModel, Sampling

ROOT = Path(__file__).resolve().parent.parent


def block(document: str, having: str) -> str:
    """The one block of Python in a document that has a text."""
    text = (ROOT / document).read_text(encoding="utf-8")
    (found,) = (code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if having in code)
    return found


def execute(code: str, **names: Any) -> dict[str, Any]:
    """Runs code that knows some names; gives all that it knows then."""
    module = ModuleType("documentation")
    module.__dict__.update(names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)  # dataclasses look themselves up there
        exec(compile(code, module.__name__, "exec"), module.__dict__)
    return module.__dict__


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, CompiledModel]]:
    """An artifact under the name that the documentation gives it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LBLLM_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        directory = tmp_path_factory.mktemp("made") / "smollm2-lbllm"
        yield directory, talker.make(directory)


@pytest.fixture
def asked(artifact: tuple[Path, CompiledModel], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The options of every compile, each of which is answered with the artifact."""
    options: list[Any] = []

    def stand_in(given: lbllm_compile.CompileOptions) -> SimpleNamespace:
        options.append(given)
        return SimpleNamespace(out=artifact[0])

    monkeypatch.setattr(lbllm_compile, "compile", stand_in, raising=False)
    monkeypatch.chdir(ROOT)
    return options


def test_the_readmes_compile_of_a_file(
    artifact: tuple[Path, CompiledModel], asked: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    execute(block("README.md", "examples/tiny_llama.py"))
    assert capsys.readouterr().out == artifact[1].generate("Once upon a time", max_new_tokens=32) + "\n"
    (options,) = asked
    assert Path(options.model).is_file() and options.preset == "quick"


def test_the_readmes_compile_of_an_object(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = talker._model(), talker._tokenizer(talker.TEMPLATE)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tokenizer)
    execute(block("README.md", "texts=["), lbllm_compile=lbllm_compile)
    (options,) = asked
    assert options.model is model and options.tokenizer is tokenizer
    assert options.out == Path("smollm2-lbllm") and len(list(options.texts)) == 2


def test_transformers_loads_and_generates(
    artifact: tuple[Path, CompiledModel], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(artifact[0].parent)
    names = execute(block("docs/engines.md", "from_pretrained"))
    prompt = names["inputs"]["input_ids"][0].tolist()
    answer = [token for (token,) in artifact[1].generate_ids([prompt], Sampling(16))]
    assert capsys.readouterr().out == names["tokenizer"].decode([*prompt, *answer]) + "\n"


def test_a_client_of_the_openai_api_is_answered(artifact: tuple[Path, CompiledModel]) -> None:
    """The documentation's lines, at the port of a server of the test's own."""
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^    from openai import OpenAI\n(?:(?: {4}.*)?\n)+?(?=\n\S)", text, re.MULTILINE)
    with serving(artifact[0], "--name", "demo-out") as server:
        answer = execute(textwrap.dedent(code).replace("http://127.0.0.1:8000", server.url))["answer"]
    # Drawn without a seed, so the answer may end on its own.
    count, reason = answer.usage.completion_tokens, answer.choices[0].finish_reason
    assert answer.model == "demo-out" and 0 < count <= 60 and (reason == "stop" or count == 60)


def test_the_test_of_the_documented_pass_passes() -> None:
    names = execute(block("docs/writing-a-pass.md", "class NegateOutput"))
    names = execute(block("docs/writing-a-pass.md", "def test_"), NegateOutput=names["NegateOutput"])
    names["test_the_output_is_negated"]()
    wrong = parse("%x = input x\n%y = aten.relu(%x)\nreturn %y")
    assert "aten.neg" in str(names["NegateOutput"]().apply(wrong, names["PassContext"]()).program.graph)
