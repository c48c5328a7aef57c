"""What a compile would do and need, before anything heavy: treatment of every linear, memory, disk, time.

A Hugging Face directory, a ``.gguf`` file and a hub id are read as configuration alone and built on the meta device,
without their weights. A ``model.py`` is run, because only it knows what it builds. Memory is told by phase, because
only some phases need the whole model (:mod:`lbllm_compile.footprint`).

The times are estimates: weights times tokens times what a stage costs for each, divided by the speed of the device's
matrix products as measured on the spot. The costs were fitted on a CPU with a model of 135 million weights; expect a
factor of two either way, and more on a busy machine or on a GPU.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import RenderableType
from rich.text import Text
from torch import nn

from lbllm_compile import footprint, frontend, recipe
from lbllm_compile.calibration import samples_in_bfloat16, sampling_bytes, writes_own
from lbllm_compile.codegen.backend import Prediction, predicting, predictions
from lbllm_compile.codegen.errors import KernelError
from lbllm_compile.codegen.levels import FREE
from lbllm_compile.codegen.sizes import DEFAULT_GROUP, group_count, int4_bytes, matrix_bytes, product_group
from lbllm_compile.codegen.spec import LinearSpec, QuantizeSpec
from lbllm_compile.codegen.targets import Target, parse_targets
from lbllm_compile.doctor import memory
from lbllm_compile.job import check_named, check_print_after, device_of, given
from lbllm_compile.options import CompileOptions
from lbllm_compile.passes import annotate, canonicalize, pipeline, ptq
from lbllm_compile.passes.activate import Activate, quantizer_scheme
from lbllm_compile.passes.base import Pass, PassContext
from lbllm_compile.passes.budget import MEASURED_TOKENS, Budget
from lbllm_compile.passes.calibrate import sensitivity
from lbllm_compile.passes.calibrate.precision import uses_bfloat16
from lbllm_compile.passes.choices import head_schemes
from lbllm_compile.passes.finetune import Finetune
from lbllm_compile.passes.head import FITTED, Head
from lbllm_compile.passes.ir import spool
from lbllm_compile.passes.ir.annotations import LinearInfo
from lbllm_compile.passes.ir.program import CPU, get_attribute
from lbllm_compile.passes.ir.scheme import Scheme, parse
from lbllm_compile.passes.outliers import Outliers
from lbllm_compile.records import ORIGINAL_BYTES
from lbllm_compile.report import terminal


@dataclass(frozen=True)
class Cost:
    """What a stage is worth in operations of matrix products, per weight, token and epoch (a forward pass has 2).

    Attributes:
        products: in the precision of the stages' products.
        rest: what else it does, as operations of float32 products.
    """

    products: float
    rest: float


_COSTS = {
    "text": Cost(0.0, 5.0),
    "smooth": Cost(2.1, 0.4),
    "ptq": Cost(4.8, 1.2),
    "distill": Cost(7.5, 2.5),
    "activate": Cost(13.9, 1.1),
    "finetune": Cost(13.9, 1.1),
}

_CHAIN = _COSTS["smooth"]
"""Taking the float model's activations through all layers."""

_CHANNELS = Cost(6.0, 0.5)
"""Taking them forward, again, and gradients backward, to measure which channels matter."""

_CAPTURE_SECONDS = 0.6
"""Tracing and checking, per decoder layer."""

_PROGRAM_SECONDS = 0.45
"""Generating the native program of a language model, per decoder layer."""


@dataclass(frozen=True)
class Treatment:
    """What becomes of one linear.

    Attributes:
        shape: ``[N, K]``, or ``[E, N, K]`` for stacked experts.
        treatment: in words, e.g. ``"W(1+1) g64, A4"``.
        reason: why.
        bytes_before: in the original, counted in 16 bit.
        bytes_after: as stored.
    """

    path: str
    shape: tuple[int, ...]
    layer: int | None
    role: str
    treatment: str
    reason: str
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Speed:
    """How fast a device multiplies matrices, in operations per second.

    Attributes:
        device: its name.
        products: in the precision that stages use unless told otherwise.
        float32: in float32.
        host: the CPU's in float32: checks run there, whatever computes the stages.
    """

    device: str
    products: float
    float32: float
    host: float

    @classmethod
    def of(cls, device: torch.device) -> Speed:
        """Measures it."""
        float32 = matmul_speed(torch.float32, device)
        products = matmul_speed(torch.bfloat16, device) if uses_bfloat16("auto", device) else float32
        return cls(device.type, products, float32, float32 if device == CPU else matmul_speed(torch.float32, CPU))

    def seconds(self, cost: Cost) -> float:
        """Of a stage, per weight, token and epoch."""
        return cost.products / self.products + cost.rest / self.float32


