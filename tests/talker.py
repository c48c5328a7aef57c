"""A small artifact that talks: random weights, a token a byte, printable answers, with or without a chat template."""

from __future__ import annotations

from pathlib import Path

import torch
from rtn import simulate
from test_zoo import apply
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lbllm_compile import artifact, frontend
from lbllm_compile.frontend import UserModel
from lbllm_compile.runtime import CompiledModel, load

CONTEXT = 512

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('no such role') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

_SPECIAL = ["<pad>", "<s>", "</s>"]
_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def _tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(_SPECIAL + _BYTES)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=template
    )


def _model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(_SPECIAL) + len(_BYTES),
        hidden_size=72,
        intermediate_size=104,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=18,
        max_position_embeddings=CONTEXT,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    printable = [len(_SPECIAL) + i for i, token in enumerate(_BYTES) if " " <= token <= "~"]
    silent = [i for i in range(config.vocab_size) if i not in printable]
    with torch.no_grad():
        model.lm_head.weight *= 4
        model.lm_head.weight[silent] = 0  # a logit of zero, which nearly never is the highest
    return model.eval().requires_grad_(False)


def make(directory: Path, template: str | None = TEMPLATE) -> CompiledModel:
    """Saves the artifact, prepares its program in the cache in use, and loads it."""
    user = frontend.prepare(UserModel(_model(), "causal-lm", "talker", "talker"))
    captured = apply(frontend.capture(user), "canonicalize,annotate")
    program = apply(apply(simulate(captured), "head"), "merge,lower,cache,cleanup")
    item = type(program)(program.module, program.kind, "talker", config=program.config, tokenizer=_tokenizer(template))
    artifact.save(item, directory, lock={})
    return load(directory)
