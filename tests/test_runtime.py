"""Running lowered graphs: bound kernels, KV state, generation."""

from __future__ import annotations

import functools
import sys

import numpy as np
import pytest
import torch
from graphs import context, normal, program, token_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from lbllm_compile.codegen.cpu.build import KernelSet
from lbllm_compile.codegen.errors import KernelError
from lbllm_compile.codegen.sizes import MIN_CAPACITY
from lbllm_compile.codegen.targets import Target
from lbllm_compile.passes.head import Head
from lbllm_compile.passes.lower import IN_FEATURES, Lower
from lbllm_compile.passes.merge import Merge
from reference_kernels import ReferenceKernels
from rtn import simulate
from stages import Notes
from test_cache import HEADS, KV_HEADS, WIDTH, cached, causal, repeat

from lbllm_compile import artifact, runtime
from lbllm_compile.lowering import session as torch_session
from lbllm_compile.lowering.bounds import input_bounds
from lbllm_compile.lowering.executor import Executor, requirements
from lbllm_compile.lowering.session import FEW_TOKENS
from lbllm_compile.native.generate import TextStream, choose, left_pad
from lbllm_compile.native.language import InputBounds
from lbllm_compile.runtime import CompiledModel, GenerationError, Sampling
from lbllm_compile.runtime.loader import build_kernels

aten, lbllm = torch.ops.aten, torch.ops.lbllm
VOCABULARY, CHANNELS, CONTEXT = 29, 36, 96


@functools.cache
def language_model(negated: bool = False, positions: str = "given"):
    """One decoder layer with grouped-query attention, through head, merge, lower and cache.

    Args:
        negated: logits are.
        positions: ``"given"`` as input, ``"shifted"`` by the two rows that OPT's table has in front, ``"counted"`` by
            the graph or ``"sliced"`` from the front of their table.
    """

    def forward(root, input_ids, attention_mask, position_ids):
        batch, length = aten.sym_size.int(attention_mask, 0), aten.sym_size.int(attention_mask, 1)
        x = aten.embedding.default(root.head.weight, input_ids)
        if positions == "sliced":
            x = aten.add.Tensor(x, aten.slice.Tensor(root.positions, 0, 0, length))
        else:
            where = position_ids if positions != "counted" else aten.unsqueeze.default(aten.arange.default(length), 0)
            where = aten.add.Tensor(where, 2) if positions == "shifted" else where
            x = aten.add.Tensor(x, aten.embedding.default(root.positions, where))

        def heads(weight, count):
            y = aten.view.default(aten.linear.default(x, weight), [batch, length, count, WIDTH])
            return aten.transpose.int(y, 1, 2)

        q, k, v = heads(root.q.weight, HEADS), heads(root.k.weight, KV_HEADS), heads(root.v.weight, KV_HEADS)
        k, v = repeat(k, batch, length), repeat(v, batch, length)
        y = aten.scaled_dot_product_attention.default(q, k, v, causal(attention_mask, length))
        y = aten.reshape.default(aten.transpose.int(y, 1, 2), [batch, length, HEADS * WIDTH])
        x = aten.add.Tensor(x, aten.linear.default(y, root.o.weight, root.o.bias))
        logits = aten.linear.default(x, root.head.weight)
        return aten.neg.default(logits) if negated else logits

    shapes = {"q": (24, CHANNELS), "k": (12, CHANNELS), "v": (12, CHANNELS), "o": (CHANNELS, 24)}
    weights = {f"{n}.weight": 0.3 * normal(*shape, seed=i) for i, (n, shape) in enumerate(shapes.items())}
    weights |= {"head.weight": normal(VOCABULARY, CHANNELS, seed=7), "o.bias": normal(CHANNELS, seed=8)}
    weights["positions"] = normal(CONTEXT + 2 * (positions == "shifted"), CHANNELS, seed=9)
    item = simulate(program(weights, forward))
    for step in (Head(group=32), Merge(), Lower()):
        item = step.apply(item, context(token_inputs(vocabulary=VOCABULARY))).program
    item = cached(item)
    return type(item)(item.module, item.kind, "toy", config={"max_position_embeddings": CONTEXT, "eos_token_id": 0})


@functools.cache
def model() -> CompiledModel:
    return CompiledModel(language_model(), ReferenceKernels())


def tokens(prompts, stop=(), **options):
    """Tokens by sequence."""
    steps = list(model().generate_ids(prompts, Sampling(**options), stop=stop))
    return [[t for t in row if t is not None] for row in zip(*steps, strict=True)]


# Binding


