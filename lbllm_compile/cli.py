"""The command line. ``lbllm-compile MODEL …`` compiles; ``lbllm-compile VERB …`` does what the verb says.

Results go to stdout; progress, notes and errors go to stderr. With ``--json`` one JSON document goes to stdout and
nothing else does. A mistake of the user is answered with one sentence and exit code 2, never with a traceback
(``--debug`` shows it).
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import io
import json
import os
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from lbllm_compile import completion
from lbllm_compile.codegen.errors import LbllmError, compiler_is_missing, missing_compiler
from lbllm_compile.codegen.sizes import GROUPS
from lbllm_compile.options import CompileOptions, options
from lbllm_compile.plain import plain
from lbllm_compile.version import __version__

# torch, transformers and tvm take seconds to import: every verb imports what it needs when it runs.
if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from lbllm_compile.passes.ir.program import Program
    from lbllm_compile.passes.pipeline import PassRecord
    from lbllm_compile.report.terminal import BarProgress, PlainProgress

EXIT_BUG = 1
EXIT_USER = 2
EXIT_DIFFERENT = 3
EXIT_INTERRUPTED = 130

# What typer raises for a wrong command line: the class behind all of its specific ones.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class UsageError(LbllmError):
    """The command line itself makes no sense."""


class VerbGroup(TyperGroup):
    """A first word that is no verb is a model to compile; every error becomes one sentence and an exit code."""

    _mistyped = ""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own, rest = _split_debug(args)
        if rest and rest[0] not in self.commands and rest[0] not in _own_options(self, ctx):
            self._mistyped = _mistyped_verb(rest[0], list(self.commands))
            rest = ["compile", *rest]
        return super().parse_args(ctx, own + rest)

    def invoke(self, ctx: Any) -> Any:
        debug = bool(ctx.params.get("debug"))
        try:
            if self._mistyped:
                raise UsageError(self._mistyped)
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt as error:
            _fail(f"interrupted{_where()}{_kept(error)}", EXIT_INTERRUPTED, debug)
        except _UsageError as error:
            _fail(_usage_text(error), EXIT_USER, debug)
        except LbllmError as error:
            excerpt = getattr(error, "excerpt", "")
            _fail(f"{error}" + (f"\n{excerpt}" if excerpt else ""), error.exit_code, debug)
        except BrokenPipeError:
            # The reader of our output has gone, as in `… | head`; what is still buffered has nowhere to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(EXIT_BUG) from None
        except OSError as error:
            where = f" '{error.filename}'" if error.filename else ""
            _fail(f"cannot access{where}: {error.strerror or error}", EXIT_USER, debug)
        except ImportError as error:
            if compiler_is_missing(error):
                _fail(f"{missing_compiler(error, f'`{ctx.invoked_subcommand}`')}", EXIT_USER, debug)
            _fail(f"{error}; `lbllm-compile doctor` says which packages are broken or missing", EXIT_BUG, debug)
        except Exception as error:
            if _is_lack_of_memory(error):
                _fail("out of memory; `lbllm-compile plan MODEL` says what a compile needs", EXIT_BUG, debug)
            text = str(error).strip().splitlines()
            reason = f"{type(error).__name__}{': ' + text[0] if text else ''}"
            _fail(
                f"this is a bug in lbllm-compile ({reason}); please report it with what --debug adds", EXIT_BUG, debug
            )


class TuneGroup(TyperGroup):
    """A first word that is no verb of ``tune`` belongs to ``search``; without any there is help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        args = args or ["--help"]
        if args[0] not in (*self.commands, "--help"):
            args = ["search", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=VerbGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Turn a causal language model into W(1+1)A4 and run it on generated kernels.\n\n"
    "`lbllm-compile MODEL` is short for `lbllm-compile compile MODEL`. MODEL is a model.py (it is Python and it runs: "
    "name only files you trust), a Hugging Face directory, a .gguf file or a hub id as hf:ORG/NAME; write ./run for "
    "a file that is named like a verb.",
    epilog="--debug, anywhere, shows the traceback of an error.",
)


def main() -> None:
    """Runs the command line of the process."""
    _open_outputs()
    app(prog_name="lbllm-compile")


