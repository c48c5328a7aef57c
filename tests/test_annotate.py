"""Canonicalize, cleanup and annotate on small graphs: before and expected."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import transformers
import zoo
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.annotate import LAYER, Annotate, LinearInfo, layer_count, linears, matrix_count
from lbllm_compile.passes.base import PassContext, PassError
from lbllm_compile.passes.canonicalize import Canonicalize
from lbllm_compile.passes.cleanup import Cleanup
from lbllm_compile.passes.ir.program import Program, get_attribute
from torch import Tensor, nn

from lbllm_compile import frontend
from lbllm_compile.frontend import UserModel

ops = torch.ops.aten


def program_of(module: nn.Module, **inputs: Tensor) -> Program:
    with torch.random.fork_rng(devices=[]):
        return frontend.capture(frontend.prepare(UserModel(module, "module", "test", "test", inputs=inputs)))


def run(text: str, program: Program, **inputs: Tensor) -> Program:
    return pipeline.run(program, pipeline.parse(text), PassContext(probe=inputs))[0]


def calls(program: Program) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


_GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    """Random values, others at every call."""
    return torch.randn(shape, generator=_GENERATOR)


class Product(nn.Module):
    """One matrix product with the parameter ``w``."""

    def __init__(self, shape: tuple[int, ...], product: Callable[[nn.Module, Tensor], Tensor]):
        super().__init__()
        self.w = nn.Parameter(normal(*shape))
        self.b = nn.Parameter(normal(shape[-1]))
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self, x)


PRODUCTS = {
    "mm": (lambda m, x: torch.mm(x, m.w), (6, 5), True),
    "mm, transposed": (lambda m, x: torch.mm(x, m.w.t()), (5, 6), False),
    "mm, permuted": (lambda m, x: x @ m.w.permute(1, 0), (5, 6), False),
    "matmul": (lambda m, x: x.unsqueeze(1) @ m.w, (6, 5), True),
    "addmm": (lambda m, x: torch.addmm(m.b, x, m.w), (6, 5), True),
    "addmm, transposed": (lambda m, x: torch.addmm(m.b[:1], x, m.w.mT), (5, 6), False),
    "weight on the left": (lambda m, x: torch.mm(m.w, x.t()), (5, 6), False),
    "linear": (lambda m, x: nn.functional.linear(x, m.w), (5, 6), False),
}


@pytest.mark.parametrize(("product", "shape", "stored_transposed"), PRODUCTS.values(), ids=PRODUCTS)
def test_every_product_with_a_weight_is_a_linear(
    product: Callable[[nn.Module, Tensor], Tensor], shape: tuple[int, int], stored_transposed: bool
) -> None:
    module, x = Product(shape, product), normal(4, 6)
    result = run("canonicalize,annotate", program_of(module, x=x), x=x)
    ((node, info),) = linears(result)
    assert node.target is ops.linear.default and info.weight == "w"
    expected = module.w.T if stored_transposed else module.w
    assert torch.equal(get_attribute(result.module, "w"), expected)


def test_batched_product_is_a_stack_of_experts() -> None:
    module, x = Product((3, 6, 5), lambda m, x: torch.bmm(x.view(3, -1, 6), m.w)), normal(3, 4, 6)
    program = program_of(module, x=x)
    assert "aten.bmm.default" in calls(program)
    result = run("canonicalize,annotate", program, x=x)
    ((node, info),) = linears(result)
    assert str(node.target) == "lbllm.grouped_linear.default"
    assert (info.experts, info.matrices, matrix_count(result)) == (3, 3, 3)
    assert get_attribute(result.module, "w").shape == (3, 5, 6)


def test_a_product_without_a_weight_stays() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) @ x.mT @ x

    x = normal(2, 4, 6)
    result = run("canonicalize,annotate", program_of(Attention(), x=x), x=x)
    assert calls(result).count("aten.matmul.default") == 2
    assert [info.path for _, info in linears(result)] == ["a"]


def test_a_weight_with_other_readers_is_not_turned_under_them() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(normal(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.mm(torch.mm(x, self.w), self.w.t()) * self.w[0]

    module, x = Both(), normal(4, 6)
    result = run("canonicalize,annotate", program_of(module, x=x), x=x)
    assert {info.weight for _, info in linears(result)} == {"w", "w_transposed"}
    assert torch.equal(get_attribute(result.module, "w"), module.w)


class Adapted(nn.Module):
    """A linear with a low-rank adapter that is added to its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.a, self.b = (nn.Parameter(normal(*shape)) for shape in ((5, 6), (5, 2), (2, 6)))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight + self.a @ self.b)


