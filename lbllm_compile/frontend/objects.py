"""Models that are given as objects instead of being named. The caller's own object is never changed."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lbllm_compile.frontend.loading import (
    UserModel,
    bind_inputs,
    check_tokenizer,
    is_causal_lm,
    load,
    prepare,
    refuse_quantized_module,
)
from lbllm_compile.frontend.messages import ModelError, a_word, reason_of
from lbllm_compile.passes.ir import spool


@dataclass(frozen=True)
class Given:
    """What comes with a model as objects; each takes the place of what the model itself brings.

    Attributes:
        tokenizer: a transformers tokenizer.
        texts: documents to calibrate a language model on, read once.
        example_inputs: a tensor, tuple or dict to call the module with, batched along the first dimension; for a module
            that is given as an object and is no transformers language model.
        calibration_inputs: batches like them to calibrate it on, read once.
    """

    tokenizer: Any = None
    texts: Iterable[str] | None = None
    example_inputs: Any = field(default=None, compare=False)
    calibration_inputs: Iterable[Any] | None = field(default=None, compare=False)


def load_given(source: Any, given: Given) -> UserModel:
    """Reads a model that is named (see :func:`load`) or given as an object, with what comes with it.

    Args:
        source: a name, or a ``torch.nn.Module`` with its weights on any device in any floating-point type.
        given: what comes with it.

    Raises:
        ModelError: it is not a usable model, or what comes with it does not fit; the message says what to do.
    """
    return attach(load(source) if isinstance(source, (str, Path)) else _load_object(source, given), given)


def attach(model: UserModel, given: Given) -> UserModel:
    """A model with what comes with it in place of its own.

    Raises:
        ModelError: what comes with it does not fit; the message says what to do.
    """
    language = model.kind == "causal-lm"
    if given.example_inputs is not None and (language or not model.in_memory):
        raise ModelError(
            f"'{model.name}' needs no example_inputs; they belong to a module that is given as an object and is no"
            " language model"
        )
    if given.tokenizer is not None:
        check_tokenizer(given.tokenizer, "tokenizer is")
        model = dataclasses.replace(model, tokenizer=given.tokenizer)
    if given.texts is not None:
        if not language:
            raise ModelError(
                f"'{model.name}' is no language model, so texts cannot calibrate it; give calibration_inputs instead"
            )
        texts = _iterated("texts", given.texts)
        model = dataclasses.replace(model, calibration_text=texts, calibration_origin="the given texts")
    if given.calibration_inputs is not None:
        if language:
            raise ModelError(f"'{model.name}' is a language model; calibrate it with texts instead of inputs")
        inputs = _iterated("calibration_inputs", given.calibration_inputs)
        model = dataclasses.replace(model, calibration_inputs=inputs, calibration_origin="the given inputs")
    return model


def _load_object(module: Any, given: Given) -> UserModel:
    # What torch.compile returns holds the module that it compiles.
    module = getattr(module, "_orig_mod", module)
    if isinstance(module, type) and issubclass(module, nn.Module):
        raise ModelError(f"the model is the class {module.__name__}; give an instance of it")
    if not isinstance(module, nn.Module):
        raise ModelError(
            f"the model is {a_word(type(module).__name__)}; give the name of one or an instance of torch.nn.Module"
        )
    name = Path(str(getattr(getattr(module, "config", None), "_name_or_path", ""))).name or type(module).__name__
    if any(p.is_meta for p in module.parameters()):
        raise ModelError(f"the weights of '{name}' are on the meta device; load them first, or name the model")
    kind = "causal-lm" if is_causal_lm(module) else "module"
    model = UserModel(module, kind, name, f"{a_word(type(module).__name__)} object", in_memory=True)
    refuse_quantized_module(model)
    copied = _copy(module, name)
    if kind == "causal-lm":
        return prepare(dataclasses.replace(model, module=copied))
    if given.example_inputs is None:
        raise ModelError(
            f"'{name}' is no transformers language model, so it needs example_inputs: the tensors to call it with"
        )
    return prepare(
        dataclasses.replace(model, module=copied, inputs=bind_inputs(copied, given.example_inputs, "example_inputs"))
    )


def _copy(module: nn.Module, name: str) -> nn.Module:
    """A copy of a module on the CPU, its weights in float32 and mapped from a file; one at a time is held in memory."""
    parameters = {str(number): p for number, p in enumerate(module.parameters())}
    mapped = spool.mapped((number, _on_cpu(p)) for number, p in parameters.items() if p.is_contiguous())
    memo: dict[int, Any] = {}
    for number, parameter in parameters.items():
        # Those in another order than that of their indices keep it: they would multiply with other roundings.
        tensor = mapped[number] if number in mapped else _on_cpu(parameter).clone()
        memo[id(parameter)] = nn.Parameter(tensor, False)
    memo.update({id(b): b.detach().cpu().clone() for b in module.buffers()})
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise ModelError(f"the model '{name}' cannot be copied: {reason_of(error)}") from error


def _on_cpu(parameter: Tensor) -> Tensor:
    tensor = parameter.detach().cpu()
    return tensor.float() if tensor.is_floating_point() else tensor


def _iterated(name: str, given: Any) -> Callable[[], Iterator[Any]]:
    """What was given as a function that iterates over it.

    Raises:
        ModelError: it is one item instead of several.
    """
    if not isinstance(given, Iterable) or isinstance(given, (str, bytes, Mapping, Tensor)):
        raise ModelError(f"{name} is {a_word(type(given).__name__)}; give a list or another iterable of them")
    return lambda: iter(given)
