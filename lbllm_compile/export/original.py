"""Gives the weights of an artifact back to the architecture that the model had before it was compiled.

The graph of an artifact names its weights by the paths they had in the original module. What passes did to them is
undone or harmless there: linears are stored apart even where ``merge`` joined them, scales that ``smooth`` moved are in
weights on both sides, a mean key that it subtracts moves all of a query's scores alike. Two things the graph alone does
not tell, and the original module does: which weights ``canonicalize`` transposed, and which norms add a number to their
weight that ``smooth`` has added already. Whether all of it came out right is tried: the module must compute what the
graph computes with float activations.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lbllm_compile import frontend
from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.codegen.format import Int4Weight, QuantizedWeight
from lbllm_compile.codegen.operators import Arguments
from lbllm_compile.codegen.operators.lbllm.linears import INT8_WEIGHT
from lbllm_compile.frontend.loading import skeleton_of, with_state
from lbllm_compile.native.language import COMPILED_CONTEXT, context_length
from lbllm_compile.passes.ir import spool, weight_only
from lbllm_compile.passes.ir.annotations import linears
from lbllm_compile.passes.ir.compare import relative_error
from lbllm_compile.passes.ir.program import Program
from lbllm_compile.passes.ir.rewrite import Node, calls, constant, is_call
from lbllm_compile.passes.lower import planes_of_heads, stored_int4, stored_weights
from lbllm_compile.passes.outliers import ORDER

TOLERANCE = 1e-4
"""Largest relative error between logits of the module and of the graph, which sum in other orders."""

_aten = torch.ops.aten
_lbllm = torch.ops.lbllm


class ExportError(LbllmError):
    """An artifact cannot be written in the form that was asked for, or not to that place."""


@dataclass(frozen=True)
class Original:
    """The model an artifact was compiled from, with the artifact's weights.

    Attributes:
        module: a transformers language model in float32.
        bit: the W(1+1) matrices by path; stored ``[..., N, K]``, also where the module has them transposed.
        int4: the 4-bit matrices by path.
        rows: int8 matrices ``[N, K]`` and their float32 scales ``[N]`` by path.
        error: relative error of the module's logits against those of the graph with float activations.
    """

    module: Any
    bit: Mapping[str, QuantizedWeight]
    int4: Mapping[str, Int4Weight]
    rows: Mapping[str, tuple[Tensor, Tensor]]
    error: float


def original(program: Program) -> Original:
    """The original architecture around the weights of a lowered program.

    Raises:
        ExportError: the program is no language model, outlier channels of it have moved, its weights do not fit its
            architecture, or its graph computes something else.
        ModelError: the architecture is none that transformers has, or has weights that the program lacks.
    """
    what = f"the artifact of '{program.name}'"
    if program.kind != "causal-lm":
        raise ExportError(f"{what} is no language model; only language models can be exported")
    if _moves_outliers(program):
        raise ExportError(
            f"{what} cannot be exported: the loudest channels of its inputs have moved (pass 'outliers'), which no"
            " format of an export has; run, chat and serve take the artifact as it is"
        )
    planes, rows = stored_weights(program), _int8_rows(program)
    shared = stored_int4(program)
    apart = _apart(program)
    int4 = {apart[path] if path in apart and path in rows else path: weight for path, weight in shared.items()}
    heads = {path: apart[path] for path in planes_of_heads(program) if path in {**rows, **shared}}
    bit = {heads.get(path, path): weight for path, weight in planes.items()}
    dropped = (COMPILED_CONTEXT, "quantization_config")
    config = {k: v for k, v in program.config.items() if k not in dropped}
    if int4.keys() != shared.keys() or bit.keys() != planes.keys():
        config["tie_word_embeddings"] = False
    empty = skeleton_of(config, what)
    foreign = sorted((bit.keys() | int4.keys() | rows.keys()) - empty.state_dict().keys())
    if foreign:
        raise ExportError(
            f"{what} cannot be exported: it computes with '{foreign[0]}', for which {type(empty).__name__} has no place"
        )
    module = with_state(empty, spool.mapped(_weights(program, empty, {**bit, **int4}, rows)), what)
    return Original(module, bit, int4, rows, _check(program, module, what))


def _moves_outliers(program: Program) -> bool:
    """Whether columns are apart from their matrix, or inputs are gathered in another order."""
    orders = (node for node in program.graph.nodes if node.op == "get_attr" and node.target.endswith(f".{ORDER}"))
    return any(info.role == "outliers" for _, info in linears(program)) or any(orders)


def _apart(program: Program) -> dict[str, str]:
    """Paths of their own for the matrices of heads of 4 or 2 bits, by the path that each is stored under: what a matrix
    takes where the embedding that the head was tied to has another form."""
    found: dict[str, str] = {}
    for node, info in linears(program):
        if info.role == "head" and is_call(node, _lbllm.int4_linear.default, _lbllm.bit_linear.default):
            arguments = Arguments(node)
            part = arguments.codes if is_call(node, _lbllm.int4_linear.default) else arguments.sign
            found[str(part.target).rpartition(".")[0]] = f"{info.path}.weight"
    return found


def _int8_rows(program: Program) -> dict[str, tuple[Tensor, Tensor]]:
    """Int8 matrices and their scales by the path of the matrix they stand for."""
    pairs = [
        *(Arguments(n).pick(*INT8_WEIGHT) for n in calls(program.graph, _lbllm.int8_linear.default)),
        *(Arguments(n).pick("weight", "scale") for n in calls(program.graph, _lbllm.int8_embedding.default)),
    ]
    return {
        rows.target.removesuffix(".rows"): (constant(program.module, rows), constant(program.module, scale))
        for rows, scale in pairs
    }


def _weights(
    program: Program,
    empty: nn.Module,
    grouped: Mapping[str, QuantizedWeight | Int4Weight],
    rows: Mapping[str, tuple[Tensor, Tensor]],
) -> Iterator[tuple[str, Tensor]]:
    """Those weights of the original module that the program has, one by one, in float32 and as the module has them."""
    stored = dict(program.parameters())
    readers: dict[str, list[Node]] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            readers.setdefault(node.target, []).extend(node.users)
    offsets: dict[tuple[type, torch.Size], float] = {}
    for path, parameter in empty.state_dict(keep_vars=True).items():
        owner = empty.get_submodule(path.rpartition(".")[0])
        if path in grouped:
            yield path, _as_in(owner, parameter, grouped[path].dequantize())
        elif path in rows:
            yield path, _lbllm.unpack_rows(*rows[path])
        elif path in stored:
            tensor = _as_in(owner, parameter, stored[path])
            if tensor.dim() == 1 and path.endswith(".weight") and not any(map(_adds_number, readers[path])):
                key = type(owner), tensor.shape
                if key not in offsets:
                    offsets[key] = _offset(owner)
                tensor = tensor - offsets[key]
            yield path, tensor


def _as_in(owner: nn.Module, parameter: Tensor, tensor: Tensor) -> Tensor:
    """A matrix as its module has it: ``canonicalize`` transposes those that multiply the other way round."""
    from transformers.pytorch_utils import Conv1D

    if tensor.dim() < 2:
        return tensor
    if tensor.shape != parameter.shape and tensor.mT.shape == parameter.shape:
        return tensor.mT
    # Only the kind of module tells of square ones.
    return tensor.mT if isinstance(owner, Conv1D) or getattr(owner, "is_transposed", False) else tensor


def _adds_number(reader: Node) -> bool:
    """Whether a reader of a weight adds a number to it."""
    while is_call(reader, _aten.to.dtype, _aten._to_copy.default) and len(reader.users) == 1:
        reader = next(iter(reader.users))
    return is_call(reader, _aten.add.Tensor) and not isinstance(Arguments(reader).other, fx.Node)


@torch.no_grad()
def _offset(owner: nn.Module) -> float:
    """What a norm adds to its weight, 1 in Gemma's; 0 for every module that is no norm of one input.

    Its output grows linearly with the weight: where it is zero tells the offset.
    """
    names = {name for name, _ in owner.named_parameters()}
    if not {"weight"} <= names <= {"weight", "bias"}:
        return 0.0
    norm = copy.deepcopy(owner).to_empty(device="cpu")
    values = torch.linspace(-1.0, 2.0, norm.weight.numel())[None]  # pyright: ignore[reportCallIssue]
    outputs = []
    for value in (0.0, 1.0):
        for name, parameter in norm.named_parameters():
            parameter.fill_(value if name == "weight" else 0.0)
        try:
            outputs.append(norm(values))
        except (TypeError, RuntimeError):
            return 0.0
    gain = outputs[1] - outputs[0]
    peak = int(gain.abs().argmax()) if gain.shape == values.shape else None
    if peak is None or not float(gain[0, peak]):
        return 0.0
    return float((outputs[0][0, peak] / gain[0, peak]).round())


@torch.no_grad()
def _check(program: Program, module: Any, what: str) -> float:
    """Compares module and graph on tokens with padding on the left; returns the relative error.

    Raises:
        ExportError: they disagree.
    """
    length = min(12, context_length(program.config) or 12)
    ids = (torch.arange(2 * length) * 7 + 3).remainder(int(module.get_input_embeddings().num_embeddings))
    mask = torch.ones((2, length), dtype=torch.int64)
    mask[1, : length // 2] = 0
    inputs = frontend.language_model_inputs(ids.view(2, length), mask)
    with spool.streamed(module):
        actual = module(**inputs, use_cache=False).logits
    error = relative_error(weight_only.run(program, inputs)[mask.bool()], actual[mask.bool()])
    if not error <= TOLERANCE:
        raise ExportError(
            f"{what} cannot be exported: {type(module).__name__} with its weights computes something else than its"
            f" graph (relative error {error:.2g}), so a pass has changed more than weights"
        )
    return error
