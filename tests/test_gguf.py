"""GGUF files: what transformers and llama.cpp read there is the artifact's weights, and computes what they do."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from graphs import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from lbllm_compile.passes.ir import weight_only
from lbllm_compile.passes.ir.compare import relative_error
from lbllm_compile.passes.ir.program import Program
from lbllm_compile.passes.lower import stored_weights
from rtn import quantize, simulate
from test_export import own_cache, saved, weight_only_logits  # noqa: F401 - a fixture
from test_zoo import apply, inputs, stages
from transformers import AutoModelForCausalLM
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from lbllm_compile import export, frontend
from lbllm_compile.evaluate import compare
from lbllm_compile.export import ExportError
from lbllm_compile.export.gguf import BLOCK, BLOCK_BYTES, blocks
from lbllm_compile.frontend import UserModel

gguf = pytest.importorskip("gguf")

_EVEN = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": 320,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""A multiple of 32 columns everywhere."""


@functools.cache
def even(architecture: str, linear: float | None = None, keep_dense: str | None = None, **options: Any) -> Program:
    """A lowered model all of whose matrices fit blocks.

    Args:
        linear: the factor of linearly scaled rotary embeddings.
        keep_dense: a pattern of linears that stay as they are.
    """
    if linear is not None:
        options["rope_parameters"] = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": linear}
    config = getattr(transformers, architecture.removesuffix("ForCausalLM") + "Config")(**_EVEN, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = getattr(transformers, architecture)(config).eval()
        for parameter in module.parameters():
            if parameter.dim() >= 2:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
            else:
                parameter.data.add_(0.1 * torch.randn(parameter.shape))
    model = frontend.prepare(UserModel(module.requires_grad_(False), "causal-lm", architecture, "even"))
    annotate = "annotate" if keep_dense is None else f"annotate{{keep_dense={keep_dense}}}"
    annotated = apply(frontend.capture(model), f"canonicalize,{annotate}")
    return apply(simulate(annotated, group=64), "head,merge,lower,cache,cleanup")


def read_back(file: Path) -> dict[str, Any]:
    """Tensors of a GGUF file by name: their type and values."""
    return {
        t.name: (t.tensor_type.name, torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type)))
        for t in gguf.GGUFReader(file).tensors
    }


def model_in(file: Path) -> transformers.PreTrainedModel:
    """As transformers reads a file; it looks at the scaling of rotary embeddings in other architectures only."""
    config = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    fields = gguf.GGUFReader(file).fields
    if factor := fields.get("llama.rope.scaling.factor"):
        kind = fields["llama.rope.scaling.type"].contents()
        config.rope_parameters = {**config.rope_parameters, "rope_type": kind, "factor": factor.contents()}
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, config=config, dtype=torch.float32)


@settings(max_examples=50, deadline=None)
@given(
    group=st.sampled_from([32, 64, 128, 256]),
    rows=st.integers(1, 3),
    count=st.integers(1, 9),
    seed=st.integers(0, 2**16),
    exponent=st.integers(-20, 12),
)
def test_a_group_is_blocks_to_the_bit(group, rows, count, seed, exponent):
    weight = quantize(normal(rows, count * BLOCK, seed=seed) * 2.0**exponent, group)
    scale = weight.scale.repeat_interleave(group // BLOCK, -1)[:, : weight.in_features // BLOCK]
    stored = blocks(weight.integer_levels(), scale)
    assert stored.shape == (rows, count * BLOCK_BYTES)
    read = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType.Q8_0)
    assert torch.equal(torch.from_numpy(read), weight.dequantize())


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("LlamaForCausalLM", {}),
        ("LlamaForCausalLM", {"tie_word_embeddings": True}),
        ("LlamaForCausalLM", {"linear": 2.0}),
        ("MistralForCausalLM", {"sliding_window": None}),
        ("Qwen2ForCausalLM", {}),
        ("Qwen3ForCausalLM", {"head_dim": 128}),
    ],
)
def test_transformers_reads_the_file_as_the_same_model(architecture, options, tmp_path):
    program = even(architecture, **options)
    out = tmp_path / "model.gguf"
    report = export.export(saved(program, tmp_path), "gguf", out, dtype="float16")
    assert "14 of 14, 8.5 bits" in str(report.facts)
    assert 0 < report.facts["largest_error_of_an_int8_row's_scale_in_float16"] <= 2**-11
    module = model_in(out)
    state, weights = module.state_dict(), stored_weights(program)
    assert len(weights) == 14
    for path, weight in weights.items():
        assert torch.equal(state[path], weight.dequantize()), path
    item = inputs(3, 13)
    with torch.no_grad():
        logits = module(**item).logits[item["attention_mask"].bool()]
    assert relative_error(weight_only_logits(program), logits) < 2**-10  # scales of embedding and head