def _open_outputs() -> None:
    """Makes standard output and error take all that is written: what a locale's encoding lacks is escaped, and what is
    closed leads nowhere, rather than into the next file that is opened."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is not None:
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
            continue
        nowhere = os.open(os.devnull, os.O_WRONLY)
        if nowhere != number:
            os.dup2(nowhere, number)
            os.close(nowhere)
        setattr(sys, name, open(number, "w", encoding="utf-8"))  # noqa: SIM115  # until the process ends


# Options that several verbs share. Those of a compile are described once, in CompileOptions.


_OPTIONS = options()

_COMPLETED = {"target": completion.targets, "print_after": completion.pass_names}
"""How a shell completes options whose values are many."""


def _plainly(help: str) -> str:
    """A help text whose brackets are no markup."""
    return help.replace("[", r"\[")


def _described(name: str) -> Any:
    """What typer wants to know of an option of a compile."""
    flag = _OPTIONS[name].flag
    if name == "model":
        return typer.Argument(metavar="MODEL", help=_plainly(flag.help))
    names = ["--" + name.replace("_", "-"), *([flag.short] if flag.short else [])]
    completed = _COMPLETED.get(name) or (completion.one_of(flag.choices) if flag.choices else None)
    return typer.Option(
        *names, help=_plainly(flag.help), metavar=flag.metavar, rich_help_panel=flag.panel, autocompletion=completed
    )


def _parameter(name: str) -> inspect.Parameter:
    """An option of a compile as the parameter of a verb."""
    kind, default, _ = _OPTIONS[name]
    if name == "model":
        kind = str  # objects cannot be named
    if typing.get_origin(kind) is tuple:
        kind, default = list[str] | None, None
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is dataclasses.MISSING else default,
        annotation=Annotated[kind, _described(name)],
    )


def _takes(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a verb a model and these options of a compile; they arrive together, as its first argument.

    Required options of its own come in front of them in the help, the others behind.
    """

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(verb, eval_str=True)
        own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in list(signature.parameters.values())[1:]]
        given = [_parameter(name) for name in _OPTIONS if name in names and name != "model"]
        required = [p for p in own if p.default is inspect.Parameter.empty]

        def called(**values: Any) -> None:
            asked = {name: values.pop(name) for name in ("model", *(p.name for p in given))}
            lists = {k: tuple(asked[k] or ()) for k in asked if typing.get_origin(_OPTIONS[k].type) is tuple}
            verb(CompileOptions(**{**asked, **lists}), **values)

        called.__name__, called.__doc__ = verb.__name__, verb.__doc__
        parameters = [_parameter("model"), *required, *given, *(p for p in own if p not in required)]
        called.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return called

    return decorate


_MODELLING = (
    "target", "recipe", "preset", "pipeline", "calibration", "group", "act_bits", "kv_bits", "scheme", "keep_dense",
    "bits", "max_kl", "budget_over", "context", "device",
)  # fmt: skip
"""What decides what a model becomes."""

