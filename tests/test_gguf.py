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
from lbllm_compile.codegen.format import QuantizedWeight, codes_to_planes
from lbllm_compile.passes.ir import weight_only
from lbllm_compile.passes.ir.compare import relative_error
from lbllm_compile.passes.ir.program import Program
from lbllm_compile.passes.lower import stored_int4, stored_weights
from rtn import quantize, simulate
from test_export import own_cache, saved, weight_only_logits  # noqa: F401 - a fixture
from test_zoo import apply, inputs, stages
from transformers import AutoModelForCausalLM
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from lbllm_compile import cli, export, frontend
from lbllm_compile.evaluate import compare
from lbllm_compile.export import ExportError, ggml
from lbllm_compile.export.ggml import BLOCK, TYPES
from lbllm_compile.export.gguf_architecture import architecture_of
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
def even(
    architecture: str,
    linear: float | None = None,
    keep_dense: str | None = None,
    head: str = "head",
    coded: tuple[str, ...] = (),
    **options: Any,
) -> Program:
    """A lowered model all of whose matrices fit blocks.

    Args:
        linear: the factor of linearly scaled rotary embeddings.
        keep_dense: a pattern of linears that stay as they are.
        head: the pass that quantizes embedding and head.
        coded: how paths of linears with 4-bit codes end.
    """
    if linear is not None:
        options["rope_parameters"] = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": linear}
    prefix = architecture.removesuffix("ForCausalLM")
    config = getattr(transformers, "Gemma3TextConfig" if prefix == "Gemma3" else f"{prefix}Config")
    config = config(**{**_EVEN, **options})
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
    return apply(simulate(annotated, group=64, coded=coded), f"{head},merge,lower,cache,cleanup")


_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

WINDOWED = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}
"""Gemma's later models, with a window that sequences are longer than."""

OTHERS: dict[str, dict[str, Any]] = {
    "GemmaForCausalLM": {"head_dim": 32},
    "Gemma2ForCausalLM": WINDOWED | {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 2.0},
    "Gemma3ForCausalLM": WINDOWED | {"num_hidden_layers": 7},
    "MixtralForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2MoeForCausalLM": _EXPERTS | {"shared_expert_intermediate_size": 32, "norm_topk_prob": False},
    "Qwen3MoeForCausalLM": _EXPERTS | {"head_dim": 32, "norm_topk_prob": True},
}
"""Architectures of which transformers reads no files, with options."""


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
    stored = ggml.exact_blocks(weight)
    assert stored.shape == (rows, count * 34)
    read = gguf.quants.dequantize(stored.numpy(), gguf.GGMLQuantizationType.Q8_0)
    assert torch.equal(torch.from_numpy(read), weight.dequantize())


FITTED = [name for name, kind in TYPES.items() if kind.steps]


@settings(max_examples=50, deadline=None)
@given(
    name=st.sampled_from(FITTED),
    group=st.sampled_from([32, 64, 128, 256]),
    rows=st.integers(1, 3),
    count=st.integers(1, 9),
    seed=st.integers(0, 2**16),
    exponent=st.integers(-6, 9),
)
def test_fitted_blocks_are_closer_than_those_of_ggmls_quantizer(name, group, rows, count, seed, exponent):
    weight = quantize(normal(rows, count * BLOCK, seed=seed) * 2.0**exponent, group)
    kind, exact = gguf.GGMLQuantizationType[TYPES[name].name], weight.dequantize()
    stored = ggml.fitted_blocks("w", weight, TYPES[name].steps)
    plain = gguf.quants.quantize(exact.numpy(), kind)
    assert stored.shape == plain.shape and stored.shape[-1] * 8 == TYPES[name].bits * weight.in_features
    errors = [
        (torch.from_numpy(gguf.quants.dequantize(made, kind)) - exact).unflatten(-1, (-1, BLOCK)).square().sum(-1)
        for made in (stored.numpy(), plain)
    ]
    spread = exact.unflatten(-1, (-1, BLOCK)).square().sum(-1)
    assert bool((errors[0] <= 1.0001 * errors[1] + 1e-6 * spread).all())


