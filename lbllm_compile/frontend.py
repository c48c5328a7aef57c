"""From what the user names to a :class:`Program`: a ``model.py``, a Hugging Face directory, a ``.gguf`` file, a hub id.

A ``model.py`` is Python and runs as such. It must define ``build_model() -> torch.nn.Module`` and may define

===========================  ==========================================================================================
``weights() -> path``        a ``.safetensors`` file or a directory of them, for a model built on the meta device
``tokenizer()``              a transformers tokenizer
``example_inputs()``         a tensor, tuple or dict to call the module with; needed by all but transformers language
                             models, and batched along the first dimension
``calibration_text()``       an iterable of strings to calibrate a language model with
``calibration_inputs()``     an iterable of inputs to calibrate any other module with
``recipe``                   a dict of compile options
===========================  ==========================================================================================

:func:`load` reads it into a :class:`UserModel`; :func:`capture` traces that with ``torch.export``. Nothing is
downloaded unless the name is a hub id, and code that comes with a model is never run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import io
import json
import linecache
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn

from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.passes import spool
from lbllm_compile.passes.program import Program, set_attribute

LM_INPUTS = ("input_ids", "attention_mask", "position_ids")
"""Placeholders of a captured language model, in order."""

HUB = "hf:"
"""What a hub id starts with. A plain ``ORG/NAME`` is a path: a mistyped one must not become a download."""

_HUB_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
_HOOKS = ("weights", "tokenizer", "example_inputs", "calibration_text", "calibration_inputs")
_ACCEPTED = "a model.py, a Hugging Face directory, a .gguf file, or a hub id as hf:ORG/NAME"
_CHECK_TOLERANCE = 1e-4
"""Relative error allowed between the captured graph and the model, at sizes the graph was not traced with."""


class ModelError(LbllmError):
    """What the user named is no model that can be compiled, or cannot be read."""


class CaptureError(LbllmError):
    """The model's forward cannot be written down as one graph."""


@dataclass(frozen=True)
class UserModel:
    """A model as the user gave it: float32, in eval mode, without gradients.

    Attributes:
        module: the model itself.
        kind: ``"causal-lm"`` (a transformers model that generates) or ``"module"``.
        name: file or directory name, for messages.
        source: the path or hub id it came from.
        tokenizer: a transformers tokenizer, or None.
        config: ``module.config`` as JSON-able values; empty for a plain module.
        inputs: one example batch by forward argument; empty for a language model.
        recipe: the ``recipe`` of a model.py.
        calibration_text, calibration_inputs: the hooks of a model.py, or None.
    """

    module: nn.Module
    kind: str
    name: str
    source: str
    tokenizer: Any = None
    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    calibration_text: Callable[[], Iterable[str]] | None = None
    calibration_inputs: Callable[[], Iterable[Any]] | None = None


# Loading


def load(source: str | Path) -> UserModel:
    """Reads the model that ``source`` names.

    Args:
        source: a ``model.py``, a Hugging Face directory, a ``.gguf`` file, or ``hf:ORG/NAME``.

    Raises:
        ModelError: there is nothing of that name, or it is not a usable model; the message says what to do.
    """
    text = str(source)
    if text.startswith(HUB):
        return _load_pretrained(hub_id(text), name=text.split("/")[-1], local=False)
    path = Path(text).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"the directory '{path}' has no config.json; name {_ACCEPTED}")
        return _load_pretrained(str(path), name=path.resolve().name)
    if path.is_file():
        if path.suffix == ".py":
            return _load_python(path)
        if path.suffix == ".gguf":
            return _load_gguf(path)
        raise ModelError(f"'{path}' is neither a .py nor a .gguf file; name {_ACCEPTED}")
    raise ModelError(f"there is no file or directory '{text}'; name {_ACCEPTED}")


def hub_id(source: str) -> str:
    """``ORG/NAME`` of ``hf:ORG/NAME``.

    Raises:
        ModelError: it is no such name.
    """
    name = source.removeprefix(HUB)
    if not _HUB_ID.fullmatch(name):
        raise ModelError(f"'{source}' is not a hub id; write it as hf:ORG/NAME")
    return name


