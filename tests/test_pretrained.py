"""Artifacts as models of transformers: the same tokens as from the runtime itself, through transformers' own doors."""

from __future__ import annotations

import builtins
import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from lbllm_compile.codegen.errors import LbllmError
from test_zoo import stages
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from zoo import VOCABULARY

import lbllm_compile
from lbllm_compile import artifact
from lbllm_compile.pretrained import hook
from lbllm_compile.runtime import CompiledModel, Sampling

LOCK = {"model": "0" * 64, "seed": "0"}
PROMPTS = [[5, 17, 42, 99, 3, 8], [7, 7, 30]]


def words() -> transformers.PreTrainedTokenizerFast:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"unk_token": "w0", "eos_token": "w2", "pad_token": "w0"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, padding_side="left", **special)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CompiledModel]:
    """An artifact and what runs it."""
    folder = tmp_path_factory.mktemp("pretrained")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LBLLM_CACHE_DIR", str(folder / "cache"))
        program = dataclasses.replace(stages("llama")[1], tokenizer=words())
        artifact.save(program, folder / "compiled", lock=LOCK)
        yield folder / "compiled", lbllm_compile.load(folder / "compiled")


@pytest.fixture(scope="module")
def model(compiled) -> transformers.PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(compiled[0])


def padded() -> dict[str, torch.Tensor]:
    return dict(words().pad({"input_ids": PROMPTS}, return_tensors="pt"))


def answers(runtime: CompiledModel, count: int) -> list[list[int]]:
    steps = runtime.generate_ids(PROMPTS, Sampling(max_new_tokens=count), stop=())
    return [list(tokens) for tokens in zip(*steps, strict=True)]


def test_the_configuration_says_that_it_is_quantized(compiled):
    directory, runtime = compiled
    assert json.loads((directory / "config.json").read_text())["quantization_config"] == {"quant_method": "lbllm"}
    assert AutoConfig.from_pretrained(directory).model_type == "llama"
    assert "quantization_config" not in artifact.load(directory).program.config
    assert "quantization_config" not in runtime.config


def test_logits_are_the_runtimes(compiled, model):
    item = padded()
    with torch.no_grad():
        output = model(**item)
    assert torch.equal(output.logits, compiled[1].logits(item["input_ids"], item["attention_mask"]))
    assert (type(model).__name__, model.is_quantized, model.num_parameters()) == ("CompiledForCausalLM", True, 0)


def test_greedy_tokens_of_a_left_padded_batch_are_the_runtimes(compiled, model):
    item = padded()
    output = model.generate(**item, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert output[:, item["input_ids"].shape[1] :].tolist() == answers(compiled[1], 12)


def test_tokens_are_fed_in_parts(model):
    item = padded()
    with torch.no_grad():
        whole = model(**item).logits
        first = model(input_ids=item["input_ids"][:, :4], attention_mask=item["attention_mask"][:, :4])
        rest = model(
            input_ids=item["input_ids"][:, 4:],
            attention_mask=item["attention_mask"],
            past_key_values=first.past_key_values,
            logits_to_keep=1,
        )
    seen = item["attention_mask"][:, :4].bool()
    assert torch.allclose(first.logits[seen], whole[:, :4][seen], atol=1e-4)
    assert rest.logits.shape == (2, 1, VOCABULARY)
    assert torch.allclose(rest.logits, whole[:, -1:], atol=1e-4)
    assert rest.past_key_values.get_seq_length() == item["input_ids"].shape[1]


def test_sampling_stops_and_labels_work(model):
    item = padded()
    torch.manual_seed(0)
    output = model.generate(**item, max_new_tokens=5, do_sample=True, top_k=5, num_return_sequences=2, pad_token_id=0)
    assert output.shape[0] == 4
    logits = model(input_ids=item["input_ids"][:1]).logits
    loss = model(input_ids=item["input_ids"][:1], labels=item["input_ids"][:1]).loss
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], item["input_ids"][0, 1:])
    assert torch.allclose(loss, expected)


def test_a_pipeline_answers(compiled, model):
    tokenizer = AutoTokenizer.from_pretrained(compiled[0])
    pipeline = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    made = pipeline(["w5 w17 w42", "w7"], batch_size=2, max_new_tokens=4, do_sample=False, return_full_text=False)
    expected = compiled[1].generate(["w5 w17 w42", "w7"], max_new_tokens=4)
    assert [one[0]["generated_text"].strip() for one in made] == [text.strip() for text in expected]