def test_levels_on_even_steps_are_fitted_exactly():
    levels = torch.tensor([[-3, -1, 0, 4], [-8, -2, 1, 7], [8, 9, 11, 17], [0, 0, 0, 0]], dtype=torch.int8)
    codes = torch.arange(BLOCK, dtype=torch.uint8).remainder(4).expand(4, -1)
    scale = torch.full((4, 1), 0.3).half()
    weight = QuantizedWeight(*codes_to_planes(codes), levels[:, None], scale, BLOCK, BLOCK)
    for name, rows in (("q4_0", [0, 1, 3]), ("q4_1", [0, 1, 2, 3]), ("q5_1", [0, 1, 2, 3])):
        stored = ggml.fitted_blocks("w", weight, TYPES[name].steps)
        read = ggml.read_blocks(stored, TYPES[name].name)
        assert torch.allclose(read[rows], weight.dequantize()[rows], rtol=2**-10, atol=1e-3), name


def test_a_level_that_does_not_occur_costs_nothing():
    levels = torch.tensor([[[-100.0, 1.0, 2.0, 100.0]]])
    weight = QuantizedWeight.from_codes(torch.tensor([[1, 2] * 16], dtype=torch.uint8), levels, BLOCK)
    for name in FITTED:
        read = ggml.read_blocks(ggml.fitted_blocks("w", weight, TYPES[name].steps), TYPES[name].name)
        assert torch.allclose(read, weight.dequantize(), rtol=2**-9), name


def test_steps_beyond_float16_are_refused_by_name():
    levels = torch.tensor([[[-1.0, 0.0, 1.0, 127.0]]]) * 6e4
    weight = QuantizedWeight.from_codes(torch.tensor([[3] * 32], dtype=torch.uint8), levels, BLOCK)
    with pytest.raises(ExportError, match="the weight 'w' is too large for blocks with float16 steps; use --type q8_0"):
        ggml.fitted_blocks("w", weight, TYPES["q4_0"].steps)


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


@pytest.mark.parametrize(
    ("group", "embedding", "tied"), [(32, 8, True), (64, 4, False), (64, 4, True), (128, 8, False)]
)
def test_heads_of_four_bits_are_in_the_file_to_the_bit(group, embedding, tied, tmp_path):
    """Also where a group is wider than a row, and where the embedding reads the codes or keeps its int8 rows."""
    head = f"head{{bits=4,group={group},embedding={embedding},sequences=0}}"
    program = even("LlamaForCausalLM", head=head, tie_word_embeddings=tied)
    out = tmp_path / "model.gguf"
    report = export.export(saved(program, tmp_path), "gguf", out)
    tensors, codes = read_back(out), stored_int4(program)
    of_embedding = tensors["token_embd.weight"]
    of_head = tensors.get("output.weight", of_embedding)
    assert ("output.weight" in tensors) == (not tied or embedding == 8)
    head_path = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert of_head[0] == "Q8_0" and torch.equal(of_head[1], codes[head_path].dequantize())
    if embedding == 4:
        assert torch.equal(of_embedding[1], codes["model.embed_tokens.weight"].dequantize())
    assert report.facts["4-bit_matrices_exact_in_Q8_0"].startswith(f"{len(codes)} of {len(codes)},")


def test_codes_of_layers_are_in_the_file_to_the_bit(tmp_path):
    """Queries and keys of one matrix, whose rows alternate, and a matrix alone."""
    program = even("LlamaForCausalLM", coded=("q_proj", "k_proj", "v_proj", "down_proj"))
    out = tmp_path / "model.gguf"
    report = export.export(saved(program, tmp_path), "gguf", out)
    codes = stored_int4(program)
    assert len(codes) == 8 and report.facts["4-bit_matrices_exact_in_Q8_0"].startswith("8 of 8,")
    state = model_in(out).state_dict()
    for path, weight in {**codes, **stored_weights(program)}.items():
        assert torch.equal(state[path], weight.dequantize()), path


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_planes_is_in_the_file_apart_from_the_embedding(tied, tmp_path):
    head = "head{bits=2,group=64,sequences=0}"
    program = even("LlamaForCausalLM", head=head, tie_word_embeddings=tied)
    out = tmp_path / "model.gguf"
    report = export.export(saved(program, tmp_path), "gguf", out)
    tensors, planes = read_back(out), stored_weights(program)
    path = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert tensors["output.weight"][0] == "Q8_0"
    assert torch.equal(tensors["output.weight"][1], planes[path].dequantize())
    assert tensors["token_embd.weight"][0] == "Q8_0"
    assert not torch.equal(tensors["token_embd.weight"][1], tensors["output.weight"][1])
    assert report.facts["W(1+1)_matrices_exact_in_Q8_0"].startswith(f"{len(planes)} of {len(planes)},")


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