def test_the_executor_gives_the_graphs_own_outputs():
    inputs = token_inputs(batch=3, length=7, vocabulary=VOCABULARY)
    logits = model().logits(inputs["input_ids"], inputs["attention_mask"])
    assert torch.equal(logits, language_model().run(inputs))
    assert logits.shape == (3, 7, VOCABULARY)


def test_a_stored_index_bounds_nothing():
    weights = {"table": normal(5, 3), "rows": torch.tensor([4, 0])}
    item = program(weights, lambda root, input_ids: aten.index_select.default(root.table, 0, root.rows), kind="module")
    assert input_bounds(item) == InputBounds(None, None)


@pytest.mark.parametrize("positions", ["given", "shifted", "counted", "sliced"])
def test_more_tokens_than_positions_are_refused(positions):
    model = language_model(positions=positions)
    bounds = input_bounds(model)
    told = positions in ("given", "shifted")
    assert (bounds.positions, bounds.slots) == ((CONTEXT, None) if told else (None, CONTEXT))
    ids = torch.ones((1, CONTEXT + 1), dtype=torch.int64)
    session = CompiledModel(model, ReferenceKernels()).session(1)
    session.step(ids[:, :CONTEXT])
    with pytest.raises(GenerationError, match=f"positions for {CONTEXT} tokens, and {CONTEXT + 1} are given"):
        session.step(ids[:, :1])


def test_every_distinct_kernel_is_required_once():
    needed = requirements(language_model())
    shapes = [(s.kind, s.out_features, s.in_features, s.bias) for s in needed.linears]
    assert shapes == [("bit", 48, CHANNELS, False), ("bit", CHANNELS, 24, True), ("int8", VOCABULARY, CHANNELS, False)]
    assert [(q.in_features, q.bits) for q in needed.quantizers] == [(CHANNELS, 4), (24, 4), (CHANNELS, 8)]


def test_only_kernels_run_linears():
    executor = Executor(language_model(), ReferenceKernels())
    names = set(executor._full._forward.__code__.co_names)
    assert "cached_attention" in names
    assert not {"bit_linear", "int8_linear", "quantize_activation"} & names


def test_no_kernel_is_an_error_not_a_slow_path(tmp_path, monkeypatch):
    class Missing(ReferenceKernels):
        def linear(self, spec):
            raise KernelError(f"no kernel was built for {spec}; there is no slow path")

    with pytest.raises(KernelError, match="no slow path"):
        CompiledModel(language_model(), Missing())

    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path / "cache"))
    artifact.save(language_model(), tmp_path / "out", lock={})
    for name in [n for n in sys.modules if n.startswith("lbllm_compile.codegen.") or n.split(".")[0] == "tvm"]:
        if "build" in name or "kernels" in name or "tvm" in name:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tvm", None)
    with pytest.raises(KernelError, match="TVM"):
        runtime.load(tmp_path / "out")


def test_simulated_graphs_do_not_run():
    before = simulate(program({"a.weight": normal(8, 40)}, lambda r, x: aten.linear.default(x, r.a.weight), "module"))
    with pytest.raises(KernelError, match="only lowered graphs run"):
        Executor(before, ReferenceKernels())


def test_an_integer_operator_without_in_features_is_refused():
    item = language_model().copy()
    for node in item.graph.nodes:
        node.meta.pop(IN_FEATURES, None)
    with pytest.raises(KernelError, match="does not say its in_features"):
        requirements(item)


def test_stacked_experts_run_expert_by_expert():
    def forward(root, x, offsets):
        return lbllm.grouped_linear.default(x, root.experts.weight, offsets)

    item = Lower().apply(simulate(program({"experts.weight": normal(3, 8, 40)}, forward, "module")), context()).program
    x, offsets = normal(6, 40, seed=3), torch.tensor([2, 2, 6], dtype=torch.int32)
    assert torch.equal(CompiledModel(item, ReferenceKernels())(x, offsets), item.module(x, offsets))


def test_a_plain_module_takes_its_inputs_by_position_or_name():
    item = program({"a.weight": normal(8, 43)}, lambda root, x: aten.linear.default(x, root.a.weight), kind="module")
    compiled = CompiledModel(Lower().apply(simulate(item), context()).program, ReferenceKernels())
    x = normal(2, 3, 43, seed=2)
    assert torch.equal(compiled(x), compiled(x=x)) and compiled(x).shape == (2, 3, 8)
    assert compiled(x[:0]).shape == (0, 3, 8)
    with pytest.raises(KernelError, match="an input has 40 channels where the model needs 43"):
        compiled(x[..., :40])
    for arguments, named in (((), {}), ((x, x), {}), ((x,), {"x": x}), ((), {"y": x})):
        with pytest.raises(GenerationError, match=r"the model takes (the inputs )?x"):
            compiled(*arguments, **named)
    with pytest.raises(GenerationError, match="not a language model"):
        compiled.generate_ids([[1]])


