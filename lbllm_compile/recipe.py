"""Recipes and presets: what turns a handful of options into a whole pipeline.

A *recipe* is a named pipeline; a *preset* sets how much work it does. Everything a recipe decides ends up in the
pipeline text, so the text alone reproduces the compile.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from lbllm_compile.codegen.errors import suggestion
from lbllm_compile.codegen.levels import DUAL, FREE
from lbllm_compile.codegen.sizes import ACTIVATION_BITS, DEFAULT_GROUP, GROUPS, KV_BITS
from lbllm_compile.options import BUDGET_OVER, OptionError
from lbllm_compile.passes import pipeline
from lbllm_compile.passes.base import Pass
from lbllm_compile.passes.budget import Budget
from lbllm_compile.passes.calibrate.layers import LAYER_SEQUENCES
from lbllm_compile.passes.head import Head

ALIGN_BATCH = 4
"""Sequences of a step where levels train in stage 2's place."""

DEVIATION = 0.5
"""A token's weight there: the geometric mean of both models' entropies."""


class RecipeError(OptionError):
    """An option does not go with a recipe.

    Args:
        reason: what does not go with what; kept for those who choose recipes in another way.
        advice: what to do about it where ``--recipe`` chooses one.
    """

    def __init__(self, reason: str, advice: str):
        super().__init__(f"{reason}; {advice}")
        self.reason = reason


@dataclass(frozen=True)
class Recipe:
    """A named pipeline.

    Attributes:
        description: what it is.
        smooth: channels are evened out and keys centered before anything is quantized.
        group: input columns per group of weights.
        per_token: activations have one scale per token instead of one per token and group.
        ranges: see the pass ``activate``.
        ranges_of_other_bits: those with activations of other than 4 bits, which cannot have ``ranges`` unless they are
            clipped. None refuses such activations.
        outliers: the loudest channels of inputs keep 8 bits, as many as the pass ``outliers`` has by default.
        levels: level rule of the linears that no scheme gives another.
        act_bits: of activations, where no others are asked for; with 16 the KV cache has 16, too.
        distill: stage 2 trains planes and levels layer by layer, as the preset says.
        align: in place of stage 2 the levels of all layers train together on the whole model's output, in as many
            passes over the calibration set; planes follow them, and tokens that the models are unsure of weigh more.
        activate_epochs: passes over the calibration set in which stage 3 trains layer by layer.
        whole: stage 3 and ``finetune`` train all layers together, as the preset says.
    """

    description: str
    smooth: bool
    group: int
    per_token: bool
    ranges: Literal["clip", "knees", "planes"]
    outliers: bool
    distill: bool
    activate_epochs: int
    whole: bool
    levels: str = FREE.name
    act_bits: int = 4
    align: bool = False
    ranges_of_other_bits: Literal["clip"] | None = None


RECIPES = {
    "lbllm": Recipe(
        "channels evened out, then the three LBLLM stages and, beyond quick, end-to-end tuning; activation scales per"
        " token and group, with knees, 4-bit KV cache, int8 lm_head",
        smooth=True,
        group=DEFAULT_GROUP,
        per_token=False,
        ranges="knees",
        ranges_of_other_bits="clip",
        outliers=False,
        distill=True,
        activate_epochs=0,
        whole=True,
    ),
    "lbllm-paper": Recipe(
        "the three LBLLM stages alone, layer by layer as in the paper; groups of 128, activation scales per token, with"
        " knees, 4-bit KV cache, int8 lm_head",
        smooth=False,
        group=128,
        per_token=True,
        ranges="knees",
        outliers=False,
        distill=True,
        activate_epochs=1,
        whole=False,
    ),
    "bwa": Recipe(
        "BWA, without training: planes and levels fitted under the inputs' Hessian, outlier channels of 8 bits; groups"
        " of 128, activation scales per token, codes whose four binary planes have fitted scales, 4-bit KV cache, int8"
        " lm_head",
        smooth=False,
        group=128,
        per_token=True,
        ranges="planes",
        outliers=True,
        distill=False,
        activate_epochs=0,
        whole=False,
    ),
    "db-llm": Recipe(
        "DB-LLM: two binary planes a weight, each with a scale per group of 64, that train on the whole model's output,"
        " unsure tokens first; 16-bit activations and KV cache unless --act-bits asks for less, int8 lm_head",
        smooth=False,
        group=64,
        per_token=False,
        ranges="clip",
        outliers=False,
        distill=False,
        activate_epochs=0,
        whole=True,
        levels=DUAL.name,
        act_bits=16,
        align=True,
    ),
}
"""Known recipes by name."""