def test_the_file_says_what_each_tensor_is(tmp_path):
    program = stages("llama")[1]  # 72 and 104 columns, no multiples of 32
    out = tmp_path / "model.gguf"
    report = export.export(saved(program, tmp_path), "gguf", out, dtype="bfloat16")
    assert report.facts["W(1+1)_matrices_exact_in_Q8_0"].startswith("0 of 14")
    assert report.facts["int8_matrices_in_Q8_0"].startswith("0 of 2")
    assert report.facts["others_in_bfloat16"].startswith("16, because their rows are no multiple of 32 columns")
    tensors = read_back(out)
    assert tensors["blk.0.attn_norm.weight"][0] == "F32"
    kind, values = tensors["blk.1.ffn_down.weight"]
    expected = stored_weights(program)["model.layers.1.mlp.down_proj.weight"].dequantize()
    assert kind == "BF16" and torch.equal(values, expected.bfloat16().float())
    assert report.nbytes == sum(t.n_bytes for t in gguf.GGUFReader(out).tensors)


def test_matrices_of_each_type_are_counted(tmp_path):
    program = even("LlamaForCausalLM", keep_dense="*.o_proj")
    report = export.export(saved(program, tmp_path), "gguf", tmp_path / "model.gguf", dtype="bfloat16")
    kinds = [t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors]
    assert (kinds.count("Q8_0"), kinds.count("BF16")) == (12 + 2, 2)
    assert report.facts["W(1+1)_matrices_exact_in_Q8_0"].startswith("12 of 12,")
    assert report.facts["int8_matrices_in_Q8_0"].startswith("2 of 2,")
    assert report.facts["dense_matrices_in_bfloat16"] == 2
    assert "others_in_bfloat16" not in report.facts


def test_rows_of_llamas_queries_and_keys_and_their_biases_alternate(tmp_path):
    program = even("LlamaForCausalLM", attention_bias=True)
    out = tmp_path / "model.gguf"
    export.export(saved(program, tmp_path), "gguf", out)
    tensors, weights, plain = read_back(out), stored_weights(program), dict(program.parameters())
    for name, projection, heads in (("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2)):
        path = f"model.layers.1.self_attn.{projection}"
        matrix, bias = weights[f"{path}.weight"].dequantize(), plain[f"{path}.bias"]
        for head in range(heads):
            for pair in range(8):
                for half in (0, 1):
                    row, original = 16 * head + 2 * pair + half, 16 * head + 8 * half + pair
                    assert torch.equal(tensors[f"blk.1.{name}.weight"][1][row], matrix[original])
                    assert tensors[f"blk.1.{name}.bias"][1][row] == bias[original]
    values = weights["model.layers.1.self_attn.v_proj.weight"].dequantize()
    assert torch.equal(tensors["blk.1.attn_v.weight"][1], values)


def byte_level(*steps: Any, normalizer: Any = None, **options: Any) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer over bytes with a few merges."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(**options))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the compiler lowers every linear layer to integer kernels 1234"] * 4, trainer)
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    made.chat_template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    return made


BYTES = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = tokenizers.pre_tokenizers.Digits(individual_digits=True)
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""LLaMA 3's."""


def split(pattern: str = WORDS, behavior: str = "isolated", prefix: bool = False) -> tuple[Any, Any]:
    """Words by a pattern, then bytes."""
    words = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), behavior)
    return words, tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)


TOKENIZERS = {
    "gpt-2": lambda: byte_level(BYTES),
    "smollm": lambda: byte_level(DIGITS, BYTES),
    "llama-bpe": lambda: byte_level(*split(), ignore_merges=True),
    "qwen2": lambda: byte_level(*split(PRETOKENIZE_REGEX), normalizer=tokenizers.normalizers.NFC()),
}


