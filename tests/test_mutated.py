"""Nothing that a damaged or crafted artifact holds does harm: it is refused in a sentence, or gives its graph's answer.

What is tried, and what counts as wrong, is in :mod:`mutations`. Artifacts are read and run in processes of their own,
on bounded memory, which may crash and hang there.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mutations
import pytest
import torch
from lbllm_compile.codegen.errors import KernelError
from reference_kernels import ReferenceKernels
from safetensors.torch import load_file, save_file

from lbllm_compile import artifact
from lbllm_compile.artifact import ArtifactError
from lbllm_compile.runtime import CompiledModel

ROOT = Path(__file__).resolve().parent.parent

PARTS, COUNT = 10, 1_000
"""Long tests, and mutations of each."""

SHORT = 200
"""Mutations of the short test."""

SEED = 1_000_000
"""The first of the long tests'; the short one begins at 0."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("artifacts")
    mutations.make(directory)
    return directory


def start(base: Path, first: int, last: int) -> subprocess.Popen[str]:
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "mutations.py"), str(base), str(first), str(last)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "LBLLM_CACHE_DIR": str(base / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def outcomes(base: Path, first: int, last: int) -> Iterator[dict[str, Any]]:
    """What became of the mutations of some seeds. One that ends its process is wrong, and another process goes on."""
    while first < last:
        child, begun = start(base, first, last), None
        with child:
            assert child.stdout is not None
            for line in child.stdout:
                said = json.loads(line)
                begun = said["seed"]
                if "verdict" in said:
                    yield said
                    first = begun + 1
        if child.returncode:
            assert begun == first, f"seed {first}: the process ended with {child.returncode} before it began"
            text = f"the process ended with {child.returncode}"
            yield {"seed": first, **dataclasses.asdict(mutations.Outcome("wrong", text))}
            first += 1


def none_is_wrong(found: list[dict[str, Any]]) -> None:
    wrong = [f"{said['seed']}: {said['text']}" for said in found if said["verdict"] == "wrong"]
    assert not wrong, "\n".join([f"{len(wrong)} of {len(found)}; python tests/mutations.py SEED repeats one", *wrong])


# What was found this way


Nodes = list[dict[str, Any]]
"""The nodes of a stored graph."""


def node(nodes: Nodes, target: str) -> dict[str, Any]:
    """The first call of an operator, or the first input or weight of a name."""
    return next(n for n in nodes if n["target"] == target)


def put(nodes: Nodes, target: str, args: list[Any], before: dict[str, Any]) -> dict[str, Any]:
    """A new call in front of a node; returns what refers to it."""
    name = f"new_{len(nodes)}"
    nodes.insert(nodes.index(before), {"name": name, "op": "call_function", "target": target, "args": args})
    return {"node": name}


def gelu_of_a_number(nodes: Nodes) -> None:
    node(nodes, "aten.gelu.default")["args"] = [3]


def no_shape(nodes: Nodes) -> None:
    del node(nodes, "x")["meta"]


def huge_input(nodes: Nodes) -> None:
    node(nodes, "x")["meta"]["shape"] = "f32[16777216, 16777216]"


def state_of_a_module(nodes: Nodes) -> None:
    node(nodes, "x")["meta"]["state"] = {"heads": 1, "tail": [259], "dtype": "float32", "kind": "fixed"}


def a_list(nodes: Nodes) -> None:
    nodes[-1]["args"] = [[nodes[-1]["args"][0]]]


def computed_planes(nodes: Nodes) -> None:
    linear = node(nodes, "lbllm.bit_linear.default")
    linear["args"][2] = put(nodes, "aten.bitwise_not.default", [linear["args"][2]], linear)


def planes_that_are_none(nodes: Nodes) -> None:
    sign = node(nodes, "lbllm.bit_linear.default")["args"][2]["node"]
    next(n for n in nodes if n["name"] == sign)["args"][0] = 3


def computed_codes(nodes: Nodes) -> None:
    linear = node(nodes, "lbllm.int4_linear.default")
    linear["args"][2] = put(nodes, "aten.bitwise_not.default", [linear["args"][2]], linear)


def two_tables(nodes: Nodes) -> None:
    linear = node(nodes, "lbllm.int4_linear.default")
    linear["args"][3] = put(nodes, "aten.cat.default", [[linear["args"][3]] * 2], linear)


def one_scale(nodes: Nodes) -> None:
    scales = node(nodes, "lbllm.int4_linear.default")["args"][4]["node"]
    del next(n for n in nodes if n["name"] == scales)["args"][0][1:]


def planes_in_the_scheme(nodes: Nodes) -> None:
    node(nodes, "lbllm.int4_linear.default")["meta"]["linear"]["scheme"]["bits"] = 2


def codes_in_the_scheme(nodes: Nodes) -> None:
    node(nodes, "lbllm.bit_linear.default")["meta"]["linear"]["scheme"]["bits"] = 4


def other_width(nodes: Nodes) -> None:
    node(nodes, "lbllm.quantize_activation.default")["meta"]["in_features"] += 1


def no_width(nodes: Nodes) -> None:
    del node(nodes, "lbllm.bit_linear.default")["meta"]["in_features"]


def narrow_state(nodes: Nodes) -> None:
    node(nodes, "kv_0_key_codes")["meta"]["state"]["tail"] = [3]


def huge_state(nodes: Nodes) -> None:
    node(nodes, "kv_0_key_codes")["meta"]["state"]["tail"] = [1 << 24, 1 << 24]


def copied_state(nodes: Nodes) -> None:
    nodes[-1]["args"] = [put(nodes, "aten.to.dtype", [{"node": "kv_0_key_codes"}, {"dtype": "float32"}], nodes[-1])]


def no_past(nodes: Nodes) -> None:
    node(nodes, "lbllm.cached_attention.default")["args"][8] = 0


def cleared_weight(nodes: Nodes) -> None:
    weight = node(nodes, "model.norm.weight")
    view = put(nodes, "aten.view.default", [{"node": weight["name"]}, [-1]], nodes[-1])
    put(nodes, "aten.zero_.default", [view], nodes[-1])


def cleared_input(nodes: Nodes) -> None:
    put(nodes, "aten.zero_.default", [{"node": "input_ids"}], node(nodes, "lbllm.int8_embedding.default"))


def dropout(nodes: Nodes) -> None:
    nodes[-1]["args"] = [put(nodes, "aten.dropout.default", [nodes[-1]["args"][0], 0.5, True], nodes[-1])]


def much_of_nothing(nodes: Nodes) -> None:
    much = put(nodes, "aten.zeros.default", [[1 << 34]], nodes[-1])
    first = put(nodes, "aten.select.int", [much, 0, 0], nodes[-1])
    nodes[-1]["args"] = [put(nodes, "aten.add.Tensor", [nodes[-1]["args"][0], first], nodes[-1])]


def endless_integer(nodes: Nodes) -> None:
    size = put(nodes, "aten.sym_size.int", [{"node": "input_ids"}, 1], nodes[-1])
    for _ in range(60):
        size = put(nodes, "operator.mul", [size, size], nodes[-1])


def one_input_twice(nodes: Nodes) -> None:
    nodes.insert(0, {"name": "again", "op": "placeholder", "target": "input_ids"})


def foreign_input(nodes: Nodes) -> None:
    nodes.insert(0, {"name": "images", "op": "placeholder", "target": "images"})


def hidden_instead_of_logits(nodes: Nodes) -> None:
    nodes[-1]["args"] = [{"node": "input_ids"}]


CRAFTED: dict[str, tuple[str, Callable[[Nodes], None], str]] = {
    "an operator of a module on a number": ("mlp", gelu_of_a_number, "does not run at 'gelu"),
    "an input of no shape": ("mlp", no_shape, "does not say the dtype and shape of its input 'x'"),
    "a huge input": ("mlp", huge_input, "input 'x' has .* elements, which is too many"),
    "a module with a state": ("mlp", state_of_a_module, "graph of a module has the state 'x'"),
    "a list": ("mlp", a_list, "something else than one tensor"),
    "planes that are computed": ("uncached", computed_planes, "weights of 'bit_linear.* are not stored matrices"),
    "codes that are computed": ("codes", computed_codes, "weights of 'int4_linear.* are not stored matrices"),
    "a table for each of merged codes": ("codes", two_tables, "weights of 'int4_linear.* are not stored matrices"),
    "fewer scales than merged codes": ("codes", one_scale, "weights of 'int4_linear.* are not stored matrices"),
    "codes that pass for planes": ("codes", planes_in_the_scheme, "has 4 as bits, and 2 in its scheme"),
    "planes that pass for codes": ("codes", codes_in_the_scheme, "has None as bits, and 4 in its scheme"),
    "planes that are a number": ("llama", planes_that_are_none, "weights of 'bit_linear.* are not stored matrices"),
    "an input of another width": ("uncached", other_width, "its input has 40 channels, not 41"),
    "an input of no width": ("uncached", no_width, "does not say how many columns its weight has"),
    "a state that is too narrow": ("llama", narrow_state, "key_codes has the shape"),
    "a huge state": ("llama", huge_state, "key_codes has the shape"),
    "a state that is given out": ("llama", copied_state, "'kv_0_key_codes' is read by what does not keep it"),
    "tokens that are forgotten": ("llama", no_past, r"key_mask is not \[2, 3\]"),
    "a weight that is cleared": ("llama", cleared_weight, "self, which it changes, is an input or a weight"),
    "an input that is cleared": ("llama", cleared_input, "self, which it changes, is an input or a weight"),
    "values dropped out": ("llama", dropout, "drops values out at random"),
    "gigabytes of zeros": ("llama", much_of_nothing, "the graph makes .* MiB of tensors"),
    "integers without end": ("llama", endless_integer, "gives an integer of more than 64 bits"),
    "an input that is not text": ("llama", foreign_input, "input 'images', which no language model has"),
    "one input twice": ("llama", one_input_twice, "the input 'input_ids' twice"),
    "no logits": ("llama", hidden_instead_of_logits, "something else than logits"),
}


def crafted(base: Path, directory: Path, model: str, change: Callable[[Nodes], None]) -> Path:
    """A copy of an artifact with a changed graph, which its manifest fits."""
    shutil.copytree(base / model, directory)
    document = json.loads((directory / "graph.json").read_bytes())
    change(document["nodes"])
    (directory / "graph.json").write_text(json.dumps(document))
    mutations.fit(directory)
    return directory


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_graph_is_refused_before_it_runs(base, tmp_path, name):
    model, change, message = CRAFTED[name]
    directory = crafted(base, tmp_path / "crafted", model, change)
    with pytest.raises(ArtifactError, match=message) as raised:
        artifact.load(directory)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("k_proj.weight.code_scale", lambda t: t.fill_(torch.inf), "k_proj.weight: a group scale is NaN or infinite"),
        ("q_proj.weight.table", lambda t: t.flip(0), "q_proj.weight: the levels of the table are not sorted"),
        ("q_proj.weight.table", lambda t: t[:-1], "q_proj.weight.table is torch.int8 .*, the format needs"),
        ("down_proj.weight.codes", lambda t: t[:, :-1], "down_proj.weight.codes is torch.uint8 .*, the format needs"),
    ],
)
def test_damaged_codes_of_a_layer_are_refused(base, tmp_path, part, change, message):
    directory = tmp_path / "damaged"
    shutil.copytree(base / "codes", directory)
    weights = load_file(directory / "model.safetensors")
    (path,) = (path for path in weights if path.endswith(part))
    weights[path] = change(weights[path]).contiguous()
    save_file(weights, directory / "model.safetensors")
    mutations.fit(directory)
    with pytest.raises(ArtifactError, match=message) as raised:
        artifact.load(directory)
    assert "\n" not in str(raised.value)