class Preset(BaseModel):
    """How much work a compile does.

    Attributes:
        sequences: calibration sequences, of which the training of all layers together takes what it has steps for.
        sequence_length: tokens in each.
        validation_sequences: held-out sequences, never trained on.
        distill_epochs: passes over the calibration set in stage 2.
        activate_steps: batches on which stage 3 trains the whole model.
        finetune_steps: the same for ``finetune``; with 0 the pipeline goes without.
        tune_trials: schedule candidates measured per shape and M bucket.
        tune_seconds: time limit of the whole schedule search.
        layer_sequences: calibration sequences that layers are fitted to one by one, at most.
        own_sequences: calibration sequences that a model writes itself where no text is named, at most; it writes them
            token by token, which is slow.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sequences: int = Field(gt=0)
    sequence_length: int = Field(gt=1)
    validation_sequences: int = Field(gt=0)
    distill_epochs: int = Field(ge=0)
    activate_steps: int = Field(ge=0)
    finetune_steps: int = Field(ge=0)
    tune_trials: int = Field(ge=1)
    tune_seconds: float = Field(gt=0)
    layer_sequences: int = Field(default=LAYER_SEQUENCES, gt=0)
    own_sequences: int = Field(default=LAYER_SEQUENCES, gt=0)

    def sequences_of(self, own: bool) -> int:
        """Calibration sequences: of a text, or of what the model writes itself."""
        return min(self.sequences, self.own_sequences) if own else self.sequences


PRESETS = {
    "quick": Preset(
        sequences=64,
        sequence_length=256,
        validation_sequences=8,
        distill_epochs=2,
        activate_steps=8,
        finetune_steps=0,
        tune_trials=16,
        tune_seconds=90,
    ),
    "default": Preset(
        sequences=1024,
        sequence_length=256,
        validation_sequences=16,
        distill_epochs=2,
        activate_steps=0,
        finetune_steps=256,
        tune_trials=32,
        tune_seconds=120,
    ),
    "best": Preset(
        sequences=8192,
        sequence_length=2048,
        validation_sequences=64,
        distill_epochs=2,
        activate_steps=0,
        finetune_steps=2048,
        tune_trials=64,
        tune_seconds=600,
        layer_sequences=8192,
        own_sequences=8192,
    ),
}


@dataclass(frozen=True)
class Choices:
    """The quantization options of the command line; None means the recipe's own."""

    recipe: str = "lbllm"
    preset: str = "default"
    pipeline: str | None = None
    group: int | None = None
    act_bits: int | None = None
    kv_bits: int | None = None
    scheme: tuple[str, ...] = ()
    keep_dense: tuple[str, ...] = ()
    bits: float | None = None
    max_kl: float | None = None
    budget_over: str | None = None


_IN_PIPELINE = ("group", "act_bits", "kv_bits", "scheme", "keep_dense", "bits", "max_kl", "budget_over")
"""Choices that pipeline text makes itself."""


