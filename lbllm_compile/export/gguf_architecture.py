"""Architectures as llama.cpp has them: its names, what it computes of them, and the metadata that it reads.

llama.cpp fixes some of what a configuration of transformers may choose, and ignores some of the rest without a word.
So an architecture says what it fixes, and a model that has it otherwise is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lbllm_compile.export.original import ExportError

_GELU, _SILU = "gelu_pytorch_tanh", "silu"

_LOCAL_BASE = 10_000.0
"""The base of rotary embeddings that llama.cpp takes for Gemma 3's layers with a window."""


@dataclass(frozen=True)
class Experts:
    """Experts as llama.cpp has them in an architecture, in every layer.

    Attributes:
        normed: whether the weights of a token's experts sum to one.
        width: the configuration's name of an expert's width.
        shared: the configuration's name of the width of the expert that all tokens have, where there is one.
    """

    normed: bool
    width: str = "moe_intermediate_size"
    shared: str | None = None


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp has an architecture.

    Attributes:
        name: llama.cpp's.
        permuted: whether rows of queries and keys are in its order.
        activation: between the linears of a feed-forward network.
        norm_offset: what is added to the weights of norms before they are written, because transformers adds it.
        period: every so many layers the last attends to everything, the others to a window; 0 where all attend to
            everything.
        large: the number of layers with which scores are scaled by the hidden size over the heads, not by a head's
            size; 0 where that is not told by layers.
        softcapped: whether scores and logits are soft-capped.
        experts: None without.
    """

    name: str
    permuted: bool = False
    activation: str = _SILU
    norm_offset: float = 0.0
    period: int = 0
    large: int = 0
    softcapped: bool = False
    experts: Experts | None = None


ARCHITECTURES = {
    "llama": Architecture("llama", permuted=True),
    "mistral": Architecture("llama", permuted=True),
    "mixtral": Architecture("llama", permuted=True, experts=Experts(normed=True, width="intermediate_size")),
    "qwen2": Architecture("qwen2"),
    "qwen2_moe": Architecture("qwen2moe", experts=Experts(normed=False, shared="shared_expert_intermediate_size")),
    "qwen3": Architecture("qwen3"),
    "qwen3_moe": Architecture("qwen3moe", experts=Experts(normed=True)),
    "gemma": Architecture("gemma", activation=_GELU, norm_offset=1.0),
    "gemma2": Architecture("gemma2", activation=_GELU, norm_offset=1.0, period=2, large=46, softcapped=True),
    "gemma3_text": Architecture("gemma3", activation=_GELU, norm_offset=1.0, period=6, large=62),
}
"""What can be written, by transformers' ``model_type``."""


def architecture_of(config: Any) -> Architecture:
    """llama.cpp's architecture for a model.

    Args:
        config: transformers' configuration.

    Raises:
        ExportError: it has none, or would compute the model otherwise without a word.
    """
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise ExportError(
            f"GGUF is written for {', '.join(ARCHITECTURES)}, not for {kind}; use --format hf-dense, which llama.cpp's"
            " own converter reads"
        )
    found = ARCHITECTURES[kind]
    if why := _window(found, config) or _rotary(found, config) or _rest(found, config) or _routing(found, config):
        raise ExportError(f"GGUF is not written for {why}; use --format hf-dense")
    return found


def head_size(config: Any) -> int:
    """Channels of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rotary(config: Any, kind: str = "full_attention") -> Mapping[str, Any]:
    """Parameters of the rotary embeddings of all layers, or of those of a kind where each has its own."""
    parameters = config.rope_parameters or {}
    return parameters.get(kind, parameters)


def describe(writer: Any, found: Architecture, config: Any) -> None:
    """Writes what llama.cpp builds the model from.

    Args:
        writer: a ``gguf.GGUFWriter``.
        found: what :func:`architecture_of` gave.
        config: transformers' configuration.
    """
    import gguf

    head, parameters = head_size(config), rotary(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(parameters["rope_theta"])
    if parameters.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(parameters["factor"])
    if found.period:
        writer.add_sliding_window(config.sliding_window)
    if found.softcapped:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if found.experts:
        writer.add_expert_count(_experts(config))
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(getattr(config, found.experts.width))
        if found.experts.shared:
            writer.add_expert_shared_feed_forward_length(getattr(config, found.experts.shared))


def _experts(config: Any) -> int:
    """In a layer; configurations have two names for it."""
    local = getattr(config, "num_local_experts", None)
    return config.num_experts if local is None else local


def _window(found: Architecture, config: Any) -> str:
    """What of a model's windows llama.cpp would ignore, empty if nothing."""
    kinds = getattr(config, "layer_types", None) or []
    if not found.period:
        windowed = "sliding_attention" in kinds or (
            not kinds and getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
        )
        if windowed:
            return f"the sliding window of {config.model_type}, which llama.cpp ignores in this architecture"
        return ""
    expected = [
        "sliding_attention" if (i + 1) % found.period else "full_attention" for i in range(config.num_hidden_layers)
    ]
    if list(kinds) != expected:
        return f"windows in other layers than llama.cpp's, which attends to everything in one layer of {found.period}"
    return "attention to tokens that follow" if getattr(config, "use_bidirectional_attention", False) else ""


def _rotary(found: Architecture, config: Any) -> str:
    """What of a model's rotary embeddings llama.cpp would compute otherwise, empty if nothing."""
    kinds = {rotary(config, kind).get("rope_type", "default") for kind in ("full_attention", "sliding_attention")}
    if other := sorted(kinds - {"default", "linear"}):
        return f"rotary embeddings of the type '{other[0]}'"
    if found.name == "gemma3":
        local = rotary(config, "sliding_attention")
        if local["rope_theta"] != _LOCAL_BASE or local.get("rope_type", "default") != "default":
            return (
                f"rotary embeddings of layers with a window that have another base than {_LOCAL_BASE:.0f} or are scaled"
            )
    return ""


def _rest(found: Architecture, config: Any) -> str:
    """What else llama.cpp fixes and a model has otherwise, empty if nothing."""
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != found.activation:
        return f"the activation '{activation}' in {config.model_type}"
    scalar = getattr(config, "query_pre_attn_scalar", None)
    large = found.large and config.num_hidden_layers == found.large
    expected = config.hidden_size // config.num_attention_heads if large else head_size(config)
    if scalar is not None and scalar != expected:
        return f"scores scaled by the root of {scalar}, where llama.cpp takes {expected}"
    caps = (getattr(config, "attn_logit_softcapping", None), getattr(config, "final_logit_softcapping", None))
    if found.softcapped:
        return "" if None not in caps else f"scores or logits that are not soft-capped in {config.model_type}"
    return "" if caps == (None, None) else f"soft-capped scores or logits in {config.model_type}"


def _routing(found: Architecture, config: Any) -> str:
    """What of a model's experts llama.cpp would compute otherwise, empty if nothing."""
    if found.experts is None:
        return ""
    if getattr(config, "norm_topk_prob", found.experts.normed) != found.experts.normed:
        sums = "do" if found.experts.normed else "do not"
        return f"other weights of experts in {config.model_type} than llama.cpp's, which {sums} sum to one"
    if getattr(config, "decoder_sparse_step", 1) != 1 or getattr(config, "mlp_only_layers", None):
        return f"layers without experts in {config.model_type}"
    if config.model_type == "qwen2_moe" and config.tie_word_embeddings:
        return "an output head that is the embedding in qwen2_moe"
    return ""
