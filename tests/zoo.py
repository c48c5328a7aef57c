"""Tiny random models of the architectures the compiler supports, with what a pass should find in each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from lbllm_compile.passes.ir.program import Program
from transformers import PreTrainedModel

from lbllm_compile import frontend
from lbllm_compile.frontend import UserModel

VOCABULARY = 101
LAYERS = 2


@dataclass(frozen=True)
class ZooModel:
    """One architecture.

    Attributes:
        build: makes the model, the same at every call.
        matrices: weight matrices in the decoder layers, one for each expert, expert routers not counted.
        routers: expert routers, which stay dense.
        tied: whether embedding and lm_head are one tensor.
    """

    build: Callable[[], PreTrainedModel]
    matrices: int
    routers: int = 0
    tied: bool = False


def _model(architecture: str, **options: object) -> Callable[[], PreTrainedModel]:
    prefix = architecture.removesuffix("LMHead").removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    config_class = getattr(transformers, options.pop("config", prefix + "Config"))

    def build() -> PreTrainedModel:
        config = config_class(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=0, **options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(transformers, architecture)(config)
            # Wider than the default initialization, so that attention and quantization have something to get wrong.
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
                else:
                    parameter.data.add_(0.1 * torch.randn(parameter.shape))
        return model.eval().requires_grad_(False)

    return build


_LLAMA = {
    "hidden_size": 72,
    "intermediate_size": 104,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
"""Not multiples of 32: 72 is a group of 64 and a tail of 8."""

ZOO: dict[str, ZooModel] = {
    "llama": ZooModel(_model("LlamaForCausalLM", head_dim=18, **_LLAMA), 7 * LAYERS),
    "llama-tied": ZooModel(_model("LlamaForCausalLM", tie_word_embeddings=True, **_LLAMA), 7 * LAYERS, tied=True),
    "mistral": ZooModel(_model("MistralForCausalLM", sliding_window=8, head_dim=18, **_LLAMA), 7 * LAYERS),
    "qwen2": ZooModel(_model("Qwen2ForCausalLM", **_LLAMA), 7 * LAYERS),
    "qwen3": ZooModel(_model("Qwen3ForCausalLM", head_dim=16, **_LLAMA), 7 * LAYERS),
    "gemma3": ZooModel(
        _model(
            "Gemma3ForCausalLM",
            config="Gemma3TextConfig",
            head_dim=16,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
            query_pre_attn_scalar=16,
            **_LLAMA,
        ),
        7 * LAYERS,
        tied=True,
    ),
    "phi3": ZooModel(_model("Phi3ForCausalLM", **_LLAMA), 4 * LAYERS),
    "gpt2": ZooModel(
        _model("GPT2LMHeadModel", n_embd=72, n_inner=104, n_layer=LAYERS, n_head=4, n_positions=128),
        4 * LAYERS,
        tied=True,
    ),
    "opt": ZooModel(
        _model(
            "OPTForCausalLM",
            hidden_size=72,
            word_embed_proj_dim=72,
            ffn_dim=104,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            max_position_embeddings=128,
        ),
        6 * LAYERS,
        tied=True,
    ),
    "gpt-neox": ZooModel(
        _model(
            "GPTNeoXForCausalLM",
            hidden_size=72,
            intermediate_size=104,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            max_position_embeddings=128,
        ),
        4 * LAYERS,
    ),
    "mixtral": ZooModel(
        _model("MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2, **_LLAMA),
        (4 + 2 * 4) * LAYERS,
        routers=LAYERS,
    ),
}
"""Every architecture, by a short name. Mistral's and Gemma3's windows (8) are shorter than the tests' sequences."""


def user_model(name: str) -> UserModel:
    """A zoo model as the frontend would load it."""
    module = ZOO[name].build()
    return frontend.prepare(UserModel(module, "causal-lm", name, f"zoo:{name}"))


@functools.cache
def captured(name: str) -> tuple[PreTrainedModel, Program]:
    """A zoo model and its captured program, made once a test run; change neither."""
    model = user_model(name)
    return model.module, frontend.capture(model)
