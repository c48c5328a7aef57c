"""Generated CPU kernels agree with the reference bit for bit, and one that does not is caught."""

from __future__ import annotations

import dataclasses
import itertools
import platform

import pytest
import torch
from lbllm_compile.codegen import prove, reference, tvm_api
from lbllm_compile.codegen.cpu import space as cpu
from lbllm_compile.codegen.cpu.buckets import FEW, ONE
from lbllm_compile.codegen.cpu.build import KernelSet
from lbllm_compile.codegen.errors import KernelError, TargetError
from lbllm_compile.codegen.format import quantize_rows
from lbllm_compile.codegen.sizes import ACTIVATION_BITS
from lbllm_compile.codegen.spec import LinearSpec, QuantizeSpec
from lbllm_compile.codegen.targets import Target, arm, host, parse_targets, runnable_targets, x86
from lbllm_compile.codegen.tune.database import Database, Key, Result
from test_format import random_weight

from lbllm_compile.kernels import measured

FAMILIES = [
    pytest.param(f"cpu:{name}", marks=[] if name in host.families() else pytest.mark.skip(reason=f"no {name} here"))
    for name in (*(x86 if platform.machine() in x86.MACHINES else arm).ARCHITECTURES, "generic")
]

# (kind, N, K, group, bits, per token, bias, additive levels): tails in both directions, sizes of one.
SHAPES = [
    ("bit", 1, 1, 32, 4, False, True),
    ("bit", 100, 130, 64, 8, True, True),
    ("bit", 47, 300, 128, 4, False, False),
    ("bit", 21, 107, 32, 4, False, True, True),
    ("bit", 20, 70, 32, 16, False, True),
    ("int8", 50, 77, 0, 8, False, True),
    ("int4", 47, 77, 32, 8, False, True),
]
MORE_SHAPES = [
    ("bit", 33, 259, 32, 8, False, False),
    ("bit", 64, 192, 64, 4, False, False),
    ("bit", 17, 513, 256, 8, False, True),
    ("bit", 47, 300, 128, 4, True, False),
    ("bit", 75, 533, 256, 4, True, False, True),
    ("bit", 5, 300, 256, 16, True, True),
    ("int8", 7, 3, 32, 8, True, False),
    ("int8", 96, 160, 64, 4, False, False),
    ("int8", 33, 100, 64, 16, False, True),
    ("int4", 1, 1, 64, 8, False, False),
    ("int4", 64, 192, 64, 8, True, False),
    ("int4", 70, 300, 128, 4, False, True),
    ("int4", 33, 101, 32, 16, False, True),
]


def build(linears, quantizers, target, directory, **options):
    return KernelSet.build(linears, quantizers, Target.parse(target), cache_dir=directory, trials=0, **options)


@pytest.mark.parametrize("shapes", [SHAPES, pytest.param(MORE_SHAPES, marks=pytest.mark.slow)], ids=["some", "more"])
@pytest.mark.parametrize("target", FAMILIES)
def test_linears_are_exact_for_odd_shapes_and_token_counts(target, shapes, tmp_path):
    """Building is already a proof; these are other draws and more token counts."""
    specs = [LinearSpec(*shape) for shape in shapes]
    kernels = build(specs, [], target, tmp_path)
    for spec in specs:
        kernel = kernels.linear(spec)
        for case in prove.linear_cases(spec, seed=1):
            packed = kernel.pack(case.weight, case.bias)
            for tokens in (0, 1, 2, 3, 15, 16, 17, 36):
                out = kernel(case.values[:tokens].contiguous(), case.x_scale[:tokens].contiguous(), packed)
                assert prove.agree(out, case.expected[:tokens]), (spec, case.name, tokens)


@pytest.mark.parametrize("kind", ["bit", "int8", "int4"])
@pytest.mark.parametrize("family", [*x86.ARCHITECTURES, *arm.ARCHITECTURES])
def test_working_memory_of_a_known_size_comes_from_the_stack(family, kind):
    """TVM's pool of workspaces would be asked in every round of the loop in which a buffer stands."""
    target = Target.parse(f"cpu:{family}")
    for implementation in cpu.implementations(LinearSpec(kind, 96, 576, 64, 4 if kind == "bit" else 8), target):
        # Three buffers have as much room as there are tokens or, with AMX, as the decoded weights of whole rows take.
        for bucket, asked in ((ONE, 0), (FEW, 3)):
            kernel = implementation.function(implementation.schedules(bucket)[0])
            built = tvm_api.compile_functions({"kernel": kernel}, target.llvm)
            calls = built.mod.inspect_source("ll").count("load ptr, ptr @__TVMBackendAllocWorkspace")
            assert calls == asked, bucket.name


