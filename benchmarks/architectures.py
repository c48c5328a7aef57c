"""Which architectures of transformers are compiled right: tiny random models against themselves, run eagerly.

    python -m benchmarks.architectures [NAME ...]      # all by default; one line each
    python -m benchmarks.architectures --write         # and docs/architectures.md

A model is captured, everything in it stays float, attention gets its cache (16 bits), and the result runs as the native
program where all its operators have a translation, else in torch. Compared are logits of whole sequences, and a prefill
with ten tokens decoded behind it, in batches with left padding. The sizes are odd on purpose.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import os
import re
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.codegen.targets import parse_targets
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.base import PassContext
from torch import Tensor, nn

from lbllm_compile import frontend
from lbllm_compile.frontend import UserModel
from lbllm_compile.kernels import build_kernels
from lbllm_compile.lowering.build import build_native, workshop
from lbllm_compile.lowering.compare import DisagreementError
from lbllm_compile.runtime.model import CompiledModel

PAGE = Path(__file__).resolve().parent.parent / "docs" / "architectures.md"

UNCHANGED = 'canonicalize,annotate{keep_dense="*"},head{bits=16},merge,lower,cache{bits=16},cleanup'
"""A pipeline that keeps every weight float."""

TOLERANCE = 5e-3
"""Largest relative error of logits that is right; keys and values are stored in 16 bits."""

SHAPES = ((1, 1), (1, 40), (3, 33))
"""Sequences and tokens of the comparisons."""

DECODED = 10
"""Tokens decoded one by one behind a prefill."""

_SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 72,
    "intermediate_size": 104,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT: dict[str, Any] = {
    "vocab_size": 101,
    "n_embd": 72,
    "n_layer": 2,
    "n_head": 6,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER: dict[str, Any] = {k: v for k, v in _SIZES.items() if k != "num_key_value_heads"} | {"is_decoder": True}
_DECODER: dict[str, Any] = {
    "vocab_size": 101,
    "d_model": 72,
    "decoder_layers": 2,
    "decoder_attention_heads": 6,
    "decoder_ffn_dim": 104,
    "max_position_embeddings": 128,
}
_HEAD: dict[str, Any] = {"head_dim": 12}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 40}
_LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 6,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
}
_ROUTED: dict[str, Any] = {
    **_EXPERTS,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_SLIDING_AND_FULL = ["sliding_attention", "full_attention"]


@dataclass(frozen=True)
class Architecture:
    """A tiny model.

    Attributes:
        model: name of its class in transformers.
        config: arguments of its configuration.
        seed: of its weights; another than 0 where two experts of a router are so close for some token that keys rounded
            to 16 bits decide between them.
    """

    model: str
    config: Mapping[str, Any]
    seed: int = 0

    def build(self) -> nn.Module:
        """The model with random weights, the same at every call, wide enough that a mistake shows."""
        model_class = getattr(transformers, self.model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = model_class(model_class.config_class(**copy.deepcopy(dict(self.config))))
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
                else:
                    parameter.data.add_(0.1 * torch.randn(parameter.shape))
        return model.eval().requires_grad_(False)


def _like_llama(model: str, seed: int = 0, **config: Any) -> Architecture:
    return Architecture(f"{model}ForCausalLM", {**_SIZES, **config}, seed)


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **parameters}


ARCHITECTURES: dict[str, Architecture] = {
    # Llama and what changes little of it
    "llama": _like_llama("Llama"),
    "llama, one key head": _like_llama("Llama", num_key_value_heads=1),
    "llama, biases": _like_llama("Llama", attention_bias=True, mlp_bias=True),
    "llama, tied": _like_llama("Llama", tie_word_embeddings=True),
    "llama, linear rope": _like_llama("Llama", rope_scaling=_rope("linear", factor=2.0)),
    "llama, dynamic rope": _like_llama("Llama", rope_scaling=_rope("dynamic", factor=2.0)),
    "llama, yarn": _like_llama(
        "Llama", rope_scaling=_rope("yarn", factor=4.0, original_max_position_embeddings=32), head_dim=12
    ),
    "llama 3": _like_llama(
        "Llama",
        rope_scaling=_rope(
            "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
        ),
    ),
    "mistral": _like_llama("Mistral", sliding_window=8),
    "ministral": _like_llama("Ministral", sliding_window=8, layer_types=_SLIDING_AND_FULL, **_HEAD),
    "ministral 3": _like_llama("Ministral3", **_HEAD),
    "qwen 2": _like_llama("Qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen 3": _like_llama("Qwen3", **_HEAD),
    "gemma": _like_llama("Gemma", **_HEAD),
    "gemma 2": _like_llama(
        "Gemma2",
        sliding_window=8,
        query_pre_attn_scalar=12,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        **_HEAD,
    ),
    "gemma 3": _like_llama("Gemma3", sliding_window=8, layer_types=_SLIDING_AND_FULL, **_HEAD),
    "gemma 3n": _like_llama(
        "Gemma3n",
        sliding_window=8,
        layer_types=_SLIDING_AND_FULL,
        vocab_size_per_layer_input=101,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=0,
        laurel_rank=8,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0, 0.0],
        **_HEAD,
    ),
    "gemma 4": _like_llama(
        "Gemma4",
        sliding_window=8,
        layer_types=_SLIDING_AND_FULL,
        vocab_size_per_layer_input=101,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=0,
        global_head_dim=12,
        **_HEAD,
    ),
    "vaultgemma": _like_llama("VaultGemma", sliding_window=8, query_pre_attn_scalar=12, **_HEAD),
    "phi": _like_llama("Phi", partial_rotary_factor=0.5),
    "phi 3": _like_llama("Phi3", sliding_window=8),
    "phi 3, long rope": _like_llama(
        "Phi3",
        rope_scaling=_rope("longrope", short_factor=[1.0] * 6, long_factor=[2.0] * 6),
        original_max_position_embeddings=64,
    ),
    "phi 3, partial": _like_llama("Phi3", partial_rotary_factor=0.5),
    "stablelm": _like_llama("StableLm", partial_rotary_factor=0.5, use_qkv_bias=True),
    "olmo": _like_llama("Olmo"),
    "olmo 2": _like_llama("Olmo2"),
    "olmo 3": _like_llama("Olmo3", sliding_window=8, layer_types=_SLIDING_AND_FULL),
    "cohere": _like_llama("Cohere", logit_scale=0.25),
    "cohere 2": _like_llama("Cohere2", sliding_window=8, layer_types=_SLIDING_AND_FULL),
    "granite": _like_llama(
        "Granite", embedding_multiplier=2.0, logits_scaling=3.0, residual_multiplier=0.5, attention_multiplier=0.2
    ),
    "nemotron": _like_llama("Nemotron", partial_rotary_factor=0.5),
    "starcoder 2": _like_llama("Starcoder2", sliding_window=8),
    "glm": _like_llama("Glm", **_HEAD),
    "glm 4": _like_llama("Glm4", **_HEAD),
    "ernie 4.5": _like_llama("Ernie4_5", **_HEAD),
    "helium": _like_llama("Helium", **_HEAD),
    "arcee": _like_llama("Arcee"),
    "apertus": _like_llama("Apertus"),
    "seed-oss": _like_llama("SeedOss", **_HEAD),
    "hunyuan": _like_llama("HunYuanDenseV1", **_HEAD),
    "exaone 4": _like_llama(
        "Exaone4", sliding_window=8, layer_types=_SLIDING_AND_FULL, sliding_window_pattern=2, **_HEAD
    ),
    "smollm 3": _like_llama("SmolLM3", no_rope_layers=[1, 0]),
    "cwm": _like_llama("Cwm", sliding_window=8, layer_types=_SLIDING_AND_FULL, **_HEAD),
    "nanochat": _like_llama("NanoChat", final_logit_softcapping=3.0),
    "bitnet": _like_llama("BitNet"),
    "diffllama": _like_llama("DiffLlama"),
    "doge": _like_llama("Doge"),
    "jais 2": _like_llama("Jais2"),
    "hyperclova x": _like_llama("HyperCLOVAX"),
    "youtu": _like_llama("Youtu", **_LATENT),
    "minicpm 3": _like_llama("MiniCPM3", **_LATENT),
    "granite swa": _like_llama("GraniteSWA", sliding_window=8),
    "emu 3": _like_llama("Emu3"),
    "hrm": _like_llama("HrmText"),
    "flint": _like_llama("Flint"),
    "beam": _like_llama("Beam"),
    "modernbert decoder": Architecture(
        "ModernBertDecoderForCausalLM", {**_ENCODER, "local_attention": 8, "cls_token_id": 3, "sep_token_id": 4}
    ),
    # the GPT family
    "gpt 2": Architecture("GPT2LMHeadModel", _GPT),
    "gpt bigcode": Architecture("GPTBigCodeForCausalLM", {**_GPT, "multi_query": True}),
    "gpt-j": Architecture("GPTJForCausalLM", {**_GPT, "rotary_dim": 8}),
    "codegen": Architecture("CodeGenForCausalLM", {**_GPT, "n_head": 4, "rotary_dim": 8}),
    "gpt neo": Architecture(
        "GPTNeoForCausalLM",
        {
            "vocab_size": 101,
            "hidden_size": 72,
            "num_layers": 2,
            "num_heads": 6,
            "max_position_embeddings": 128,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
        },
    ),
    "gpt neox": Architecture("GPTNeoXForCausalLM", {**_ENCODER, "rotary_pct": 0.5}),
    "gpt neox, in sequence": Architecture(
        "GPTNeoXForCausalLM", {**_ENCODER, "rotary_pct": 0.5, "use_parallel_residual": False}
    ),
    "gpt neox japanese": Architecture("GPTNeoXJapaneseForCausalLM", {**_ENCODER, "intermediate_multiple_size": 2}),
    "openai gpt": Architecture("OpenAIGPTLMHeadModel", _GPT),
    "ctrl": Architecture("CTRLLMHeadModel", {**_GPT, "dff": 104}),
    "opt": Architecture("OPTForCausalLM", {**_ENCODER, "ffn_dim": 104, "word_embed_proj_dim": 72}),
    "opt, projected": Architecture(
        "OPTForCausalLM", {**_ENCODER, "ffn_dim": 104, "word_embed_proj_dim": 40, "do_layer_norm_before": False}
    ),
    "bloom": Architecture("BloomForCausalLM", {"vocab_size": 101, "hidden_size": 72, "n_layer": 2, "n_head": 6}),
    "mpt": Architecture(
        "MptForCausalLM", {"vocab_size": 101, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}
    ),
    "falcon": Architecture(
        "FalconForCausalLM", {**_ENCODER, "multi_query": True, "alibi": False, "new_decoder_architecture": False}
    ),
    "falcon, grouped": Architecture(
        "FalconForCausalLM", {**_ENCODER, "num_kv_heads": 2, "alibi": False, "new_decoder_architecture": True}
    ),
    "falcon, alibi": Architecture(
        "FalconForCausalLM", {**_ENCODER, "multi_query": False, "alibi": True, "new_decoder_architecture": False}
    ),
    "persimmon": Architecture("PersimmonForCausalLM", _ENCODER),
    "xglm": Architecture(
        "XGLMForCausalLM",
        {
            "vocab_size": 101,
            "d_model": 72,
            "ffn_dim": 104,
            "num_layers": 2,
            "attention_heads": 6,
            "max_position_embeddings": 128,
        },
    ),
    "biogpt": Architecture("BioGptForCausalLM", _ENCODER),
    # encoders' architectures as decoders
    "bert": Architecture("BertLMHeadModel", _ENCODER),
    "bert, not causal": Architecture("BertLMHeadModel", {**_ENCODER, "is_decoder": False}),
    "bert generation": Architecture("BertGenerationDecoder", _ENCODER),
    "camembert": Architecture("CamembertForCausalLM", {**_ENCODER, "max_position_embeddings": 130}),
    "data2vec": Architecture("Data2VecTextForCausalLM", {**_ENCODER, "max_position_embeddings": 130}),
    "electra": Architecture("ElectraForCausalLM", {**_ENCODER, "embedding_size": 40}),
    "ernie": Architecture("ErnieForCausalLM", _ENCODER),
    "megatron bert": Architecture("MegatronBertForCausalLM", _ENCODER),
    "rembert": Architecture(
        "RemBertForCausalLM", {**_ENCODER, "input_embedding_size": 40, "output_embedding_size": 48}
    ),
    "roberta": Architecture("RobertaForCausalLM", {**_ENCODER, "max_position_embeddings": 130}),
    "roformer": Architecture("RoFormerForCausalLM", {**_ENCODER, "embedding_size": 72}),
    "roberta, norm first": Architecture("RobertaPreLayerNormForCausalLM", {**_ENCODER, "max_position_embeddings": 130}),
    "xlm-roberta xl": Architecture("XLMRobertaXLForCausalLM", {**_ENCODER, "max_position_embeddings": 130}),
    "xmod": Architecture("XmodForCausalLM", {**_ENCODER, "max_position_embeddings": 130, "default_language": "en_XX"}),
    "big bird": Architecture("BigBirdForCausalLM", {**_ENCODER, "attention_type": "original_full"}),
    "bart decoder": Architecture("BartForCausalLM", _DECODER),
    "mbart decoder": Architecture("MBartForCausalLM", _DECODER),
    "mvp decoder": Architecture("MvpForCausalLM", _DECODER),
    "plbart decoder": Architecture("PLBartForCausalLM", _DECODER),
    "pegasus decoder": Architecture("PegasusForCausalLM", _DECODER),
    "bigbird pegasus decoder": Architecture("BigBirdPegasusForCausalLM", _DECODER),
    "blenderbot decoder": Architecture("BlenderbotForCausalLM", _DECODER),
    "blenderbot small decoder": Architecture("BlenderbotSmallForCausalLM", _DECODER),
    "marian decoder": Architecture("MarianForCausalLM", {**_DECODER, "pad_token_id": 0, "eos_token_id": 2}),
    "trocr decoder": Architecture("TrOCRForCausalLM", _DECODER),
    "rocbert": Architecture("RoCBertForCausalLM", {**_ENCODER, "enable_pronunciation": False, "enable_shape": False}),
    "xlm": Architecture(
        "XLMWithLMHeadModel",
        {"vocab_size": 101, "emb_dim": 72, "n_layers": 2, "n_heads": 6, "causal": True, "max_position_embeddings": 128},
    ),
    "xlm-roberta": Architecture("XLMRobertaForCausalLM", {**_ENCODER, "max_position_embeddings": 130}),
    # mixtures of experts
    "mixtral": _like_llama("Mixtral", sliding_window=8, **_LOCAL),
    "qwen 2 moe": _like_llama("Qwen2Moe", num_experts=4, shared_expert_intermediate_size=48, **_EXPERTS),
    "qwen 3 moe": _like_llama("Qwen3Moe", num_experts=4, norm_topk_prob=True, **_EXPERTS, **_HEAD),
    "qwen 3 moe, mixed": _like_llama("Qwen3Moe", num_experts=4, mlp_only_layers=[0], **_EXPERTS, **_HEAD),
    "olmoe": _like_llama("Olmoe", num_experts=4, num_experts_per_tok=2),
    "flex olmo": _like_llama("FlexOlmo", num_experts=4, num_experts_per_tok=2),
    "granite moe": _like_llama("GraniteMoe", **_LOCAL),
    "granite moe, shared": _like_llama("GraniteMoeShared", shared_intermediate_size=40, **_LOCAL),
    "phi moe": _like_llama("Phimoe", **_LOCAL),
    "gpt-oss": _like_llama("GptOss", sliding_window=8, layer_types=_SLIDING_AND_FULL, **_LOCAL, **_HEAD),
    "deepseek 2": _like_llama("DeepseekV2", **_LATENT, **_ROUTED, topk_method="greedy"),
    "deepseek 3": _like_llama("DeepseekV3", **_LATENT, **_ROUTED),
    "dots 1": _like_llama("Dots1", **_ROUTED, **_HEAD),
    "glm 4 moe": _like_llama("Glm4Moe", **_ROUTED, **_HEAD),
    "ernie 4.5 moe": _like_llama(
        "Ernie4_5_Moe", moe_num_experts=4, moe_k=2, moe_intermediate_size=40, moe_num_shared_experts=1
    ),
    "hunyuan moe": _like_llama("HunYuanMoEV1", num_experts=4, moe_topk=2, **_HEAD),
    "llama 4": _like_llama(
        "Llama4",
        intermediate_size_mlp=104,
        attention_chunk_size=16,
        interleave_moe_layer_step=2,
        no_rope_layers=[1, 0],
        num_local_experts=4,
        num_experts_per_tok=1,
        **_HEAD,
    ),
    "minimax m2": _like_llama("MiniMaxM2", rotary_dim=8, **_LOCAL, **_HEAD),
    "longcat flash": _like_llama(
        "LongcatFlash",
        **_LATENT,
        num_layers=1,
        ffn_hidden_size=104,
        expert_ffn_hidden_size=40,
        n_routed_experts=4,
        zero_expert_num=1,
        moe_topk=2,
        head_dim=8,
    ),
    "dbrx": Architecture(
        "DbrxForCausalLM",
        {
            "vocab_size": 101,
            "d_model": 72,
            "n_heads": 6,
            "n_layers": 2,
            "max_seq_len": 128,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 72},
        },
    ),
    "jetmoe": _like_llama("JetMoe", kv_channels=12, **_LOCAL),
    "afmoe": _like_llama(
        "Afmoe",
        num_experts=4,
        num_shared_experts=1,
        num_dense_layers=1,
        sliding_window=8,
        layer_types=_SLIDING_AND_FULL,
        **_EXPERTS,
        **_HEAD,
    ),
    "cohere 2 moe": _like_llama(
        "Cohere2Moe", sliding_window=8, layer_types=_SLIDING_AND_FULL, num_experts=4, **_EXPERTS, **_HEAD
    ),
    "exaone moe": _like_llama(
        "ExaoneMoe", sliding_window=8, layer_types=_SLIDING_AND_FULL, num_experts=4, **_EXPERTS, **_HEAD
    ),
    "glm 4 moe lite": _like_llama("Glm4MoeLite", **_LATENT, **_ROUTED),
    "hy 3": _like_llama("HYV3", num_experts=4, **_EXPERTS, **_HEAD),
    "mellum": _like_llama(
        "Mellum", 1, sliding_window=8, layer_types=_SLIDING_AND_FULL, num_experts=4, **_EXPERTS, **_HEAD
    ),
    "laguna": _like_llama("Laguna", num_experts=4, **_EXPERTS, **_HEAD),
    "aria": _like_llama("AriaText", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
    "kolibri": _like_llama("Kolibri1", 1),
    "solar open": _like_llama("SolarOpen", **_ROUTED, **_HEAD),
    # states that are not per token
    "lfm 2": _like_llama("Lfm2", layer_types=["conv", "full_attention"]),
    "lfm 3": _like_llama("Lfm3", layer_types=["conv", "full_attention"]),
    "lfm 2 moe": _like_llama(
        "Lfm2Moe", layer_types=["conv", "full_attention"], num_experts=4, num_dense_layers=1, **_EXPERTS
    ),
    "mamba": Architecture(
        "MambaForCausalLM", {"vocab_size": 101, "hidden_size": 72, "num_hidden_layers": 2, "state_size": 8}
    ),
    "mamba 2": Architecture(
        "Mamba2ForCausalLM",
        {
            "vocab_size": 101,
            "hidden_size": 72,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 12,
            "head_dim": 12,
            "n_groups": 2,
            "chunk_size": 16,
        },
    ),
    "falcon mamba": Architecture(
        "FalconMambaForCausalLM", {"vocab_size": 101, "hidden_size": 72, "num_hidden_layers": 2, "state_size": 8}
    ),
    "falcon h1": _like_llama(
        "FalconH1", mamba_d_ssm=144, mamba_n_heads=12, mamba_d_head=12, mamba_d_state=8, mamba_chunk_size=16
    ),
    "bamba": _like_llama(
        "Bamba",
        attn_layer_indices=[1],
        mamba_n_heads=12,
        mamba_d_head=12,
        mamba_d_state=8,
        mamba_chunk_size=16,
    ),
    "granite moe, hybrid": _like_llama(
        "GraniteMoeHybrid",
        layer_types=["mamba", "attention"],
        shared_intermediate_size=40,
        mamba_n_heads=12,
        mamba_d_head=12,
        mamba_d_state=8,
        mamba_chunk_size=16,
        **_LOCAL,
    ),
    "qwen 3 next": _like_llama(
        "Qwen3Next",
        layer_types=["linear_attention", "full_attention"],
        num_experts=4,
        shared_expert_intermediate_size=40,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        **_EXPERTS,
        **_HEAD,
    ),
    "minimax": _like_llama("MiniMax", layer_types=["linear_attention", "full_attention"], **_LOCAL, **_HEAD),
    "recurrent gemma": _like_llama(
        "RecurrentGemma", attention_window_size=16, block_types=["recurrent", "attention"], lru_width=72
    ),
    "zamba": _like_llama(
        "Zamba",
        attention_hidden_size=144,
        attention_head_dim=24,
        mamba_d_state=8,
        layers_block_type=["mamba", "hybrid", "hybrid"],
        num_hidden_layers=3,
    ),
    "jamba": _like_llama(
        "Jamba", attn_layer_offset=1, attn_layer_period=2, num_experts=4, num_experts_per_tok=2, mamba_d_state=8
    ),
    "rwkv": Architecture(
        "RwkvForCausalLM",
        {
            "vocab_size": 101,
            "hidden_size": 72,
            "num_hidden_layers": 2,
            "attention_hidden_size": 72,
            "context_length": 64,
        },
    ),
}
"""By name, as the documentation lists them."""


@dataclass(frozen=True)
class Finding:
    """What became of an architecture.

    Attributes:
        name: in :data:`ARCHITECTURES`.
        verdict: ``"right"``, ``"refused"``, ``"wrong"`` (other logits) or ``"fault"`` (an error that is no sentence).
        native: whether the native program computed it.
        error: largest relative error of logits.
        message: of the refusal or error; of what is right in torch only, why.
    """

    name: str
    verdict: str
    native: bool = False
    error: float = 0.0
    message: str = ""

    @property
    def runs_on(self) -> str:
        """``"native"`` or ``"torch"``; empty for what is not right."""
        return ("native" if self.native else "torch") if self.verdict == "right" else ""

    @property
    def line(self) -> str:
        runs = f"{self.runs_on}, error {self.error:.1e}" if self.error else ""
        return f"{self.verdict:8} {self.name:24} {' '.join(part for part in (runs, self.message) if part)}"


class _Notes:
    """Keeps what a build says, and shows no progress."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def task(self, title: str, total: int | None = None) -> Any:
        return contextlib.nullcontext(self)

    def advance(self, *_: Any) -> None:
        """Nobody watches."""