def _load_python(path: Path) -> UserModel:
    user = _import_file(path)
    build = getattr(user, "build_model", None)
    if not callable(build):
        raise ModelError(f"'{path}' has no function build_model(); define one that returns a torch.nn.Module")
    module = _call_hook(path, "build_model", build)
    if isinstance(module, type) and issubclass(module, nn.Module):
        raise ModelError(f"build_model() in '{path}' returned the class {module.__name__}; return an instance of it")
    if not isinstance(module, nn.Module):
        raise ModelError(
            f"build_model() in '{path}' returned {_a(type(module).__name__)}; it must return a torch.nn.Module"
        )
    hooks = {name: getattr(user, name, None) for name in _HOOKS}
    for name, hook in hooks.items():
        if hook is not None and not callable(hook):
            raise ModelError(f"'{name}' in '{path}' must be a function, not {_a(type(hook).__name__)}")
    recipe = getattr(user, "recipe", {})
    if not isinstance(recipe, Mapping):
        raise ModelError(f"'recipe' in '{path}' must be a dict of options, not {_a(type(recipe).__name__)}")
    if any(p.is_meta for p in module.parameters()):
        if hooks["weights"] is None:
            raise ModelError(
                f"the model of '{path}' is on the meta device but there is no weights(); define weights() to return the"
                " path of its .safetensors, or build the model on the CPU"
            )
        stored = _call_hook(path, "weights", hooks["weights"])
        if not isinstance(stored, (str, os.PathLike)):
            raise ModelError(
                f"weights() in '{path}' returned {_a(type(stored).__name__)}; return the path of the .safetensors"
            )
        module = _materialize(module, Path(stored))
    kind = "causal-lm" if _is_causal_lm(module) else "module"
    inputs: dict[str, Tensor] = {}
    if kind == "module":
        if hooks["example_inputs"] is None:
            raise ModelError(
                f"'{path}' has no example_inputs(), which every model but a transformers language model needs; define"
                " it to return the tensors to call the model with"
            )
        inputs = bind_inputs(module, _call_hook(path, "example_inputs", hooks["example_inputs"]))
    tokenizer = _tokenizer(path, hooks["tokenizer"]) if hooks["tokenizer"] else None
    return prepare(
        UserModel(
            module=module,
            kind=kind,
            name=path.stem,
            source=str(path),
            tokenizer=tokenizer,
            inputs=inputs,
            recipe=dict(recipe),
            calibration_text=_iterated(path, "calibration_text", hooks["calibration_text"]),
            calibration_inputs=_iterated(path, "calibration_inputs", hooks["calibration_inputs"]),
        )
    )


def _import_file(path: Path) -> ModuleType:
    """Runs a Python file under a module name of its own, so that two models never meet in ``sys.modules``."""
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    spec = importlib.util.spec_from_file_location(f"lbllm_user_model_{digest}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        with contextlib.redirect_stdout(sys.stderr):
            spec.loader.exec_module(module)
    except SyntaxError as error:
        del sys.modules[spec.name]
        where = f"{error.filename or path}, line {error.lineno}"
        raise ModelError(f"syntax error in {where}: {error.msg}") from error
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise ModelError(f"'{path}' cannot be imported: {_reason(error, path)}") from error
    return module


def _call_hook(path: Path, name: str, hook: Callable[[], Any]) -> Any:
    try:
        with contextlib.redirect_stdout(sys.stderr), _quiet_transformers():
            return hook()
    except LbllmError:
        raise
    except (Exception, SystemExit) as error:
        raise ModelError(f"{name}() in '{path}' failed: {_reason(error, path)}") from error


_END = object()


def _iterated(path: Path, name: str, hook: Callable[[], Any] | None) -> Callable[[], Iterator[Any]] | None:
    """A hook that gives an iterable, as a function whose iterator answers every mistake in one sentence."""
    if hook is None:
        return None

    def items() -> Iterator[Any]:
        given = _call_hook(path, name, hook)
        if not isinstance(given, Iterable) or isinstance(given, (str, bytes, Mapping, Tensor)):
            raise ModelError(
                f"{name}() in '{path}' returned {_a(type(given).__name__)}; return a list or yield one item at a time"
            )
        iterator = iter(given)
        while (item := _call_hook(path, name, functools.partial(next, iterator, _END))) is not _END:
            yield item

    return items


def _tokenizer(path: Path, hook: Callable[[], Any]) -> Any:
    from transformers import PreTrainedTokenizerBase

    tokenizer = _call_hook(path, "tokenizer", hook)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ModelError(
            f"tokenizer() in '{path}' returned {_a(type(tokenizer).__name__)}; return a transformers tokenizer, e.g. of"
            " AutoTokenizer.from_pretrained()"
        )
    return tokenizer


def _load_pretrained(source: str, name: str, local: bool = True) -> UserModel:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    what = f"the directory '{source}'" if local else f"the hub model '{source}'"
    if local:
        _refuse_quantized(Path(source))
    files = _weight_files(source, what, local)
    if files:
        skeleton = _skeleton(source, what, local)
        module = _from_pretrained(type(skeleton), what, None, config=skeleton.config, state_dict=_state(files, what))
    else:
        # A hub model may have weights in another form; of a directory this tells what is missing.
        options = {"local_files_only": local, "trust_remote_code": False, "use_safetensors": True}
        module = _from_pretrained(AutoModelForCausalLM, what, source, **options)
    tokenizer = None
    if not local or any((Path(source) / f).is_file() for f in ("tokenizer.json", "tokenizer_config.json")):
        try:
            with _quiet_transformers():
                tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local, trust_remote_code=False)
        except Exception as error:
            raise ModelError(f"the tokenizer of {what} cannot be loaded: {_reason(error, frame=False)}") from error
    return prepare(UserModel(module, "causal-lm", name, source if local else HUB + source, tokenizer))