COMPUTED = {
    "weight normalization": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)),
    "adapter": Adapted,
}


@pytest.mark.parametrize("make", COMPUTED.values(), ids=COMPUTED)
def test_a_weight_computed_from_parameters_is_computed_once(make: Callable[[], nn.Module]) -> None:
    module, x = nn.Sequential(make(), nn.ReLU()), normal(4, 6)
    before = program_of(module, input=x)
    result = run("canonicalize,annotate", before, input=x)
    ((_, info),) = linears(result)
    assert info.path == "0" and calls(result) == ["aten.linear.default", "aten.relu.default"]
    assert get_attribute(result.module, info.weight).shape == (5, 6)
    assert torch.equal(result.run({"input": x}), before.run({"input": x}))


class Projections(nn.Module):
    """Three products of one module whose weights share a base."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(6, 6))
        self.adapters = nn.ParameterList(normal(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (nn.functional.linear(x, self.weight + adapter) for adapter in self.adapters)
        return q * k + v @ self.weight[:, :3] @ self.weight[:3]


def test_computed_weights_of_one_module_keep_apart() -> None:
    module, x = nn.Sequential(Projections()), normal(4, 6)
    before = program_of(module, input=x)
    result = run("canonicalize,annotate", before, input=x)
    assert len({info.weight for _, info in linears(result)}) == len(linears(result)) == 5
    torch.testing.assert_close(result.run({"input": x}), before.run({"input": x}))


def test_a_matrix_without_parameters_is_no_weight() -> None:
    class Fourier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            steps = torch.arange(6, dtype=torch.float32)
            return self.a(x) @ torch.cos(torch.outer(steps, steps))

    x = normal(4, 6)
    assert [i.path for _, i in linears(run("canonicalize,annotate", program_of(Fourier(), x=x), x=x))] == ["a"]


def test_blocks_are_inlined_and_no_ops_removed() -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                y = self.a(x.to(torch.float32))
            y = nn.functional.dropout(y[:, :], 0.5, training=False).detach()
            assert y.shape[1] == 6
            return y.float().expand(-1, -1)

    x = normal(4, 6)
    program = program_of(Blocks(), x=x)
    assert len(calls(program)) > 1
    assert calls(run("canonicalize", program, x=x)) == ["aten.linear.default"]


def test_real_autocast_is_refused() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.a(x).float()

    program = program_of(Half(), x=normal(4, 6))
    with pytest.raises(PassError, match="remove the autocast block"):
        Canonicalize().apply(program, PassContext())


def test_conversions_that_change_something_stay() -> None:
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x.to(torch.bfloat16).to(torch.float32))[:, 1:].expand(2, -1, -1)

    x = normal(4, 6)
    result = run("canonicalize", program_of(Narrow(), x=x), x=x)
    conversions = ["aten.to.dtype", "aten.to.dtype"]
    assert calls(result) == [*conversions, "aten.linear.default", "aten.slice.Tensor", "aten.expand.default"]


def test_passes_leave_the_program_they_got() -> None:
    program = program_of(Product((6, 5), lambda m, x: torch.mm(x, m.w)), x=normal(4, 6))
    text, weight = str(program.graph), get_attribute(program.module, "w").clone()
    context = PassContext()
    annotated = Annotate().apply(Canonicalize().apply(program, context).program, context).program
    Cleanup().apply(annotated, context)
    assert str(program.graph) == text
    assert torch.equal(get_attribute(program.module, "w"), weight)
    assert all(LAYER not in node.meta for node in program.graph.nodes)


def test_cleanup_is_idempotent_and_drops_unused_weights() -> None:
    program = zoo.captured("llama")[1].copy()
    linear = next(n for n in program.graph.nodes if n.target is ops.linear.default)
    path = str(linear.args[1].target)
    linear.replace_all_uses_with(linear.args[0])
    program.graph.erase_node(linear)
    once = Cleanup().apply(program, PassContext()).program
    twice = Cleanup().apply(once, PassContext())
    assert path not in dict(once.module.named_buffers())
    assert twice.summary["removed"] == 0 and str(twice.program.graph) == str(once.graph)


# Layers


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    """Three blocks between an entrance and an exit."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(5, 8)
        self.blocks = nn.ModuleList([Block(8) for _ in range(3)])
        self.leave = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.leave(x)