def examine(name: str, native: bool = True) -> Finding:
    """Compiles one architecture and compares it.

    Args:
        name: in :data:`ARCHITECTURES`.
        native: build the native program; else the graph runs in torch.
    """
    reference = ARCHITECTURES[name].build()
    model = copy.deepcopy(reference)
    with contextlib.suppress(ValueError):  # one without a choice
        reference.set_attn_implementation("eager")  # type: ignore[operator]
    notes = _Notes()
    try:
        with contextlib.ExitStack() as stack:
            compiled = _compiled(name, model, notes, stack.enter_context(workshop()) if native else None)
            errors = list(_errors(compiled, reference))
    except DisagreementError as error:
        return Finding(name, "wrong", native=True, message=str(error))
    except LbllmError as error:
        return Finding(name, "refused", message=str(error))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = next(iter(str(error).strip().splitlines()), "")
        return Finding(
            name, "fault", message=f"{type(error).__name__}: {text[:160]} ({Path(where.filename).name}:{where.lineno})"
        )
    worst = max(errors, key=lambda e: float("inf") if e != e else e)
    verdict = "right" if worst <= TOLERANCE else "wrong"
    return Finding(name, verdict, compiled.native is not None, worst, "; ".join(notes.notes))


def _compiled(name: str, model: nn.Module, notes: _Notes, folder: Path | None) -> CompiledModel:
    program = frontend.capture(frontend.prepare(UserModel(model, "causal-lm", name, "-")))
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    context = PassContext(probe=frontend.language_model_inputs(ids), teacher=program)
    program, _ = pipeline.run(program, pipeline.parse(UNCHANGED), context)
    kernels = build_kernels(program, parse_targets("cpu"), trials=0)
    native = None if folder is None else build_native(program, kernels.host, folder, notes)  # type: ignore[arg-type]
    return CompiledModel(program, kernels.host, native)