@pytest.mark.parametrize("sampled", [3, pytest.param(24, marks=pytest.mark.slow)])
@pytest.mark.parametrize("target", FAMILIES)
@pytest.mark.parametrize("shape", [(150, 75, 32), (150, 20, 32)], ids=["with tails", "a single group"])
def test_schedules_of_the_whole_space_are_exact(target, sampled, shape):
    """A search itself checks what it measures."""
    from lbllm_compile.codegen.cpu import space as cpu
    from lbllm_compile.codegen.tune.search import spread
    from lbllm_compile.codegen.tvm_api import compile_functions

    spec = LinearSpec("bit", *shape, 4, False, True)
    cases = prove.linear_cases(spec, seed=2)
    for implementation, bucket in itertools.product(cpu.implementations(spec, Target.parse(target)), cpu.BUCKETS):
        space = implementation.schedules(bucket)
        assert len(space) == len(set(space)) >= 16 and {s.layout for s in space} == {implementation.layout}
        sample = {f"k{i}": schedule for i, schedule in enumerate(spread(space, sampled))}
        functions = {name: implementation.function(schedule) for name, schedule in sample.items()}
        library = compile_functions(functions, Target.parse(target).llvm)
        for case in cases:
            packed = implementation.pack(case.weight, case.bias)
            counts = prove.token_counts(bucket.lowest, bucket.highest)
            for name, schedule in sample.items():
                assert prove.linear_failure(library[name], packed, case, counts) is None, schedule


@pytest.mark.parametrize("target", FAMILIES)
@pytest.mark.parametrize("bits", ACTIVATION_BITS)
def test_quantizers_are_exact(target, bits, tmp_path):
    specs = [QuantizeSpec(k, group, bits) for k, group in ((1, 32), (259, 64), (77, 0))]
    kernels = build([], specs, target, tmp_path)
    for spec in specs:
        for x, clip in prove.quantizer_inputs(spec, seed=3):
            for got, expected in zip(
                kernels.quantizer(spec)(x, clip),
                reference.quantize_activation(x, clip, spec.bits, spec.group),
                strict=True,
            ):
                assert torch.equal(got, expected)


def test_quantizers_are_exact_when_split_over_threads(tmp_path):
    spec = QuantizeSpec(1024, 128, 4)
    x = torch.randn(2, 65, 1024, generator=torch.Generator().manual_seed(0))
    got = build([], [spec], "cpu", tmp_path).quantizer(spec)(x, torch.ones(2))
    for actual, expected in zip(got, reference.quantize_activation(x, torch.ones(2), 4, 128), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(("group", "weight_group"), [(32, 32), (256, 256), (32, 128)])
def test_a_linear_of_quantized_activations_equals_the_operators(group, weight_group, tmp_path):
    """From float activations to output, the way a lowered graph runs: batched, and with very many tokens."""
    spec, quantize = LinearSpec("bit", 40, 270, group), QuantizeSpec(270, group)
    kernels = build([spec], [quantize], "cpu", tmp_path)
    weight = random_weight(40, 270, weight_group)
    packed = kernels.linear(spec).pack(weight)
    for shape in ((3, 5, 270), (2100, 270)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(group))
        values, scale = kernels.quantizer(quantize)(x, torch.ones(2))
        expected = reference.bit_linear(*reference.quantize_activation(x, torch.ones(2), 4, group), weight)
        assert torch.equal(kernels.linear(spec)(values, scale, packed), expected)


def test_merged_rows_give_the_rows_of_their_parts(tmp_path):
    whole, part = LinearSpec("bit", 80, 64, 32), LinearSpec("bit", 40, 64, 32)
    kernels = build([whole, part], [], "cpu:generic", tmp_path)
    first, second = random_weight(40, 64, 32, 1), random_weight(40, 64, 32, 2)
    values, x_scale = torch.ones(3, 64, dtype=torch.int8), torch.ones(3, 2)
    merged = kernels.linear(whole)(values, x_scale, kernels.linear(whole).pack(first.concatenate_rows(second)))
    parts = [kernels.linear(part)(values, x_scale, kernels.linear(part).pack(w)) for w in (first, second)]
    assert torch.equal(merged, torch.cat(parts, 1))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    spec = LinearSpec("bit", 48, 64, 32, 4, False, False)
    kernel = build([spec], [QuantizeSpec(64, 32)], "cpu", tmp_path_factory.mktemp("tuning"))
    return kernel.linear(spec), kernel.quantizer(QuantizeSpec(64, 32)), random_weight(48, 64, 32)


def _arguments():
    return {"values": torch.ones(5, 64, dtype=torch.int8), "x_scale": torch.ones(5, 2)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.ones(5, 64)}, "values is torch.float32"),
        ({"values": torch.ones(5, 63, dtype=torch.int8)}, r"values is torch.int8 \(5, 63\)"),
        ({"values": torch.ones(64, 5, dtype=torch.int8).t()}, "values must be contiguous"),
        ({"values": torch.ones(5, 64, dtype=torch.int16)}, "values is torch.int16"),
        ({"x_scale": torch.ones(5, 1)}, "x_scale is"),
        ({"x_scale": torch.ones(4, 2)}, "x_scale is"),
        ({"x_scale": torch.ones(5, 2, dtype=torch.float64)}, "x_scale is torch.float64"),
        ({"x_scale": torch.ones(2, 5).t()}, "x_scale must be contiguous"),
        ({"out": torch.ones(5, 47)}, "out is"),
        ({"out": torch.ones(48, 5).t()}, "out must be contiguous"),
    ],
)
def test_wrong_tensors_are_named(one, change, message):
    kernel, _, weight = one
    with pytest.raises(KernelError, match=message):
        kernel(**{**_arguments(), "packed": kernel.pack(weight), **change})


