"""What can be asked of a compile. No heavy imports: the command line builds its options from here."""

from __future__ import annotations

import dataclasses
import numbers
import os
import shlex
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.codegen.sizes import ACTIVATION_BITS, GROUPS, KV_BITS, MAX_SEED


class OptionError(LbllmError):
    """An option has a value it cannot have, or two options contradict each other."""


@dataclass(frozen=True)
class Flag:
    """How an option stands on a command line.

    Attributes:
        help: what it says, in a line.
        panel: the part of the help that it is in.
        short: its one-letter form, e.g. ``-t``.
        metavar: what stands for its value; by default its type.
        choices: its values, where they are few; what a shell completes.
    """

    help: str
    panel: str | None = None
    short: str | None = None
    metavar: str | None = None
    choices: tuple[str | int, ...] = ()


BUDGET_OVER = ("layers", "model")
"""What a limit may be on."""

FORMAT, WORK, LOOK = "What it becomes", "How much is done, and where", "Looking at what happens"
"""Parts of the help."""


@dataclass(frozen=True)
class CompileOptions:
    """What the command line of a compile can say.

    Attributes:
        model: a ``model.py``, a Hugging Face directory, a ``.gguf`` file, a hub id as ``hf:ORG/NAME``, or the model
            itself, a ``torch.nn.Module``, which is not changed.
        target: what to generate kernels for; several separated by commas.
        recipe, preset: see :mod:`lbllm_compile.recipe`.
        pipeline: pipeline text instead of the recipe's.
        group, act_bits, kv_bits: override the recipe's.
        scheme: entries of :mod:`lbllm_compile.passes.ir.scheme`, for single linears; later ones win.
        keep_dense: linears that stay float, whatever the scheme says; ``*`` leaves the whole model as it is.
        bits, max_kl: a limit under which the group of every linear is chosen, or that it stays float, see
            :mod:`lbllm_compile.passes.budget`.
        budget_over: what the limit is on: the linears of the decoder ``layers``, or the whole ``model``.
        fallback: ``dense`` keeps linears float whose kernels are slower than float ones on this machine, see
            :mod:`lbllm_compile.fallback`.
        context: tokens that a language model shall attend to at most, see :func:`lbllm_compile.frontend.capture`.
        out: the directory to write; ``<model name>-lbllm`` by default.
        calibration: calibration text; the model's own samples by default.
        device: where calibrations compute and the model samples its calibration text: ``auto``, ``cpu`` or ``cuda``.
        work_dir: where finished layers are kept until the compile is done; ``<out>.lbllm-work`` by default.
        seed: of every random choice.
        fresh: start over instead of resuming.
        no_sheet: measure neither quality nor speed of the artifact when it is written; it is loaded and checked.
        dump_dir: where to write the graph after every pass, as text.
        print_after, time_passes: what the command line shows.
        tokenizer, texts, example_inputs, calibration_inputs: what comes with the model as objects, see
            :class:`lbllm_compile.frontend.Given`.
    """

    model: Annotated[Any, Flag("model.py, Hugging Face directory, .gguf file or hf:ORG/NAME")]
    target: Annotated[
        str, Flag("where it will run: cpu, cuda, cuda:sm_90, …; several joined by commas", FORMAT, short="-t")
    ] = "cpu"
    recipe: Annotated[
        str | None,
        Flag(
            "named pipeline: lbllm, lbllm-paper, bwa or db-llm [default: lbllm]",
            FORMAT,
            choices=("lbllm", "lbllm-paper", "bwa", "db-llm"),
        ),
    ] = None
    pipeline: Annotated[str | None, Flag("the passes as text; `plan MODEL` shows the recipe's", FORMAT)] = None
    group: Annotated[
        int | None,
        Flag(
            "input columns that share four levels: 32, 64, 128 or 256 [default: 64; 128 in lbllm-paper and bwa]",
            FORMAT,
            choices=GROUPS,
        ),
    ] = None
    act_bits: Annotated[
        int | None, Flag("activation bits: 4, 8 or 16 [default: 4; 16 in db-llm]", FORMAT, choices=ACTIVATION_BITS)
    ] = None
    kv_bits: Annotated[
        int | None,
        Flag(
            "bits of the key/value cache: 4, 8 or 16 [default: 4; 16 with --keep-dense '*' and in db-llm without"
            " --act-bits]",
            FORMAT,
            choices=KV_BITS,
        ),
    ] = None
    scheme: Annotated[
        tuple[str, ...],
        Flag("other settings for some linears, e.g. '*.down_proj: group=32 act=8'; repeatable", FORMAT, metavar="TEXT"),
    ] = ()
    keep_dense: Annotated[
        tuple[str, ...],
        Flag("linears to keep float, e.g. 'model.layers.0.*'; repeatable", FORMAT, metavar="PATTERN"),
    ] = ()
    bits: Annotated[
        float | None,
        Flag("choose each linear's group, or float, for the least harm at so many bits a weight, e.g. 2.5", FORMAT),
    ] = None
    max_kl: Annotated[
        float | None,
        Flag("choose them for the fewest bits at so much KL divergence behind stage 1, in nats, e.g. 0.5", FORMAT),
    ] = None
    budget_over: Annotated[
        str | None,
        Flag(
            "what --bits or --max-kl counts and chooses for: layers, or model, embedding and head too [default:"
            " layers]",
            FORMAT,
            choices=BUDGET_OVER,
        ),
    ] = None
    fallback: Annotated[
        str | None,
        Flag("dense: linears whose kernels are slower here than float ones stay float [default: W(1+1) all]", FORMAT),
    ] = None
    context: Annotated[
        int | None,
        Flag(
            "tokens to attend to at most [default: all the model is made for; as many as have unscaled frequencies"
            " where long or dynamic rotary embeddings change them]",
            FORMAT,
        ),
    ] = None
    out: Annotated[Path | None, Flag("artifact directory to write [default: NAME-lbllm]", WORK)] = None
    preset: Annotated[
        str | None,
        Flag("how much work: quick, default or best [default: default]", WORK, choices=("quick", "default", "best")),
    ] = None
    calibration: Annotated[
        str | None,
        Flag(
            "FILE.txt, .jsonl, .parquet or hf:NAME[:CONFIG][@SPLIT] [default: text that the model writes itself]",
            WORK,
        ),
    ] = None
    device: Annotated[
        str,
        Flag(
            "where calibrations compute and the model samples calibration text: auto, cpu or cuda",
            WORK,
            choices=("auto", "cpu", "cuda"),
        ),
    ] = "auto"
    work_dir: Annotated[Path | None, Flag("where unfinished work is kept", WORK)] = None
    seed: Annotated[int, Flag("start of every random choice", WORK)] = 0
    fresh: Annotated[bool, Flag("start over instead of taking over what is finished", WORK)] = False
    no_sheet: Annotated[bool, Flag("do not measure quality and speed of the artifact at the end", WORK)] = False
    dump_dir: Annotated[Path | None, Flag("write the graph after every pass here, as 005_ptq.txt", LOOK)] = None
    print_after: Annotated[
        tuple[str, ...], Flag("show the graph after this pass; repeatable", LOOK, metavar="PASS")
    ] = ()
    time_passes: Annotated[bool, Flag("show what each pass took", LOOK)] = False

    tokenizer: Any = None
    texts: Iterable[str] | None = None
    example_inputs: Any = field(default=None, compare=False)
    calibration_inputs: Iterable[Any] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Takes paths as text, text as paths, and a single text where several may be given.

        Raises:
            OptionError: an option has a value of another type or one that it cannot have, or there are two calibration
                texts.
        """
        if isinstance(self.model, os.PathLike):
            object.__setattr__(self, "model", str(self.model))
        for name, option in options().items():
            object.__setattr__(self, name, _taken(name, option.type, getattr(self, name)))
        if self.calibration is not None and self.texts is not None:
            raise OptionError("calibration and texts contradict each other; give one of them")
        if self.fallback not in (None, "dense"):
            raise OptionError(f"--fallback cannot be '{self.fallback}'; give dense, or leave it out")
        if not 0 <= self.seed <= MAX_SEED:
            raise OptionError(f"--seed cannot be {self.seed}; choose 0 to {MAX_SEED}")


class _Values(NamedTuple):
    """What may be given for options of a type, and what becomes of it."""

    described: str
    types: tuple[type, ...]
    made: Callable[[Any], Any]


_VALUES: dict[Any, _Values] = {
    str: _Values("text", (str, os.PathLike), os.fspath),
    int: _Values("a whole number", (numbers.Integral,), int),
    float: _Values("a number", (numbers.Real,), float),
    bool: _Values("True or False", (bool,), bool),
    Path: _Values("a path", (str, os.PathLike), Path),
    tuple[str, ...]: _Values(
        "one text or a tuple of them",
        (str, list, tuple),
        lambda texts: (texts,) if isinstance(texts, str) else (*texts,),
    ),
}


def _taken(name: str, kind: Any, value: Any) -> Any:
    """A value as the option of that name has it, whose type is ``kind``.

    Raises:
        OptionError: it is of another type.
    """
    if kind is Any or (value is None and type(None) in typing.get_args(kind)):
        return value
    wanted, values = next((k, v) for k, v in _VALUES.items() if kind in (k, k | None))
    fits = isinstance(value, values.types) and isinstance(value, bool) == (wanted is bool)
    if fits and isinstance(value, (list, tuple)):
        fits = all(isinstance(text, str) for text in value)
    if not fits:
        raise OptionError(f"--{name.replace('_', '-')} cannot be {value!r}; give {values.described}")
    return values.made(value)


class Option(NamedTuple):
    """An option of a compile that a command line has.

    Attributes:
        type: of its values.
        default: where it is not given; ``dataclasses.MISSING`` where it must be.
        flag: how it stands on the command line.
    """

    type: Any
    default: Any
    flag: Flag


def options() -> dict[str, Option]:
    """The options of a compile that a command line has, in order."""
    hints = typing.get_type_hints(CompileOptions, include_extras=True)
    described = {f.name: (typing.get_args(hints[f.name]), f.default) for f in dataclasses.fields(CompileOptions)}
    return {
        name: Option(args[0], default, args[-1])
        for name, (args, default) in described.items()
        if args and isinstance(args[-1], Flag)
    }


def command_line(given: CompileOptions) -> str:
    """The command line of a compile that decides what comes of it: options at their defaults and those of looking are
    left out. A model that is an object stands as its type, in angle brackets."""
    words = ["lbllm-compile", given.model if isinstance(given.model, str) else f"<{type(given.model).__name__}>"]
    for name, option in options().items():
        value = getattr(given, name)
        if name in ("model", "fresh", "work_dir") or option.flag.panel == LOOK or value == option.default:
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag)
            continue
        for text in value if isinstance(value, tuple) else (value,):
            words += [flag, str(text)]
    return shlex.join(words)
