"""A tiny GPT-2 that is trained from scratch in about half a minute, so that its quality means something.

    lbllm-compile examples/gpt2_tiny.py --target cpu --preset quick
    lbllm-compile run gpt2_tiny-lbllm --raw --prompt "The old farmer"

It learns a made-up grammar: subjects and verbs agree across relative clauses, and a name's pronoun follows sentences
later. With ``GPT2_TINY_TEXT=FILE.txt`` it learns that text instead. The same text, seed and number of threads give the
same weights, which are kept in the cache directory.
"""

from __future__ import annotations

import functools
import hashlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import tokenizers
import torch
from lbllm_compile.codegen.cache import cache_directory, write_atomically
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from lbllm_compile.frontend import ModelError

VOCABULARY = 512
CONTEXT = 128
STEPS = 360
BATCH = 16
LENGTH = 64
RATE = 3e-3
WARMUP = 20
SENTENCES = 12_000

END = "<|endoftext|>"

_NAMES = {"Anna": "she", "Bela": "he", "Clara": "she", "David": "he", "Emma": "she", "Felix": "he"}
_NOUNS = ["farmer", "teacher", "sailor", "baker", "painter", "doctor", "dog", "cat", "horse", "bird", "child", "driver"]
_ADJECTIVES = ["old", "young", "tall", "quiet", "clever", "tired", "happy", "brave"]
_VERBS = ["sees", "follows", "helps", "finds", "likes", "knows", "hears", "calls"]
_PLACES = ["in the garden", "near the river", "behind the house", "at the market", "under the bridge"]
_TIMES = ["today", "every morning", "after dinner", "on Sundays"]


def sentences(count: int, seed: int) -> Iterator[str]:
    """Sentences of the grammar, the same for the same seed."""
    chance = random.Random(seed)
    person = ""
    for _ in range(count):
        if person and chance.random() < 0.5:
            subject, plural = _NAMES[person].capitalize(), False
        elif chance.random() < 0.3:
            person = chance.choice(list(_NAMES))
            subject, plural = person, False
        else:
            subject, plural = _phrase(chance, clause=True)
            subject = subject.capitalize()
        words = [subject, _verb(chance, plural), _phrase(chance, clause=False)[0]]
        words += [chance.choice(tail) for tail in (_PLACES, _TIMES) if chance.random() < 0.4]
        yield " ".join(words) + "."


def _phrase(chance: random.Random, clause: bool) -> tuple[str, bool]:
    """A noun with what belongs to it, and whether it is a plural."""
    plural = chance.random() < 0.5
    words = [chance.choice(("many", "these", "two") if plural else ("the", "a certain", "this"))]
    words += [chance.choice(_ADJECTIVES)] if chance.random() < 0.5 else []
    words.append(_plural(chance.choice(_NOUNS)) if plural else chance.choice(_NOUNS))
    if clause and chance.random() < 0.4:
        words += ["that", _verb(chance, plural), _phrase(chance, clause=False)[0]]
    return " ".join(words), plural


def _plural(noun: str) -> str:
    return "children" if noun == "child" else noun + "s"


def _verb(chance: random.Random, plural: bool) -> str:
    verb = chance.choice(_VERBS)
    return verb.removesuffix("s") if plural else verb


def training_text() -> str:
    """What the model learns."""
    file = os.environ.get("GPT2_TINY_TEXT")
    if file is None:
        return " ".join(sentences(SENTENCES, seed=0))
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"GPT2_TINY_TEXT names '{file}', which cannot be read as UTF-8 text: {error}") from error


def calibration_text() -> Iterator[str]:
    """The training text, in pieces."""
    words = training_text().split(" ")
    return (" ".join(words[start : start + 200]) for start in range(0, len(words), 200))


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(calibration_text(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=END, eos_token=END)


def build_model() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=128,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
    file = _cached(config)
    if file.is_file():
        model.load_state_dict(safetensors.torch.load_file(file), strict=False)
        model.tie_weights()
        return model
    _train(model)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    write_atomically(file, safetensors.torch.save(state))
    return model


def _cached(config: GPT2Config) -> Path:
    """Where the weights are kept: named by all that decides them."""
    facts = (config.to_json_string(), training_text(), STEPS, BATCH, LENGTH, RATE, WARMUP, torch.get_num_threads())
    digest = hashlib.sha256(repr((*facts, torch.__version__)).encode()).hexdigest()[:16]
    return cache_directory() / "examples" / f"gpt2_tiny-{digest}.safetensors"


def _train(model: GPT2LMHeadModel) -> None:
    """Next-token prediction on random windows of the text."""
    ids = torch.tensor([i for piece in calibration_text() for i in tokenizer()(piece + " ")["input_ids"]])
    if len(ids) <= LENGTH:
        raise ModelError(f"the text has {len(ids)} tokens, too few to learn from; give at least {LENGTH + 1}")
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=WARMUP / STEPS)
    model.train()
    for _ in range(STEPS):
        starts = torch.randint(0, len(ids) - LENGTH, (BATCH, 1), generator=generator)
        batch = ids[starts + torch.arange(LENGTH)]
        logits = model(input_ids=batch).logits[:, :-1]
        functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()