# State


@pytest.mark.parametrize("prefill", [1, 4, 12])
def test_cached_decoding_gives_the_whole_sequences_logits(prefill):
    inputs = token_inputs(batch=3, length=12, padding=1, vocabulary=VOCABULARY)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    whole = model().logits(ids, mask)
    session = model().session(3)
    session.start(mask[:, :prefill])
    parts = [session.logits(ids[:, :prefill])] + [session.logits(ids[:, i : i + 1]) for i in range(prefill, 12)]
    seen = mask.bool()
    # rounding differs with the shapes; a code flipped by it moves a logit by less than this
    torch.testing.assert_close(torch.cat(parts, 1)[seen], whole[seen], rtol=0, atol=0.05)
    assert session.state.past == 12


def test_the_state_grows_and_keeps_what_it_holds():
    ids = torch.randint(1, VOCABULARY, (2, CONTEXT), generator=torch.Generator().manual_seed(3))
    session = model().session(2)
    assert session.state.capacity == MIN_CAPACITY
    parts = [session.logits(ids[:, i : i + 8]) for i in range(0, CONTEXT, 8)]
    assert session.state.capacity >= CONTEXT
    roomy = model().session(2, CONTEXT)
    again = [roomy.logits(ids[:, i : i + 8]) for i in range(0, CONTEXT, 8)]
    assert torch.equal(torch.cat(parts, 1), torch.cat(again, 1))


def test_the_last_logits_come_from_the_last_position_alone():
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    one, all_ = model().session(2), model().session(2)
    assert np.array_equal(one.step(ids), all_.logits(ids)[:, -1].numpy())
    assert model()._executor._last is not None


# Generation


def test_greedy_generation_follows_the_largest_logit():
    ids = [5, 3, 8]
    for token in tokens([ids], max_new_tokens=10)[0]:
        logits = model().logits(torch.tensor([ids]))[0, -1]
        assert logits[token] >= logits.max() - 0.05
        ids = [*ids, token]


def test_a_padded_batch_gives_each_prompt_its_own_answer():
    prompts = [[5, 3, 8], [9], [4, 4, 4, 4, 7, 2]]
    together = tokens(prompts, max_new_tokens=12)
    assert together == [tokens([p], max_new_tokens=12)[0] for p in prompts]


def test_negating_the_head_changes_the_text():
    negated = CompiledModel(language_model(negated=True), ReferenceKernels())
    sampling = Sampling(max_new_tokens=5)
    assert negated._executor._last is not None
    assert list(negated.generate_ids([[5, 3]], sampling)) != list(model().generate_ids([[5, 3]], sampling))
    ids = torch.tensor([[5, 3]])
    assert torch.equal(negated.logits(ids), -model().logits(ids))


def test_small_steps_take_one_torch_thread_and_give_it_back(monkeypatch):
    seen = []
    last_logits = Executor.last_logits

    def spy(self, *inputs):
        seen.append((inputs[0].numel(), torch.get_num_threads()))
        return last_logits(self, *inputs)

    monkeypatch.setattr(Executor, "last_logits", spy)
    prompt = [[1] * (FEW_TOKENS + 1)]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in model().generate_ids(prompt, Sampling(max_new_tokens=3), ()):
            assert torch.get_num_threads() == 2
        assert seen == [(FEW_TOKENS + 1, 2), (1, 1), (1, 1)]
        seen.clear()
        monkeypatch.setattr(torch_session, "SHORT_CONTEXT", FEW_TOKENS + 2)
        list(model().generate_ids(prompt, Sampling(max_new_tokens=3), ()))
    finally:
        torch.set_num_threads(before)
    assert seen == [(FEW_TOKENS + 1, 2), (1, 1), (1, 2)]


def test_a_stop_token_ends_its_sequence_only():
    prompts = [[5, 3, 8], [9, 1, 1]]
    free = tokens(prompts, max_new_tokens=12)
    stop = next(t for t in free[0] if t not in free[1])
    stopped = tokens(prompts, stop=(stop,), max_new_tokens=12)
    assert stopped == [free[0][: free[0].index(stop)], free[1]]


def test_stop_tokens_come_from_the_configuration():
    assert model().stop_tokens() == (0,)


def test_sampling_is_a_function_of_the_seed_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    first, second, other = (tokens([[5, 3]], max_new_tokens=20, temperature=30.0, seed=s)[0] for s in (1, 1, 2))
    assert first == second != other
    assert torch.equal(torch.get_rng_state(), state)