@dataclass(frozen=True)
class Plan:
    """What a compile would do and need.

    Attributes:
        parameters: of the whole model.
        linears: every linear, in model order.
        pipeline: as text.
        peak_memory, disk, artifact: bytes; ``disk`` is what the work directory and the artifact take together.
        memory: bytes held resident at most, by phase; the largest is the peak.
        spool: bytes of weights and activations in temporary files, in the folder ``spool_directory``.
        memory_available, disk_available, spool_available: bytes here; None where unknown.
        seconds: estimate by stage.
        speed: measured.
        predicted: how long a token would take on devices of the targets that are not here; empty where no backend
            says.
        predicted_without: linears that stay float, which this leaves out.
        unpredicted: why a backend that predicts says nothing of this compile; empty where it does, or none is asked.
    """

    model: str
    kind: str
    parameters: int
    layers: int
    tokens: int
    pipeline: str
    targets: tuple[str, ...]
    linears: tuple[Treatment, ...]
    artifact: int
    peak_memory: int
    memory: dict[str, int]
    memory_available: int | None
    disk: int
    disk_available: int
    spool: int
    spool_directory: str
    spool_available: int
    seconds: dict[str, float]
    speed: Speed
    predicted: tuple[Prediction, ...] = ()
    predicted_without: int = 0
    unpredicted: str = ""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class _Linear:
    info: LinearInfo
    shape: tuple[int, ...]

    @property
    def weights(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def matrix_rows(self) -> int:
        return self.weights // self.shape[-1]


def make_plan(options: CompileOptions) -> Plan:
    """Works out the plan of a compile.

    Raises:
        LbllmError: what would stop the compile at its start: a wrong option, a missing file, an unknown target.
    """
    targets = parse_targets(options.target)
    passes = recipe.passes(recipe.choices(options), options.target)
    check_named(options, passes)
    comes_with = given(options)
    if isinstance(options.model, str):
        model = frontend.attach(skeleton(options.model), comes_with)
    else:
        model = frontend.load_given(options.model, comes_with)
    choices = recipe.choices(options, model.recipe)
    passes = recipe.passes(choices, options.target)
    check_print_after(options, passes)
    preset = recipe.preset(choices.preset)
    found = survey(
        model,
        _option(passes, "annotate", "keep_dense", ()),
        _option(passes, "annotate", "scheme", ""),
        _option(passes, "annotate", "slower", ()),
    )
    open_form = _open_form(found, passes)
    linears = tuple(_treatment(linear, passes, open_form) for linear in found)
    parameters = sum(p.numel() for p in model.module.parameters())
    rest = parameters - sum(linear.weights for linear in found)
    artifact = sum(t.bytes_after for t in linears) + _rest_bytes(passes, rest, model, found)
    own = writes_own(model, options.calibration)
    sequences = preset.sequences_of(own)
    tokens = sequences * preset.sequence_length if model.kind == "causal-lm" else sequences
    text = _sampling_bytes(model, preset) if own else None
    size, work = footprint_of(model, found, passes, preset, artifact, text)
    width = max((x.shape[-1] for x in found if x.info.role == "decoder"), default=0)
    phases = footprint.memory(size, work)
    speed = Speed.of(device_of(options))
    return Plan(
        model=model.source,
        kind=model.kind,
        parameters=parameters,
        layers=len({x.info.layer for x in found if x.info.layer is not None}),
        tokens=tokens,
        pipeline=pipeline.render(passes),
        targets=tuple(target.name for target in targets),
        linears=linears,
        artifact=artifact,
        peak_memory=max(phases.values()),
        memory=phases,
        memory_available=memory()[1],
        disk=2 * artifact + size.decoder + footprint.saved(size, work),
        disk_available=shutil.disk_usage(_existing(options.out or Path())).free,
        spool=footprint.spooled(size, work, width),
        spool_directory=str(spool.directory()),
        spool_available=shutil.disk_usage(spool.directory()).free,
        seconds=_seconds(found, passes, model, tokens, preset, speed, own),
        speed=speed,
        **_predicted(model.kind, found, passes, targets),
    )


def _predicted(
    kind: str, found: Sequence[_Linear], passes: Sequence[Pass], targets: Sequence[Target]
) -> dict[str, Any]:
    """What the targets' backends predict, by the fields of :class:`Plan`; linears that a compile merges read what they
    would together."""
    if not predicting(targets):
        return {}
    if kind != "causal-lm":
        return {"unpredicted": "the model is no language model"}
    if any(item.name == "budget" for item in passes):
        return {"unpredicted": "which groups the pass 'budget' will choose is not known yet"}
    if any(linear.info.experts for linear in found):
        return {"unpredicted": "how many experts a token takes is not known here"}
    layers = len({x.info.layer for x in found if x.info.layer is not None})
    try:
        parts = [_kernels(linear, passes) for linear in found]
        linears = Counter(spec for part in parts for spec, _ in part)
        quantizers = {spec for part in parts for _, spec in part}
        predicted = tuple(predictions(linears, quantizers, layers, targets))
    except KernelError as error:
        return {"unpredicted": str(error)}
    if not linears:
        return {"unpredicted": "all linears stay float"}
    return {"predicted": predicted, "predicted_without": sum(not part for part in parts)}


def _kernels(linear: _Linear, passes: Sequence[Pass]) -> list[tuple[LinearSpec, QuantizeSpec]]:
    """What computes a linear, and its input; nothing where it stays float.

    Raises:
        KernelError: no kernel can be for it.
    """
    info, (*_, rows, columns), group = linear.info, linear.shape, _group(linear, passes)
    kind: Literal["bit", "int4", "int8"]
    quantizer = _quantizer(info.scheme, passes)
    if info.role == "decoder" and group is not None and quantizer is not None:
        outliers = 0 if info.scheme.bits else _outliers(columns, passes)
        tables = {name: quantizer.codebook == name for name in ("knees", "planes")}
        assert quantizer.act_bits is not None and quantizer.act_group is not None
        of_input = QuantizeSpec(columns - outliers, quantizer.act_group, quantizer.act_bits, **tables)
        per_token = of_input.group == 0
        own, kind = product_group(group, of_input.group), "int4" if info.scheme.bits == 4 else "bit"
        found = [(LinearSpec(kind, rows, columns - outliers, own, of_input.value_bits, per_token), of_input)]
        if outliers:
            of_loud = QuantizeSpec(outliers, 0, max(8, _option(passes, "activate", "bits", 4)))
            found.append((LinearSpec("int8", rows, outliers, 0, of_loud.bits, per_token=True), of_loud))
        return found
    head = _head(passes)
    if info.role == "head" and (form := head.form(info.scheme)).bits < 16:
        group = info.scheme.act_group
        of_input = QuantizeSpec(columns, (form.group or head.group) if group is None else group, 8)
        kind = "int8" if form.bits == 8 else "int4" if form.bits == 4 else "bit"
        group = product_group(form.group, of_input.group)
        return [(LinearSpec(kind, rows, columns, group, 8, per_token=of_input.group == 0), of_input)]
    return []


def _head(passes: Sequence[Pass]) -> Head:
    """The pass that quantizes embedding and head; one that leaves them where the pipeline has none."""
    return next((item for item in passes if isinstance(item, Head)), Head(bits=16))


def _over_model(passes: Sequence[Pass]) -> Budget | None:
    """The budget of a pipeline that counts embedding and head, too."""
    return next((item for item in passes if isinstance(item, Budget) and item.over == "model"), None)


def footprint_of(
    model: frontend.UserModel,
    found: Sequence[_Linear],
    passes: Sequence[Pass],
    preset: recipe.Preset,
    artifact: int,
    text: int | None,
) -> tuple[footprint.Model, footprint.Work]:
    """What decides the memory that a compile takes.

    Args:
        found: see :func:`survey`.
        artifact: bytes of the compiled weights.
        text: what writing the calibration text takes besides the weights; None where it is not written.
    """
    layers: dict[int | None, list[tuple[int, ...]]] = {}
    for linear in found:
        if linear.info.role == "decoder":
            layers.setdefault(linear.info.layer, []).append(linear.shape)
    decoder = [x for x in found if x.info.role == "decoder"]
    inside = {x.info.weight for x in decoder}
    outside = (p.numel() for name, p in model.module.named_parameters() if name not in inside)
    names = {p.name for p in passes}
    together = [
        _option(passes, stage, "batch", 0) for stage in ("activate", "finetune") if _option(passes, stage, "steps", 0)
    ]
    language = model.kind == "causal-lm"
    rows = 1 if language else 64
    return footprint.Model(
        parameters=sum(p.numel() for p in model.module.parameters()),
        largest=max(outside, default=0),
        outputs=max((x.shape[-2] for x in found if x.info.role == "head"), default=0),
        layers=list(layers.values()),
        whole=not all(p.is_meta for p in model.module.parameters()) or model.source.endswith(".gguf"),
        artifact=artifact,
    ), footprint.Work(
        tokens=(preset.sequences_of(text is not None) + preset.validation_sequences)
        * (preset.sequence_length if language else 1),
        length=preset.sequence_length if language else 1,
        fit=ptq.BATCH * rows if "ptq" in names else 0,
        distill=_option(passes, "distill", "batch", 0) * rows if _option(passes, "distill", "epochs", 0) else 0,
        activate=_option(passes, "activate", "batch", 0) * rows if _option(passes, "activate", "epochs", 0) else 0,
        together=max(together, default=0) * rows,
        validate=_option(passes, "activate", "batch", 0) * rows,
        groups=sum(x.matrix_rows * group_count(x.shape[-1], _group(x, passes) or DEFAULT_GROUP) for x in decoder),
        text=text,
        half=samples_in_bfloat16(),
        propagates=bool(_option(passes, "ptq", "propagate", 0.0)),
        latents=max((_latents(item) for item in passes if isinstance(item, Finetune)), default=0),
    )


def _sampling_bytes(model: frontend.UserModel, preset: recipe.Preset) -> int:
    """What it takes besides the weights that the model writes its own calibration text."""
    config: Any = model.module.config
    return sampling_bytes(config, preset.sequences_of(True) + preset.validation_sequences, preset.sequence_length)


def survey(
    model: frontend.UserModel, keep_dense: Sequence[str] = (), scheme: str = "", slower: Sequence[str] = ()
) -> list[_Linear]:
    """Every linear of a model and what the pass ``annotate`` will say about it.

    A language model is only looked at, module by module; any other model is captured and annotated.

    Raises:
        LbllmError: a pattern matches nothing, a linear cannot have what the scheme says, or a plain module cannot be
            captured.
    """
    if model.kind == "causal-lm":
        found = _survey_modules(model.module)
        infos = annotate.choose([x.info for x in found], parse(scheme), keep_dense, slower)
        return [dataclasses.replace(x, info=info) for x, info in zip(found, infos, strict=True)]
    program = frontend.capture(model)
    context = PassContext()
    for item in (canonicalize.Canonicalize(), annotate.Annotate(tuple(keep_dense), scheme, tuple(slower))):
        program = item.apply(program, context).program
    return [
        _Linear(info, tuple(get_attribute(program.module, info.weight).shape)) for _, info in annotate.linears(program)
    ]


def _survey_modules(module: nn.Module) -> list[_Linear]:
    """Linears of a language model by its modules: ``nn.Linear``, GPT-2's ``Conv1D``, stacked experts, routers."""
    from transformers.pytorch_utils import Conv1D

    head = module.get_output_embeddings()  # type: ignore[operator]
    layers = _layer_prefix(module)
    result = []
    for path, owner in module.named_modules():
        layer = _layer_of(path, layers)
        if owner is head:
            info = LinearInfo(path, f"{path}.weight", None, "head", 0, "computes the output")
            result.append(_Linear(info, tuple(head.weight.shape)))
            continue
        for name, weight in owner.named_parameters(recurse=False):
            full = f"{path}.{name}"
            if isinstance(owner, (nn.Linear, Conv1D)) and name == "weight":
                shape = tuple(weight.shape) if isinstance(owner, nn.Linear) else tuple(reversed(weight.shape))
                role, reason = _role(layer, path.rpartition(".")[2] in ("gate", "router", "shared_expert_gate"))
                result.append(_Linear(LinearInfo(path, full, layer, role, 0, reason), shape))
            elif weight.dim() == 3 and layer is not None:
                info = LinearInfo(full, full, layer, "decoder", weight.shape[0], f"in decoder layer {layer}")
                result.append(_Linear(info, tuple(weight.shape)))
            elif weight.dim() == 2 and "Router" in type(owner).__name__:
                role, reason = _role(layer, True)
                result.append(_Linear(LinearInfo(path, full, layer, role, 0, reason), tuple(weight.shape)))
    return result


def _role(layer: int | None, routes: bool) -> tuple[str, str]:
    if layer is None:
        return "dense", "outside the decoder layers"
    return ("dense", "routes tokens to experts") if routes else ("decoder", f"in decoder layer {layer}")


def _layer_prefix(module: nn.Module) -> str:
    """The path of the list of decoder layers: the module list with the most weights."""
    lists = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.ModuleList)]
    best = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()), default=("", None))
    return best[0]