def _weight_files(source: str, what: str, local: bool) -> list[Path]:
    """The ``.safetensors`` of a directory or hub model, which are downloaded; empty where it has none."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    options: dict[str, Any] = {"local_files_only": local, "_raise_exceptions_for_missing_entries": False}
    try:
        with _quiet_transformers():
            whole = cached_file(source, SAFE_WEIGHTS_NAME, **options)
            index = None if whole else cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **options)
            shards = (get_checkpoint_shard_files(source, index, local_files_only=local)[0] if index else None) or []
    except Exception as error:
        raise ModelError(f"{what} cannot be loaded as a language model: {_reason(error, frame=False)}") from error
    return [Path(file) for file in ([whole] if whole else shards)]


def _skeleton(source: str, what: str, local: bool) -> Any:
    """A pretrained language model on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with _quiet_transformers(), torch.device("meta"):
            config = AutoConfig.from_pretrained(source, local_files_only=local, trust_remote_code=False)
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{what} cannot be loaded as a language model: {_reason(error, frame=False)}") from error


def _state(files: Sequence[Path], what: str) -> dict[str, Tensor]:
    """The tensors of ``.safetensors`` by name, in float32 and mapped from a file; one at a time is held in memory."""
    from safetensors import SafetensorError

    try:
        return spool.mapped(_stored_tensors(files))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{what} cannot be loaded as a language model: {_reason(error, frame=False)}") from error