@pytest.mark.parametrize("name", TYPES)
def test_a_file_has_the_type_that_was_asked_for(name, tmp_path):
    program, kind = even("LlamaForCausalLM", keep_dense="*.o_proj"), TYPES[name]
    out = tmp_path / "model.gguf"
    report = export.export(saved(program, tmp_path), "gguf", out, type=name)
    assert (report.type, report.dtype) == (name, kind.dtype or "bfloat16")
    tensors, weights = read_back(out), stored_weights(program)
    assert tensors["blk.1.ffn_down.weight"][0] == kind.name
    assert tensors["blk.1.attn_output.weight"][0] == {"F32": "F32", "F16": "F16"}.get(kind.name, "BF16")
    assert tensors["token_embd.weight"][0] == (kind.name if kind.dtype else "Q8_0")
    path = "model.layers.1.mlp.down_proj.weight"
    exact, read = weights[path].dequantize(), tensors["blk.1.ffn_down.weight"][1]
    error = float((read - exact).norm() / exact.norm())
    assert error <= {"F32": 0.0, "Q8_0": 0.0, "F16": 2**-11, "BF16": 2**-8}.get(kind.name, 0.1)
    assert (error == 0.0) == kind.exact
    stated = report.facts.get("relative_error_of_W(1+1)_weights", 0.0)
    assert stated == pytest.approx(error, rel=0.5) and ("exact" in str(report.facts)) == kind.exact
    assert f"12 of 12, {kind.bits:g} bits" in str(report.facts)
    assert report.nbytes == sum(t.n_bytes for t in gguf.GGUFReader(out).tensors)
    numbers = {"q8_0": 7, "f32": 0, "f16": 1, "bf16": 32, "q5_1": 9, "q4_1": 3, "q4_0": 2}
    assert gguf.GGUFReader(out).fields["general.file_type"].contents() == numbers[name]


def test_a_floating_point_type_needs_no_multiples_of_32_columns(tmp_path):
    program = stages("llama")[1]  # 72 and 104 columns
    out = tmp_path / "model.gguf"
    report = export.export(saved(program, tmp_path), "gguf", out, type="f32")
    assert report.facts["W(1+1)_matrices_exact_in_F32"].startswith("14 of 14")
    kind, values = read_back(out)["blk.1.ffn_down.weight"]
    expected = stored_weights(program)["model.layers.1.mlp.down_proj.weight"].dequantize()
    assert kind == "F32" and torch.equal(values, expected)


def test_a_type_that_a_format_does_not_have_is_refused(tmp_path):
    where = saved(stages("llama")[1], tmp_path)
    with pytest.raises(ExportError, match="gguf has no type 'q2_k'; use one of q8_0, f32, f16, bf16, q5_1, q4_1, q4_0"):
        export.export(where, "gguf", tmp_path / "model.gguf", type="q2_k")
    with pytest.raises(ExportError, match="hf-dense has all weights in one dtype; use --dtype in place of --type"):
        export.export(where, "hf-dense", tmp_path / "dense", type="f16")


def test_the_command_completes_the_types_that_there_are():
    assert tuple(TYPES) == cli._GGML_TYPES


def test_matrices_of_each_type_are_counted(tmp_path):
    program = even("LlamaForCausalLM", keep_dense="*.o_proj")
    report = export.export(saved(program, tmp_path), "gguf", tmp_path / "model.gguf", dtype="bfloat16")
    kinds = [t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors]
    assert (kinds.count("Q8_0"), kinds.count("BF16")) == (12 + 2, 2)
    assert report.facts["W(1+1)_matrices_exact_in_Q8_0"].startswith("12 of 12,")
    assert report.facts["int8_matrices_in_Q8_0"].startswith("2 of 2,")
    assert report.facts["dense_matrices_in_bfloat16"] == 2
    assert "others_in_bfloat16" not in report.facts and "router_matrices_in_F32" not in report.facts