def test_packed_weights_of_another_kernel_or_alignment_are_refused(one):
    kernel, _, weight = one
    packed = kernel.pack(weight)
    with pytest.raises(KernelError, match="packed from another kernel"):
        kernel(**_arguments(), packed={"packed": packed["packed"][:-64]})
    whole = packed["packed"]
    shifted = torch.empty(whole.numel() + 8, dtype=torch.uint8)[8:].copy_(whole)
    with pytest.raises(KernelError, match="64-byte aligned"):
        kernel(**_arguments(), packed={"packed": shifted})


def test_misaligned_activations_give_the_same_result(one):
    kernel, quantize, weight = one
    packed = kernel.pack(weight)
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6 * 64 + 1, generator=generator)[1:]
    for tokens in (1, 6):
        x = base[: tokens * 64].view(tokens, 64)
        values, x_scale = quantize(x, torch.ones(2))
        moved = torch.empty(values.numel() + 1, dtype=torch.int8)[1:].copy_(values.flatten()).view_as(values)
        assert moved.data_ptr() % 2 or values.data_ptr() % 2
        assert torch.equal(kernel(moved, x_scale, packed), kernel(values, x_scale, packed))


def test_a_kernel_writes_where_it_is_told(one):
    kernel, _, weight = one
    out = torch.full((5, 48), float("nan"))
    result = kernel(**_arguments(), packed=kernel.pack(weight), out=out)
    assert result.data_ptr() == out.data_ptr() and bool(out.isfinite().all())


@pytest.mark.parametrize(
    "weight",
    [random_weight(47, 64, 32), quantize_rows(torch.ones(48, 64))],
    ids=["rows", "kind"],
)
def test_a_weight_that_does_not_fit_is_refused(one, weight):
    with pytest.raises(KernelError, match="does not fit"):
        one[0].pack(weight)


def test_a_weight_of_smaller_groups_is_refused(tmp_path):
    kernel = build([LinearSpec("bit", 16, 64, 64)], [], "cpu:generic", tmp_path).linear(LinearSpec("bit", 16, 64, 64))
    with pytest.raises(KernelError, match="a weight with groups of 32 does not fit"):
        kernel.pack(random_weight(16, 64, 32))


def test_a_bias_must_match_the_spec(one):
    with pytest.raises(KernelError, match="needs no bias"):
        one[0].pack(one[2], torch.ones(48))


def test_quantizers_name_wrong_tensors(one):
    for x, clip in ((torch.ones(2, 63), torch.ones(2)), (torch.ones(2, 64).double(), torch.ones(2))):
        with pytest.raises(KernelError, match="x is"):
            one[1](x, clip)
    with pytest.raises(KernelError, match="clip is"):
        one[1](torch.ones(2, 64), torch.ones(1))


def test_what_was_not_built_is_an_error_not_a_slow_path(tmp_path):
    empty = build([], [], "cpu", tmp_path)
    with pytest.raises(KernelError, match="no kernel was built"):
        empty.linear(LinearSpec("bit", 8, 32, 32))
    with pytest.raises(KernelError, match="no kernel was built"):
        empty.quantizer(QuantizeSpec(8, 32))