def _stored_tensors(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
        for name in names:
            # A tensor of safetensors is a mapping of its file, and what was read of that is dropped with the file.
            with safe_open(file, framework="pt") as tensors:
                tensor = tensors.get_tensor(name)
            yield name, tensor.float() if tensor.is_floating_point() else tensor


def _refuse_quantized(directory: Path) -> None:
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        method = config.get("quantization_config", {}).get("quant_method")
    except (ValueError, AttributeError) as error:
        reason = _reason(error, frame=False)
        raise ModelError(f"'{directory / 'config.json'}' is not a model configuration: {reason}") from error
    if method:
        raise ModelError(f"the model in '{directory}' is already quantized ({method}); give the original weights")


def load_gguf(path: Path) -> tuple[nn.Module, Any]:
    """The model (dequantized to float32) and the tokenizer of a ``.gguf`` file.

    Raises:
        ModelError: a package that reading it needs is missing, or the file is broken.
    """
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ModelError(
                f"reading '{path.name}' needs the package {package}; install it with"
                " `pip install 'lbllm-compile[examples]'`"
            )
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not path.is_file():
        raise ModelError(f"there is no file '{path}'")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"'{path}' is not a GGUF file (it does not start with the letters GGUF)")
    options: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    # transformers parses the file's header three times and the name table once a module; once each saves most of it.
    with (
        mock.patch.object(gguf, "GGUFReader", functools.cache(gguf.GGUFReader)),
        mock.patch.object(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
    ):
        module = _from_pretrained(AutoModelForCausalLM, f"the GGUF file '{path}'", str(path.parent), **options)
        try:
            with _quiet_transformers():
                tokenizer = AutoTokenizer.from_pretrained(str(path.parent), **options)
        except Exception as error:
            raise ModelError(
                f"the tokenizer of the GGUF file '{path}' cannot be loaded: {_reason(error, frame=False)}"
            ) from error
    return module, tokenizer


def _from_pretrained(loader: Any, what: str, source: str | None, **options: Any) -> nn.Module:
    """``loader.from_pretrained`` in float32, refusing a checkpoint that lacks weights (they would be random)."""
    try:
        with _quiet_transformers():
            module, info = loader.from_pretrained(
                source, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except Exception as error:
        raise ModelError(f"{what} cannot be loaded as a language model: {_reason(error, frame=False)}") from error
    missing, misfits = sorted(info["missing_keys"]), sorted(info["mismatched_keys"])
    if missing:
        raise ModelError(f"{what} lacks the weight '{missing[0]}' ({len(missing)} missing in all)")
    if misfits:
        name, stored, wanted = misfits[0]
        raise ModelError(f"{what} stores '{name}' as {tuple(stored)}, but its configuration needs {tuple(wanted)}")
    return module


def _load_gguf(path: Path) -> UserModel:
    module, tokenizer = load_gguf(path.resolve())
    return prepare(UserModel(module, "causal-lm", path.stem, str(path), tokenizer))


def _materialize(module: nn.Module, path: Path) -> nn.Module:
    """Fills a model on the meta device from ``.safetensors``, tensor by tensor."""
    from safetensors import SafetensorError

    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(f.is_file() for f in files):
        raise ModelError(f"weights() names '{path}', where there is no .safetensors file")
    try:
        state = spool.mapped(_stored_tensors(files))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"the weights '{path}' cannot be read: {_reason(error)}") from error
    if _is_causal_lm(module):
        # Only from_pretrained computes buffers that are not stored, such as the rotary frequencies.
        return _from_pretrained(type(module), f"'{path}'", None, config=module.config, state_dict=state)
    try:
        module.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        raise ModelError(f"the weights '{path}' do not fit the model: {_reason(error)}") from error
    missing = [n for n, t in [*module.named_parameters(), *module.named_buffers()] if t.is_meta]
    if missing:
        raise ModelError(f"the weights '{path}' lack '{missing[0]}' ({len(missing)} missing in all)")
    return module


def _is_causal_lm(module: nn.Module) -> bool:
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel) and module.can_generate()


def prepare(model: UserModel) -> UserModel:
    """Makes the model ready to trace, and refuses what cannot be compiled."""
    method = getattr(model.module, "quantization_method", None)
    if getattr(model.module, "is_quantized", False) and method != "gguf":
        raise ModelError(f"'{model.name}' is already quantized ({method}); give the original weights")
    # transformers refuses .float() on whatever was read from GGUF, although it is plain float32 by now.
    module = nn.Module.float(model.module.requires_grad_(False)).eval()
    if not any(p.dim() >= 2 for m in module.modules() if not isinstance(m, nn.Embedding) for p in m.parameters(False)):
        raise ModelError(f"the model '{model.name}' has no linear layer; there is nothing to quantize")
    _move_to_disk(module)
    gauge = spool.Gauge()
    for name, tensor in module.named_parameters():
        if tensor.is_floating_point() and tensor.numel():
            low, high = torch.aminmax(tensor)
            gauge.use([tensor])
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                raise ModelError(f"the weight '{name}' has NaN or infinite values; repair or re-download the model")
    spool.release()
    if model.kind != "causal-lm":
        return dataclasses.replace(model, module=module)
    config: Any = module.config
    if config.is_encoder_decoder:
        raise ModelError(f"'{model.name}' is an encoder-decoder model; only decoder-only language models are supported")
    try:
        # One attention operator per layer, and experts as grouped matrix products over their stacked weights.
        module.set_attn_implementation("sdpa")  # type: ignore[operator]
        if type(module)._can_set_experts_implementation():  # type: ignore[attr-defined]
            module.set_experts_implementation("grouped_mm")  # type: ignore[operator]
    except ValueError as error:
        raise ModelError(f"'{model.name}' cannot use torch's attention operator: {_reason(error)}") from error
    return dataclasses.replace(
        model, module=module, config=clean_config(config.to_dict() | {"architectures": [type(module).__name__]})
    )