ArtifactDir = Annotated[Path, typer.Argument(metavar="DIR", help="what a compile wrote")]
Seed = Annotated[int, typer.Option(help=_plainly(_OPTIONS["seed"].flag.help))]
Group = Annotated[
    int | None,
    typer.Option(help=_plainly(_OPTIONS["group"].flag.help), autocompletion=completion.one_of(GROUPS)),
]
ScoredText = Annotated[Path, typer.Option(help="UTF-8 text to score")]
SequenceLength = Annotated[
    int | None, typer.Option(help=_plainly("tokens in a chunk [default: 512, or what the model's context holds]"))
]
Chunks = Annotated[int, typer.Option(help="chunks, from the start of the file, without overlap")]
RunTarget = Annotated[
    str,
    typer.Option(
        "--target", "-t", help="what to run on; cpu is the best of this machine", autocompletion=completion.targets
    ),
]
Threads = Annotated[int | None, typer.Option(help=_plainly("threads of the kernels [default: one a CPU]"))]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="end an answer in front of this; repeatable")]
MaxTokens = Annotated[int, typer.Option(help="at most so many tokens")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token, more is more varied")]
TopK = Annotated[int, typer.Option(help="choose among the k likeliest tokens; 0: all")]
TopP = Annotated[float, typer.Option(help="choose among the likeliest tokens of this total probability")]
Json = Annotated[bool, typer.Option("--json", help="one JSON document on stdout")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="show the version", is_eager=True, callback=_show_version)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    pass


@app.command("compile")
@_takes(*_OPTIONS)
def compile_command(options: CompileOptions, as_json: Json = False) -> None:
    """Compile MODEL into an artifact directory. Interrupted? The same command resumes."""
    with _terminal(as_json) as ui:
        from lbllm_compile import driver
        from lbllm_compile.passes import registry
        from lbllm_compile.report import graph, summary

        for name in options.print_after:
            registry.get(name)

        def after_pass(record: PassRecord, before: Program, after: Program) -> None:
            ui.progress.note(summary.pass_line(record))
            if record.name in options.print_after:
                title = f"After {record.text}: {graph.summary(after, before)}"
                ui.console.print(graph.view(after, before, title=title))

        report = driver.compile(options, progress=ui.progress, listener=after_pass)
        for part in summary.compile_report(report, times=options.time_passes):
            ui.console.print(part)
        ui.progress.note(f"\nWritten: {report.out}")
        ui.emit(report.to_json())


@app.command()
@_takes(*_MODELLING)
def plan(options: CompileOptions, as_json: Json = False) -> None:
    """Say what a compile of MODEL would do to each linear and why, and what RAM, disk and time it would take."""
    with _terminal(as_json) as ui:
        from lbllm_compile import plan as planning

        result = planning.make_plan(options)
        ui.show(*planning.render(result))
        ui.emit(result.to_json())


@app.command()
@_takes(*_MODELLING, "seed")
def preflight(options: CompileOptions, as_json: Json = False) -> None:
    """Take one decoder layer of MODEL through every stage and its kernels, to see that a compile will work."""
    with _terminal(as_json) as ui:
        from lbllm_compile import driver
        from lbllm_compile.report import summary

        result = driver.rehearse(options, progress=ui.progress)
        ui.show(*summary.rehearsal(result))
        ui.emit(dataclasses.asdict(result))


@app.command()
def run(
    directory: ArtifactDir,
    prompt: Annotated[list[str], typer.Option(help="text to answer or continue; - reads it from standard input")],
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    stop: Stop = None,
    raw: Annotated[bool, typer.Option("--raw", help="continue the text; no chat template")] = False,
    seed: Seed = 0,
    target: RunTarget = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Generate text from an artifact, streaming it as it comes."""
    import time

    with _terminal(as_json) as ui:
        from lbllm_compile.native.generate import check_stop_strings
        from lbllm_compile.native.language import (
            TemplateError,
            check_prompts,
            context_length,
            encode,
            has_chat_template,
        )
        from lbllm_compile.runtime import Sampling
        from lbllm_compile.runtime.opening import open_model

        if len(prompt) > 1:
            raise UsageError(f"{len(prompt)} prompts were given; run answers one --prompt at a time")
        # What is out of range is refused before anything is read, a prompt that does not fit before kernels are built.
        options = {"max_new_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        sampling = Sampling(**options, seed=seed)
        stop_text = check_stop_strings([_as_text(text) for text in stop or ()])
        _use_threads(threads)
        text = _read_prompt() if prompt[0] == "-" else _as_text(prompt[0])
        ids: list[int] = []

        def check(tokenizer: Any, config: Mapping[str, Any]) -> None:
            try:
                ids[:] = encode(tokenizer, text, chat=not raw and has_chat_template(tokenizer))
            except TemplateError as error:
                raise TemplateError(f"{error} (--raw)") from error
            check_prompts([ids], sampling, context_length(config))

        model = open_model(directory, target=target, progress=ui.progress, check=check)
        start = time.perf_counter()
        pieces: list[str] = []
        for piece in model.stream(ids, stop_text=stop_text, **options, seed=seed):
            pieces.append(piece)
            if not ui.json:
                ui.stdout.write(piece)
                ui.stdout.flush()
        seconds = time.perf_counter() - start
        if not ui.json:
            ui.stdout.write("\n")
        answer = "".join(pieces)
        ui.emit({"prompt": text, "text": answer, "prompt_tokens": len(ids), "seconds": seconds})


@app.command()
def chat(
    directory: ArtifactDir,
    system: Annotated[str, typer.Option(metavar="TEXT", help="the system prompt")] = "",
    max_tokens: Annotated[
        int | None, typer.Option(help=_plainly("of an answer at most [default: 512, or half of the context]"))
    ] = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    stop: Stop = None,
    seed: Seed = 0,
    target: RunTarget = "cpu",
    threads: Threads = None,
) -> None:
    """Talk with an artifact; /help lists what can be typed. Piped standard input is answered line by line."""
    with _terminal(False) as ui:
        from lbllm_compile import chat as chatting
        from lbllm_compile.native.generate import check_stop_strings
        from lbllm_compile.native.language import context_length, has_chat_template
        from lbllm_compile.runtime import GenerationError, Sampling
        from lbllm_compile.runtime.opening import open_model

        sampling = Sampling(chatting.MOST_TOKENS if max_tokens is None else max_tokens, temperature, top_k, top_p, seed)
        stop_text = check_stop_strings([_as_text(text) for text in stop or ()])
        system = _as_text(system)
        _use_threads(threads)

        def check(tokenizer: Any, config: Mapping[str, Any]) -> None:
            limit = context_length(config)
            if tokenizer is None:
                raise GenerationError("the model has no tokenizer; use it from Python, with token ids")
            if system and not has_chat_template(tokenizer):
                raise GenerationError("the model has no chat template, so it can have no --system prompt; leave it out")
            if limit is not None and max_tokens is not None and max_tokens >= limit:
                raise GenerationError(
                    f"{max_tokens} tokens an answer leave no room for a message, because the model's context holds"
                    f" {limit}; ask for fewer with --max-tokens"
                )

        model = open_model(directory, target=target, progress=ui.progress, check=check)
        if max_tokens is None and model.context_length is not None:
            most = min(sampling.max_new_tokens, max(1, model.context_length // 2))
            sampling = dataclasses.replace(sampling, max_new_tokens=most)
        conversation = chatting.Conversation(model, sampling, system, stop_text)
        chatting.talk(conversation, chatting.messages(ui.stdout, ui.progress.note), ui.stdout, ui.progress.note)


@app.command()
def serve(
    directory: ArtifactDir,
    host: Annotated[str, typer.Option(help="address to listen at; 0.0.0.0 for all of this machine's")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen at; 0 takes a free one")] = 8000,
    name: Annotated[str, typer.Option(help=_plainly("of the model, for clients [default: the directory's]"))] = "",
    api_key: Annotated[
        str, typer.Option(envvar="LBLLM_API_KEY", help="that clients must send; others on this machine see arguments")
    ] = "",
    together: Annotated[int, typer.Option(help="requests that are decoded together at most")] = 8,
    waiting: Annotated[int, typer.Option(help="requests that wait at most; more are told to come back")] = 64,
    max_tokens: Annotated[
        int | None, typer.Option(help=_plainly("of an answer at most [default: what the context holds]"))
    ] = None,
    max_body: Annotated[int, typer.Option(metavar="BYTES", help="of a request at most")] = 4 << 20,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="in which a request must be answered")] = 600.0,
    grace: Annotated[
        float, typer.Option(metavar="SECONDS", help="that answers in work have when a signal ends the server")
    ] = 30.0,
    prefix_cache: Annotated[
        int, typer.Option(metavar="MB", help="memory for conversations that were answered, to go on from")
    ] = 256,
    target: RunTarget = "cpu",
    threads: Threads = None,
) -> None:
    """Serve an artifact with the OpenAI API, several requests at once; needs the extra `serve`."""
    with _terminal(False) as ui:
        try:
            from lbllm_compile.serve.server import ServeOptions
            from lbllm_compile.serve.server import serve as serve_artifact
        except ImportError as error:
            if error.name not in ("starlette", "uvicorn", "prometheus_client", "anyio", "pydantic"):
                raise
            raise UsageError(
                f"serving needs the package {error.name}; install it with `pip install 'lbllm-compile[serve]'`"
            ) from error
        options = ServeOptions(
            directory, host, port, name, api_key, together, waiting, max_tokens, max_body, timeout, grace,
            prefix_cache << 20, target,
        )  # fmt: skip
        _use_threads(threads)
        serve_artifact(options, ui.progress)


@app.command("eval")
def eval_command(
    context: typer.Context,
    directory: ArtifactDir,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to score")] = None,
    seq_len: SequenceLength = None,
    chunks: Chunks = 32,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help=_plainly("the original [default: what the artifact was compiled from]")),
    ] = None,
    greedy_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help=_plainly("greedy tokens behind each chunk's beginning, to count loops; 0: none [default: 256]"),
        ),
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(
            metavar="NAME,…",
            help=_plainly("tasks of lm-evaluation-harness, whose data it downloads; needs the extra [eval]"),
        ),
    ] = "",
    task_folder: Annotated[Path | None, typer.Option(help="folder with more tasks, as YAML files")] = None,
    limit: Annotated[int | None, typer.Option(help=_plainly("documents of each task at most [default: all]"))] = None,
    shots: Annotated[
        int | None, typer.Option(help=_plainly("examples in front of each question [default: the task's own number]"))
    ] = None,
    target: Annotated[
        str,
        typer.Option("--target", "-t", help="what scores the text; not tasks", autocompletion=completion.targets),
    ] = "cpu",
    as_json: Json = False,
) -> None:
    """Score an artifact on a text, on tasks, or on both, beside the original: perplexity, divergence, loops, size."""
    names = [name.strip() for name in tasks.split(",")] if tasks else []
    if text is None and not names:
        raise UsageError("eval scores a text or tasks; give --text FILE, --tasks NAME,…, or both")
    if text is None:
        _refuse_given(context, ("seq_len", "chunks", "greedy_tokens", "target"), "--text FILE")
    if not names:
        _refuse_given(context, ("task_folder", "limit", "shots"), "--tasks NAME,…")
    with _terminal(as_json) as ui:
        from lbllm_compile import evaluate
        from lbllm_compile import tasks as harness

        figures: dict[str, Any] = {}
        # A wrong name is told before a text is scored, whose figures would be lost.
        manager = harness.check(names, limit, shots, task_folder) if names else None
        if text is not None:
            figures |= evaluate.evaluate(
                directory, text, seq_len=seq_len, chunks=chunks, teacher=teacher, greedy_tokens=greedy_tokens,
                target=target, progress=ui.progress,
            )  # fmt: skip
            ui.show(*evaluate.render(directory, figures))
        if names:
            figures |= harness.score(
                directory, names, manager=manager, limit=limit, shots=shots, teacher=teacher, progress=ui.progress
            )
            ui.show(*harness.render(directory, figures))
        ui.emit(figures)


@app.command("bench")
def bench_command(
    context: typer.Context,
    directory: ArtifactDir,
    against: Annotated[
        str, typer.Option(metavar="NAME,…", help="compare with torch, torch-bf16 and llama.cpp, or some of them")
    ] = "",
    threads: Annotated[
        str | None, typer.Option(metavar="N,…", help=_plainly("numbers of threads, e.g. 1,2 [default: one a CPU]"))
    ] = None,
    original: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help=_plainly("what torch runs [default: the artifact's weights in the original's form]")
        ),
    ] = None,
    gguf: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help=_plainly("what llama.cpp runs [default: the artifact's weights as Q8_0]")),
    ] = None,
    rounds: Annotated[int, typer.Option(help="turns of each that count")] = 5,
    predict: Annotated[
        bool, typer.Option("--predict", help="time nothing: predict what a token takes on GPUs that are not here")
    ] = False,
    target: RunTarget = "cpu",
    as_json: Json = False,
) -> None:
    """Time an artifact here, whole and linear by linear, in turns with others; says where it is slower."""
    with _terminal(as_json) as ui:
        if predict:
            given = _given(context, ("against", "threads", "original", "gguf", "rounds", "target"))
            if given:
                raise UsageError(f"--predict times nothing; leave out {' and '.join(given)}")
            from lbllm_compile import plan as planning
            from lbllm_compile.bench.predicted import predicted

            predictions, without = predicted(directory)
            ui.show(planning.predicted_table(predictions, without))
            rows = [dataclasses.asdict(prediction) for prediction in predictions]
            ui.emit({"predicted": rows, "predicted_without": without})
            return
        from lbllm_compile.bench import command

        names = tuple(name.strip() for name in against.split(",")) if against else ()
        options = command.BenchOptions(directory, names, command.threads_from(threads), target, original, gguf, rounds)
        report = command.bench(options, ui.progress)
        ui.show(*command.render(report))
        ui.emit(report.to_json())


@app.command()
@_takes(
    "recipe", "preset", "calibration", "group", "act_bits", "kv_bits", "scheme", "keep_dense", "context", "device",
    "work_dir",
    "seed",
    "fresh",
)  # fmt: skip
def ablate(
    options: CompileOptions,
    text: ScoredText,
    seq_len: SequenceLength = None,
    chunks: Chunks = 32,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME,…", help="these comparisons alone; a wrong name lists them; repeatable"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what each part of the recipe earns on MODEL, as a table. Interrupted? The same command resumes."""
    names = [name.strip() for listed in only or [] for name in listed.split(",")]
    with _terminal(as_json) as ui:
        from lbllm_compile import ablate as ablation

        result = ablation.ablate(options, text, seq_len=seq_len, chunks=chunks, only=names, progress=ui.progress)
        ui.show(*ablation.render(result))
        ui.emit(result.to_json())


@app.command("compare")
@_takes(
    "preset", "calibration", "group", "act_bits", "kv_bits", "scheme", "keep_dense", "bits", "max_kl",
    "budget_over", "context", "device", "seed", "fresh",
)  # fmt: skip
def compare_command(
    options: CompileOptions,
    text: ScoredText,
    recipes: Annotated[
        str | None, typer.Option(metavar="NAME,…", help=_plainly("recipes, joined by commas [default: all]"))
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help=_plainly("folder for an artifact a recipe, kept and reused [default: NAME-compare]")),
    ] = None,
    seq_len: SequenceLength = None,
    chunks: Chunks = 32,
    as_json: Json = False,
) -> None:
    """Compile MODEL with several recipes, and say what each costs, leaves and gains. The same command resumes."""
    with _terminal(as_json) as ui:
        from lbllm_compile import compare
        from lbllm_compile.recipe import RECIPES

        names = [*RECIPES] if recipes is None else [name.strip() for name in recipes.split(",")]
        result = compare.compare(
            dataclasses.replace(options, out=out), names, text, seq_len=seq_len, chunks=chunks, progress=ui.progress
        )
        ui.show(*compare.render(result))
        ui.emit(result.to_json())


@app.command("inspect")
def inspect_command(
    directory: ArtifactDir,
    pass_name: Annotated[
        str | None,
        typer.Option(
            "--pass",
            metavar="PASS",
            help="the graph after this pass, with what it changed",
            autocompletion=completion.stored_passes,
        ),
    ] = None,
    layer: Annotated[int | None, typer.Option(help="one decoder layer alone")] = None,
    diff: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="P Q",
            help="what changed from the graph after P to that after Q",
            autocompletion=completion.stored_passes,
        ),
    ] = None,
    grep: Annotated[str | None, typer.Option(metavar="REGEX", help="only nodes whose line has this")] = None,
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="FORM",
            help="the graph as txt (whole), json (node-link) or dot (Graphviz)",
            autocompletion=completion.one_of(("txt", "json", "dot")),
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what an artifact is and how it was made on a page; or its graph, as it runs or after a pass."""
    if form is not None and (diff is not None or grep is not None or as_json):
        raise UsageError("--format writes one graph; give it without --diff, --grep and --json")
    if diff is not None and pass_name is not None:
        raise UsageError("--pass and --diff contradict each other; give one of them")
    with _terminal(as_json) as ui:
        from lbllm_compile import inspect as inspection

        if form is not None:
            ui.stdout.write(inspection.written(directory, form, pass_name, layer))
            return
        parts, document = inspection.look(directory, pass_name, layer, diff=diff, grep=grep)
        ui.show(*parts, paged=True)
        ui.emit(document)


@app.command("explain")
def explain_command(
    directory: ArtifactDir,
    linear: Annotated[str, typer.Argument(metavar="LINEAR", help="its module path, or the end of it that is its own")],
    tir: Annotated[bool, typer.Option("--tir", help="with the text of its kernels")] = False,
    asm: Annotated[bool, typer.Option("--asm", help="with the assembly of its kernels")] = False,
    as_json: Json = False,
) -> None:
    """Say what the passes made of one linear of an artifact, what that cost, and which kernel computes it."""
    with _terminal(as_json) as ui:
        from lbllm_compile import explain

        found = explain.explain(directory, linear, tir=tir, asm=asm)
        ui.show(*explain.render(found), paged=True)
        ui.emit(found.to_json())


@app.command("report")
def report_command(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR…", help="what compiles wrote")],
    out: Annotated[
        Path | None, typer.Option(help=_plainly("the page to write [default: report.html in DIR]"), metavar="FILE")
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="show it in the browser")] = False,
    as_json: Json = False,
) -> None:
    """Write the page about an artifact again, or one about the trade-off between several."""
    with _terminal(as_json) as ui:
        import webbrowser

        from lbllm_compile.html_report import command

        path = command.write(directories, out, ui.progress)
        if open_page and not webbrowser.open(path.resolve().as_uri()):
            ui.progress.note("no browser was found; open the file in yours")
        ui.show(str(path))
        ui.emit({"page": path})


@app.command("bisect")
@_takes(*_MODELLING, "seed")
def bisect_command(
    options: CompileOptions,
    out: Annotated[
        Path | None, typer.Option(help=_plainly("folder for the script that shows a fault [default: NAME-fault]"))
    ] = None,
    whole: Annotated[bool, typer.Option("--whole", help="the passes do all of their work, as in a compile")] = False,
    as_json: Json = False,
) -> None:
    """Find the first pass, kernel or operator of MODEL, or of an artifact, that is wrong; exit code 3 if one is."""
    with _terminal(as_json) as ui:
        from lbllm_compile import bisect

        findings = bisect.bisect(options, out, whole=whole, progress=ui.progress)
        ui.show(*bisect.render(findings))
        ui.emit(findings.to_json())
    if findings.fault is not None:
        raise typer.Exit(EXIT_DIFFERENT)


@app.command("reproduce")
def reproduce_command(
    directory: ArtifactDir,
    out: Annotated[Path | None, typer.Option(help=_plainly("keep the new artifact here [default: nowhere]"))] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help=_plainly("the original [default: what it was compiled from]"))
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(metavar="TEXT", help=_plainly("calibration text that was named [default: the same]"))
    ] = None,
    work_dir: Annotated[
        Path | None, typer.Option(help=_plainly("where unfinished work is kept [default: in the cache]"))
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help=_plainly(_OPTIONS["fresh"].flag.help))] = False,
    as_json: Json = False,
) -> None:
    """Compile an artifact again from its lbllm.lock, and say what differs; exit code 3 if it is another model."""
    with _terminal(as_json) as ui:
        from lbllm_compile import reproduce

        result = reproduce.reproduce(
            directory, out, model=model, calibration=calibration, work_dir=work_dir, fresh=fresh, progress=ui.progress
        )
        ui.show(*reproduce.render(result))
        ui.emit(result.to_json())
    if not result.same:
        raise typer.Exit(EXIT_DIFFERENT)


@app.command()
def passes(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[PASS]", help="show everything about one pass", autocompletion=completion.pass_names),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the passes a pipeline may name, what each does to a graph, its options and its contract; and the recipes."""
    with _terminal(as_json) as ui:
        from lbllm_compile.report import catalogue

        entries = catalogue.entries([name] if name else None)
        recipes = [] if name else catalogue.recipes()
        ui.show(*catalogue.render(entries), *catalogue.render_recipes(recipes))
        ui.emit({"passes": [e.to_json() for e in entries], "recipes": [dataclasses.asdict(r) for r in recipes]})