def _errors(compiled: CompiledModel, reference: nn.Module) -> Iterable[float]:
    """Relative errors of logits over :data:`SHAPES`."""
    for batch, length in SHAPES:
        ids = torch.randint(3, 101, (batch, length), generator=torch.Generator().manual_seed(97 * batch + length))
        mask = torch.ones_like(ids)
        for row in range(batch - 1):
            mask[row, : (row + 1) * length // 4] = 0
        with torch.no_grad():
            expected = reference(**frontend.language_model_inputs(ids, mask), use_cache=False).logits
        seen = mask.bool()
        yield _relative(compiled.logits(ids, mask)[seen], expected[seen])
        if length > DECODED:
            prefill = length - DECODED
            session = compiled.session(batch)
            session.start(mask[:, :prefill].numpy())
            steps = [ids[:, :prefill], *ids[:, prefill:].split(1, 1)]
            found = [torch.from_numpy(session.step(step.numpy())) for step in steps]
            yield _relative(torch.stack(found, 1), expected[:, prefill - 1 :])


def _relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))


def page(findings: Sequence[Finding]) -> str:
    """docs/architectures.md."""
    counts = Counter(f.verdict for f in findings)
    native = sum(f.native for f in findings if f.verdict == "right")
    lines = [
        "# Architectures",
        "",
        f"Tiny random models of {len(findings)} architectures of transformers {transformers.__version__}, compiled with"
        " every weight kept float and",
        "compared with the eager model: logits of whole sequences, a prefill and ten decoded tokens, in batches with",
        f"left padding. {counts['right']} are right (relative error at most {TOLERANCE:g}), {native} of them on the"
        f" native program; {counts['refused']} are refused.",
        "`python -m benchmarks.architectures --write` makes this page.",
        "",
        "| architecture | class | | runs on |",
        "|---|---|---|---|",
    ]
    for finding in findings:
        text = finding.verdict if finding.verdict == "right" else f"{finding.verdict}: {_plain(finding.message)}"
        lines.append(f"| {finding.name} | `{ARCHITECTURES[finding.name].model}` | {text} | {finding.runs_on} |")
    return "\n".join(lines) + "\n"


def stated(text: str) -> dict[str, tuple[str, str]]:
    """Verdict and what it runs on of each architecture, by name, as a page of :func:`page` states them."""
    rows = re.findall(r"^\| ([^|`]+) \| `\w+` \| (\w+)\b.* \| (native|torch|) \|$", text, re.MULTILINE)
    return {name: (verdict, runs_on) for name, verdict, runs_on in rows}


def _plain(message: str) -> str:
    """A message as it stands in a table: without this machine's folders."""
    root = str(Path(transformers.__file__).resolve().parent.parent) + os.sep
    return message.replace(root, "").replace("|", "\\|").replace("\n", " ")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[[], *ARCHITECTURES], default=[])
    parser.add_argument("--torch", action="store_true", help="build no native programs")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}, of all architectures")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    findings = []
    for name in ARCHITECTURES if options.write else options.names or ARCHITECTURES:
        findings.append(examine(name, native=not options.torch))
        print(findings[-1].line, flush=True)
        gc.collect()
    if options.write:
        PAGE.write_text(page(findings), encoding="utf-8")
    return int(any(f.verdict in ("wrong", "fault") for f in findings))


if __name__ == "__main__":
    sys.exit(main())
