"""Holds a native program against the executor on probe tokens.

Both run the same lowered graph on the same proven kernels, and round differently in between: in norms, attention and
activations. One such difference may move a code of a quantizer by one, and what follows spreads it, so that no fixed
bound is right for all models. What rounding may do is therefore measured on the model itself: the executor runs the
probe again with the token embeddings disturbed by one part in :data:`DISTURBANCE`, some hundred times what rounding
does, so that where rounding could move a code the disturbance has moved one. Without quantized activations it stays
small, and so does the bound.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lbllm_compile.codegen.errors import KernelError
from lbllm_compile.codegen.operators import Arguments
from lbllm_compile.lowering.executor import Executor, Kernels
from lbllm_compile.passes.ir.program import Program, copy_module, set_attribute
from lbllm_compile.passes.ir.rewrite import Node, calls, constant
from lbllm_compile.runtime.native import NativeProgram

PROMPT, STEPS = 9, 4
"""Tokens of the probe's prompts, and of the steps behind them."""

PADDING = 3
"""Tokens that one of the prompts is padded with on the left."""

DISTURBANCE = 1 << 16
"""Token embeddings are disturbed by up to one part in so many."""

DISTURBED = 4
"""Disturbed copies of each sequence."""

FACTOR, FLOOR, CEILING = 4, 1e-3, 0.5
"""The bound is so many times what the disturbance does, at least and at most so much; unrelated logits are 1.4 apart."""

_FACTORS = "lbllm_probe_factors"

_EMBEDDINGS = (torch.ops.lbllm.int8_embedding.default, torch.ops.aten.embedding.default)


class DisagreementError(KernelError):
    """A native program gives other logits than its graph: a bug."""

    exit_code = 1


def check_agreement(program: Program, kernels: Kernels, native: NativeProgram) -> None:
    """Checks a native program against the graph it was translated from.

    Compared are the logits of a prompt and of cached steps of one token behind it, of two sequences at once, one of
    them padded on the left, and of all tokens of both in one call. The distance of two vectors of logits is that of
    their differences from their means, relative to the length of the executor's.

    Raises:
        DisagreementError: the mean distance of one of these is above the bound.
    """
    distance, bound = distances(program, kernels, native)
    if not distance <= bound:
        raise DisagreementError(
            f"the native program does not compute the model: on probe tokens its logits differ from the graph's by"
            f" {distance:.2g} of their length, where rounding explains {bound:.2g}; it is not used, and this is a bug:"
            " please report it"
        )


def distances(program: Program, kernels: Kernels, native: NativeProgram) -> tuple[float, float]:
    """The largest mean distance of the logits of one way to feed the probe from the executor's, and the bound."""
    length = PROMPT + STEPS
    ids = np.random.default_rng(0).integers(0, native.description.bounds.vocabulary, (2, length))
    mask = np.ones_like(ids)
    mask[1, :PADDING] = 0
    expected = _executed(program, kernels, torch.from_numpy(ids), torch.from_numpy(mask))
    exact, disturbed = expected[:2], expected[2:].unflatten(0, (DISTURBED, 2))
    seen = torch.from_numpy(mask).bool()
    rounding = float(_distance(disturbed, exact)[:, seen].mean(1).max())

    found = []
    for sequences in (1, 2):
        stepped = _decoded(native, ids[:sequences], mask[:sequences])
        distance = _distance(stepped, exact[:sequences, PROMPT - 1 :])
        found += [distance[:, :1], distance[:, 1:]]
    session = native.session(2)
    session.start(mask)
    found.append(_distance(torch.from_numpy(session.logits(ids)), exact)[seen])
    return max(float(f.mean()) for f in found), min(max(FACTOR * rounding, FLOOR), CEILING)


def _executed(program: Program, kernels: Kernels, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits ``[(1 + DISTURBED) * B, S, V]`` of the executor for tokens ``[B, S]``: exact, then disturbed."""
    copies = 1 + DISTURBED
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    values = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    repeated = {name: value.repeat(copies, 1) for name, value in values.items()}
    disturbed = _disturbed(program, len(ids) * copies, ids.shape[1], len(ids))
    return Executor(disturbed, kernels)(*disturbed.arguments(repeated))


def _disturbed(program: Program, batch: int, length: int, exact: int) -> Program:
    """The program with token embeddings multiplied by numbers near 1, or 1 in the first ``exact`` sequences."""
    result = program.with_module(copy_module(program.module))
    (ids,) = (node for node in result.placeholders() if node.target == "input_ids")
    embedding = next(n for n in calls(result.graph, *_EMBEDDINGS) if ids in _above(n))
    width = constant(result.module, Arguments(embedding).weight).shape[1]
    noise = torch.rand((batch, length, width), generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise[:exact] = 0
    set_attribute(result.module, _FACTORS, 1 + noise / DISTURBANCE)
    with result.graph.inserting_after(embedding):
        factors = result.graph.get_attr(_FACTORS)
    with result.graph.inserting_after(factors):
        product = result.graph.call_function(torch.ops.aten.mul.Tensor, (embedding, factors))
    embedding.replace_all_uses_with(product, delete_user_cb=lambda user: user is not product)
    result.module.recompile()
    return result


def _above(embedding: Node) -> list[Node]:
    """What an embedding looks up, and what that is made of."""
    return [above for node in embedding.all_input_nodes for above in (node, *node.all_input_nodes)]


def _decoded(native: NativeProgram, ids: np.ndarray, mask: np.ndarray) -> Tensor:
    """Logits ``[B, 1 + STEPS, V]`` behind the prompt, and behind each token that follows."""
    session = native.session(len(ids))
    session.start(mask[:, :PROMPT])
    steps = [session.step(ids[:, :PROMPT])]
    steps += [session.step(ids[:, i : i + 1]) for i in range(PROMPT, PROMPT + STEPS)]
    return torch.from_numpy(np.stack(steps, 1))


def _distance(found: Tensor, expected: Tensor) -> Tensor:
    """Distances ``[...]`` of logits ``[..., V]``; infinite where one is not finite."""
    centered = expected - expected.mean(-1, keepdim=True)
    difference = found - expected
    difference = difference - difference.mean(-1, keepdim=True)
    distance = difference.norm(dim=-1) / centered.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return distance.nan_to_num(nan=torch.inf)
