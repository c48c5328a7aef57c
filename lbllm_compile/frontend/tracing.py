"""Traces a :class:`UserModel` with ``torch.export`` into a :class:`Program`, and checks what came out."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lbllm_compile.frontend import rotary
from lbllm_compile.frontend.loading import UserModel
from lbllm_compile.frontend.messages import (
    CaptureError,
    a_word,
    capture_reason,
    fixes_size,
    is_users,
    reason_of,
    source_line,
)
from lbllm_compile.native.language import COMPILED_CONTEXT, context_length
from lbllm_compile.passes.ir import spool
from lbllm_compile.passes.ir.program import Program, set_attribute

LM_INPUTS = ("input_ids", "attention_mask", "position_ids")
"""Placeholders of a captured language model, in order."""

_CHECK_TOLERANCE = 1e-4
"""Relative error allowed between the captured graph and the model, at sizes the graph was not traced with."""


_FRAME_HERE = re.compile(rf' *File "{re.escape(__file__)}".*\n(?:    .*(?:\n|$))*')
"""Frames of this file, which are no part of the model, in a stack trace."""


class _LanguageModel(nn.Module):
    """A transformers causal LM as a function of the three placeholders."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        ).logits


def language_model_inputs(input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
    """The three placeholders for token ids ``[B, S]``; positions count attended tokens, so left padding is fine."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    return {"input_ids": input_ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


@torch.no_grad()
def capture(model: UserModel, context: int | None = None) -> Program:
    """Traces the model's forward into a :class:`Program` at ATen level, batch and sequence dynamic.

    Weights become ``get_attr`` nodes under the paths they have in the model; tied weights share one path. Nodes keep
    ``nn_module_stack`` (which module they come from), ``stack_trace`` (which line) and ``val`` (their shape). Where the
    graph is right up to some length only, its configuration says so under ``COMPILED_CONTEXT``, and the metadata's
    ``context`` says why.

    Args:
        model: what to trace.
        context: tokens that a language model shall attend to at most; by default as many as it is made for, or, where
            its rotary frequencies depend on the length, as many as have unscaled ones.

    Raises:
        CaptureError: the forward cannot be captured, or not for that context; the message names the operation, the line
            and a way out.
    """
    if model.kind != "causal-lm":
        if context is not None:
            raise CaptureError(f"'{model.name}' is no language model, so it has no context; leave out --context")
        inputs = _at_least_two(model.inputs)
        free = _takes_any_batch(model.module, inputs)
        shapes = {n: {0: torch.export.Dim.AUTO} if free and t.dim() else None for n, t in inputs.items()}
        return _capture(model, model.module, inputs, lambda _: shapes, "")
    held = rotary.frozen_kind(model.module, context)
    _check_context(model, context, held)
    vocabulary = int(model.module.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    with rotary.frozen(model.module, held.context) if held else contextlib.nullcontext():
        module, inputs = _LanguageModel(model.module), language_model_inputs(_token_ids((2, 5), vocabulary))
        program = _capture(model, module, inputs, _lm_shapes, "model")
    limits = [n for n in (context, held and held.context, program.metadata.get("longest")) if n]
    if not limits:
        return program
    config = {**program.config, COMPILED_CONTEXT: min(limits)}
    metadata = {**program.metadata, "context": str(held)} if held else program.metadata
    return dataclasses.replace(program, config=config, metadata=metadata)


def _check_context(model: UserModel, context: int | None, held: rotary.Frozen | None) -> None:
    longest = context_length(model.config)
    if context is None:
        return
    if context < 1:
        raise CaptureError(f"--context cannot be {context}; ask for at least 1 token")
    if longest is not None and context > longest and not (held and held.kind == rotary.DYNAMIC):
        raise CaptureError(f"'{model.name}' attends to {longest} tokens at most; --context cannot be {context}")


def _lm_shapes(longest: int | None) -> dict[str, Any]:
    """Dynamic sizes of a language model's inputs, sequences of up to ``longest`` tokens."""
    batch, sequence = torch.export.Dim("batch", min=1), torch.export.Dim("sequence", min=1, max=longest)
    return {name: {0: batch, 1: sequence} for name in LM_INPUTS}


def _capture(
    model: UserModel,
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    shapes: Callable[[int | None], Mapping[str, Any]],
    strip: str,
) -> Program:
    """Traces ``module``, the model or a wrapper that holds it as ``strip``, on ``inputs``.

    Args:
        shapes: gives dynamic sizes for the longest sequence, None for any.
    """
    _run_eagerly(model, module, inputs)
    longest = None
    try:
        exported = _export(model, module, inputs, shapes(None))
    except _FixedSizeError as error:
        if getattr(model.module, "_is_stateful", False):
            where = _loop_over_tokens(module, inputs)
            raise CaptureError(
                f"'{model.name}' cannot be captured: its layers carry a recurrent state from token to token (a state"
                f" space, linear attention or the like), in a loop that no graph of any length holds{where}; only"
                " attention and short convolutions are supported"
            ) from error
        # A forward that slices a table made for the longest sequence fits sequences up to that.
        longest = context_length(model.config)
        if longest is None:
            raise
        exported = _export(model, module, inputs, shapes(longest))
    program = Program(
        module=_graph_module(model, exported, strip),
        kind=model.kind,
        name=model.name,
        config=model.config,
        tokenizer=model.tokenizer,
        metadata={"longest": longest} if longest else {},
    )
    _check(model, module, program, inputs)
    return program


class _Calls(TorchDispatchMode):
    """Counts calls of operators, by the operator and the user's line that makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        frame = sys._getframe(1)
        while frame is not None and not is_users(frame.f_code.co_filename):
            frame = frame.f_back
        if frame is not None:
            self.counts[str(func), frame.f_code.co_filename, frame.f_lineno] += 1
        return func(*args, **(kwargs or {}))


def _loop_over_tokens(module: nn.Module, inputs: Mapping[str, Tensor]) -> str:
    """`` (operator at line)`` of what a language model calls once for every token; empty where nothing is."""
    counts = []
    for length in (inputs["input_ids"].shape[1], inputs["input_ids"].shape[1] + 1):
        with spool.streamed(module), _Calls() as calls:
            module(**language_model_inputs(inputs["input_ids"].repeat(1, 2)[:, :length]))
        counts.append(calls.counts)
    few, many = counts
    found = next((call for call, count in many.items() if count > few[call]), None)
    return f" ({found[0]} at {source_line(*found[1:])})" if found else ""


def _token_ids(shape: tuple[int, int], vocabulary: int) -> Tensor:
    return (torch.arange(shape[0] * shape[1]) * 7 + 3).remainder(vocabulary).view(shape)


def _at_least_two(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Repeats a batch of one, because a traced size of 1 would stay 1."""
    single = all(t.dim() > 0 and t.shape[0] == 1 for t in inputs.values())
    return {n: torch.cat([t, t]) if single else t for n, t in inputs.items()}


def _one_more(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: torch.cat([t, t[:1]]) if t.dim() else t for n, t in inputs.items()}


def _takes_any_batch(module: nn.Module, inputs: Mapping[str, Tensor]) -> bool:
    """Whether the first dimension of every input is a batch: one row more is as welcome."""
    if len({t.shape[0] for t in inputs.values() if t.dim()}) != 1:
        return False
    try:
        with spool.streamed(module):
            module(**_one_more(inputs))
    except (RuntimeError, ValueError, IndexError, AssertionError):
        return False
    return True


def _run_eagerly(model: UserModel, module: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    try:
        with spool.streamed(module):
            output = module(**inputs)
    except Exception as error:
        raise CaptureError(f"the forward of '{model.name}' failed on its example inputs: {reason_of(error)}") from error
    if not isinstance(output, Tensor):
        raise CaptureError(
            f"the forward of '{model.name}' returns {a_word(type(output).__name__)}; wrap the model so that it"
            " returns one tensor"
        )


def _export(
    model: UserModel, module: nn.Module, inputs: Mapping[str, Tensor], shapes: Mapping[str, Any]
) -> torch.export.ExportedProgram:
    # A tensor must not be two inputs at once, and export keeps what it gets.
    arguments = {n: t.clone() for n, t in inputs.items()}
    try:
        with _quiet_export(), _ordered_sets(module):
            exported = torch.export.export(
                module,
                args=(),
                kwargs=arguments,
                dynamic_shapes=dict(shapes),
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            if any(_mutates(node) for node in exported.graph.nodes):
                exported = exported.run_decompositions({})
    except Exception as error:
        kind = _FixedSizeError if fixes_size(error) else CaptureError
        raise kind(f"'{model.name}' cannot be captured: {capture_reason(error)}") from error
    written = [
        *exported.graph_signature.buffers_to_mutate.values(),
        *exported.graph_signature.user_inputs_to_mutate.values(),
    ]
    if written:
        raise CaptureError(
            f"'{model.name}' cannot be captured: its forward writes to '{written[0]}'; compute a new tensor instead"
        )
    return exported


class _FixedSizeError(CaptureError):
    """The forward fits some sizes only."""


class _OrderedSet(set):
    """A set whose elements come in the order in which it was given them."""

    def __init__(self, elements: Iterable[Any] = ()):
        ordered = dict.fromkeys(elements)
        super().__init__(ordered)
        self._place = {element: place for place, element in enumerate(ordered)}

    def __iter__(self) -> Iterator[Any]:
        return iter(sorted(super().__iter__(), key=lambda element: self._place.get(element, len(self._place))))


@contextlib.contextmanager
def _ordered_sets(module: nn.Module) -> Iterator[None]:
    """While this lasts, ``set`` is :class:`_OrderedSet` in the files that define a model.

    Strings hash differently in every process. A forward that walks through a set of them (transformers' Gemma 3 makes a
    rotary table for each kind of layer) would give another graph each time, and an interrupted compile of it could not
    be resumed.
    """
    names = {type(m).__module__ for m in module.modules()}
    files = [sys.modules[name] for name in names if name in sys.modules and not name.startswith("torch.")]
    changed = [file for file in files if "set" not in vars(file)]
    for file in changed:
        vars(file)["set"] = _OrderedSet
    try:
        yield
    finally:
        for file in changed:
            del vars(file)["set"]


@contextlib.contextmanager
def _quiet_export() -> Iterator[None]:
    """Silence around torch.export, which writes the half-traced graph to stderr before it raises."""
    silence = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        warnings.simplefilter("ignore")
        yield


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def _graph_module(model: UserModel, exported: torch.export.ExportedProgram, strip: str) -> fx.GraphModule:
    """Rebuilds the exported graph with weights as attributes under their original paths."""
    from torch.export.graph_signature import InputKind

    prefix = f"{strip}." if strip else ""
    first_path = {id(t): n for n, t in reversed([*_named_tensors(model.module)])}
    root = nn.Module()
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    call = exported.call_spec.in_spec
    assert call is not None
    arguments = iter(call.child(1).context)  # the keyword arguments' names, in order
    for node in exported.graph.nodes:
        if node.op == "output":
            graph.output(values[node.args[0][0]])
            continue
        if node.op != "placeholder":
            values[node] = _copy_node(exported, root, graph, node, values)
        elif specs[node.name].kind is InputKind.USER_INPUT:
            values[node] = graph.placeholder(next(arguments))
        else:
            target = str(specs[node.name].target)
            tensor = exported.state_dict[target] if target in exported.state_dict else exported.constants[target]
            path = first_path.get(id(tensor), target.removeprefix(prefix))
            set_attribute(root, path, tensor)  # pyright: ignore[reportArgumentType]
            values[node] = graph.get_attr(path)
        values[node].meta = _clean_meta(node.meta, strip)
    return fx.GraphModule(root, graph)


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _copy_node(
    exported: torch.export.ExportedProgram,
    root: nn.Module,
    graph: fx.Graph,
    node: fx.Node,
    values: Mapping[fx.Node, fx.Node],
) -> fx.Node:
    if node.op == "get_attr":  # the body of a higher-order operator
        root.add_module(str(node.target), getattr(exported.graph_module, str(node.target)))
    return graph.node_copy(node, lambda n: values[n])


def _clean_meta(meta: Mapping[str, Any], strip: str) -> dict[str, Any]:
    """What later passes may rely on: shape, line and module path, the latter without the wrapper's prefix."""
    kept = {k: meta[k] for k in ("val",) if k in meta}
    if trace := _FRAME_HERE.sub("", meta.get("stack_trace") or ""):
        kept["stack_trace"] = trace
    stack: dict[str, tuple[str, str]] = {}
    for key, (path, kind) in meta.get("nn_module_stack", {}).items():
        if path == "_empty_nn_module_stack_from_metadata_hook" or (strip and path == ""):
            continue
        path = path.removeprefix(strip).removeprefix(".") if strip else path
        stack[key] = (path, kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}")
    if stack:
        kept["nn_module_stack"] = stack
    return kept


@torch.no_grad()
def _check(model: UserModel, module: nn.Module, program: Program, inputs: Mapping[str, Tensor]) -> None:
    """Compares graph and model at sizes other than the traced ones, with padding on the left.

    Raises:
        CaptureError: they disagree, which means that tracing froze something that depends on the inputs.
    """
    attended: Any = ...
    if model.kind == "causal-lm":
        vocabulary = int(model.module.get_input_embeddings().num_embeddings)  # type: ignore[operator]
        mask = torch.ones((3, 9), dtype=torch.int64)
        mask[1, :4] = 0
        inputs, attended = language_model_inputs(_token_ids((3, 9), vocabulary), mask), mask.bool()
    elif all(isinstance(n.meta["val"].shape[0], torch.SymInt) for n in program.placeholders() if n.meta["val"].dim()):
        inputs = _one_more(inputs)
    with spool.streamed(module):
        expected = module(**inputs)[attended]
    try:
        actual = program.run(inputs)[attended]
    except Exception as error:
        raise CaptureError(f"the captured graph of '{model.name}' does not run: {reason_of(error)}") from error
    error = float((actual - expected).norm() / expected.norm().clamp(min=1e-30))
    if not error <= _CHECK_TOLERANCE:
        raise CaptureError(
            f"the captured graph of '{model.name}' differs from the model by {error:.2g}; its forward must be a"
            " function of its inputs alone, without branches on their values"
        )


def program_hash(program: Program) -> str:
    """SHA-256 of a program's graph and weights: two programs that agree in it compute the same."""
    return _hash(program.parameters(), str(program.graph))


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of a module's weights and their names."""
    return _hash(module.named_parameters(), type(module).__qualname__)


def _hash(tensors: Iterable[tuple[str, Tensor]], preamble: str) -> str:
    digest = hashlib.sha256(preamble.encode())
    gauge = spool.Gauge()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        gauge.use([tensor])
    spool.release()
    return digest.hexdigest()