_GGML_TYPES = ("q8_0", "f32", "f16", "bf16", "q5_1", "q4_1", "q4_0")
"""Of :data:`lbllm_compile.export.ggml.TYPES`, which need torch."""


@app.command("export")
def export_command(
    context: typer.Context,
    directory: ArtifactDir,
    out: Annotated[Path, typer.Option("--out", "-o", help="the folder or file to make")],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            "-f",
            metavar="FORMAT",
            help="hf-dense or gguf",
            autocompletion=completion.one_of(("hf-dense", "gguf")),
        ),
    ] = "hf-dense",
    dtype: Annotated[
        str | None,
        typer.Option(
            help=_plainly("of plain weights: float32, bfloat16, float16 [default: 16 bits]"),
            autocompletion=completion.one_of(("float32", "bfloat16", "float16")),
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--type",
            metavar="TYPE",
            help=_plainly(f"of W(1+1) matrices in gguf: {', '.join(_GGML_TYPES)} [default: {_GGML_TYPES[0]}]"),
            autocompletion=completion.one_of(_GGML_TYPES),
        ),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to compare artifact and written weights on")] = None,
    seq_len: SequenceLength = None,
    chunks: Chunks = 32,
    as_json: Json = False,
) -> None:
    """Write an artifact's weights for other engines, which compute with float activations."""
    if text is None:
        _refuse_given(context, ("seq_len", "chunks"), "--text FILE")
    with _terminal(as_json) as ui:
        from lbllm_compile import export

        report = export.export(
            directory,
            form,
            out,
            dtype=dtype,
            type=kind,
            text=text,
            seq_len=seq_len,
            chunks=chunks,
            progress=ui.progress,
        )
        ui.show(*export.render(report))
        ui.emit(report.to_json())