def choices(options: Any, model_recipe: Mapping[str, Any] | None = None) -> Choices:
    """The choices of a command line, on top of the ``recipe`` dict of a model.py, on top of the defaults.

    A pipeline on the command line also takes the place of what the dict says that pipeline text says.

    Args:
        options: anything with the fields of :class:`Choices`, None where not given.

    Raises:
        OptionError: the model's recipe has an unknown key or a value of the wrong type.
    """
    known = {f.name: f for f in dataclasses.fields(Choices)}
    hints = typing.get_type_hints(Choices)
    values: dict[str, Any] = {}
    for key, value in (model_recipe or {}).items():
        if key not in known:
            raise OptionError(
                f"the model's recipe has no option '{key}'{suggestion(key, known)}; it has {', '.join(known)}"
            )
        try:
            values[key] = TypeAdapter(hints[key]).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].lower()
            raise OptionError(f"the option '{key}' of the model's recipe cannot be {value!r}: {reason}") from error
    given = {name: getattr(options, name) for name in known}
    if given["pipeline"] is not None:
        values = {key: value for key, value in values.items() if key not in _IN_PIPELINE}
    return Choices(**{**values, **{k: v for k, v in given.items() if v is not None and v != ()}})


def preset(name: str) -> Preset:
    """The preset of a name.

    Raises:
        OptionError: there is none.
    """
    if name not in PRESETS:
        raise OptionError(f"there is no preset '{name}'{suggestion(name, PRESETS)}; choose {', '.join(PRESETS)}")
    return PRESETS[name]


def passes(choices: Choices, target: str) -> list[Pass]:
    """The pipeline that a recipe, a preset and options amount to; or the one given as text.

    Raises:
        OptionError: an option is out of range or contradicts ``pipeline``.
        PipelineError, PassNameError: the text is wrong.
    """
    size = preset(choices.preset)
    if choices.recipe not in RECIPES:
        hint = suggestion(choices.recipe, RECIPES)
        raise OptionError(f"there is no recipe '{choices.recipe}'{hint}; choose {', '.join(RECIPES)}")
    if choices.pipeline is not None:
        given = [name for name in _IN_PIPELINE if getattr(choices, name)]
        if given:
            option = given[0].replace("_", "-")
            raise OptionError(f"--{option} and --pipeline contradict each other; write the option in the pipeline text")
        given = pipeline.parse(choices.pipeline)
        names = [item.name for item in given]
        simulated = [name for name in names if name in ("ptq", "activate", "head")]
        if simulated and "lower" not in names:
            raise OptionError(
                f"the pipeline simulates quantization ('{simulated[0]}') and never lowers it, and only lowered graphs"
                " run; add 'lower' behind it"
            )
        if {"budget", "outliers"} <= set(names):
            raise OptionError(
                "the pass 'budget' does not count the channels that 'outliers' keeps at 8 bits; leave out one of them"
            )
        for item in given:
            if isinstance(item, Budget):
                _check_whole(item, given)
        return given
    recipe = RECIPES[choices.recipe]
    limit = _limit(choices)
    group = _one_of("group", choices.group, recipe.group, GROUPS)
    act_bits = _one_of("act-bits", choices.act_bits, recipe.act_bits, ACTIVATION_BITS)
    weight_only = act_bits == recipe.act_bits == 16
    kv_bits = _one_of("kv-bits", choices.kv_bits, 16 if "*" in choices.keep_dense or weight_only else 4, KV_BITS)
    ranges = _ranges(choices.recipe, act_bits)
    layers = {"sequences": size.layer_sequences}
    activate = {
        "bits": act_bits,
        "kv": kv_bits,
        "group": 0 if recipe.per_token else group,
        "ranges": ranges,
        "epochs": recipe.activate_epochs,
        **(layers if recipe.activate_epochs else {}),
        "steps": size.activate_steps if recipe.whole and not weight_only else 0,
    }
    make = pipeline.make
    tuned = recipe.whole and size.finetune_steps and not weight_only
    rules = [f"*: levels={recipe.levels}"] if recipe.levels != FREE.name else []
    weighing = {"deviation": DEVIATION} if recipe.align else {}
    steps = size.distill_epochs * math.ceil(min(size.sequences, size.layer_sequences) / ALIGN_BATCH)
    # DB-LLM trains scales alone.
    align = {"steps": steps, "batch": ALIGN_BATCH, "planes": "nearest", "lr_norms": 0.0, **weighing}
    return [
        make("canonicalize", {}),
        make("annotate", {"keep_dense": choices.keep_dense, "scheme": "; ".join([*rules, *choices.scheme])}),
        *([make("smooth", {})] if recipe.smooth else []),
        *([make("budget", limit)] if limit else []),
        *([make("outliers", {})] if recipe.outliers else []),
        make("observe", {}),
        make("ptq", {"group": group, **layers}),
        *([make("distill", {"epochs": size.distill_epochs, **layers})] if recipe.distill else []),
        *([make("finetune", align)] if recipe.align else []),
        make("activate", activate),
        *([make("finetune", {"steps": size.finetune_steps, **weighing})] if tuned else []),
        make("head", {}),
        make("merge", {}),
        make("lower", {"target": target}),
        make("cache", {}),
        make("cleanup", {}),
    ]