def test_scales_of_another_activation_are_refused(base, tmp_path):
    def swapped(nodes):
        first, *_, last = (n for n in nodes if n["target"] == "lbllm.bit_linear.default")
        last["args"][1] = first["args"][1]

    directory = crafted(base, tmp_path / "crafted", "mlp", swapped)
    with pytest.raises(KernelError, match="does not read the values and scales of"):
        CompiledModel(artifact.load(directory).program, ReferenceKernels())


def test_what_only_fits_one_length_is_one_sentence(base, tmp_path):
    size = [2, 3, mutations.VOCABULARY]

    def three_tokens(nodes):
        nodes[-1]["args"] = [put(nodes, "aten.expand.default", [nodes[-1]["args"][0], size], nodes[-1])]

    with pytest.raises(ArtifactError, match=r"the graph does not run at .*expanded size"):
        artifact.load(crafted(base, tmp_path / "crafted", "llama", three_tokens))

    program = artifact.load(base / "llama").program
    output = program.graph.output_node()
    with program.graph.inserting_before(output):
        output.args = (program.graph.call_function(torch.ops.aten.expand.default, (output.args[0], size)),)
    program.module.recompile()
    model = CompiledModel(program, ReferenceKernels())
    assert model.logits(torch.zeros((2, 3), dtype=torch.int64)).shape == (2, 3, mutations.VOCABULARY)
    with pytest.raises(KernelError, match=r"does not run on these inputs: .*expanded size"):
        model.logits(torch.zeros((2, 5), dtype=torch.int64))