def _layer_of(path: str, prefix: str) -> int | None:
    if not prefix or not path.startswith(prefix + "."):
        return None
    return int(path[len(prefix) + 1 :].split(".")[0])


def skeleton(source: str) -> frontend.UserModel:
    """The model without its weights where its configuration is enough, else the model itself."""
    path, hub = Path(source).expanduser(), source.startswith(frontend.HUB)
    if not hub and not (path.suffix == ".gguf" and path.is_file()) and not (path / "config.json").is_file():
        return frontend.load(source)
    from transformers import AutoConfig, AutoModelForCausalLM

    name = frontend.hub_id(source) if hub else ""
    try:
        if hub:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        elif path.is_file():
            config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
        else:
            config = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise frontend.ModelError(f"'{source}' cannot be read as a language model: {reason}") from error
    return frontend.UserModel(module, "causal-lm", path.stem, source)


def _option(passes: Sequence[Pass], name: str, option: str, default: Any) -> Any:
    """An option of the first pass of that name; ``default`` where the pipeline lacks the pass."""
    return next((getattr(p, option, default) for p in passes if p.name == name), default)


def _latents(training: Finetune) -> int:
    """See :attr:`.footprint.Work.latents`."""
    if not training.steps or training.planes == "frozen":
        return 0
    return 3 if training.lr_weight else 1