def _ranges(name: str, act_bits: int) -> Literal["clip", "knees", "planes"]:
    """The ranges of a recipe's activations, or those it has with other than 4 bits.

    Raises:
        RecipeError: it has none with so many bits.
    """
    recipe = RECIPES[name]
    if recipe.ranges == "clip" or act_bits == 4:
        return recipe.ranges
    if recipe.ranges_of_other_bits is not None:
        return recipe.ranges_of_other_bits
    raise RecipeError(
        f"--act-bits cannot be {act_bits} in the recipe '{name}', whose activations have {recipe.ranges}",
        "use 4 or --recipe lbllm",
    )


def _check_whole(budget: Budget, passes: Sequence[Pass]) -> None:
    """Checks the pass ``budget`` of a pipeline text.

    Raises:
        OptionError: the pipeline does not go with a budget over the whole model.
    """
    heads = [item for item in passes if isinstance(item, Head)]
    if budget.over == "model" and not heads:
        raise OptionError("budget{over=model} chooses the form of the head, which the pass 'head' makes; add 'head'")
    if budget.over == "model" and any(head != Head() for head in heads):
        raise OptionError(
            "budget{over=model} chooses the form of the head, and measures it with the options that the pass 'head' has"
            " by default; leave out those of 'head', and give a form of your own with annotate{scheme=\"lm_head: ...\"}"
        )


def _limit(choices: Choices) -> dict[str, float | str]:
    """The options of the pass ``budget`` that are asked for; none where there is no limit.

    Raises:
        OptionError: it cannot be, or contradicts another option.
    """
    given: dict[str, Any] = {}
    for name in ("bits", "max_kl"):
        if (value := getattr(choices, name)) is None:
            continue
        given[name] = value
        flag = f"--{name.replace('_', '-')}"
        if not 0 < value < math.inf:
            raise OptionError(f"{flag} cannot be {value:g}; give a number above 0, e.g. {_LIMITS[name]}")
        if choices.group is not None:
            raise OptionError(f"--group and {flag} contradict each other: {flag} chooses groups; give one of them")
        if RECIPES[choices.recipe].outliers:
            raise RecipeError(
                f"{flag} cannot be given with the recipe '{choices.recipe}': it does not count the channels that keep 8"
                " bits",
                "use --recipe lbllm",
            )
    if len(given) > 1:
        raise OptionError("--bits and --max-kl contradict each other; give one of them")
    over = choices.budget_over
    if over is not None and over not in BUDGET_OVER:
        raise OptionError(f"--budget-over cannot be '{over}'; choose {' or '.join(BUDGET_OVER)}")
    if not given and over is not None:
        raise OptionError("--budget-over says what a limit is on; give --bits or --max-kl with it")
    return {**given, "over": over} if over == "model" else given


_LIMITS = {"bits": 2.5, "max_kl": 0.5}
"""What may be asked for, in messages."""


def _one_of(name: str, value: int | None, default: int, allowed: Sequence[int]) -> int:
    if value is None:
        return default
    if value not in allowed:
        raise OptionError(f"--{name} cannot be {value}; choose {', '.join(str(a) for a in allowed)}")
    return value