@pytest.mark.slow
def test_lm_eval_scores_and_generates_with_the_runtime(compiled):
    pytest.importorskip("lm_eval")
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    directory, runtime = compiled
    documents = [
        {"prompt": "w5 w17 w42", "choices": ["w99 w3", "w8"], "label": 0},
        {"prompt": "w7", "choices": ["w30", "w7 w9"], "label": 1},
    ]
    split = {"custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(documents)}, "test_split": "test"}
    text = {"doc_to_text": "{{prompt}}", "doc_to_target": "{{label}}"}
    choice = ConfigurableTask(
        config={
            "task": "choice",
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            **split,
            **text,
        }
    )
    continuation = ConfigurableTask(
        config={
            "task": "continuation",
            "output_type": "generate_until",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
            **split,
            **text,
        }
    )
    result = evaluate(
        HFLM(pretrained=str(directory), device="cpu", batch_size=2),
        {"choice": choice, "continuation": continuation},
        bootstrap_iters=0,
    )
    tokenizer = words()

    def score(prompt: str, answer: str) -> float:
        before, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(f"{prompt} {answer}")["input_ids"]
        logits = runtime.logits(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
        return float(sum(logits[i - 1, ids[i]] for i in range(before, len(ids))))

    for document, sample in zip(documents, result["samples"]["choice"], strict=True):
        expected = [score(document["prompt"], answer) for answer in document["choices"]]
        assert [float(one[0][0]) for one in sample["resps"]] == pytest.approx(expected, abs=1e-3)
    answers = runtime.generate([document["prompt"] for document in documents], max_new_tokens=4)
    for answer, sample in zip(answers, result["samples"]["continuation"], strict=True):
        assert sample["resps"][0][0].strip() == answer.split("w2")[0].strip()  # lm-eval cuts at the stop token's text


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda m: m(inputs_embeds=torch.zeros(1, 2, 72)), "takes token ids"),
        (lambda m: m(input_ids=torch.ones(1, 2, dtype=torch.int64), attention_mask=torch.ones(1, 3)), "attention_mask"),
        (
            lambda m: m(input_ids=torch.ones(1, 2, dtype=torch.int64), position_ids=torch.tensor([[4, 5]])),
            "position_ids are not the numbers of the tokens",
        ),
        (
            lambda m: m(input_ids=torch.ones(1, 2, dtype=torch.int64), past_key_values=transformers.DynamicCache()),
            "keeps its own state",
        ),
        (lambda m: m(input_ids=torch.ones(1, 2, dtype=torch.int64, device="meta")), "an input is on 'meta'"),
        (lambda m: m(**{**padded(), "attention_mask": torch.ones(2, 6, device="meta")}), "an input is on 'meta'"),
        (lambda m: m(input_ids=torch.tensor([[VOCABULARY]])), "outside the vocabulary"),
        (lambda m: m.generate(**padded(), max_new_tokens=3, num_beams=2, pad_token_id=0), "use num_beams=1"),
    ],
)
def test_what_it_cannot_do_is_one_sentence(model, use, message):
    with pytest.raises(LbllmError, match=message):
        use(model)


def test_it_stays_on_the_cpu_and_is_not_saved_again(compiled, model, tmp_path):
    with pytest.raises(LbllmError, match="run on CPUs"):
        AutoModelForCausalLM.from_pretrained(compiled[0], device_map="cuda")
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", transformers.AutoModel),
        ("llama", transformers.AutoModelForSequenceClassification),
        ("gpt2", transformers.GPT2DoubleHeadsModel),
    ],
)
def test_it_takes_no_other_models_place(name, kind, tmp_path):
    artifact.save(stages(name)[1], tmp_path / "compiled", lock=LOCK)
    with pytest.raises(LbllmError, match=r"cannot be a \w+; load it with AutoModelForCausalLM"):
        kind.from_pretrained(tmp_path / "compiled")


def test_weights_in_several_files_are_found(compiled, tmp_path, monkeypatch):
    monkeypatch.setattr(artifact, "SHARD_BYTES", 20_000)
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path / "cache"))
    artifact.save(artifact.load(compiled[0]).program, tmp_path / "sharded", lock=LOCK)
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")
    item = padded()
    assert torch.equal(model(**item).logits, compiled[1].logits(item["input_ids"], item["attention_mask"]))


def test_the_registry_is_followed_by_the_registration_after_an_import_that_failed(tmp_path, monkeypatch):
    name = "registry_that_fails_once"
    registered, imports = [], iter(["interrupted", "whole"])
    (tmp_path / f"{name}.py").write_text("import builtins\nbuiltins.begin_registry()\n")

    def begin() -> None:
        if next(imports) == "interrupted":
            raise KeyboardInterrupt

    monkeypatch.setattr(builtins, "begin_registry", begin, raising=False)
    monkeypatch.setattr(hook, "REGISTRY", name)
    monkeypatch.setattr(hook, "_register", lambda: registered.append(name))
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if not isinstance(finder, hook._Finder)])
    monkeypatch.syspath_prepend(tmp_path)
    hook.install()
    assert importlib.util.find_spec(name) is not None
    with pytest.raises(KeyboardInterrupt):
        importlib.import_module(name)
    assert registered == []
    importlib.import_module(name)
    assert registered == [name]


@pytest.mark.parametrize("first", ["import lbllm_compile", "from transformers import AutoModelForCausalLM"])
def test_importing_the_package_is_light_and_enough(compiled, first, tmp_path):
    code = f"""
import sys
{first}
import lbllm_compile
light = "torch" not in sys.modules
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(compiled[0])!r})
print(type(model).__name__, light)
"""
    environment = {**os.environ, "LBLLM_CACHE_DIR": str(compiled[0].parent / "cache")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["CompiledForCausalLM", str(first == "import lbllm_compile")]