def _treatment(linear: _Linear, passes: Sequence[Pass], open_form: str) -> Treatment:
    """What becomes of a linear.

    Args:
        open_form: see :func:`_open_form`.
    """
    info, (*_, rows, columns) = linear.info, linear.shape
    before = ORIGINAL_BYTES * linear.weights
    group = _group(linear, passes)
    if info.role == "decoder" and group is not None:
        outliers = 0 if info.experts or info.scheme.bits else _outliers(columns, passes)
        limit = None if info.scheme.group else _option(passes, "budget", "bits", None)
        if limit:
            after = int(limit * linear.weights / 8)
        else:
            stored = int4_bytes if info.scheme.bits == 4 else matrix_bytes
            after = stored(linear.matrix_rows, columns - outliers, group)
            after += linear.matrix_rows * (outliers + 4) if outliers else 0
        levels = "" if info.scheme.levels == FREE.name else f" {info.scheme.levels}"
        size = f"{_FORMS[info.scheme.bits or 2]} g{group}" if limit is None else _open(info, passes)
        kept = f", {outliers} columns int8 A8" if outliers else ""
        text = f"{size}{levels}" + _activations(info.scheme, passes, group) + kept
    elif info.role == "head" and (form := _head(passes).form(info.scheme)).bits < 16:
        size = f"{_FORMS[form.bits]} " + (f"g{form.group}" if form.group else "per row")
        after, text = form.bytes(rows, columns), f"{size}, A8"
        if (budget := _over_model(passes)) and not info.scheme.bits:
            after = int(budget.bits * linear.weights / 8) if budget.bits else after
            text = f"{open_form}, as the budget chooses, A8"
    else:
        after, text = 4 * linear.weights, "float"
    return Treatment(info.path, linear.shape, info.layer, info.role, text, info.reason, before, after)


