"""Reads what the user names, a ``model.py``, a directory, a file or a hub id, into a :class:`UserModel`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.frontend.messages import ModelError, a_word, reason_of
from lbllm_compile.frontend.siblings import Siblings
from lbllm_compile.passes.ir import spool

HUB = "hf:"
"""What a hub id starts with. A plain ``ORG/NAME`` is a path: a mistyped one must not become a download."""

_HUB_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
_HOOKS = ("weights", "tokenizer", "example_inputs", "calibration_text", "calibration_inputs")
_ACCEPTED = "a model.py, a Hugging Face directory, a .gguf file, or a hub id as hf:ORG/NAME"


@dataclass(frozen=True)
class UserModel:
    """A model as the user gave it: float32, in eval mode, without gradients.

    Attributes:
        module: the model itself.
        kind: ``"causal-lm"`` (a transformers model that generates) or ``"module"``.
        name: file or directory name, for messages.
        source: the path or hub id it came from.
        tokenizer: a transformers tokenizer, or None.
        config: ``module.config`` as JSON-able values, with the stop tokens that the model generates with; empty for a
            plain module.
        inputs: one example batch by forward argument; empty for a language model.
        recipe: the ``recipe`` of a model.py.
        calibration_text, calibration_inputs: the hooks of a model.py or what was given as objects, or None.
        calibration_origin: where those are from, in words; empty for the hooks.
        in_memory: it was given as an object; ``source`` says of which class.
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
    calibration_origin: str = ""
    in_memory: bool = False


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
            f"build_model() in '{path}' returned {a_word(type(module).__name__)}; it must return a torch.nn.Module"
        )
    hooks = {name: getattr(user, name, None) for name in _HOOKS}
    for name, hook in hooks.items():
        if hook is not None and not callable(hook):
            raise ModelError(f"'{name}' in '{path}' must be a function, not {a_word(type(hook).__name__)}")
    recipe = getattr(user, "recipe", {})
    if not isinstance(recipe, Mapping):
        raise ModelError(f"'recipe' in '{path}' must be a dict of options, not {a_word(type(recipe).__name__)}")
    if any(p.is_meta for p in module.parameters()):
        if hooks["weights"] is None:
            raise ModelError(
                f"the model of '{path}' is on the meta device but there is no weights(); define weights() to return the"
                " path of its .safetensors, or build the model on the CPU"
            )
        stored = _call_hook(path, "weights", hooks["weights"])
        if not isinstance(stored, (str, os.PathLike)):
            raise ModelError(
                f"weights() in '{path}' returned {a_word(type(stored).__name__)}; return the path of the .safetensors"
            )
        module = _materialize(module, Path(stored))
    kind = "causal-lm" if is_causal_lm(module) else "module"
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
    name, beside = _package_of(path), _siblings(path)
    # As the package of its siblings, it can also import them relatively.
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=[str(path.resolve().parent)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    beside.forget()
    sys.modules[name] = module
    try:
        with contextlib.redirect_stdout(sys.stderr), beside.importable():
            spec.loader.exec_module(module)
    except SyntaxError as error:
        del sys.modules[name]
        where = f"{error.filename or path}, line {error.lineno}"
        raise ModelError(f"syntax error in {where}: {error.msg}") from error
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ModelError(f"'{path}' cannot be imported: {reason_of(error, path)}") from error
    return module


def _package_of(path: Path) -> str:
    return f"lbllm_user_model_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"


@functools.cache
def _siblings(path: Path) -> Siblings:
    """What lies beside a model.py."""
    return Siblings(path.resolve().parent, _package_of(path))


def _call_hook(path: Path, name: str, hook: Callable[[], Any]) -> Any:
    try:
        with contextlib.redirect_stdout(sys.stderr), quiet_transformers(), _siblings(path).importable():
            return hook()
    except LbllmError:
        raise
    except (Exception, SystemExit) as error:
        raise ModelError(f"{name}() in '{path}' failed: {reason_of(error, path)}") from error


_END = object()


def _iterated(path: Path, name: str, hook: Callable[[], Any] | None) -> Callable[[], Iterator[Any]] | None:
    """A hook that gives an iterable, as a function whose iterator answers every mistake in one sentence."""
    if hook is None:
        return None

    def items() -> Iterator[Any]:
        given = _call_hook(path, name, hook)
        if not isinstance(given, Iterable) or isinstance(given, (str, bytes, Mapping, Tensor)):
            raise ModelError(
                f"{name}() in '{path}' returned {a_word(type(given).__name__)}; return a list or yield one"
                " item at a time"
            )
        iterator = iter(given)
        while (item := _call_hook(path, name, functools.partial(next, iterator, _END))) is not _END:
            yield item

    return items


def _tokenizer(path: Path, hook: Callable[[], Any]) -> Any:
    tokenizer = _call_hook(path, "tokenizer", hook)
    check_tokenizer(tokenizer, f"tokenizer() in '{path}' returned")
    return tokenizer


def check_tokenizer(tokenizer: Any, where: str) -> None:
    """Checks that something is a tokenizer.

    Raises:
        ModelError: it is not; the message begins with ``where``.
    """
    from transformers import PreTrainedTokenizerBase

    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ModelError(
            f"{where} {a_word(type(tokenizer).__name__)}; a transformers tokenizer is needed, e.g. of"
            " AutoTokenizer.from_pretrained()"
        )


def _load_pretrained(source: str, name: str, local: bool = True) -> UserModel:
    from transformers import AutoTokenizer

    what = f"the directory '{source}'" if local else f"the hub model '{source}'"
    if local:
        _refuse_quantized(Path(source))
    files = _weight_files(source, what, local)
    if files:
        skeleton = _skeleton(source, what, local)
        module = _from_pretrained(type(skeleton), what, None, config=skeleton.config, state_dict=_state(files, what))
        _configure_generation(module, source, what, local)
    else:
        # A hub model may have weights in another form; of a directory this tells what is missing.
        module = _as_transformers_loads(source, what, local)
    tokenizer = None
    if not local or any((Path(source) / f).is_file() for f in ("tokenizer.json", "tokenizer_config.json")):
        try:
            with quiet_transformers():
                tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local, trust_remote_code=False)
        except Exception as error:
            raise ModelError(f"the tokenizer of {what} cannot be loaded: {reason_of(error, frame=False)}") from error
    return prepare(UserModel(module, "causal-lm", name, source if local else HUB + source, tokenizer))


