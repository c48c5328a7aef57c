"""What descriptions of passes show under Given and Result is what the passes do."""

from __future__ import annotations

import importlib
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from graphs import normal, rewrites, token_inputs, with_values
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.annotate import LINEAR, LinearInfo
from lbllm_compile.passes.base import Pass, PassContext, PassResult
from lbllm_compile.passes.ir import dump
from lbllm_compile.passes.ir.convolution import cache_convolutions
from lbllm_compile.passes.ir.parse import parse
from lbllm_compile.passes.ir.program import Program
from lbllm_compile.passes.ir.rewrite import LINEARS, calls, operands_of
from rtn import planes
from torch import Tensor
from transformers.integrations import moe as moe  # registers its operators

from lbllm_compile import passes


@dataclass(frozen=True)
class Setting:
    """What snippets leave out.

    Attributes:
        around: lines that say what the names are that the snippets use and do not define.
        behind: lines that compute what the program gives from what the snippets give.
        inputs: of the program.
        item: the pass, where it is not the one with default options.
        weights: values of weights, by path.
        original: lines in place of ``around`` and the snippet for the float program, which trainings imitate.
        kind: of the program.
    """

    around: str
    inputs: dict[str, Tensor]
    item: str = ""
    weights: dict[str, Tensor] = field(default_factory=dict)
    original: str = ""
    behind: str = ""
    kind: str = "module"