@pytest.mark.parametrize("splits", TOKENIZERS)
def test_the_tokenizer_is_in_the_file(splits, tmp_path):
    tokenizer = TOKENIZERS[splits]()
    program = dataclasses.replace(even("LlamaForCausalLM"), tokenizer=tokenizer)
    out = tmp_path / "model.gguf"
    export.export(saved(program, tmp_path), "gguf", out)
    fields = gguf.GGUFReader(out).fields
    assert fields["tokenizer.ggml.pre"].contents() == splits
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == 320 and tokens[:3] == ["<unk>", "<s>", "</s>"]
    assert [tokens[i] for i in range(len(tokenizer))] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert fields["tokenizer.ggml.token_type"].contents()[319] == gguf.TokenType.UNUSED
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    assert (fields["tokenizer.ggml.bos_token_id"].contents(), fields["tokenizer.ggml.eos_token_id"].contents()) == (
        1,
        2,
    )
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False


def test_named_chat_templates_are_in_the_file(tmp_path):
    tokenizer = byte_level(BYTES)
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools }}"}
    program = dataclasses.replace(even("LlamaForCausalLM"), tokenizer=tokenizer)
    export.export(saved(program, tmp_path), "gguf", tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template["default"]
    assert fields["tokenizer.chat_template.tool_use"].contents() == tokenizer.chat_template["tool_use"]


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (lambda: byte_level(BYTES, normalizer=tokenizers.normalizers.Lowercase()), "normalize text with Lowercase"),
        (
            lambda: byte_level(
                *split(PRETOKENIZE_REGEX),
                normalizer=tokenizers.normalizers.Sequence(
                    [tokenizers.normalizers.NFC(), tokenizers.normalizers.Replace("a", "b")]
                ),
            ),
            "normalize text with Replace",
        ),
        (lambda: byte_level(tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)), "put a space before text"),
        (lambda: byte_level(*split(prefix=True), ignore_merges=True), "put a space before text"),
        (lambda: byte_level(*split(behavior="removed"), ignore_merges=True), "and the artifact has another"),
        (lambda: byte_level(*split()), "and the artifact has another"),
        (lambda: byte_level(BYTES, ignore_merges=True), "and the artifact has another"),
        (lambda: byte_level(tokenizers.pre_tokenizers.Whitespace()), "GGUF is written for byte-level BPE tokenizers"),
    ],
)
def test_a_tokenizer_of_which_llama_cpp_would_make_other_tokens_is_refused(tokenizer, message, tmp_path):
    program = dataclasses.replace(even("LlamaForCausalLM"), tokenizer=tokenizer())
    with pytest.raises(ExportError, match=f"{message}.*; use --format hf-dense"):
        export.export(saved(program, tmp_path), "gguf", tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_what_gguf_is_not_written_for_is_refused(tmp_path):
    refused = [
        (stages("gpt2")[1], "GGUF is written for llama, mistral, qwen2, qwen3, not for gpt2; use --format hf-dense"),
        (stages("mistral")[1], "not written for the sliding window of mistral"),
    ]
    for number, (program, message) in enumerate(refused):
        (tmp_path / str(number)).mkdir()
        with pytest.raises(ExportError, match=message):
            export.export(saved(program, tmp_path / str(number)), "gguf", tmp_path / "model.gguf")
    with pytest.raises(ExportError, match=r"'.*/model' is no .gguf file; pass --out .*/model.gguf"):
        export.export(tmp_path / "0" / "compiled", "gguf", tmp_path / "model")
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize(
    ("architecture", "options", "splits"),
    [
        ("LlamaForCausalLM", {}, "smollm"),
        ("LlamaForCausalLM", {"linear": 2.0}, "llama-bpe"),
        ("Qwen2ForCausalLM", {}, "qwen2"),
        ("Qwen3ForCausalLM", {"head_dim": 128}, "gpt-2"),
    ],
)
def test_llama_cpp_computes_the_same(architecture, options, splits, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    tokenizer = TOKENIZERS[splits]()
    program = dataclasses.replace(even(architecture, **options), tokenizer=tokenizer)
    export.export(saved(program, tmp_path), "gguf", tmp_path / "model.gguf")
    model = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    for text in ("the linear kernels", " 1234 x\n\n  tabs\t", "naïve café, 你好 😀", "a<s>b</s>"):
        ids = tokenizer(text)["input_ids"]
        assert model.tokenize(text.encode(), add_bos=False, special=True) == ids
        model.reset()
        model.eval(ids)
        actual = torch.tensor(model.scores[: len(ids)])[None]
        item = frontend.language_model_inputs(torch.tensor([ids]))
        figures = compare(lambda _, a=actual: a, lambda _, i=item: weight_only.run(program, i), [item["input_ids"]])
        assert figures.summary()["kld_mean"] <= 1e-3