def test_no_graph_reads_what_nobody_has_written(base, tmp_path):
    def unwritten(nodes):
        given = nodes[-1]["args"][0]
        for target, args in (("aten.empty_like.default", []), ("aten.new_empty.default", [[1]])):
            given = put(nodes, "aten.add.Tensor", [given, put(nodes, target, [given, *args], nodes[-1])], nodes[-1])
        nodes[-1]["args"] = [given]

    program = artifact.load(crafted(base, tmp_path / "crafted", "mlp", unwritten)).program
    inputs = mutations.inputs_of(program)
    assert torch.equal(program.run(inputs), artifact.load(base / "mlp").program.run(inputs))


def test_settings_of_a_tokenizer_that_cannot_be_are_one_sentence(base, tmp_path):
    directory = tmp_path / "crafted"
    shutil.copytree(base / "llama", directory)
    settings = json.loads((directory / "tokenizer_config.json").read_bytes())
    (directory / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": {}}))
    mutations.fit(directory)
    with pytest.raises(ArtifactError, match=r"the tokenizer in .* cannot be read"):
        artifact.load(directory)


# By the thousand


def test_no_mutation_does_harm(base):
    found = list(outcomes(base, 0, SHORT))
    none_is_wrong(found)
    counts = collections.Counter(said["verdict"] for said in found)
    # Neither is everything refused nor is what is changed without effect.
    assert sum(counts.values()) == SHORT and min(counts[v] for v in ("refused", "same", "other")) > SHORT // 50
    assert any(said["natively"] == "run" for said in found)


@pytest.mark.slow
@pytest.mark.timeout(1790)
@pytest.mark.parametrize("part", range(PARTS))
def test_none_of_many_mutations_does_harm(base, part, capsys):
    begin, first = time.monotonic(), SEED + part * COUNT
    found = list(outcomes(base, first, first + COUNT))
    seconds, natively = time.monotonic() - begin, collections.Counter(said["natively"] for said in found)
    with capsys.disabled():
        print(f"\n{COUNT} mutations in {seconds:.0f} s, {COUNT / seconds:.1f} a second; natively {dict(natively)}")
    none_is_wrong(found)
    assert len(found) == COUNT and natively["run"]