def matrix(path: str, rows: int, columns: int, group: int, prefix: str = "") -> str:
    """The lines of a quantized weight's tensors; their names begin with ``prefix``."""
    width, groups = -(-columns // 8), -(-columns // group)
    return f"""
        %{prefix}sign: u8[{rows}, {width}] = weight {path}.weight.sign
        %{prefix}bitmap: u8[{rows}, {width}] = weight {path}.weight.bitmap
        %{prefix}levels: i8[{rows}, {groups}, 4] = weight {path}.weight.levels
        %{prefix}scale: f16[{rows}, {groups}] = weight {path}.weight.scale
    """


Q = "model.layers.0.self_attn.q_proj"
PLANES = planes(f"{Q}.weight", normal(64, 576), 64)
X = {"x": normal(2, 6, 576, seed=1)}

QUERY = {"query": normal(2, 2, 6, 16, seed=3)}
HEADS = normal(2, 6, 2, 16, seed=4)

TRAINED = f"""
    %x = input x
    decoder layer 0:
    {matrix(Q, 64, 576, 64)}
"""
ORIGINAL = f"""
    %x = input x
    decoder layer 0:
    %w: f32[64, 576] = weight {Q}.weight
    %q = aten.linear(%x, %w)
"""

SETTINGS = {
    "canonicalize": Setting(
        """
        %x = input x
        %h = input h
        %offsets = input offsets
        %bias: f32[3072] = weight transformer.h.0.mlp.c_fc.bias
        """,
        {"x": normal(2, 768), "h": normal(6, 96), "offsets": torch.tensor([1, 1, 4, 6], dtype=torch.int32)},
    ),
    "ir.attention": Setting(
        """
        %q = input q
        %k = input k
        %v = input v
        %mask = input mask
        """,
        {**{name: normal(2, 3, 6, 16, seed=seed) for seed, name in enumerate("qkv")}, "mask": normal(2, 1, 6, 6)},
        "canonicalize",
        kind="causal-lm",
    ),
    "annotate": Setting(
        """
        %x = input input_ids
        %up_weight: f32[8, 8] = weight model.layers.0.mlp.up_proj.weight
        %head_weight: f32[9, 8] = weight lm_head.weight
        """,
        {"input_ids": normal(2, 3, 8)},
        kind="causal-lm",
    ),
    "smooth": Setting(
        f"""
        %x = input x
        %heads = input heads
        %query = input query
        %value = input value
        decoder layer 0:
        %norm_weight: f32[576] = weight model.layers.0.norm.weight
        %q_weight: f32[8, 576] = weight {Q}.weight
        """,
        X | QUERY | {"heads": HEADS, "value": QUERY["query"] + 1},
        kind="causal-lm",
    ),
    "budget": Setting(
        f"""
        %x = input x
        decoder layer 0:
        %w: f32[64, 576] = weight {Q}.weight
        """,
        X,
        "budget{bits=2.5}",
    ),
    "outliers": Setting(
        f"""
        %x = input x
        %y = input y
        decoder layer 0:
        %q_weight: f32[8, 576] = weight {Q}.weight
        %gate_weight: f32[576, 24] = weight model.layers.0.mlp.gate_proj.weight
        %up_weight: f32[576, 24] = weight model.layers.0.mlp.up_proj.weight
        %d_weight: f32[8, 576] = weight model.layers.0.mlp.down_proj.weight
        %gate = aten.linear(%y, %gate_weight)
        %up = aten.linear(%y, %up_weight)
        """,
        X | {"y": normal(2, 6, 24, seed=2)},
    ),
    "observe": Setting(
        f"""
        %x = input x
        %q_weight: f32[64, 576] = weight {Q}.weight
        %k_weight: f32[32, 576] = weight model.layers.0.self_attn.k_proj.weight
        """,
        X,
    ),
    "ptq": Setting(
        f"""
        %x = input x
        decoder layer 0:
        %q_weight: f32[64, 576] = weight {Q}.weight
        """,
        X,
        "ptq{group=64}",
    ),
    "distill": Setting(TRAINED, X, "distill{epochs=1}", PLANES, ORIGINAL),
    "activate": Setting(
        f"""
        %x = input x
        %key_heads = input keys
        %value_heads = input values
        %query = input query
        decoder layer 0:
        {matrix(Q, 64, 576, 64)}
        %q_weight = lbllm.unpack_weight(%sign, %bitmap, %levels, %scale, 576, 64)
        """,
        X | QUERY | {"keys": HEADS, "values": HEADS + 1},
        "activate{steps=0}",
        PLANES,
        f"""
        %x = input x
        %key_heads = input keys
        %value_heads = input values
        %query = input query
        decoder layer 0:
        %w: f32[64, 576] = weight {Q}.weight
        %q = aten.linear(%x, %w)
        %key = aten.transpose.int(%key_heads, 1, 2)
        %value = aten.transpose.int(%value_heads, 1, 2)
        %out = aten.scaled_dot_product_attention(%query, %key, %value)
        """,
        kind="causal-lm",
    ),
    "finetune": Setting(TRAINED, X, "finetune{steps=1}", PLANES, ORIGINAL),
    "head": Setting(
        """
        %input_ids = input input_ids
        %embed_weight: f32[100, 576] = weight model.embed_tokens.weight
        """,
        {"input_ids": torch.tensor([[1, 99, 7]])},
        kind="causal-lm",
    ),
    "merge": Setting(
        f"""
        %x = input x
        %clip: f32[2] = weight q.input_clip
        %xq = lbllm.fake_quantize(%x, %clip, 4, 32)
        {matrix("q", 64, 64, 32, "q_")}
        {matrix("k", 32, 64, 32, "k_")}
        """,
        {"x": normal(2, 64)},
        weights={
            "q.input_clip": torch.ones(2),
            **planes("q.weight", normal(64, 64), 32),
            **planes("k.weight", normal(32, 64, seed=1), 32),
        },
    ),
    "lower": Setting(
        f"""
        %x = input x
        {matrix(Q, 64, 576, 64)}
        %bias: f32[64] = weight {Q}.bias
        %clip: f32[2] = weight {Q}.input_clip
        """,
        X,
        weights=PLANES | {f"{Q}.input_clip": torch.ones(2)},
    ),
    "cache": Setting(
        """
        %ids = input input_ids
        %attention_mask = input attention_mask
        %batch = aten.sym_size.int(%ids, 0)
        %length = aten.sym_size.int(%ids, 1)
        %slots = aten.arange(%length)
        %queries = aten.unsqueeze(%slots, 1)
        %causal = aten.le.Tensor(%slots, %queries)
        %columns = aten.unsqueeze(%attention_mask, 1)
        %rows = aten.unsqueeze(%columns, 1)
        %attended = aten.to.dtype(%rows, torch.bool)
        %embed_weight: f32[11, 128] = weight embed.weight
        %x = aten.embedding(%embed_weight, %ids)
        %heads = aten.view(%x, [%batch, %length, 2, 64])
        %q = aten.transpose.int(%heads, 1, 2)
        %k = aten.neg(%q)
        %v = aten.relu(%q)
        """,
        {name: value for name, value in token_inputs().items() if name != "position_ids"},
        behind="""
        %swapped = aten.transpose.int(%y, 1, 2)
        %logits = aten.reshape(%swapped, [%batch, %length, 128])
        """,
        kind="causal-lm",
    ),
    "ir.convolution": Setting(
        """
        %x = input x
        %tokens = aten.sym_size.int(%x, 2)
        %w: f32[72, 1, 3] = weight conv.weight
        %b: f32[72] = weight conv.bias
        """,
        {"x": normal(2, 72, 6)},
    ),
    "cleanup": Setting("%x = input x", X),
}


class CacheConvolutions(Pass):
    """What ``cache`` does behind all else."""

    name = "cache-convolutions"

    def apply(self, program: Program, context: PassContext) -> PassResult:
        program = program.copy()
        shapes = {n: n.meta["val"].shape for n in program.graph.nodes if isinstance(n.meta.get("val"), Tensor)}
        assert cache_convolutions(program.graph, shapes, 6) == 1
        program.graph.eliminate_dead_code()
        return PassResult(program)


_WORDS = [re.compile(rf"^{word}::\n\n((?: {{4}}.*\n|\n)+)", re.MULTILINE) for word in ("Given", "Result")]


def snippets(module: str) -> list[str]:
    """What stands indented under ``Given::`` and ``Result::`` in the description of a module below ``passes``."""
    text = importlib.import_module(f"lbllm_compile.passes.{module}").__doc__ or ""
    return [textwrap.dedent(match[1]) for word in _WORDS if (match := word.search(text))]


def lines_of(text: str) -> list[str]:
    """The lines of a dump, those put together that go on."""
    return [line.strip() for line in re.sub(r"([,({\[])\n\s*", r"\1 ", text).splitlines() if line.strip()]


def whole(setting: Setting, around: str, shown: Sequence[str], results: Sequence[str]) -> Program:
    """A snippet as a program: in its surroundings, of which what nothing reads is left out, and inputs first."""
    returned = ", ".join(f"%{name}" for name in results)
    kept = [*shown, f"return {returned}" if len(results) == 1 else f"return ({returned})"]
    for line in reversed(lines_of(around)):
        made = re.match(r"%\w+", line)
        if not made or " = input " in line or re.search(rf"{made[0]}\b", "\n".join(kept)):
            kept.insert(0, line)
    kept.sort(key=lambda line: not re.search(r" = (input|state) ", line))
    return parse("\n".join(kept), setting.weights, setting.kind)


def results_of(lines: Sequence[str]) -> list[str]:
    """The names that no line reads."""
    text = "\n".join(lines)
    names = re.findall(r"^%(\w+)", text, re.MULTILINE)
    return [name for name in names if len(re.findall(rf"%{name}\b", text)) == 1]


def annotated(program: Program) -> Program:
    """The program, with what ``annotate`` would have noted on its linears."""
    for node in calls(program.graph, *LINEARS):
        weight = operands_of(node)[1]
        path = str(next(n for n in (weight, *weight.all_input_nodes) if n.op == "get_attr").target)
        path = path.partition(".weight")[0].replace("model.embed_tokens", "lm_head")
        role = "head" if path == "lm_head" else "decoder"
        node.meta[LINEAR] = LinearInfo(path, f"{path}.weight", None if role == "head" else 0, role, 0, "")
    return program


def test_no_description_shows_graphs_that_are_not_run():
    folder = Path(passes.__file__).parent
    files = [path.relative_to(folder).with_suffix("") for path in folder.rglob("*.py") if path.stem != "__init__"]
    assert {name for name in (".".join(f.parts) for f in files) if len(snippets(name)) == 2} == {*SETTINGS}


@pytest.mark.parametrize("module", SETTINGS)
def test_a_pass_makes_the_result_that_its_description_shows(module):
    setting = SETTINGS[module]
    before, after = (lines_of(f"{text}\n{setting.behind}") for text in snippets(module))
    results = results_of(after)
    given, result = (whole(setting, setting.around, shown, results) for shown in (before, after))
    if module == "ir.convolution":
        rewrites(CacheConvolutions(), with_values(given, setting.inputs), dump.render(result))
        return
    if module not in ("canonicalize", "annotate"):
        annotated(given)
    context = PassContext(calibration=[setting.inputs], validation=[setting.inputs], probe=setting.inputs)
    if setting.original:
        context.teacher = annotated(whole(setting, setting.original, (), results))
    (item,) = pipeline.parse(setting.item or module)
    rewrites(item, given, dump.render(result), context)