tune_app = typer.Typer(
    cls=TuneGroup,
    rich_markup_mode="rich",
    help="Search the fastest schedules of kernels, and carry results from machine to machine.\n\n"
    "`lbllm-compile tune --shapes 4096x11008` and `lbllm-compile tune DIR` are short for "
    "`lbllm-compile tune search …`; write ./export for a directory that is named like a verb.",
)
app.add_typer(tune_app, name="tune")


@tune_app.command("search")
def tune_search(
    directory: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="an artifact whose linears to tune; or give --shapes")
    ] = None,
    shapes: Annotated[
        str | None, typer.Option(metavar="OUTxIN,…", help="linears to tune, e.g. 4096x11008,576x1536")
    ] = None,
    target: Annotated[
        str,
        typer.Option("--target", "-t", help="a CPU target; `targets` lists them", autocompletion=completion.targets),
    ] = "cpu",
    kind: Annotated[
        str | None,
        typer.Option(
            help=_plainly("their weights: bit, int4 or int8 [default: bit]"),
            autocompletion=completion.one_of(("bit", "int4", "int8")),
        ),
    ] = None,
    group: Group = None,
    act_bits: Annotated[
        int | None,
        typer.Option(help=_plainly("activation bits: 4, 8 or 16 [default: 4, or 8 for int4 and int8]")),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(metavar="RANGE,…", help=_plainly("numbers of tokens at once: 1, 2-16, 17+ [default: all]")),
    ] = None,
    trials: Annotated[int, typer.Option(help="at most so many schedules are measured for each")] = 32,
    budget: Annotated[str | None, typer.Option(metavar="TIME", help="at most so long in all, e.g. 90s or 2m")] = None,
    rpc: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="measure on a device of this TVM RPC tracker")
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="what the device is registered under; stands for its CPU's name in the results")
    ] = None,
    cc: Annotated[
        str | None, typer.Option(help=_plainly("C compiler that links for the device [default: the target's]"))
    ] = None,
    as_json: Json = False,
) -> None:
    """Search the fastest schedules of linears, and store them for every later compile."""
    with _terminal(as_json) as ui:
        from lbllm_compile import tune

        options = tune.TuneOptions(
            shapes, directory, target, kind, group, act_bits, tokens, trials, budget, rpc, key, cc
        )
        report = tune.tune(options, ui.progress)
        ui.show(*tune.render(report))
        ui.emit(report.to_json())