def load_directory(directory: Path, dtype: torch.dtype) -> nn.Module:
    """The language model of a Hugging Face directory in a type, as transformers itself loads and runs it: not to be
    compiled but to be compared with.

    Raises:
        ModelError: it is not a usable model, or quantized already, as an artifact is.
    """
    _refuse_quantized(directory)
    return _as_transformers_loads(str(directory), f"the directory '{directory}'", True, dtype).eval()


def _as_transformers_loads(source: str, what: str, local: bool, dtype: torch.dtype = torch.float32) -> nn.Module:
    from transformers import AutoModelForCausalLM

    options = {"local_files_only": local, "trust_remote_code": False, "use_safetensors": True}
    return _from_pretrained(AutoModelForCausalLM, what, source, dtype, **options)


def _configure_generation(module: Any, source: str, what: str, local: bool) -> None:
    """Gives a model the ``generation_config.json`` of its directory or hub repository, where there is one."""
    from transformers import GenerationConfig
    from transformers.utils import GENERATION_CONFIG_NAME
    from transformers.utils.hub import cached_file

    options: dict[str, Any] = {"local_files_only": local}
    try:
        with quiet_transformers():
            if cached_file(source, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **options):
                module.generation_config = GenerationConfig.from_pretrained(source, **options)
    except Exception as error:
        reason = reason_of(error, frame=False)
        raise ModelError(f"the {GENERATION_CONFIG_NAME} of {what} cannot be read: {reason}") from error


def _weight_files(source: str, what: str, local: bool) -> list[Path]:
    """The ``.safetensors`` of a directory or hub model, which are downloaded; empty where it has none."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    options: dict[str, Any] = {"local_files_only": local, "_raise_exceptions_for_missing_entries": False}
    try:
        with quiet_transformers():
            whole = cached_file(source, SAFE_WEIGHTS_NAME, **options)
            index = None if whole else cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **options)
            shards = (get_checkpoint_shard_files(source, index, local_files_only=local)[0] if index else None) or []
    except Exception as error:
        raise ModelError(f"{what} cannot be loaded as a language model: {reason_of(error, frame=False)}") from error
    return [Path(file) for file in ([whole] if whole else shards)]


def _skeleton(source: str, what: str, local: bool) -> Any:
    """A pretrained language model on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with quiet_transformers(), torch.device("meta"):
            config = AutoConfig.from_pretrained(source, local_files_only=local, trust_remote_code=False)
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{what} cannot be loaded as a language model: {reason_of(error, frame=False)}") from error


def skeleton_of(config: Mapping[str, Any], what: str) -> Any:
    """A transformers language model of a configuration (:attr:`UserModel.config`), on the meta device.

    Raises:
        ModelError: the configuration is of no such model, or not of one that transformers itself has.
    """
    import transformers

    kind, names = config.get("model_type"), config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    model_class = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise ModelError(f"{what} is of no architecture that transformers has ({name or kind or 'it names none'})")
    config_class: Any = model_class.config_class
    try:
        with quiet_transformers(), torch.device("meta"):
            return model_class._from_config(config_class.from_dict(dict(config)), dtype=torch.float32)
    except Exception as error:
        reason = reason_of(error, frame=False)
        raise ModelError(f"{what} has a configuration that {name} does not take: {reason}") from error