def test_routers_are_counted_by_themselves(tmp_path):
    program = even("MixtralForCausalLM", **OTHERS["MixtralForCausalLM"])
    report = export.export(saved(program, tmp_path), "gguf", tmp_path / "model.gguf", dtype="bfloat16")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    routers = [kind for name, kind in kinds.items() if name.endswith("ffn_gate_inp.weight")]
    assert report.facts["router_matrices_in_F32"] == routers.count("F32") == 2
    assert report.facts["dense_matrices_in_bfloat16"] == [*kinds.values()].count("BF16") == 0


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
        (stages("gpt2")[1], "GGUF is written for llama, mistral, .*, gemma3_text, not for gpt2; use --format hf-dense"),
        (stages("mistral")[1], "not written for the sliding window of mistral"),
    ]
    for number, (program, message) in enumerate(refused):
        (tmp_path / str(number)).mkdir()
        with pytest.raises(ExportError, match=message):
            export.export(saved(program, tmp_path / str(number)), "gguf", tmp_path / "model.gguf")
    with pytest.raises(ExportError, match=r"'.*/model' is no .gguf file; pass --out .*/model.gguf"):
        export.export(tmp_path / "0" / "compiled", "gguf", tmp_path / "model")
    assert not (tmp_path / "model.gguf").exists()