@tune_app.command("export")
def tune_export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSON lines to write")],
    target: Annotated[
        str | None,
        typer.Option("--target", "-t", help="results of this target alone", autocompletion=completion.targets),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the stored results to FILE."""
    with _terminal(as_json) as ui:
        from lbllm_compile import tune

        count = tune.export_results(file, target)
        ui.show(f"{count} results written to {file}")
        ui.emit({"file": file, "results": count})


@tune_app.command("import")
def tune_import(
    files: Annotated[list[Path], typer.Argument(metavar="FILE…", help="what `tune export` wrote")],
    as_json: Json = False,
) -> None:
    """Take over results of elsewhere, each where it is better than the stored one."""
    with _terminal(as_json) as ui:
        from lbllm_compile import tune

        merged = tune.import_results(files)
        ui.show(f"{merged.added} results added, {merged.replaced} replaced by faster ones, {merged.kept} kept")
        ui.emit(dataclasses.asdict(merged))


@app.command()
def targets(as_json: Json = False) -> None:
    """List the targets kernels can be generated for, and what this machine is."""
    with _terminal(as_json) as ui:
        from lbllm_compile import doctor

        rows = doctor.target_rows()
        ui.show(doctor.render_targets(rows))
        ui.emit({"targets": rows})


@app.command("doctor")
def doctor_command(as_json: Json = False) -> None:
    """Examine this machine: what is there, what is missing, and what each missing thing costs."""
    with _terminal(as_json) as ui:
        from lbllm_compile import doctor

        findings = doctor.examine()
        ui.show(doctor.render(findings))
        ui.emit({"findings": [f.to_json() for f in findings]})


@dataclass
class Terminal:
    """Where a verb writes: results to stdout, the rest to stderr."""

    console: Console
    progress: PlainProgress | BarProgress
    json: bool
    stdout: Any

    def show(self, *parts: RenderableType, paged: bool = False) -> None:
        """The verb's result, for people; ``paged`` through a pager where it is longer than the terminal."""
        if self.json:
            return
        from lbllm_compile.report.terminal import make_console, pager

        out = make_console(file=self.stdout)
        with pager(out) if paged else contextlib.nullcontext():
            for part in parts:
                out.print(part, crop=False)

    def emit(self, document: Mapping[str, Any]) -> None:
        """The verb's result, for programs."""
        if self.json:
            self.stdout.write(json.dumps(plain(document), indent=1, allow_nan=False) + "\n")
            self.stdout.flush()


_active: list[Terminal] = []
"""The terminal of the running verb; an interrupt asks its progress where work stopped."""


@contextlib.contextmanager
def _terminal(as_json: bool) -> Iterator[Terminal]:
    """A verb's output. Whatever libraries or a model.py print meanwhile goes to stderr."""
    import warnings

    from lbllm_compile.report.terminal import make_console, make_progress

    console = make_console(stderr=True)
    ui = Terminal(console, make_progress(console), as_json, sys.stdout)
    _active[:] = [ui]
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        if "--debug" not in sys.argv:
            warnings.simplefilter("ignore")
        yield ui


def _refuse_given(context: typer.Context, names: Sequence[str], lacking: str) -> None:
    """Refuses options that have no effect for lack of another.

    Raises:
        UsageError: one of them was given.
    """
    for option in _given(context, names):
        counterpart = lacking.split()[0]
        raise UsageError(f"{option} has no effect without {counterpart}; give {lacking}, too, or drop {option}")


def _given(context: typer.Context, names: Sequence[str]) -> list[str]:
    """Those options of parameters that were given, whatever their values."""
    sources = {name: context.get_parameter_source(name) for name in names}
    return ["--" + name.replace("_", "-") for name, source in sources.items() if source and source.name != "DEFAULT"]


def _as_text(argument: str) -> str:
    """An argument of the command line as UTF-8, where the locale's encoding could not read it."""
    if not any("\udc80" <= c <= "\udcff" for c in argument):
        return argument
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"the prompt is not UTF-8 text (byte {error.start}); convert it first") from error