_FORMS = {8: "int8", 4: "int4", 2: "W(1+1)"}
"""What weights of so many bits are, in words."""


def _open(info: LinearInfo, passes: Sequence[Pass]) -> str:
    """What a budget may make of a decoder linear, in words."""
    if info.scheme.bits:
        return f"{_FORMS[info.scheme.bits]}, in groups as the budget chooses"
    entries = [entry for entry in parse(_option(passes, "budget", "choices", "")) if not entry.of_head]
    coded = any(entry.gives_form for entry in entries) and not info.experts and info.scheme.levels == FREE.name
    words = ["W(1+1)", *(["int4"] if coded else []), *(["float"] if any(entry.dense for entry in entries) else [])]
    return f"{_listed(words)}, as the budget chooses"


def _listed(words: Sequence[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _open_form(found: Sequence[_Linear], passes: Sequence[Pass]) -> str:
    """What a budget may make of output heads, in words; empty where none chooses for them.

    Raises:
        PassError: the budget has no choice for them.
    """
    budget, infos = _over_model(passes), [linear.info for linear in found]
    if budget is None or all(info.role != "head" for info in infos):
        return ""
    bits = {scheme.bits for made in head_schemes(infos, parse(budget.choices)) for scheme in made}
    return _listed([word for each, word in (*_FORMS.items(), (None, "float")) if each in bits])


def _group(linear: _Linear, passes: Sequence[Pass]) -> int | None:
    """Input columns per group of a decoder linear's levels; None where the pipeline quantizes no weights."""
    default = _option(passes, "ptq", "group", None)
    return default and (linear.info.scheme.group or default)


def _outliers(columns: int, passes: Sequence[Pass]) -> int:
    """Columns of a decoder linear that have 8 bits."""
    if not _option(passes, "ptq", "outliers", True):
        return 0
    return next((item.count(columns) for item in passes if isinstance(item, Outliers)), 0)


def _quantizer(scheme: Scheme, passes: Sequence[Pass]) -> Scheme | None:
    """How the input of a decoder linear is quantized; None where the pipeline quantizes no inputs."""
    options = [_option(passes, "activate", name, None) for name in ("bits", "group", "ranges")]
    return None if None in options else quantizer_scheme(scheme, *options)


def _activations(scheme: Scheme, passes: Sequence[Pass], group: int) -> str:
    """How the input of a decoder linear is quantized, in words; scales are named where they are not the pipeline's, and
    where they are of parts of the weight's groups."""
    made = _quantizer(scheme, passes)
    if made is None:
        return ""
    scales = " per token" if _option(passes, "activate", "group", 0) and made.act_group == 0 else ""
    if made.act_group and made.act_group < group:
        scales = f" g{made.act_group}"
    table = "" if made.codebook == "none" else f" with {made.codebook}"
    return f", A{made.act_bits}{table}{scales}"


def _keeps_head(model: frontend.UserModel, found: Sequence[_Linear]) -> bool:
    """Whether the output head stays float; the token embedding then does so too."""
    if model.kind != "causal-lm" or model.module.get_output_embeddings() is None:  # type: ignore[operator]
        return False
    return all(linear.info.role != "head" for linear in found)


def _rest_bytes(passes: Sequence[Pass], rest: int, model: frontend.UserModel, found: Sequence[_Linear]) -> int:
    """Bytes of what is no linear: the embedding as the pass ``head`` stores it, norms and biases in float32.

    Args:
        rest: numbers that are no linear's.
        found: all linears.
    """
    if model.kind != "causal-lm":
        return 4 * max(0, rest)
    embedding, head = model.module.get_input_embeddings(), model.module.get_output_embeddings()  # type: ignore[operator]
    tied = head is not None and bool(getattr(model.module.config, "tie_word_embeddings", False))
    weights = 0 if tied else embedding.weight.numel()
    item, heads = _head(passes), [x.info.scheme for x in found if x.info.role == "head"]
    form, budget = item.form_beside(heads), _over_model(passes)
    if _keeps_head(model, found) or form.bits == 16:
        own = 4 * weights
    elif budget and budget.bits and not any(scheme.bits for scheme in heads):
        own = int(budget.bits * weights / 8)
    elif tied and form in map(item.form, heads):
        own = 0  # the head's
    else:
        own = form.bytes(*embedding.weight.shape)
    return own + 4 * max(0, rest - weights)


def _seconds(
    found: Sequence[_Linear],
    passes: Sequence[Pass],
    model: frontend.UserModel,
    tokens: int,
    preset: recipe.Preset,
    speed: Speed,
    writes_text: bool,
) -> dict[str, float]:
    decoder = [x for x in found if x.info.role == "decoder"]
    layers = max(1, len({x.info.layer for x in decoder}))
    weights = sum(x.weights for x in decoder)
    everything = sum(x.weights for x in found)
    sequences = tokens / preset.sequence_length
    work: dict[str, float] = {}
    if writes_text:
        work["text"] = everything

    def share(name: str) -> float:
        """Of the calibration sequences, those that a pass fits layers to: of a plain module's, all."""
        most = _option(passes, name, "sequences", 0)
        return min(1.0, most / sequences) if model.kind == "causal-lm" else float(most > 0)

    for name in ("smooth", "ptq"):
        work[name] = weights * share(name)
    beside = weights * share("ptq") if _option(passes, "ptq", "propagate", 0.0) else 0.0
    work["distill"] = weights * _option(passes, "distill", "epochs", 0) * share("distill")
    chains: dict[str, float] = {}
    for stage in ("activate", "finetune"):
        trainings = [p for p in passes if isinstance(p, (Activate, Finetune)) and p.name == stage]
        if trainings:
            seen = sum(_seen(training, sequences) for training in trainings)
            epochs = _option(passes, stage, "epochs", 0)
            work[stage] = seen * everything + weights * epochs * share(stage)
            chains[stage] = max(min(seen, 1.0), share(stage) if epochs else 0.0)
    result = {"capture and preflight": 15 + 2 * _CAPTURE_SECONDS * layers}
    result.update({_TITLES[k]: v * tokens * speed.seconds(_COSTS[k]) for k, v in work.items() if v})
    if any(item.name == "budget" for item in passes):
        result["budget"] = _budget_seconds(weights, everything, layers, tokens, passes, speed)
        heads = sum(x.weights for x in found if x.info.role == "head")
        result["budget"] += _forms_seconds(heads, everything, tokens, passes, speed)
    for stage in ("distill", "activate"):
        if work.get(stage) and _option(passes, stage, "epochs", 0):
            result[_TITLES[stage]] += everything * min(tokens, sensitivity.TOKENS) * speed.seconds(_CHANNELS)
    if beside:
        result[_TITLES["ptq"]] += beside * tokens * speed.seconds(_CHAIN)
    for stage, run in chains.items():
        if work[stage]:
            result[_TITLES[stage]] += weights * run * tokens * speed.seconds(_CHAIN)
    shapes = len({x.shape[-2:] for x in found if x.info.role != "dense"})
    result["kernels: search and proof"] = min(preset.tune_seconds, 2.0 * shapes * preset.tune_trials) + 5
    if model.kind == "causal-lm":
        result["native program"] = _PROGRAM_SECONDS * layers
    result["checks, artifact, sheet"] = 20 + 2 * 4096 * 2 * weights / speed.host
    return result


_INPUTS = 4
"""Inputs that the linears of a decoder layer read, in most architectures: of attention, its output and the MLP."""


_FIT_TOKENS = 20_000
"""A fit costs what the statistics of so many tokens cost, whatever number it is fitted to; from a budget that took 11.5
minutes for SmolLM2 on a Zen 5."""


def _seen(training: Activate | Finetune, sequences: float) -> float:
    """Passes over the calibration sequences that training on the whole model's output makes."""
    passes = training.steps * training.batch / sequences
    return min(passes, training.repeats) if isinstance(training, Finetune) else passes


def _budget_seconds(
    weights: int, everything: int, layers: int, tokens: int, passes: Sequence[Pass], speed: Speed
) -> float:
    """Every choice is fitted, run and weighed by gradients on a few tokens, one of each input in the whole model; the
    choice for all is fitted as a whole, under ``max_kl`` twice at most."""
    entries = parse(_option(passes, "budget", "choices", ""))
    fitted = sum(not (entry.dense or entry.of_head) for entry in entries)
    few = min(tokens, sensitivity.TOKENS)
    measured = min(tokens, MEASURED_TOKENS)
    wholes = 2 if _option(passes, "budget", "max_kl", 0.0) else 1
    fits = (fitted + wholes) * weights * (few + _FIT_TOKENS) * speed.seconds(_COSTS["ptq"])
    gradients = everything * few * speed.seconds(_CHANNELS)
    runs = _INPUTS * weights * (fitted * few + layers * measured / 2) * speed.seconds(_CHAIN)
    return fits + gradients + runs


def _forms_seconds(heads: int, everything: int, tokens: int, passes: Sequence[Pass], speed: Speed) -> float:
    """The head's inputs are seen twice; each of its forms is fitted to them and run through the model, the chosen one
    in the end once more."""
    budget = _over_model(passes)
    if budget is None:
        return 0.0
    forms = [dict(entry.settings)["bits"] for entry in parse(budget.choices) if entry.gives_form]
    few, measured = min(tokens, sensitivity.TOKENS), min(tokens, MEASURED_TOKENS)
    fits = (sum(bits in FITTED for bits in forms) + 1) * heads * (few + _FIT_TOKENS) * speed.seconds(_COSTS["ptq"])
    return fits + everything * (2 * few + (len(forms) + 1) * measured) * speed.seconds(_CHAIN)


_TITLES = {
    "text": "calibration text by the model itself",
    "smooth": "smooth",
    "ptq": "stage 1, ptq",
    "distill": "stage 2, distill",
    "activate": "stage 3, activate",
    "finetune": "finetune",
}


def matmul_speed(dtype: torch.dtype, device: torch.device, seconds: float = 0.3, size: int = 0) -> float:
    """Speed of a device's matrix products, in operations per second.

    Args:
        dtype: of the matrices.
        device: what multiplies them.
        seconds: how long to measure.
        size: of the square matrices; 0 for one that suits the device.
    """
    size = size or (768 if device == CPU else 4096)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    best = float("inf")
    _multiply(a, b)
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        once = time.perf_counter()
        _multiply(a, b)
        best = min(best, time.perf_counter() - once)
    return 2 * size**3 / best


def _multiply(a: torch.Tensor, b: torch.Tensor) -> None:
    """Multiplies matrices and waits for a device that works on its own."""
    torch.mm(a, b)[0, 0].item()


def _existing(path: Path) -> Path:
    path = path.resolve()
    return next(p for p in (path, *path.parents) if p.exists())


def render(plan: Plan) -> list[RenderableType]:
    """The plan for people: linears folded over decoder layers, then what it needs."""
    rows = [
        [place, path, "x".join(str(d) for d in shape), count, treatment, reason]
        for (place, path, shape, treatment, reason), count in _fold(plan.linears).items()
    ]
    linears = terminal.table("Linears", ["where", "linear", "shape", "count", "becomes", "why"], rows)
    before, after = ORIGINAL_BYTES * plan.parameters, plan.artifact
    facts = [
        ("parameters", f"{plan.parameters / 1e6:.1f} M, {terminal.size(before)} in 16 bit"),
        ("artifact", f"{terminal.size(after)}, {before / max(1, after):.1f} times smaller; the original in 16 bit"),
        ("peak memory", terminal.size(plan.peak_memory) + _against(plan.peak_memory, plan.memory_available)),
        *(("  " + name, terminal.size(size)) for name, size in plan.memory.items()),
        ("disk", terminal.size(plan.disk) + _against(plan.disk, plan.disk_available)),
        (
            "temporary files",
            f"{terminal.size(plan.spool)}{_against(plan.spool, plan.spool_available)} in {plan.spool_directory}",
        ),
        ("calibration", f"{plan.tokens} tokens" if plan.kind == "causal-lm" else f"{plan.tokens} inputs"),
        *((name, "about " + terminal.duration(seconds)) for name, seconds in plan.seconds.items()),
        (
            "in all",
            f"about {terminal.duration(sum(plan.seconds.values()))}"
            f" ({plan.speed.products / 1e9:.0f} GFLOP/s of this {plan.speed.device})",
        ),
        ("targets", ", ".join(plan.targets)),
        ("pipeline", plan.pipeline),
    ]
    predicted: list[RenderableType] = []
    if plan.predicted:
        predicted = [Text(), predicted_table(plan.predicted, plan.predicted_without)]
    elif plan.unpredicted:
        predicted = [Text(), Text(f"No prediction of how long a token takes: {plan.unpredicted}")]
    return [linears, Text(), terminal.table("Needs", ["", ""], facts), *predicted]


def predicted_table(predicted: Sequence[Prediction], without: int) -> RenderableType:
    """Predictions for people.

    Args:
        without: how many linears they leave out, because these stay float.
    """
    rows = [
        [p.device, f"{1e3 * p.seconds:.3g}", f"{1 / p.seconds:.0f}", f"{100 * p.gaps_s / p.seconds:.0f} %", p.limit]
        for p in predicted
    ]
    columns = ["on", "ms a token", "tokens a second", "of it gaps between launches", "the rest waits for"]
    left = f"; without {without} linears that stay float" if without else ""
    title = f"PREDICTION, not measured: a token can take no less (docs/cuda-bounds.md){left}"
    return terminal.table(title, columns, rows)


def _fold(linears: Sequence[Treatment]) -> dict[tuple[str, str, tuple[int, ...], str, str], int]:
    """Counts linears that differ in nothing but their decoder layer."""
    result: dict[tuple[str, str, tuple[int, ...], str, str], int] = {}
    for t in linears:
        own = t.path if t.layer is None else t.path.replace(f".{t.layer}.", ".*.", 1)
        place = "outside the layers" if t.layer is None else "decoder layers"
        reason = t.reason.replace(f"layer {t.layer}", "layer") if t.layer is not None else t.reason
        key = (place, own, t.shape, t.treatment, reason)
        result[key] = result.get(key, 0) + 1
    return result


def _against(needed: int, available: int | None) -> str:
    if available is None:
        return ""
    verdict = "" if needed <= available else ": NOT ENOUGH"
    return f" of {terminal.size(available)} available{verdict}"
