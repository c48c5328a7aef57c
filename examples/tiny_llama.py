"""A LLaMA with random weights, small enough to compile in a minute: for trying things out.

    lbllm-compile examples/tiny_llama.py --target cpu --preset quick
    lbllm-compile run tiny_llama-lbllm --prompt "Hello"

It talks nonsense. Its tokenizer, one token a byte, is built here, so that prompts work without any file.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def build_model():
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(BYTES),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def tokenizer():
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(SPECIAL + BYTES)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
