"""``lbllm-compile serve DIR``: loads an artifact and serves it until a signal ends it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from lbllm_compile.codegen.backend import SequenceBackend, backend_of
from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.codegen.progress import Progress
from lbllm_compile.codegen.targets import Target
from lbllm_compile.native.batch import can_batch, is_exact
from lbllm_compile.native.program import NativeModel, NativeProgram
from lbllm_compile.runtime.opening import open_model
from lbllm_compile.serve.app import Front, application
from lbllm_compile.serve.engine import Engine
from lbllm_compile.serve.metrics import Metrics
from lbllm_compile.serve.protocol import Served

BACKLOG = 2048
"""Connections that may wait to be taken."""

MOST_SECONDS = 1 << 24
"""Of any time that is given: half a year, which the system's clocks can wait for."""

LAST_SECONDS = 5
"""In which clients must have taken their answers when the time for these is over."""

TELL_SECONDS = 1
"""In which clients are told that a second signal broke their answers off."""


class ServeError(LbllmError):
    """What cannot be served, or not here."""


@dataclass(frozen=True)
class ServeOptions:
    """How an artifact is served.

    Attributes:
        directory: what a compile wrote.
        host, port: where to listen; port 0 takes a free one.
        name: of the model; the directory's where none is given.
        api_key: that clients must send; empty for none.
        together: requests that are decoded together at most.
        waiting: requests that wait at most.
        most_tokens: of an answer; None for what the context holds.
        most_bytes: of a request's body.
        seconds: in which a request must be answered.
        closing_seconds: that answers in work have when a signal ends the server.
        kept_bytes: memory for conversations that were answered.
        target: what to run on.

    Raises:
        ServeError: a value is out of range.
    """

    directory: Path
    host: str = "127.0.0.1"
    port: int = 8000
    name: str = ""
    api_key: str = ""
    together: int = 8
    waiting: int = 64
    most_tokens: int | None = None
    most_bytes: int = 4 << 20
    seconds: float = 600.0
    closing_seconds: float = 30.0
    kept_bytes: int = 256 << 20
    target: str = "cpu"

    def __post_init__(self) -> None:
        for option, value, lowest in (
            ("--together", self.together, 1),
            ("--waiting", self.waiting, 1),
            ("--max-tokens", self.most_tokens, 1),
            ("--max-body", self.most_bytes, 1),
            ("--prefix-cache", self.kept_bytes >> 20, 0),
        ):
            if value is not None and value < lowest:
                raise ServeError(f"{value} is too little for {option}; use at least {lowest}")
        if not 0 <= self.port <= 65535:
            raise ServeError(f"there is no port {self.port}; use 1 to 65535, or 0 for a free one")
        if not 0 < self.seconds <= MOST_SECONDS:
            raise ServeError(f"--timeout cannot be {self.seconds:g}; use more than 0, up to {MOST_SECONDS} seconds")
        if not 0 <= self.closing_seconds <= MOST_SECONDS:
            raise ServeError(f"--grace cannot be {self.closing_seconds:g}; use 0 to {MOST_SECONDS} seconds")


def serve(options: ServeOptions, progress: Progress) -> None:
    """Serves an artifact until SIGTERM or SIGINT.

    Raises:
        ServeError: the artifact has no native program or no tokenizer, or the address cannot be listened at.
        LbllmError: as :func:`~..runtime.opening.open_model`.
    """
    with _listening(options.host, options.port) as listening:
        model = _opened(options, progress)
        if not can_batch(model.program):
            progress.note("requests are answered one at a time: the model counts padding as positions")
        elif not is_exact(model.program):
            progress.note(
                "on this machine answers may differ in the last bits from those to a request alone: decoded together,"
                " sequences round otherwise"
            )
        name = options.name or options.directory.resolve().name
        fingerprint = f"lbllm-{model.program.directory.name[:12]}"
        served = Served(model, name, options.most_tokens, options.seconds, int(time.time()), fingerprint)
        metrics = Metrics()
        engine = Engine(
            model,
            together=options.together,
            waiting=options.waiting,
            kept_bytes=options.kept_bytes,
            listener=metrics,
        )
        metrics.watch(engine)
        front = Front(served, engine, metrics, options.api_key, options.most_bytes)
        config = uvicorn.Config(
            application(front),
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            backlog=BACKLOG,
            lifespan="off",
            timeout_graceful_shutdown=math.ceil(options.closing_seconds) + LAST_SECONDS,
        )
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        listening.listen(BACKLOG)  # from here on who connects is answered, if only when the loop runs
        progress.note(f"serving {name} at http://{shown}:{port}/v1; Ctrl-C or SIGTERM ends it")
        _log_to(progress)
        _Server(config, engine, options.closing_seconds).run(sockets=[listening])
        progress.note("the server has ended")


class _Server(uvicorn.Server):
    """Ends at SIGTERM and SIGINT and returns, where uvicorn's own raises the signal again.

    At the first signal the engine has some time to end its answers, and its clients are told where it could not; a
    second one, of either kind, ends at once.

    Args:
        config: uvicorn's.
        engine: is closed.
        seconds: that answers in work have.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, seconds: float):
        super().__init__(config)
        self._engine, self._seconds = engine, seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit, self.should_exit = self.should_exit, True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        closing = threading.Thread(target=self._engine.close, args=(self._seconds,), name="closing", daemon=True)
        closing.start()
        await super().shutdown(sockets)
        self._engine.close(0)  # a second signal does not wait for the thread above
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=TELL_SECONDS)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that is bound, before anything that takes long."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ServeError(f"there is no address '{host}' ({error.strerror or error}); give another --host") from error
    with bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(address)
        except OSError as error:
            raise ServeError(
                f"cannot listen at {host}, port {port}: {error.strerror or error}; give another --port"
            ) from error
        yield bound


def _opened(options: ServeOptions, progress: Progress) -> NativeModel:
    """The artifact's native program and tokenizer."""

    def check(tokenizer: Any, _: Any) -> None:
        if tokenizer is None:
            raise ServeError("the model has no tokenizer, so it cannot be served; use it from Python, with token ids")

    target = Target.parse(options.target)
    if isinstance(backend_of(target), SequenceBackend):
        raise ServeError(
            f"programs on {target.name} are not served; `run` and `chat` take them, or serve it with --target cpu"
        )
    model = open_model(options.directory, target=options.target, progress=progress, check=check)
    program = getattr(model, "native", None) or getattr(model, "program", None)
    if not isinstance(program, NativeProgram):
        raise ServeError("the model runs operator by operator in torch, which is not served; `run` and `chat` take it")
    return NativeModel(program, model.tokenizer)


class _Notes(logging.Handler):
    """Hands log records on to who watches."""

    def __init__(self, progress: Progress):
        super().__init__(logging.WARNING)
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self._progress.note(self.format(record))


def _log_to(progress: Progress) -> None:
    """Warnings and errors of the server and its libraries go where notes go."""
    handler = _Notes(progress)
    for name in ("uvicorn", "uvicorn.error", "lbllm_compile.serve", "asyncio"):
        logging.getLogger(name).handlers = [handler]
        logging.getLogger(name).propagate = False