def pieces(prefixed: bool = False, drop: int = 0) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer as SentencePiece trains them.

    Args:
        prefixed: whether a space is put before text.
        drop: merges to leave out, of those that give the last token.
    """
    special = ["<unk>", "<s>", "</s>"]
    characters = ["\u2581", *"abcdefghiklmnoprstuvwxyz"]
    tokens = [
        "in",
        "er",
        "th",
        "the",
        "▁the",
        "▁▁",
        "ar",
        "ear",
        "lin",
        "linear",
        "ker",
        "ne",
        "nel",
        "kern",
        "kernel",
        "kernels",
        "▁ker",
    ]
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *characters, *tokens]
    vocabulary = {text: number for number, text in enumerate(names)}
    merges = [
        (text[:place], text[place:])
        for text in tokens
        for place in range(1, len(text))
        if text[:place] in vocabulary and text[place:] in vocabulary
    ]
    model = tokenizers.models.BPE(
        vocabulary, merges[: len(merges) - drop], unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    core = tokenizers.Tokenizer(model)
    spaces = tokenizers.normalizers.Replace(" ", "\u2581")
    prepend = tokenizers.normalizers.Prepend("\u2581")
    core.normalizer = tokenizers.normalizers.Sequence([prepend, spaces]) if prefixed else spaces
    if not prefixed:  # as Gemma's has them: a step though no space is left for it, and added tokens of spaces
        core.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "merged_with_previous")
        core.add_tokens([tokenizers.AddedToken("\u2581" * 3, normalized=True)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


TEXTS = (
    "the linear kernels",
    " 1234 x\n\n  tabs\t",
    "na\u00efve caf\u00e9, \u4f60\u597d \U0001f600",
    "a<s>b</s> the  \n <s>the",
    "earkernelsthenerker",
    "ear    the   ker",
)


@pytest.mark.parametrize("prefixed", [False, True])
def test_llama_cpp_makes_the_tokens_of_sentencepiece(prefixed, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    tokenizer = pieces(prefixed)
    program = dataclasses.replace(even("LlamaForCausalLM"), tokenizer=tokenizer)
    export.export(saved(program, tmp_path), "gguf", tmp_path / "model.gguf")
    model = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=64, n_threads=1, vocab_only=True, verbose=False)
    for text in TEXTS:
        assert model.tokenize(text.encode(), add_bos=False, special=True) == tokenizer(text)["input_ids"], text


def test_merges_that_scores_of_tokens_cannot_say_are_refused(tmp_path):
    program = dataclasses.replace(even("LlamaForCausalLM"), tokenizer=pieces(drop=1))
    with pytest.raises(ExportError, match=r"SentencePiece's as Gemma .*, and the artifact has another"):
        export.export(saved(program, tmp_path), "gguf", tmp_path / "model.gguf")


@pytest.mark.parametrize("architecture", OTHERS)
def test_llama_cpp_computes_other_architectures(architecture, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    tokenizer = pieces()
    program = dataclasses.replace(even(architecture, **OTHERS[architecture]), tokenizer=tokenizer)
    where, ids = saved(program, tmp_path), tokenizer("the linear kernels of the ear in there" * 2)["input_ids"]
    for kind, bound in (("f32", 1e-5), ("q8_0", 1e-2)):
        out = tmp_path / f"{kind}.gguf"
        report = export.export(where, "gguf", out, type=kind)
        assert f"{len(stored_weights(program))} of {len(stored_weights(program))}, " in str(report.facts)
        model = llama_cpp.Llama(str(out), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
        model.eval(ids)
        actual = torch.tensor(model.scores[: len(ids)])[None]
        item = frontend.language_model_inputs(torch.tensor([ids]))
        figures = compare(lambda _, a=actual: a, lambda _, i=item: weight_only.run(program, i), [item["input_ids"]])
        assert figures.summary()["kld_mean"] <= bound, kind


def test_stacked_experts_keep_their_levels(tmp_path):
    program = even("MixtralForCausalLM", **OTHERS["MixtralForCausalLM"])
    export.export(saved(program, tmp_path), "gguf", tmp_path / "model.gguf")
    tensors, weights = read_back(tmp_path / "model.gguf"), stored_weights(program)
    gate_up = weights["model.layers.1.mlp.experts.gate_up_proj"].dequantize()
    for name, expected in (("gate", gate_up[:, :96]), ("up", gate_up[:, 96:])):
        kind, values = tensors[f"blk.1.ffn_{name}_exps.weight"]
        assert kind == "Q8_0" and torch.equal(values, expected)
    down = weights["model.layers.1.mlp.experts.down_proj"].dequantize()
    assert torch.equal(tensors["blk.1.ffn_down_exps.weight"][1], down)
    assert tensors["blk.1.ffn_gate_inp.weight"][0] == "F32"


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("Gemma3ForCausalLM", {"num_hidden_layers": 2, "sliding_window_pattern": 2}, "one layer of 6"),
        (
            "Gemma3ForCausalLM",
            {"query_pre_attn_scalar": 64},
            "scores scaled by the root of 64, where llama.cpp takes 32",
        ),
        ("Gemma3ForCausalLM", {"final_logit_softcapping": 30.0}, "soft-capped scores or logits in gemma3_text"),
        ("Gemma2ForCausalLM", {"attn_logit_softcapping": None}, "that are not soft-capped in gemma2"),
        ("GemmaForCausalLM", {"hidden_act": "silu"}, "the activation 'silu' in gemma"),
        ("Qwen3MoeForCausalLM", {"norm_topk_prob": False}, "which do sum to one"),
        ("Qwen2MoeForCausalLM", {"norm_topk_prob": True}, "which do not sum to one"),
        ("Qwen2MoeForCausalLM", {"decoder_sparse_step": 2}, "layers without experts in qwen2_moe"),
        ("Qwen2MoeForCausalLM", {"tie_word_embeddings": True}, "an output head that is the embedding in qwen2_moe"),
        ("MixtralForCausalLM", {"sliding_window": 8}, "the sliding window of mixtral, which llama.cpp ignores"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(architecture, options, message):
    prefix = architecture.removesuffix("ForCausalLM")
    config = getattr(transformers, "Gemma3TextConfig" if prefix == "Gemma3" else f"{prefix}Config")
    config = config(**{**_EVEN, **OTHERS[architecture], **options})
    with pytest.raises(ExportError, match=f"GGUF is not written for .*{message}.*; use --format hf-dense"):
        architecture_of(config)
    assert architecture_of(type(config)(**{**_EVEN, **OTHERS[architecture]}))


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
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert model.tokenize(text.encode(), add_bos=False, special=True) == ids
        model.reset()
        model.eval(ids)
        actual = torch.tensor(model.scores[: len(ids)])[None]
        item = frontend.language_model_inputs(torch.tensor([ids]))
        figures = compare(lambda _, a=actual: a, lambda _, i=item: weight_only.run(program, i), [item["input_ids"]])
        assert figures.summary()["kld_mean"] <= 1e-3