STACK = {
    "enter": (None, "dense"),
    "blocks.0.up": (0, "decoder"),
    "blocks.0.down": (0, "decoder"),
    "blocks.1.up": (1, "decoder"),
    "blocks.1.down": (1, "decoder"),
    "blocks.2.up": (2, "decoder"),
    "blocks.2.down": (2, "decoder"),
    "leave": (None, "head"),
}


def treatment(program: Program) -> dict[str, tuple[int | None, str]]:
    return {info.path: (info.layer, info.role) for _, info in linears(program)}


def test_layers_by_module_path() -> None:
    x = normal(4, 5)
    result = run("canonicalize,annotate", program_of(Stack(), x=x), x=x)
    assert treatment(result) == STACK
    ((_, first),) = [pair for pair in linears(result) if pair[1].path == "blocks.1.up"]
    assert first == LinearInfo("blocks.1.up", "blocks.1.up.weight", 1, "decoder", 0, "in layer 1")
    relu = [n for n in result.graph.nodes if n.target is ops.relu.default]
    assert [n.meta[LAYER] for n in relu] == [0, 1, 2]
    weights = [n for n in result.graph.nodes if n.op == "get_attr" and "blocks.2" in str(n.target)]
    assert {n.meta[LAYER] for n in weights} == {2}


def without_provenance(program: Program) -> Program:
    program = program.copy()
    for node in program.graph.nodes:
        node.meta.pop("nn_module_stack", None)
    return program


def test_layers_by_shape_where_paths_are_missing() -> None:
    x = normal(4, 5)
    result = run("canonicalize,annotate", without_provenance(program_of(Stack(), x=x)), x=x)
    assert treatment(result) == STACK


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "mixtral"])
def test_layers_by_shape_agree_with_paths(name: str) -> None:
    program = zoo.captured(name)[1]
    context = PassContext()
    program = Canonicalize().apply(program, context).program
    by_path = Annotate().apply(program, context).program
    by_shape = Annotate().apply(without_provenance(program), context).program
    assert layer_count(by_shape) == zoo.LAYERS
    assert {i.weight: (i.layer, i.role) for _, i in linears(by_shape)} == {
        i.weight: (i.layer, i.role) for _, i in linears(by_path)
    }


def test_a_module_without_repetition_is_one_layer() -> None:
    module = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    x = normal(4, 5)
    result = run("canonicalize,annotate", program_of(module, input=x), input=x)
    assert treatment(result) == {"0": (0, "decoder"), "2": (0, "decoder"), "4": (0, "decoder")}