def _use_threads(count: int | None) -> None:
    """Sets how many threads the kernels' pool has; it starts with the first kernel."""
    if count is not None and count < 1:
        raise UsageError(f"{count} threads cannot compute; ask for at least 1")
    if count is not None:
        os.environ["TVM_NUM_THREADS"] = str(count)


def _read_prompt() -> str:
    """Standard input as UTF-8, whatever encoding the locale sets."""
    if sys.stdin is None:
        raise UsageError("standard input is closed; give the prompt as --prompt TEXT")
    try:
        # A shell's echo and every editor end the last line.
        return sys.stdin.buffer.read().decode("utf-8-sig").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"the prompt on standard input is not UTF-8 text (byte {error.start}); convert it first, e.g. with iconv"
        ) from error


def _own_options(group: Any, ctx: Any) -> set[str]:
    """The options of a group of verbs itself."""
    return {name for parameter in group.get_params(ctx) for name in parameter.opts}


def _split_debug(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """``--debug`` may stand anywhere before ``--``; it belongs to the command as a whole."""
    head = list(args[: args.index("--")] if "--" in args else args)
    tail = list(args[len(head) :])
    return (["--debug"] if "--debug" in head else []), [a for a in head if a != "--debug"] + tail


def _mistyped_verb(word: str, verbs: list[str]) -> str:
    """What to say when a first word is neither a model nor a verb, but nearly a verb; else nothing."""
    near = difflib.get_close_matches(word, verbs, n=1)
    if not near or not word.isalpha() or Path(word).exists():
        return ""
    return f"there is no verb or file '{word}' (did you mean '{near[0]}'?)"


def _usage_text(error: Any) -> str:
    text = str(error.format_message()).strip().rstrip(".")
    if text.startswith("No such option: "):
        option = text.removeprefix("No such option: ").split()[0]
        known = [o for p in error.ctx.command.params for o in p.opts if o.startswith("--")] if error.ctx else []
        near = difflib.get_close_matches(option, known, n=1)
        text = f"there is no option {option}" + (f" (did you mean {near[0]}?)" if near else "")
    command = error.ctx.command_path if getattr(error, "ctx", None) else "lbllm-compile"
    return f"{text[:1].lower()}{text[1:]}; see `{command} --help`"


def _where() -> str:
    """Where an interrupt hit, e.g. `` in stage 2: training weights, 3 of 30``."""
    stopped = _active[0].progress.stopped if _active else None
    if stopped is None:
        return ""
    return f" in {stopped.title}, {stopped.done + 1} of {stopped.total}"


def _kept(error: KeyboardInterrupt) -> str:
    """What a compile has finished (:class:`lbllm_compile.driver.Interrupted`); nothing where there is nothing."""
    count = getattr(error, "kept", 0)
    pieces = "one finished piece of work is" if count == 1 else f"{count} finished pieces of work are"
    return f"; {pieces} kept, run the same command again to resume" if count else ""


def _is_lack_of_memory(error: Exception) -> bool:
    """Whether memory ran out; torch says so by a plain RuntimeError on the CPU and by one of its own on a GPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def _fail(message: str, code: int, debug: bool) -> NoReturn:
    """One sentence on stderr, and out."""
    if debug:
        traceback.print_exc(file=sys.stderr)
    typer.echo(f"lbllm-compile: {message}", err=True)
    raise typer.Exit(code)
