"""Holds a native program against what it was made from, on probe tokens.

Program and executor run the same lowered graph on the same proven kernels, and round differently in between: in norms,
attention and activations. One such difference may move a code of a quantizer by one, or a token to another expert, and
what follows spreads it, so that no fixed bound is right for all models. What rounding may do is therefore measured on
the model itself: the executor runs the probe again with the token embeddings disturbed by one part in
:data:`DISTURBANCE`, some hundred times what rounding does, so that where rounding could move a code the disturbance has
moved one. Without quantized activations it stays small, and so does the bound.

The forms of the program that decode one token of a sequence or of a few, in few launches and kernel by kernel, compute
the same in the same order, and are held against each other to the bit; so are replays of a list of launches and these
launches one by one, and the tokens that a device chooses and those that the host would.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from lbllm_compile.codegen.backend import DecodedSequence, EagerKernels
from lbllm_compile.codegen.errors import KernelError
from lbllm_compile.codegen.sampling import Draw, drawn
from lbllm_compile.lowering.bounds import lookups
from lbllm_compile.lowering.executor import Executor
from lbllm_compile.lowering.session import Session
from lbllm_compile.native.description import Function
from lbllm_compile.native.language import InputBounds
from lbllm_compile.native.program import NativeProgram, StoredProgram
from lbllm_compile.native.replayed import ReplayedProgram
from lbllm_compile.passes.ir.program import Program, copy_module

PARTS = (19, 4, 1, 1, 1)
"""Tokens of the probe as they are fed: a prompt, a few at once, and single ones; each kind has a form of its own."""

PADDING = 3
"""Tokens that one of the prompts is padded with on the left."""

TOGETHER = 3
"""Sequences that are decoded together in few launches and kernel by kernel; and then as many as can be."""

DISTURBANCE = 1 << 16
"""Token embeddings are disturbed by up to one part in so many."""

DISTURBED = 3
"""Disturbed copies of each sequence."""

FACTOR, FLOOR, CEILING = 2, 1e-3, 1.0
"""The bound is so many times the most that the disturbance does to the logits of a token, at least and at most so much;
unrelated logits are at 1.4."""

DRAWN_FROM = ((0, 1.0), (20, 0.9), (0, 0.7), (5, 1.0))
"""Top-k and top-p of the draws of a probe: each way to leave tokens out, and none."""

UNBOUNDED_VOCABULARY = 100
"""Token ids to draw from where the model looks them up in no table."""


class DisagreementError(KernelError):
    """A native program gives other logits than its graph: a bug."""

    exit_code = 1


def merging_is_exact(native: NativeProgram, function: Function) -> bool:
    """Whether the same tokens in few launches and kernel by kernel give equal logits and state, to the bit.

    Args:
        native: the program.
        function: of few launches.
    """
    batches = (TOGETHER, function.most) if function.batch is None else (function.batch,)
    return all(_merging_is_exact(native, batch) for batch in batches if batch is not None)


def _merging_is_exact(native: NativeProgram, batch: int) -> bool:
    ids = _probe(native.description.bounds, batch)
    prompt = ids.shape[1] // 2
    few, many = (native.session(batch) for _ in range(2))
    for session in (few, many):
        session.step(ids[:, :prompt])
    for i in range(prompt, ids.shape[1]):
        ours, theirs = few.step(ids[:, i : i + 1]), many.step_by_kernel(ids[:, i : i + 1])
        same_state = all(np.array_equal(a, b) for a, b in zip(few.state.arrays, many.state.arrays, strict=True))
        if not np.array_equal(ours, theirs) or not same_state:
            return False
    return True


def check_replay(native: ReplayedProgram) -> None:
    """Checks that replays give what their launches give one by one, to the bit: tokens, logits and KV state; and that
    the tokens are those that the host would choose from these logits, greedily and drawn.

    Half of the steps are given their token, the others go on with the one that was chosen. Then the probe is fed as a
    prompt, in two parts.

    Raises:
        DisagreementError: they do not, or are others.
    """
    (ids,) = _probe(native.description.bounds, 1).tolist()
    replayed, launched = (native.session(1).sequences[0] for _ in range(2))
    for number, token in enumerate(ids):
        given, draw = None if number > len(ids) // 2 else token, _draw(replayed.logits(), number)
        replayed.step(given, draw)
        launched.step_by_launch(given, draw)
        _check_same(native, replayed, launched, f"from token {number + 1} of a probe on")
        _check_choice(native, replayed, draw)
    for sequence in (replayed, launched):
        sequence.rewind(0)
    for number, half in enumerate((ids[: len(ids) // 2], ids[len(ids) // 2 :])):
        draw = _draw(replayed.logits(), number)
        replayed.feed(half, draw)
        launched.feed_by_launch(half, draw)
        _check_same(native, replayed, launched, "in a prompt")
        _check_choice(native, replayed, draw)


def _draw(logits: np.ndarray, number: int) -> Draw | None:
    """How the token of a probe is chosen: every other time it is drawn, each time elsewhere and from other tokens.

    Args:
        logits: of the step before, whose spread is the temperature, so that draws fall on many tokens.
        number: of the step.
    """
    if number % 2 == 0:
        return None
    top_k, top_p = DRAWN_FROM[number // 2 % len(DRAWN_FROM)]
    finite = logits[np.isfinite(logits)]
    spread = float(finite.std(dtype=np.float64)) if finite.size else 0.0
    return Draw(spread or 1.0, top_k, top_p, number * math.sqrt(2.0) % 1.0)


def _check_same(native: ReplayedProgram, replayed: DecodedSequence, launched: DecodedSequence, where: str) -> None:
    # By their bytes: what is no number is no other one, either, and is told as such later.
    ours, theirs = ([s.logits().tobytes(), np.array(s.choice()).tobytes(), s.state()] for s in (replayed, launched))
    if ours != theirs:
        raise DisagreementError(
            f"replaying the program on {native.description.target} gives other logits than its launches one by one,"
            f" {where}; it is not used, and this is a bug: please report it"
        )


def _check_choice(native: ReplayedProgram, sequence: DecodedSequence, draw: Draw | None) -> None:
    """Holds the token that a device has chosen against the one that the host chooses from the same logits."""
    logits, (token, logit) = sequence.logits(), sequence.choice()
    if not np.isfinite(logits.max()):  # there is nothing to draw from, and no model gives such logits
        return
    expected = int(logits.argmax()) if draw is None else drawn(logits, draw)
    if (token, logit) != (expected, logits[expected]):
        raise DisagreementError(
            f"the program on {native.description.target} chooses token {token} of a probe where the host"
            f" {'takes' if draw is None else 'draws'} {expected}; it is not used, and this is a bug: please report it"
        )


def check_agreement(program: Program, kernels: EagerKernels, native: StoredProgram) -> None:
    """Checks a native program against the graph it was translated from.

    Compared are the logits behind a prompt and behind the parts that follow it, of one sequence and of two at once, one
    of them padded on the left, and those of all tokens of two. The distance of two vectors of logits is that of their
    differences from their means, relative to the length of the executor's.

    Raises:
        DisagreementError: the mean distance of one of these is above the bound.
        KernelError: the executor's logits are not finite.
    """
    distance, bound = distances(program, kernels, native)
    if not distance <= bound:
        raise DisagreementError(
            f"the native program does not compute the model: on probe tokens its logits differ from the graph's by"
            f" {distance:.2g} of their length, where rounding explains {bound:.2g}; it is not used, and this is a bug:"
            " please report it"
        )


def distances(program: Program, kernels: EagerKernels, native: StoredProgram) -> tuple[float, float]:
    """The largest mean distance of the logits of one way to feed the probe from the executor's, and the bound.

    Raises:
        KernelError: the executor's are not finite, so that there is no distance.
    """
    ids = _probe(native.description.bounds, 2)
    mask = np.ones_like(ids)
    mask[1, : min(PADDING, ids.shape[1] - 1)] = 0
    ends = [end for end in accumulate(PARTS, initial=0) if end < ids.shape[1]] + [ids.shape[1]]

    one, two, whole = native.session(1), native.session(2), native.session(2)
    for session, batch in ((one, 1), (two, 2), (whole, 2)):
        session.start(mask[:batch, : ends[1]])

    found, rounding = [], []
    for (begin, end), (exact, moved) in zip(pairwise(ends), probed(program, kernels, ids, mask, ends), strict=True):
        part, seen = ids[:, begin:end], torch.from_numpy(mask[:, begin:end]).bool()
        rounding.append(moved)
        found.append(_distance(torch.from_numpy(one.step(part[:1])), exact[:1, -1]))
        found.append(_distance(torch.from_numpy(two.step(part)), exact[:, -1]))
        found.append(_distance(torch.from_numpy(whole.logits(part)), exact)[seen])
    bounded = native.description.bounds.vocabulary is not None
    bound = explained(max(rounding)) if bounded else CEILING
    return max(float(distance.mean()) for distance in found), bound


def probed(
    program: Program, kernels: EagerKernels, ids: np.ndarray, mask: np.ndarray, ends: Sequence[int]
) -> Iterator[tuple[Tensor, float]]:
    """The executor's logits of tokens, and what the disturbance does to them.

    Args:
        program: the lowered graph.
        kernels: of the executor.
        ids, mask: int64 ``[B, S]``: tokens, and which of them are not padding.
        ends: 0, and the end of each part that is fed at once.

    Yields:
        For each part, logits ``[B, part, V]``, and the farthest that those of a token are moved, relative to their
        length.

    Raises:
        KernelError: the logits are not finite.
    """
    batch, copies = len(ids), 1 + DISTURBED
    disturbed = _disturbed(program, exact=batch)
    reference = Session(disturbed, Executor(disturbed, kernels), batch * copies, 0)
    reference.start(np.tile(mask[:, : ends[1]], (copies, 1)))
    for begin, end in pairwise(ends):
        seen = torch.from_numpy(mask[:, begin:end]).bool()
        exact, *moved = reference.logits(torch.from_numpy(np.tile(ids[:, begin:end], (copies, 1)))).split(batch)
        if not bool(torch.isfinite(exact[seen]).all()):
            raise KernelError(
                "the model's logits of probe tokens are infinite or NaN: its weights are too large; compile it again"
            )
        yield exact, max(float(_distance(logits, exact)[seen].max()) for logits in moved)


def explained(moved: float) -> float:
    """The distance of logits that rounding explains where the disturbance moves them so far."""
    return min(max(FACTOR * moved, FLOOR), CEILING)


def _probe(bounds: InputBounds, batch: int) -> np.ndarray:
    """Random token ids ``[batch, S]``: as many as all parts have, or as there are positions."""
    length = min(most for most in (sum(PARTS), bounds.positions, bounds.slots) if most is not None)
    return np.random.default_rng(0).integers(0, bounds.vocabulary or UNBOUNDED_VOCABULARY, (batch, length))


def _disturbed(program: Program, exact: int) -> Program:
    """The program with token embeddings disturbed in all but the first sequences, ``exact`` in number.

    Tokens that are looked up in no table of weights stay as they are.
    """
    result = program.with_module(copy_module(program.module))
    embedding = next((found.node for found in lookups(result) if found.source == "input_ids"), None)
    if embedding is not None:
        with result.graph.inserting_after(embedding):
            disturbed = result.graph.call_function(_Disturbance(exact), (embedding,))
        embedding.replace_all_uses_with(disturbed, delete_user_cb=lambda user: user is not disturbed)
        result.module.recompile()
    return result


class _Disturbance:
    """Multiplies ``[B, ...]`` by numbers near 1, but for the first ``exact`` of the batch."""

    __name__ = "disturb"

    def __init__(self, exact: int):
        self._exact = exact

    def __call__(self, x: Tensor) -> Tensor:
        noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        noise[: self._exact] = 0
        return x * (1 + noise / DISTURBANCE)


def _distance(found: Tensor, expected: Tensor) -> Tensor:
    """Distances ``[...]`` of logits ``[..., V]``; infinite where one is not finite."""
    centered = expected - expected.mean(-1, keepdim=True)
    difference = found - expected
    difference = difference - difference.mean(-1, keepdim=True)
    distance = difference.norm(dim=-1) / centered.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return distance.nan_to_num(nan=torch.inf)