class Other(nn.Module):
    """A layer of another class than :class:`Block`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.mix(x))


class Unlike(nn.Module):
    """A language model whose layers are of two classes."""

    def __init__(self, kinds: str) -> None:
        super().__init__()
        self.enter = nn.Linear(5, 8)
        self.layers = nn.ModuleList([Block(8) if kind == "b" else Other(8) for kind in kinds])
        self.head = nn.Linear(8, 9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x)
        return torch.tanh(self.head(x))


class Parts(nn.Module):
    """The same, with head and all in a list of parts."""

    def __init__(self, kinds: str) -> None:
        super().__init__()
        stack = nn.Sequential(*(Block(8) if kind == "b" else Other(8) for kind in kinds))
        self.parts = nn.ModuleList([nn.Sequential(nn.LayerNorm(8)), stack, nn.Sequential(nn.Linear(8, 9))])

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


class Listed(nn.Module):
    """Entrance, layers and head in one list."""

    def __init__(self, kinds: str) -> None:
        super().__init__()
        layers = (Block(8) if kind == "b" else Other(8) for kind in kinds)
        self.h = nn.ModuleList([*layers, nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 9))])

    def forward(self, x: Tensor) -> Tensor:
        for part in self.h:
            x = part(x)
        return x


def as_language_model(module: nn.Module, x: Tensor) -> dict[str, tuple[int | None, str]]:
    program = dataclasses.replace(program_of(module, x=x), kind="causal-lm")
    program = Canonicalize().apply(program, PassContext()).program
    return treatment(Annotate().apply(program, PassContext()).program)


@pytest.mark.parametrize("kinds", ["bob", "bbo", "ob", "b", "bbb"])
@pytest.mark.parametrize(
    ("model", "width", "layers", "head"),
    [(Unlike, 5, "layers.", "head"), (Parts, 8, "parts.1.", "parts.2.0"), (Listed, 8, "h.", "h.{}.1")],
)
def test_layers_of_a_language_model_may_be_unlike(
    model: type[nn.Module], width: int, layers: str, head: str, kinds: str
) -> None:
    found = as_language_model(model(kinds), normal(4, width))
    assert found.pop(head.format(len(kinds))) == (None, "head")
    for index, kind in enumerate(kinds):
        for name in ("up", "down") if kind == "b" else ("mix",):
            assert found.pop(f"{layers}{index}.{name}") == (index, "decoder")
    assert all(rest == (None, "dense") for rest in found.values())


def test_a_language_model_without_repetition_keeps_its_head() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(5, 8), nn.Linear(8, 9)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.body(x)))

    assert as_language_model(Plain(), normal(4, 5)) == {"body": (0, "decoder"), "head": (None, "head")}


def test_routers_stay_dense() -> None:
    program = zoo.captured("mixtral")[1]
    context = PassContext()
    result = Annotate().apply(Canonicalize().apply(program, context).program, context).program
    dense = [info for _, info in linears(result) if info.role == "dense"]
    assert [info.path for info in dense] == [f"model.layers.{i}.mlp.gate" for i in range(zoo.LAYERS)]
    assert {info.reason for info in dense} == {"routes tokens to experts"}
    assert {info.experts for _, info in linears(result)} == {0, 4}


def test_a_classifier_is_no_router() -> None:
    class Classifier(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(-1).float()

    x = normal(4, 5)
    result = run("canonicalize,annotate", program_of(Classifier(Block(5), nn.Linear(5, 3)), x=x), x=x)
    assert {info.role for _, info in linears(result)} == {"decoder"}


def test_an_entrance_is_no_head() -> None:
    class Open(Stack):
        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x)
            for block in self.blocks:
                x = block(x)
            return x.tanh()

    x = normal(4, 5)
    result = run("canonicalize,annotate", program_of(Open(), x=x), x=x)
    assert treatment(result)["enter"] == (None, "dense")


# keep_dense


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        ("blocks.1.up", ["blocks.1.up"]),
        ("blocks.1", ["blocks.1.up", "blocks.1.down"]),
        ("*.down", ["blocks.0.down", "blocks.1.down", "blocks.2.down"]),
        ("leave|blocks.[02].up", ["blocks.0.up", "blocks.2.up", "leave"]),
    ],
)
def test_keep_dense(pattern: str, kept: list[str]) -> None:
    x = normal(4, 5)
    result = run(f'canonicalize,annotate{{keep_dense="{pattern}"}}', program_of(Stack(), x=x), x=x)
    found = {info.path: info for _, info in linears(result)}
    assert [path for path, info in found.items() if info.reason.startswith("kept by")] == kept
    assert all(found[path].role == "dense" for path in kept)
    assert {path: found[path].role for path in STACK if path not in kept} == {
        path: role for path, (_, role) in STACK.items() if path not in kept
    }


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    program = program_of(Stack(), x=normal(4, 5))
    with pytest.raises(PassError, match=r"'blocks\.1\.upp' matches no linear; did you mean 'blocks\.1\.up'\?"):
        Annotate(keep_dense=("blocks.1.upp",)).apply(program, PassContext())


def test_a_graph_without_linears_is_refused() -> None:
    module = nn.Sequential(nn.Conv1d(2, 2, 3))
    program = program_of(module, input=normal(4, 2, 9))
    with pytest.raises(PassError, match="has no linear layer"):
        Annotate().apply(program, PassContext())


def test_conv1d_of_transformers() -> None:
    module = transformers.pytorch_utils.Conv1D(5, 6)
    module.weight.data = normal(6, 5)
    x = normal(4, 6)
    before = module.weight.detach().clone()
    result = run("canonicalize,annotate", program_of(module, x=x), x=x)
    ((node, info),) = linears(result)
    assert info.path == "" and info.weight == "weight" and node.args[2].target == "bias"
    assert torch.equal(get_attribute(result.module, "weight"), before.T)
