"""The bit-serial popcount kernels: exact whatever the window of the activations, and chosen by their time alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from lbllm_compile.codegen import reference
from lbllm_compile.codegen.cpu.build import KernelSet
from lbllm_compile.codegen.errors import KernelError
from lbllm_compile.codegen.format import GROUPS, QuantizedWeight, codes_to_planes
from lbllm_compile.codegen.spec import LinearSpec
from lbllm_compile.codegen.targets import Target, host
from lbllm_compile.codegen.threads import thread_count
from lbllm_compile.codegen.tune.measure import Measurer, Outcome

TARGET = "cpu:avx512-vpopcnt"

pytestmark = pytest.mark.skipif("avx512-vpopcnt" not in host.families(), reason="this CPU does not count bits of bytes")


def popcount_records(spec: LinearSpec) -> list[dict]:
    """Records as a search that preferred the popcount kernels leaves them."""
    from lbllm_compile.codegen.cpu import space as cpu

    implementation = cpu.of_layout(cpu.implementations(spec, Target.parse(TARGET)), "popcount")
    return [
        {
            "spec": dataclasses.asdict(spec),
            "tokens": bucket.name,
            "target": TARGET,
            "threads": thread_count(),
            "schedule": dataclasses.asdict(implementation.schedules(bucket)[0]),
        }
        for bucket in cpu.BUCKETS
    ]


def build(spec: LinearSpec, directory) -> KernelSet:
    records = popcount_records(spec)
    kernels = KernelSet.build([spec], [], Target.parse(TARGET), cache_dir=directory, trials=0, records=records)
    assert kernels.records() == records
    return kernels


def weight_of(spec: LinearSpec, generator: torch.Generator, extreme: bool) -> QuantizedWeight:
    n, k, groups = spec.out_features, spec.in_features, spec.groups
    codes = torch.randint(4, (n, k), generator=generator, dtype=torch.uint8)
    levels = torch.randint(-127, 128, (n, groups, 4), generator=generator).sort(-1).values.to(torch.int8)
    if extreme:  # the sum of `level - level_0` reaches 255 * group
        codes[0::2] = 3
        levels[..., :3], levels[..., 3] = -128, 127
        levels[1::4] = 127
    if spec.additive:
        levels[..., 2] = (levels[..., 0].int() + levels[..., 3] - levels[..., 1]).to(torch.int8)
        levels = levels.sort(-1).values
    return QuantizedWeight(*codes_to_planes(codes), levels, torch.rand(n, groups).half(), k, spec.group)


def windows_of(spec: LinearSpec, generator: torch.Generator) -> torch.Tensor:
    """One token for each zero point with random values, for each zero point with its least and greatest value in all
    columns, and one whose groups all differ."""
    zeros = torch.arange(16)[:, None]
    drawn = torch.randint(16, (16, spec.in_features), generator=generator) - zeros
    constant = torch.cat([-zeros, 15 - zeros]).expand(-1, spec.in_features)
    mixed = torch.randint(16, (spec.groups,), generator=generator).repeat_interleave(spec.group)[: spec.in_features]
    return torch.cat([drawn, constant, drawn[:1] - mixed]).to(torch.int8)


@pytest.mark.parametrize("additive", [False, True], ids=["any levels", "additive levels"])
@pytest.mark.parametrize("extreme", [False, True], ids=["random weights", "extreme weights"])
@pytest.mark.parametrize(
    ("rows", "columns", "group"), [(1, 1, 32), (33, 259, 32), (64, 130, 64), (47, 300, 128), (31, 540, 256)]
)
def test_every_window_of_activations_is_exact(rows, columns, group, extreme, additive, tmp_path):
    spec = LinearSpec("bit", rows, columns, group, 4, rows == 47, extreme, additive)
    kernel = build(spec, tmp_path).linear(spec)
    generator = torch.Generator().manual_seed(group)
    weight = weight_of(spec, generator, extreme)
    bias = torch.randn(rows, generator=generator) if extreme else None
    values = windows_of(spec, generator)
    x_scale = torch.rand(len(values), spec.x_scales, generator=generator)
    packed = kernel.pack(weight, bias)
    expected = reference.bit_linear(values, x_scale, weight, bias)
    one_by_one = torch.cat([kernel(values[i : i + 1], x_scale[i : i + 1], packed) for i in range(len(values))])
    assert torch.equal(one_by_one, expected)
    for tokens in (2, 13, len(values)):
        assert torch.equal(kernel(values[:tokens], x_scale[:tokens], packed), expected[:tokens])


@pytest.mark.parametrize("group", GROUPS)
def test_the_planes_cost_two_bits_a_weight_and_a_zero_point_sum_a_group(group):
    from lbllm_compile.codegen.cpu import space as cpu

    spec = LinearSpec("bit", 32, 4 * group, group)
    lut8, popcount = cpu.implementations(spec, Target.parse(TARGET))
    weight = weight_of(spec, torch.Generator().manual_seed(0), extreme=False)
    assert popcount.pack(weight, None).numel() * 8 == weight.stored_bits + 16 * 32 * spec.groups
    assert lut8.pack(weight, None).numel() * 8 == weight.stored_bits


def test_additive_levels_have_a_layout_of_their_own_and_are_counted_twice_not_thrice(tmp_path):
    from lbllm_compile.codegen.cpu import space as cpu

    specs = [LinearSpec("bit", 64, 128, 64, additive=additive) for additive in (False, True)]
    counts, layouts = [], []
    for spec in specs:
        popcount = cpu.of_layout(cpu.implementations(spec, Target.parse(TARGET)), "popcount")
        schedule = popcount.schedules(cpu.BUCKETS[0])[0]
        counts.append(popcount.function(schedule).script().count("llvm.ctpop"))
        layouts.append(popcount.pack(weight_of(specs[1], torch.Generator().manual_seed(0), False), None))
    assert counts[0] > 0 and 2 * counts[0] == 3 * counts[1]
    assert layouts[0].shape == layouts[1].shape and not torch.equal(*layouts)
    with pytest.raises(KernelError, match="not additive"):
        popcount.pack(weight_of(specs[0], torch.Generator().manual_seed(0), False), None)


def test_misaligned_activations_give_the_same_result(tmp_path):
    spec = LinearSpec("bit", 48, 96, 32)
    kernel = build(spec, tmp_path).linear(spec)
    generator = torch.Generator().manual_seed(0)
    packed = kernel.pack(weight_of(spec, generator, extreme=False))
    values, x_scale = windows_of(spec, generator)[:1], torch.ones(1, 3)
    moved = torch.empty(values.numel() + 1, dtype=torch.int8)[1:].copy_(values.flatten()).view_as(values)
    assert torch.equal(kernel(moved, x_scale, packed), kernel(values.clone(), x_scale, packed))


@pytest.mark.parametrize(
    ("bug", "additive"),
    [("zero point", False), ("intersection", False), ("bit order", False), ("zero point", True), ("bit order", True)],
)
def test_the_proof_catches_a_planted_bug(bug, additive, monkeypatch, tmp_path):
    from lbllm_compile.codegen.kernels import popcount

    operand = popcount.PlaneOperand
    if bug == "zero point":
        monkeypatch.setattr(operand, "level_sum", lambda self, isa, *_: isa.broadcast(0))
    else:
        pack = operand.pack

        def wrong(self, weight):
            packed = pack(self, weight).clone()
            if bug == "intersection":  # the last of the four levels' terms
                terms = packed.reshape(-1, self.group_bytes)[:, popcount.WORD_BYTES :][:, 3 : popcount.LEVEL_BYTES : 4]
                terms += 1
            else:  # two columns of the first word change places
                packed[0] = (packed[0] & 0xFC) | ((packed[0] & 1) << 1) | ((packed[0] & 2) >> 1) ^ 1
            return packed

        monkeypatch.setattr(operand, "pack", wrong)
    with pytest.raises(KernelError, match=r"is wrong on this machine \(\d+ of \d+ outputs differ"):
        build(LinearSpec("bit", 48, 96, 32, additive=additive), tmp_path)


@pytest.mark.parametrize("fastest", ["lut8", "popcount"])
def test_the_time_for_one_token_decides_the_layout(fastest, monkeypatch, tmp_path):
    asked = []

    def measure(self, request):
        layouts = [schedule["layout"] for schedule in request.schedules]
        asked.extend((request.bucket, layout) for layout in layouts)
        # For more tokens the other layout would be the faster one.
        return [Outcome(1.0 if (layout == fastest) == (request.bucket == "1") else 2.0) for layout in layouts]

    monkeypatch.setattr(Measurer, "measure", measure)
    spec = LinearSpec("bit", 64, 64, 32)
    for _ in range(2):
        kernels = KernelSet.build([spec], [], Target.parse(TARGET), cache_dir=tmp_path, trials=8)
        assert {record["schedule"]["layout"] for record in kernels.records()} == {fastest}
        assert {layout for bucket, layout in asked if bucket == "1"} <= {"lut8", "popcount"}
        assert {layout for bucket, layout in asked if bucket != "1"} <= {fastest}
        asked.clear()


def test_a_layout_decided_anew_is_followed_by_the_other_token_counts(monkeypatch, tmp_path):
    """A search that may measure more finds the other layout faster; results stored for the first one do not stay."""
    spec, target = LinearSpec("bit", 64, 64, 32), Target.parse(TARGET)
    for fastest, trials in (("lut8", 8), ("popcount", 16)):

        def measure(self, request, fastest=fastest):
            return [Outcome(1.0 if schedule["layout"] == fastest else 2.0) for schedule in request.schedules]

        monkeypatch.setattr(Measurer, "measure", measure)
        records = KernelSet.build([spec], [], target, cache_dir=tmp_path, trials=trials).records()
        assert {record["schedule"]["layout"] for record in records} == {fastest}


@pytest.mark.parametrize(
    ("spec", "target"),
    [
        (LinearSpec("bit", 64, 64, 32, 8), TARGET),
        (LinearSpec("int8", 64, 64, 32, 4), TARGET),
        (LinearSpec("bit", 64, 64, 32, 4), "cpu:avx512-vnni"),
    ],
)
def test_popcounts_are_offered_for_four_bits_on_targets_that_have_them(spec, target):
    from lbllm_compile.codegen.cpu import space as cpu

    assert len(cpu.implementations(spec, Target.parse(target))) == 1