@given(st.integers(0, 2**31), st.integers(1, 12), st.floats(0.05, 1.0), st.floats(0.2, 3.0))
@settings(deadline=None, max_examples=60)
def test_draws_stay_within_top_k_and_top_p(seed, k, p, temperature):
    generator = np.random.default_rng(seed)
    logits = generator.standard_normal((3, 12)).astype(np.float32)
    sampling = Sampling(temperature=temperature, top_k=k, top_p=p)
    drawn = choose(logits, sampling, generator)
    probabilities = torch.softmax(torch.from_numpy(logits).double() / temperature, -1)
    for row, token in enumerate(drawn.tolist()):
        better = probabilities[row] > probabilities[row, token]
        assert int(better.sum()) < k
        kept = probabilities[row].topk(k).values.sum()
        assert float(probabilities[row][better].sum() / kept) < p + 1e-9


def test_draws_follow_the_probabilities():
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))
    generator = np.random.default_rng(0)
    drawn = np.concatenate([choose(logits, Sampling(temperature=1.0), generator) for _ in range(4000)])
    shares = np.bincount(drawn, minlength=4) / len(drawn)
    assert np.abs(shares - [0.5, 0.3, 0.15, 0.05]).max() < 0.03


def test_requests_that_cannot_be_answered_are_told():
    with pytest.raises(GenerationError, match="prompt is empty"):
        model().generate_ids([[]])
    with pytest.raises(GenerationError, match=r"has 90 tokens and 10 more .* context holds 96; ask for at most 6"):
        model().generate_ids([[1] * 90], Sampling(max_new_tokens=10))
    with pytest.raises(GenerationError, match="context holds 96; shorten the prompt"):
        model().generate_ids([[1] * 100], Sampling(max_new_tokens=10))
    with pytest.raises(GenerationError, match="no tokenizer"):
        model().generate("text")
    for options in (
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"temperature": float("nan")},
    ):
        with pytest.raises(GenerationError):
            Sampling(**options)


class Bytes:
    """A tokenizer whose tokens are bytes, so that most characters take several."""

    eos_token_id = None
    chat_template = None

    def __call__(self, text):
        return {"input_ids": list(text.encode())}

    def decode(self, ids, **_):
        return bytes(ids).decode("utf-8", errors="replace")


@given(st.text(max_size=30))
@settings(deadline=None)
def test_streamed_pieces_are_whole_characters_and_add_up(text):
    tokenizer = Bytes()
    stream = TextStream(tokenizer.decode)
    pieces = [stream.push(t) for t in text.encode()]
    assert "".join(pieces) + stream.end() == text
    assert all("\ufffd" not in p for p in pieces) or "\ufffd" in text


def test_text_goes_in_and_comes_out():
    compiled = CompiledModel(language_model(), ReferenceKernels())

    class Letters(Bytes):
        def __call__(self, text):
            return {"input_ids": [ord(c) - 96 for c in text]}

        def decode(self, ids, **_):
            return "".join(chr(96 + i) for i in ids)

    compiled.tokenizer = Letters()
    options = {"max_new_tokens": 6, "stop": ()}
    answer = compiled.generate("abc", **options)
    assert len(answer) == 6 and answer == "".join(compiled.stream("abc", **options))
    assert compiled.generate(["abc", "z"], **options) == [answer, compiled.generate("z", **options)]
    with pytest.raises(GenerationError, match="no chat template"):
        compiled.generate("abc", chat=True)


def test_left_padding():
    ids, mask = left_pad([[1, 2, 3], [4]], pad=9)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize(
    ("target", "threads", "guessed"), [("cpu:generic", 4, False), ("cpu:generic", 1, True), ("cpu:avx2", 2, True)]
)
def test_loading_an_artifact_that_was_tuned_for_something_else_says_so(tmp_path, monkeypatch, target, threads, guessed):
    monkeypatch.setenv("LBLLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TVM_NUM_THREADS", "2")
    item, progress = language_model(), Notes()
    needed = requirements(item)
    built = KernelSet.build(needed.linears, needed.quantizers, Target.parse("cpu:generic"), trials=0)
    records = [{**record, "target": target, "threads": threads} for record in built.records()]
    artifact.save(item, tmp_path / "out", lock={}, records=records)
    build_kernels(artifact.load(tmp_path / "out"), "cpu:generic", progress)
    sentence = f"not tuned for cpu:generic with 2 threads: {len(records)} of {len(records)} schedules are guesses"
    assert [sentence in note for note in progress.said] == [True] * guessed