def _move_to_disk(module: nn.Module) -> None:
    """Maps the weights that are not mapped from a file yet; tied ones stay one.

    Those that lie in memory in another order than that of their indices stay, because copies in order would multiply
    with other roundings.
    """
    rest: dict[tuple[Any, ...], list[nn.Parameter]] = {}
    for parameter in module.parameters():
        if parameter.device.type == "cpu" and parameter.is_contiguous() and not spool.is_mapped(parameter):
            rest.setdefault((parameter.data_ptr(), parameter.shape), []).append(parameter)
    groups = {str(number): same for number, same in enumerate(rest.values())}
    for number, tensor in spool.mapped((number, same[0]) for number, same in groups.items()).items():
        for parameter in groups[number]:
            parameter.data = tensor


def clean_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A transformers configuration as plain JSON values, without how its weights were once stored."""
    dropped = ("quantization_config", "_name_or_path", "_model_name_or_path")
    kept = {k: v for k, v in config.items() if k not in dropped}
    return json.loads(json.dumps(kept, default=str))


def bind_inputs(module: nn.Module, inputs: Any, hook: str = "example_inputs") -> dict[str, Tensor]:
    """A batch of inputs by forward argument.

    Args:
        module: the model they are for.
        inputs: a tensor, a tuple or list of tensors, or a mapping from argument to tensor.
        hook: where they come from, for messages.

    Raises:
        ModelError: they are something else, do not fit the forward's signature, or are not finite.
    """
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    positional, named = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
    if not isinstance(positional, (tuple, list)):
        raise ModelError(
            f"{hook}() gives {_a(type(inputs).__name__)}; each batch must be a tensor, a tuple of tensors or a dict"
        )
    try:
        bound = inspect.signature(module.forward).bind(*positional, **named).arguments
    except TypeError as error:
        raise ModelError(f"{hook}() does not fit forward(): {error}") from error
    for name, value in bound.items():
        if not isinstance(value, Tensor):
            raise ModelError(
                f"the input '{name}' of {hook}() is {_a(type(value).__name__)}; every input must be a tensor"
                " (bake other values into build_model())"
            )
        if not bool(torch.isfinite(value).all()):
            raise ModelError(f"the input '{name}' of {hook}() has NaN or infinite values; give finite ones")
    return dict(bound)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice from transformers while it loads; its own settings come back afterwards."""
    from transformers import modeling_gguf_pytorch_utils as gguf_loader
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # The GGUF loader's bar obeys no setting.
    silent = functools.partial(gguf_loader.tqdm, disable=True)
    try:
        with warnings.catch_warnings(), mock.patch.object(gguf_loader, "tqdm", silent):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


