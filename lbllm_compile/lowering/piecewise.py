"""Holds a lowered graph's operators, one by one and on the same inputs, against what runs in their place.

A kernel must give the bits of its operator. What an operator is translated into rounds in its own way, and so has a
bound. Translations depend on what an operator is and on sizes, not on where it stands, so of operators that are alike
one is looked at. One that keeps a state from call to call has no function of its own, and is left to the comparison of
the whole program (:mod:`.compare`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from lbllm_compile.codegen.backend import Array, EagerKernels, Kernels, Machine, backend_of
from lbllm_compile.codegen.errors import UntranslatableError
from lbllm_compile.codegen.program.builder import TensorSpec
from lbllm_compile.codegen.progress import Progress
from lbllm_compile.lowering.executor import Executor
from lbllm_compile.lowering.translate import graph_weights, translate_graph
from lbllm_compile.passes.ir.parting import Piece, difference, pieces
from lbllm_compile.passes.ir.program import STATE, Program
from lbllm_compile.passes.ir.rewrite import calls_of_role

KERNEL, NATIVE = "kernel", "native operator"
"""What is held against an operator: the kernel that the executor runs, and what it is translated into."""

ALLOWED = {KERNEL: 0.0, NATIVE: 1e-3}
"""The largest relative error (Frobenius norm) of each; 0 for bit-equal."""

_FUNCTION = "piece"


@dataclass(frozen=True)
class Held:
    """An operator and how far what runs in its place is from it.

    Attributes:
        kind: ``KERNEL`` or ``NATIVE``.
        piece: the operator.
        error: relative error.
    """

    kind: str
    piece: Piece
    error: float


def hold(program: Program, kernels: Kernels, probe: Mapping[str, Any], progress: Progress) -> Iterator[Held]:
    """Holds a lowered program's operators against kernels and translations.

    Args:
        program: after ``lower``.
        kernels: proven kernels of everything in it.
        probe: inputs by placeholder.
        progress: told what goes on.
    """
    count, found = pieces(program, probe)
    seen: set[Any] = set()
    with progress.task("holding operators against what runs", count) as task:
        for piece in found:
            for kind, run in ((KERNEL, on_kernels), (NATIVE, natively)):
                if kind == KERNEL and not calls_of_role(piece.program.graph, "kernel"):
                    continue
                if kind == NATIVE and (not _alone(piece, program) or (form := _form(piece)) in seen):
                    continue
                if kind == NATIVE:
                    seen.add(form)
                try:
                    value = run(piece.program, piece.inputs, kernels)
                except UntranslatableError:
                    continue  # the whole is not translated, either, and says why
                yield Held(kind, piece, difference(piece.value.float(), value.float()))
            task.advance(piece.node.name)


def on_kernels(program: Program, inputs: Mapping[str, Any], kernels: EagerKernels) -> Tensor:
    """What a lowered program gives on kernels, operator by operator."""
    return Executor(program, kernels)(*program.arguments(inputs))


def natively(program: Program, inputs: Mapping[str, Any], kernels: Kernels) -> Tensor:
    """What a lowered program without state gives where it is translated and compiled.

    Raises:
        UntranslatableError: it cannot be.
    """
    given = [(str(n.target), inputs[str(n.target)]) for n in program.placeholders()]
    specs = [TensorSpec(name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in given]
    backend = backend_of(kernels.target)
    compiled = backend.compile(translate_graph(program, kernels, specs, _FUNCTION), kernels)
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "piece.so"
        compiled.export(library)
        machine = backend.machine(library)
        tensors = [machine.tensor(_held_by(machine, t)) for _, t in given]
        weights = machine.tuple([_held_by(machine, t) for t in graph_weights(program, kernels)])
        result = machine.function(_FUNCTION)(*tensors, weights, machine.tuple([]))
        return torch.from_numpy(machine.array(result).copy())


def _held_by(machine: Machine, tensor: Tensor) -> Array:
    """A tensor in a machine's own memory, aligned as kernels want it; a stored weight may lie anywhere in its file."""
    memory = machine.zeros(tensor.nbytes)
    memory[:] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memory.view(str(tensor.dtype).removeprefix("torch.")).reshape(tuple(tensor.shape))


def _alone(piece: Piece, program: Program) -> bool:
    """Whether a piece of a language model can be a function of tensors."""
    has_state = any(STATE in n.meta for n in piece.program.placeholders())
    values = [*piece.inputs.values(), piece.value]
    tensors = all(isinstance(v, Tensor) and not v.is_complex() for v in values)
    return program.kind == "causal-lm" and tensors and not has_state and piece.value.dtype != torch.bool


def _form(piece: Piece) -> Any:
    """What a translation depends on: operators, arguments that are no tensors, and dtypes and shapes of those."""
    places = {n: i for i, n in enumerate(piece.program.graph.nodes)}
    weights = dict(piece.program.parameters())

    def described(node: fx.Node) -> Any:
        tensor = piece.inputs[str(node.target)] if node.op == "placeholder" else weights.get(str(node.target))
        if node.op in ("placeholder", "get_attr"):
            return (node.op, None if tensor is None else (str(tensor.dtype), tuple(tensor.shape)))
        return (str(node.target), repr(fx.map_arg((node.args, node.kwargs), lambda n: f"%{places[n]}")))

    return tuple(described(node) for node in places)