def plant(monkeypatch, module, name, replacement):
    from importlib import import_module

    monkeypatch.setattr(import_module(f"lbllm_compile.codegen.kernels.{module}"), name, replacement)


@pytest.mark.parametrize("bug", ["rounding", "scale", "level", "tail"])
def test_the_proof_catches_a_planted_bug(bug, monkeypatch, tmp_path):
    from lbllm_compile.codegen.kernels import dot, lut8
    from lbllm_compile.codegen.tvm_api import T

    if runnable_targets() == ["cpu:generic"]:
        pytest.skip("the planted bugs are in the vector kernels")
    operand = lut8.Lut8Operand
    if bug == "rounding":
        # A product and a sum that round twice: right to seven digits, and not what the reference says.
        fused = dot.fused_multiply_add

        def rounded_twice(isa, a, b, c):
            return fused(isa, a, b, T.broadcast(T.float32(0), isa.lanes)) + c

        plant(monkeypatch, "dot", "fused_multiply_add", rounded_twice)
    elif bug == "scale":
        scale = operand.scale
        monkeypatch.setattr(
            operand,
            "scale",
            lambda self, isa, *a: T.max(scale(self, isa, *a), T.broadcast(T.float32(2.0**-23), isa.lanes)),
        )
    elif bug == "level":
        pack = operand.pack

        def one_level_off(self, weight):
            levels = weight.levels.clone()
            levels[-1, -1, 3] -= 1
            return pack(self, dataclasses.replace(weight, levels=levels))

        monkeypatch.setattr(operand, "pack", one_level_off)
    else:
        monkeypatch.setattr(dot.Problem, "tail_slabs", property(lambda self: max(0, self.columns % self.group // 16)))
    with pytest.raises(KernelError, match=r"is wrong on this machine \(\d+ of \d+ outputs differ"):
        build([LinearSpec("bit", 48, 100, 64)], [], runnable_targets()[0], tmp_path)


def test_the_proof_catches_a_wrong_quantizer(monkeypatch, tmp_path):
    from lbllm_compile.codegen.tvm_api import T

    def reciprocal(x, scale, zero, bits, lanes):
        one = T.float32(1) / scale
        value = T.nearbyint(x * (T.broadcast(one, lanes) if lanes > 1 else one))
        return T.cast(value, f"int8x{lanes}" if lanes > 1 else "int8")

    plant(monkeypatch, "quantize", "_values_of", reciprocal)
    with pytest.raises(KernelError, match="quantized values differ"):
        build([], [QuantizeSpec(256, 32, 8)], "cpu", tmp_path)


def test_a_search_is_stored_and_not_repeated(tmp_path, monkeypatch):
    spec = LinearSpec("bit", 64, 64, 32)
    target = Target.parse("cpu:generic")
    first = KernelSet.build([spec], [], target, cache_dir=tmp_path, trials=3)
    lines = (tmp_path / "tuning.jsonl").read_text().splitlines()
    assert len(lines) == 3  # a line for each token bucket
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path))
    rows = measured(first)
    assert len(rows) == 3 and all(row["microseconds"] > 0 for row in rows)
    assert all(row["schedule"] in [tried["schedule"] for tried in row["candidates"]] for row in rows)

    def never(self, request):
        raise AssertionError("measured again")

    monkeypatch.setattr("lbllm_compile.codegen.tune.measure.Measurer.measure", never)
    again = KernelSet.build([spec], [], target, cache_dir=tmp_path, trials=3)
    assert again.records() == first.records()
    elsewhere = KernelSet.build([spec], [], target, cache_dir=tmp_path / "new", trials=3, records=first.records())
    assert elsewhere.records() == first.records()
    for other, trials in ((LinearSpec("bit", 64, 96, 32), 3), (spec, 4)):
        with pytest.raises(AssertionError, match="measured again"):
            KernelSet.build([other], [], target, cache_dir=tmp_path, trials=trials)


def test_records_spare_the_search_but_never_the_proof(tmp_path, monkeypatch):
    spec = LinearSpec("bit", 64, 64, 32)
    records = build([spec], [], "cpu:generic", tmp_path).records()
    monkeypatch.setattr(prove, "linear_failure", lambda *a: "1 of 1 outputs differ")
    with pytest.raises(KernelError, match="is wrong on this machine"):
        build([spec], [], "cpu:generic", tmp_path, records=records)


def test_what_a_search_here_found_wins_over_records_and_one_thread_says_nothing_about_several(tmp_path, monkeypatch):
    spec, target = LinearSpec("bit", 64, 64, 32), Target.parse("cpu:generic")
    monkeypatch.setenv("TVM_NUM_THREADS", "2")
    plain = KernelSet.build([spec], [], target, cache_dir=tmp_path / "empty", trials=0)
    assert plain.guessed == len(plain.records())

    def records(threads):
        changed = [{**r, "schedule": {**r["schedule"], "rows": 4}} for r in plain.records()]
        return [{**r, "threads": threads} if threads else {k: r[k] for k in r if k != "threads"} for r in changed]

    def rows(found, folder):
        kernels = KernelSet.build([spec], [], target, cache_dir=tmp_path / folder, trials=0, records=found)
        return kernels.guessed, {r["schedule"]["rows"] for r in kernels.records()}

    for threads, guessed in ((2, 0), (7, 0), (1, len(plain.records())), (None, len(plain.records()))):
        expected = {4} if not guessed else {r["schedule"]["rows"] for r in plain.records()}
        assert rows(records(threads), "empty") == (guessed, expected)
    database = Database(tmp_path / "searched")
    for bucket in cpu.BUCKETS:
        key = Key.here(spec, bucket.name, target, 2, tvm_api.VERSION, cpu.SCHEDULE_VERSION)
        database.add(key, Result({"layout": "portable", "rows": 2, "parallel": True}, 1.0, 16, 16))
    assert rows(records(2), "searched") == (0, {2})


def test_records_of_schedules_that_no_longer_exist_are_errors_or_ignored(tmp_path):
    spec = LinearSpec("bit", 64, 64, 32)
    records = build([spec], [], "cpu:generic", tmp_path).records()
    odd = [{**r, "schedule": {**r["schedule"], "rows": 48}} for r in records]
    assert build([spec], [], "cpu:generic", tmp_path, records=odd).records() == records
    with pytest.raises(KernelError, match="unknown fields"):
        build([spec], [], "cpu:generic", tmp_path, records=[{**r, "schedule": {"x": 1}} for r in records])


def test_a_progress_bar_hears_of_each_kernel(tmp_path):
    class Recorder:
        def __init__(self):
            self.steps = []

        def task(self, title, total):
            self.steps.append((title, total))
            return self

        def advance(self, note=""):
            self.steps.append(note)

        def note(self, text):
            self.steps.append(text)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    recorder = Recorder()
    build([LinearSpec("bit", 8, 32, 32)], [QuantizeSpec(32, 32)], "cpu:generic", tmp_path, progress=recorder)
    assert recorder.steps == [("prove kernels", 2), "", ""]


def test_a_wide_group_that_could_overflow_is_refused(tmp_path):
    with pytest.raises(KernelError, match="overflow"):
        build([LinearSpec("int8", 2, 70000, 0, 8)], [], "cpu", tmp_path)
    with pytest.raises(KernelError, match="overflow"):
        build([LinearSpec("int8", 2, 600, 0, 16)], [], "cpu", tmp_path)


def test_targets_parse_to_their_canonical_name():
    assert Target.parse("cpu") == Target.parse(runnable_targets()[0])
    assert [t.name for t in parse_targets("cpu:avx2, cuda:sm_90,cuda")][:4] == [
        *("cpu:avx2", "cuda:sm_90", "cuda:sm_75", "cuda:sm_80"),
    ]
    for text in ("cpu:avx2", "cpu:avx512-vnni", "cpu:generic", "cuda:sm_90"):
        assert Target.parse(Target.parse(text).name) == Target.parse(text)


@pytest.mark.parametrize(
    ("text", "hint"),
    [("cpu:avx512-vn", "cpu:avx512-vnni"), ("cud", "cuda"), ("", "known targets"), ("cpu:neon9", "known targets")],
)
def test_an_unknown_target_gets_a_suggestion(text, hint):
    with pytest.raises(TargetError, match=hint):
        Target.parse(text)


def test_a_target_of_another_machine_cannot_be_proven(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "families", lambda: ("generic",))
    with pytest.raises(TargetError, match="cannot run cpu:avx512-vnni; its own targets: cpu:generic"):
        build([], [], "cpu:avx512-vnni", tmp_path)
    with pytest.raises(TargetError, match="cannot run cuda"):
        build([], [], "cuda", tmp_path)