# Capture


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
def capture(model: UserModel) -> Program:
    """Traces the model's forward into a :class:`Program` at ATen level, batch and sequence dynamic.

    Weights become ``get_attr`` nodes under the paths they have in the model; tied weights share one path. Nodes keep
    ``nn_module_stack`` (which module they come from), ``stack_trace`` (which line) and ``val`` (their shape).

    Raises:
        CaptureError: the forward cannot be captured; the message names the operation, the line and a way out.
    """
    if model.kind == "causal-lm":
        module: nn.Module = _LanguageModel(model.module)
        vocabulary = int(model.module.get_input_embeddings().num_embeddings)  # type: ignore[operator]
        inputs = language_model_inputs(_token_ids((2, 5), vocabulary))
        batch, sequence = torch.export.Dim("batch", min=1), torch.export.Dim("sequence", min=1)
        shapes: dict[str, Any] = {name: {0: batch, 1: sequence} for name in LM_INPUTS}
        strip = "model"
    else:
        module, inputs, strip = model.module, _at_least_two(model.inputs), ""
        free = _takes_any_batch(module, inputs)
        shapes = {n: {0: torch.export.Dim.AUTO} if free and t.dim() else None for n, t in inputs.items()}
    _run_eagerly(model, module, inputs)
    exported = _export(model, module, inputs, shapes)
    program = Program(
        module=_graph_module(model, exported, strip),
        kind=model.kind,
        name=model.name,
        config=model.config,
        tokenizer=model.tokenizer,
    )
    _check(model, module, program, inputs)
    return program


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
        raise CaptureError(f"the forward of '{model.name}' failed on its example inputs: {_reason(error)}") from error
    if not isinstance(output, Tensor):
        raise CaptureError(
            f"the forward of '{model.name}' returns {_a(type(output).__name__)}; wrap the model so that it returns one"
            " tensor"
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
        raise CaptureError(f"'{model.name}' cannot be captured: {_capture_reason(error)}") from error
    written = [
        *exported.graph_signature.buffers_to_mutate.values(),
        *exported.graph_signature.user_inputs_to_mutate.values(),
    ]
    if written:
        raise CaptureError(
            f"'{model.name}' cannot be captured: its forward writes to '{written[0]}'; compute a new tensor instead"
        )
    return exported


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
    kept = {k: meta[k] for k in ("val", "stack_trace") if k in meta}
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
        raise CaptureError(f"the captured graph of '{model.name}' does not run: {_reason(error)}") from error
    error = float((actual - expected).norm() / expected.norm().clamp(min=1e-30))
    if not error <= _CHECK_TOLERANCE:
        raise CaptureError(
            f"the captured graph of '{model.name}' differs from the model by {error:.2g}; its forward must be a"
            " function of its inputs alone, without branches on their values"
        )


def fingerprint(program: Program) -> str:
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


# Messages


def _a(word: str) -> str:
    return "None" if word == "NoneType" else f"{'an' if word[0].lower() in 'aeiou' else 'a'} {word}"


def _reason(error: BaseException, path: Path | None = None, frame: bool = True) -> str:
    """The first line of an exception, and the line of ``path`` (or of any code but torch's) that it came from."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    name = type(error).__name__
    message = f"{name}: {text}" if text else name
    where = _user_frame(error, path) if frame else ""
    return f"{message} ({where})" if where else message


def _user_frame(error: BaseException, path: Path | None = None) -> str:
    """``file.py:12`` of the innermost frame outside torch and this package, or an empty string."""
    own = str(Path(__file__).resolve().parent)
    torch_root = str(Path(torch.__file__).resolve().parent)
    found = ""
    for frame in traceback.extract_tb(error.__traceback__):
        file = Path(frame.filename)
        if path is not None and file.resolve() != path.resolve():
            continue
        if frame.filename.startswith(("<", own, torch_root)):
            continue
        found = f"{file.name if path is not None else _short(file)}:{frame.lineno}"
        line = linecache.getline(frame.filename, frame.lineno or 0).strip()
        found += f" `{line}`" if line else ""
    return found


def _short(file: Path) -> str:
    parts = file.parts
    return "/".join(parts[parts.index("site-packages") + 1 :]) if "site-packages" in parts else file.name


def _capture_reason(error: BaseException) -> str:
    """What stopped ``torch.export``, in one sentence: the operation, the line, the way out."""
    chain: list[BaseException] = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None and inner not in chain:
        chain.append(inner)
    frame = next((f for e in reversed(chain) if (f := _user_frame(e))), "")
    text = " ".join(str(e) for e in chain)
    if any(type(e).__name__.startswith("GuardOnDataDependent") for e in chain) or "data-dependent" in text.lower():
        reason = "a branch or a size depends on the values of a tensor; compute both sides and use torch.where"
    elif "ConstraintViolation" in text or "Constraints violated" in text:
        reason = "the batch or sequence size is fixed by the forward; derive shapes from the inputs' shapes"
    elif ".item()" in text or "aten._local_scalar_dense" in text:
        reason = "a tensor is read as a Python number; keep the computation in tensors"
    else:
        reason = _reason(chain[-1] if not str(error).strip() else error)
        return f"{reason}; rewrite this with tensor operations that torch.export supports"
    return f"{reason} (at {frame})" if frame else reason