def with_state(skeleton: Any, state: Mapping[str, Tensor], what: str) -> nn.Module:
    """A language model in float32 from a skeleton on the meta device and its weights by path.

    Raises:
        ModelError: weights are missing or of another shape.
    """
    return _from_pretrained(type(skeleton), what, None, config=skeleton.config, state_dict=dict(state))


def _state(files: Sequence[Path], what: str) -> dict[str, Tensor]:
    """The tensors of ``.safetensors`` by name, in float32 and mapped from a file; one at a time is held in memory."""
    from safetensors import SafetensorError

    try:
        return spool.mapped(_stored_tensors(files))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{what} cannot be loaded as a language model: {reason_of(error, frame=False)}") from error


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
        method = (config.get("quantization_config") or {}).get("quant_method")
    except (ValueError, AttributeError) as error:
        reason = reason_of(error, frame=False)
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
            with quiet_transformers():
                tokenizer = AutoTokenizer.from_pretrained(str(path.parent), **options)
        except Exception as error:
            raise ModelError(
                f"the tokenizer of the GGUF file '{path}' cannot be loaded: {reason_of(error, frame=False)}"
            ) from error
    return module, tokenizer


def _from_pretrained(
    loader: Any, what: str, source: str | None, dtype: torch.dtype = torch.float32, **options: Any
) -> nn.Module:
    """``loader.from_pretrained`` in a type, refusing a checkpoint that lacks weights (they would be random)."""
    try:
        with quiet_transformers():
            module, info = loader.from_pretrained(
                source, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except Exception as error:
        raise ModelError(f"{what} cannot be loaded as a language model: {reason_of(error, frame=False)}") from error
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
        raise ModelError(f"the weights '{path}' cannot be read: {reason_of(error)}") from error
    if is_causal_lm(module):
        # Only from_pretrained computes buffers that are not stored, such as the rotary frequencies.
        return _from_pretrained(type(module), f"'{path}'", None, config=module.config, state_dict=state)
    try:
        module.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        raise ModelError(f"the weights '{path}' do not fit the model: {reason_of(error)}") from error
    missing = [n for n, t in [*module.named_parameters(), *module.named_buffers()] if t.is_meta]
    if missing:
        raise ModelError(f"the weights '{path}' lack '{missing[0]}' ({len(missing)} missing in all)")
    return module


def is_causal_lm(module: nn.Module) -> bool:
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel) and module.can_generate()


def refuse_quantized_module(model: UserModel) -> None:
    """Refuses a model whose weights are not numbers but codes.

    Raises:
        ModelError: it is one.
    """
    method = getattr(model.module, "quantization_method", None)
    if getattr(model.module, "is_quantized", False) and method != "gguf":
        raise ModelError(f"'{model.name}' is already quantized ({method}); give the original weights")


def prepare(model: UserModel) -> UserModel:
    """Makes the model ready to trace, and refuses what cannot be compiled."""
    refuse_quantized_module(model)
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
        # One attention operator per layer where the model can, and experts as grouped matrix products over their
        # stacked weights.
        module.set_attn_implementation("sdpa" if module._supports_sdpa else "eager")  # type: ignore[operator]
        if type(module)._can_set_experts_implementation():  # type: ignore[attr-defined]
            module.set_experts_implementation("grouped_mm")  # type: ignore[operator]
    except ValueError as error:
        raise ModelError(f"'{model.name}' cannot be made to compute attention in torch: {reason_of(error)}") from error
    stop = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
    facts = {"architectures": [type(module).__name__], **({} if stop is None else {"eos_token_id": stop})}
    return dataclasses.replace(model, module=module, config=clean_config(config.to_dict() | facts))


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
            f"{hook}() gives {a_word(type(inputs).__name__)}; each batch must be a tensor, a tuple of tensors or a dict"
        )
    try:
        bound = inspect.signature(module.forward).bind(*positional, **named).arguments
    except TypeError as error:
        raise ModelError(f"{hook}() does not fit forward(): {error}") from error
    for name, value in bound.items():
        if not isinstance(value, Tensor):
            raise ModelError(
                f"the input '{name}' of {hook}() is {a_word(type(value).__name__)}; every input must be a tensor"
                " (bake other values into build_model())"
            )
        if not bool(torch.isfinite(value).all()):
            raise ModelError(f"the input '{name}' of {hook}() has NaN or infinite values; give finite ones")
    return dict(bound)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
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
