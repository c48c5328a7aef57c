"""Translations of the ``lbllm`` operators, with the kernels that a backend builds for them, are their references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from lbllm_compile.codegen import operators
from lbllm_compile.codegen.backend import backend_of
from lbllm_compile.codegen.program.builder import BATCH, CAPACITY, LENGTH, TOTAL, TensorSpec
from lbllm_compile.codegen.program.compile import compile_program
from lbllm_compile.codegen.sizes import ACTIVATION_BITS, GROUPS, KV_BITS
from lbllm_compile.codegen.spec import AttentionSpec
from lbllm_compile.codegen.targets import Target
from lbllm_compile.codegen.tvm_runtime import Machine, array
from lbllm_compile.passes.calibrate.int4 import quantize_int4
from lbllm_compile.passes.ir import dump
from lbllm_compile.passes.ir.parse import parse
from lbllm_compile.passes.ir.program import Program
from lbllm_compile.passes.ir.scheme import CODEBOOKS
from rtn import planes
from test_attention_kernel import agrees
from torch import Tensor

from lbllm_compile.lowering.executor import requirements
from lbllm_compile.lowering.translate import _Weights, translate_graph

lbllm = torch.ops.lbllm
HOST = Target.parse("cpu")


class Native:
    """A program of one function, which gives several tensors and may change those that it gets."""

    def __init__(self, program: Program, inputs: Sequence[TensorSpec], folder: Path):
        needed = requirements(program)
        kernels = backend_of(HOST).build(needed.linears, needed.quantizers, HOST, cache_dir=folder, trials=0)
        library = folder / f"{len(list(folder.glob('*.so')))}.so"
        compile_program(translate_graph(program, kernels, inputs), HOST.llvm, kernels.lanes, {}).export(library)
        self._machine = Machine(library)
        self._weights = [tensor.numpy() for tensor in _Weights(program, kernels).tensors.values()]

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        assert all(t.is_contiguous() for t in tensors)
        given = [self._machine.tensor(t.numpy()) for t in tensors]
        found = self._machine.function("graph")(*given, self._machine.tuple(self._weights), self._machine.tuple([]))
        return [torch.from_numpy(np.array(array(part))) for part in found]


def normal(*shape: int, seed: int, size: float = 1.0) -> Tensor:
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def name_of(path: str) -> str:
    """The node of a weight."""
    return f"%{path.replace('.', '_')}"


def weight_lines(weights: Mapping[str, Tensor]) -> str:
    """The lines of a dump that name weights."""
    return "\n".join(f"{name_of(path)}: {dump.shape_text(tensor)} = weight {path}" for path, tensor in weights.items())


SEEDS = st.integers(0, 2**32 - 1)
SIZES = ((1, 1), (1, 5), (3, 33))
"""Sequences and tokens of the calls of a program."""


@dataclass(frozen=True)
class Linear:
    """A quantizer, and the linear behind it; ``kind`` is None for the quantizer alone."""

    kind: str | None
    rows: int
    columns: int
    group: int
    bits: int
    per_token: bool
    codebook: str
    bias: bool
    added: bool
    leading: bool
    seed: int

    @classmethod
    def strategy(cls, kind: str | None) -> st.SearchStrategy[Linear]:
        return st.builds(
            cls,
            st.just(kind),
            st.integers(1, 70),
            st.integers(1, 300),
            st.sampled_from(GROUPS),
            st.sampled_from(ACTIVATION_BITS),
            st.booleans(),
            st.sampled_from(CODEBOOKS),
            *[st.booleans()] * 3,
            SEEDS,
        )

    @property
    def act_group(self) -> int:
        return 0 if self.per_token else self.group

    def program(self) -> Program:
        clip, matrix, text = {"clip": torch.tensor([0.95, 0.9])}, {}, ""
        operands = ["%x", "%clip", str(self.bits), str(self.act_group)]
        if self.codebook == "knees" and self.bits == 4:
            clip["knees"] = torch.tensor([0.2, 0.35])
            operands.append("%knees")
        elif self.codebook == "planes" and self.bits == 4:
            clip["plane_scales"] = torch.tensor([0.9, 1.7, 3.1, 7.3])
            operands += ["None", "%plane_scales"]
        quantizer = ", ".join(operands)
        if self.kind == "bit":
            matrix = planes("w", normal(self.rows, self.columns, seed=self.seed), self.group)
        elif self.kind == "int4":
            coded = quantize_int4(normal(self.rows, self.columns, seed=self.seed), self.group)
            matrix = {"w": coded.packed, "w_table": coded.table, "w_scale": coded.scale}
        elif self.kind == "int8":
            values = normal(self.rows, self.columns, seed=self.seed, size=50)
            matrix = {"w": values.clamp(-127, 127).to(torch.int8), "w_scale": normal(self.rows, seed=self.seed).abs()}
        if self.kind:
            matrix |= {"bias": normal(self.rows, seed=self.seed + 1)} if self.bias else {}
            group = self.act_group if self.kind == "int8" else self.group
            operands = ", ".join(["%values", "%scale", *map(name_of, matrix), *([] if self.bias else ["None"])])
            text = f"%y = lbllm.{self.kind}_linear({operands}, {group}) {{in_features={self.columns}}}\n"
        results = "%y" if self.kind else "%values, %scale"
        if self.kind and self.added:
            text, results = f"%r = input r\n{text}%z = aten.add.Tensor(%r, %y)\n", "%z"
        return parse(
            f"""
            %x = input x
            {weight_lines(clip | matrix)}
            %pair = lbllm.quantize_activation({quantizer}) {{in_features={self.columns}}}
            %values = getitem(%pair, 0)
            %scale = getitem(%pair, 1)
            {text}
            return ({results},)
            """,
            clip | matrix,
            "module",
        )

    def check(self, folder: Path) -> None:
        """The program's results are the references' bits."""
        program = self.program()
        leading = (BATCH, LENGTH) if self.leading else (LENGTH,)
        widths = {"x": self.columns, "r": self.rows}
        names = [str(node.target) for node in program.placeholders()]
        native = Native(program, [TensorSpec(n, (*leading, widths[n]), "float32") for n in names], folder)
        for sizes in SIZES:
            shape = sizes[-len(leading) :]
            given = {n: normal(*shape, widths[n], seed=self.seed + i) for i, n in enumerate(names, 2)}
            given["x"][..., 0] = 0.0
            given["x"][..., -1, :] *= 1e-20
            for ours, theirs in zip(native(*given.values()), program.run(given), strict=True):
                assert ours.dtype == theirs.dtype and torch.equal(ours.reshape(theirs.shape), theirs)


@dataclass(frozen=True)
class Experts:
    """Stacked matrices of which every row of a batch meets one, floats or, behind a quantizer, W(1+1)."""

    quantized: bool
    experts: int
    rows: int
    columns: int
    group: int
    dtype: torch.dtype
    seed: int

    @classmethod
    def strategy(cls, quantized: bool) -> st.SearchStrategy[Experts]:
        sizes = st.integers(1, 6), st.integers(1, 40), st.integers(1, 150)
        dtypes = st.sampled_from((torch.int32, torch.int64))
        return st.builds(cls, st.just(quantized), *sizes, st.sampled_from(GROUPS), dtypes, SEEDS)

    def program(self) -> Program:
        matrices = normal(self.experts, self.rows, self.columns, seed=self.seed)
        weights = planes("w", matrices, self.group) if self.quantized else {"w": matrices}
        text = f"%x = input x\n%offsets = input offsets\n{weight_lines(weights)}\n"
        if self.quantized:
            weights["clip"] = torch.tensor([0.95, 0.9])
            text += f"""
                %clip: f32[2] = weight clip
                %pair = lbllm.quantize_activation(%x, %clip, 4, {self.group}) {{in_features={self.columns}}}
                %values = getitem(%pair, 0)
                %scale = getitem(%pair, 1)
                %y = lbllm.grouped_bit_linear(
                    %values, %scale, %w_sign, %w_bitmap, %w_levels, %w_scale, %offsets, {self.group}) {{
                    in_features={self.columns}}}
            """
        else:
            text += "%y = lbllm.grouped_linear(%x, %w, %offsets)\n"
        return parse(f"{text}\nreturn (%y,)", weights, "module")

    def check(self, folder: Path) -> None:
        program = self.program()
        dtype = str(self.dtype).removeprefix("torch.")
        inputs = [
            TensorSpec("x", (LENGTH, self.columns), "float32"),
            TensorSpec("offsets", (self.experts,), dtype),
        ]
        native = Native(program, inputs, folder)
        for count in (1, 5, 40):
            generator = torch.Generator().manual_seed(self.seed + count)
            ends = torch.randint(0, count + 1, (self.experts,), generator=generator).sort().values
            ends[-1] = count
            x, offsets = normal(count, self.columns, seed=self.seed + count), ends.to(self.dtype)
            (ours,), (theirs,) = native(x, offsets), program.run({"x": x, "offsets": offsets})
            bound = 0.0 if self.quantized else 1e-4
            torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound)


@dataclass(frozen=True)
class Embedding:
    """A look-up of ids with some dimensions in int8 rows or, with groups, 4-bit codes."""

    rows: int
    columns: int
    group: int
    dimensions: int
    dtype: torch.dtype
    seed: int

    @classmethod
    def strategy(cls, groups: Sequence[int]) -> st.SearchStrategy[Embedding]:
        dtypes = st.sampled_from((torch.int64, torch.int32))
        sizes = st.integers(1, 300), st.integers(1, 200), st.sampled_from(groups), st.integers(0, 3)
        return st.builds(cls, *sizes, dtypes, SEEDS)

    def check(self, folder: Path) -> None:
        matrix = normal(self.rows, self.columns, seed=self.seed, size=50)
        if self.group:
            coded = quantize_int4(matrix, self.group)
            weights = {"codes": coded.packed, "table": coded.table, "scale": coded.scale}
            call = f"int4_embedding(%codes, %table, %scale, %ids, {self.columns}, {self.group})"
        else:
            weights = {"rows": matrix.clamp(-128, 127).to(torch.int8), "scale": normal(self.rows, seed=self.seed + 1)}
            call = "int8_embedding(%rows, %scale, %ids)"
        text = f"""
            %ids = input ids
            {weight_lines(weights)}
            %y = lbllm.{call}
            return (%y,)
        """
        program = parse(text, weights, "module")
        leading = (BATCH, LENGTH, 2)[: self.dimensions]
        native = Native(program, [TensorSpec("ids", leading, str(self.dtype).removeprefix("torch."))], folder)
        for sizes in SIZES:
            generator = torch.Generator().manual_seed(self.seed)
            shape = (*sizes, 2)[: self.dimensions]
            ids = torch.randint(0, self.rows, shape, generator=generator).to(self.dtype)
            (ours,), (theirs,) = native(ids), program.run({"ids": ids})
            assert torch.equal(ours, theirs)


@dataclass(frozen=True)
class Attention:
    """An attention over its cache: a prompt, and tokens behind what is stored."""

    spec: AttentionSpec
    seed: int

    @classmethod
    def strategy(cls) -> st.SearchStrategy[Attention]:
        specs = st.builds(
            lambda shared, repeat, *rest: AttentionSpec(shared * repeat, shared, *rest),
            st.integers(1, 3),
            st.integers(1, 3),
            st.integers(1, 40),
            st.integers(1, 40),
            st.sampled_from(KV_BITS),
            st.sampled_from((0, 0, 1, 3, 20)),
            st.floats(0.05, 1.0),
            st.sampled_from((0.0, 0.0, 1.5, 50.0)),
            *[st.booleans()] * 3,
            st.sampled_from((0, 0, 1, 4, 30)),
        )
        return st.builds(cls, specs, SEEDS)

    def check(self, folder: Path) -> None:
        spec = self.spec
        own = {"sinks": spec.sinks, "slopes": spec.slopes}
        options = {"softcap": spec.softcap, **{n: f"%{n}" for n, there in own.items() if there}}
        options |= {"counted": spec.counted, "chunk": spec.chunk}
        given = [n for n, there in own.items() if there]
        state = ("key_codes", "key_params", "value_codes", "value_params")
        operands = ["query", "key", "value", *state, "key_mask", "past"]
        lines = "\n".join(f"%{name} = input {name}" for name in (*operands, *given))
        arguments = ", ".join(
            [*(f"%{name}" for name in operands), str(spec.scale), str(spec.window), str(spec.bits)]
            + [f"{name}={value}" for name, value in options.items()]
        )
        program = parse(f"{lines}\n%y = lbllm.cached_attention({arguments})\nreturn (%y,)", kind="module")
        stored = "float16" if spec.bits == 16 else "uint8"
        parameters = 0 if spec.bits == 16 else 2
        shapes = {
            "query": ((BATCH, spec.heads, LENGTH, spec.key_width), "float32"),
            "key": ((BATCH, spec.kv_heads, LENGTH, spec.key_width), "float32"),
            "value": ((BATCH, spec.kv_heads, LENGTH, spec.value_width), "float32"),
            "key_codes": ((BATCH, spec.kv_heads, CAPACITY, spec.stored(spec.key_width)), stored),
            "key_params": ((BATCH, spec.kv_heads, CAPACITY, parameters), "float16"),
            "value_codes": ((BATCH, spec.kv_heads, CAPACITY, spec.stored(spec.value_width)), stored),
            "value_params": ((BATCH, spec.kv_heads, CAPACITY, parameters), "float16"),
            "key_mask": ((BATCH, TOTAL), "int64"),
            "sinks": ((spec.heads,), "float32"),
            "slopes": ((spec.heads,), "float32"),
        }
        names = [*operands[:-1], *given]
        native = Native(program, [TensorSpec(name, *shapes[name]) for name in names], folder)

        def function(*tensors: Tensor) -> None:
            """As the kernel takes them: numbers of every head twice where there is one kind, and the result last."""
            *operands, out = tensors
            state = operands[3:7] if spec.bits < 16 else [t for s in operands[3:7:2] for t in (s, s[..., :0])]
            new, mask, own = operands[:3], operands[7], operands[8 : 8 + len(given)]
            out.copy_(native(*new, *(t.contiguous() for t in state), mask, *own)[0])

        generator = torch.Generator().manual_seed(self.seed)
        for batch, length, past in ((1, 1, 0), (1, 1, 40), (2, 7, 0), (3, 33, 5)):
            agrees(spec, function, batch, length, past, generator)


@dataclass(frozen=True)
class Convolution:
    """A short convolution over a sequence in parts."""

    channels: int
    taps: int
    bias: bool
    seed: int

    @classmethod
    def strategy(cls) -> st.SearchStrategy[Convolution]:
        return st.builds(cls, st.integers(1, 70), st.integers(2, 9), st.booleans(), SEEDS)

    def check(self, folder: Path) -> None:
        weights = {"w": normal(self.channels, 1, self.taps, seed=self.seed)}
        weights |= {"b": normal(self.channels, seed=self.seed + 1)} if self.bias else {}
        text = f"""
            %x = input x
            %state = input last
            {weight_lines(weights)}
            %y = lbllm.cached_conv(%x, %w, {"%b" if self.bias else "None"}, %state)
            return (%y,)
        """
        program = parse(text, weights, "module")
        inputs = {"x": (BATCH, self.channels, LENGTH), "last": (BATCH, self.channels, self.taps - 1)}
        native = Native(program, [TensorSpec(name, shape, "float32") for name, shape in inputs.items()], folder)
        for batch, lengths in ((1, (1, 1, 1)), (2, (7, 1)), (3, (33,))):
            ours, theirs = torch.zeros(2, batch, self.channels, self.taps - 1)
            for i, length in enumerate(lengths):
                x = normal(batch, self.channels, length, seed=self.seed + i)
                (wanted,) = program.run({"x": x, "last": theirs})
                torch.testing.assert_close(native(x, ours)[0], wanted, rtol=1e-5, atol=1e-5)
                assert torch.equal(ours, theirs)


CASES = {
    lbllm.quantize_activation.default: Linear.strategy(None),
    lbllm.bit_linear.default: Linear.strategy("bit"),
    lbllm.int4_linear.default: Linear.strategy("int4"),
    lbllm.int8_linear.default: Linear.strategy("int8"),
    lbllm.grouped_linear.default: Experts.strategy(False),
    lbllm.grouped_bit_linear.default: Experts.strategy(True),
    lbllm.int8_embedding.default: Embedding.strategy((0,)),
    lbllm.int4_embedding.default: Embedding.strategy(GROUPS),
    lbllm.cached_attention.default: Attention.strategy(),
    lbllm.cached_conv.default: Convolution.strategy(),
}
"""Programs of every ``lbllm`` operator that has a translation."""


def test_every_translation_of_the_own_operators_has_a_case():
    """Of this package's; others' operators, which a test may have registered, are theirs to test."""
    translated = {o for o in operators.operators() if o.translate is not None and o.name.startswith("lbllm.")}
    package = operators.__name__
    missing = {o.target for o in translated if o.translate.__module__.startswith(package)} - {*CASES}
    assert not missing, f"no case calls {sorted(map(str, missing))}"


@pytest.mark.parametrize("examples", [2, pytest.param(30, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
@pytest.mark.parametrize("target", CASES, ids=lambda target: target._opname)
def test_a_translation_gives_its_references_results(target, examples, tmp_path):
    @settings(max_examples=examples, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
    @given(CASES[target])
    def holds(drawn):
        drawn.check(tmp_path)

    holds()
