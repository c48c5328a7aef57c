"""Measures candidates in a worker process that is started on demand and replaced when it dies or hangs."""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

from ..errors import KernelError
from ..spec import LinearSpec

START_SECONDS = 120.0
"""Time-out of a worker's start, which imports torch and TVM."""

CANDIDATE_SECONDS = 30.0
"""Time-out of one candidate: compile, check and timing."""

STARTS = 2
"""Attempts to start a worker before the search is given up."""


@dataclasses.dataclass(frozen=True)
class RemoteDevice:
    """A device that a TVM RPC tracker lends.

    Attributes:
        host, port: the tracker's address.
        key: what the device is registered under; stands for its CPU's name in the database.
        compiler: C compiler that links for it; None for that of the target's triple, or this machine's.
    """

    host: str
    port: int
    key: str
    compiler: str | None = None


@dataclasses.dataclass(frozen=True)
class Request:
    """Candidates to measure.

    Attributes:
        spec: the linear.
        target: canonical target.
        bucket: name of the token bucket.
        schedules: JSON forms of the candidates.
        seconds: how long to time each.
    """

    spec: LinearSpec
    target: str
    bucket: str
    schedules: list[dict[str, Any]]
    seconds: float

    @classmethod
    def from_json(cls, line: str) -> Request:
        fields = json.loads(line)
        return cls(**{**fields, "spec": LinearSpec(**fields["spec"])})

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One candidate's measurement: microseconds per call, or why there is none."""

    microseconds: float | None
    failure: str = ""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What bounds a candidate of the last request, as measured in the worker.

    Attributes:
        roofline_microseconds: least time of a call, 0 where nothing measured bounds it.
        weight_bytes: bytes of packed weights that a call reads.
        bandwidth: bytes per second that the machine reads.
        products: 8-bit multiply-adds per second, None where the target has no dot product.
    """

    roofline_microseconds: float = 0.0
    weight_bytes: int = 0
    bandwidth: float = 0.0
    products: float | None = None


class Measurer:
    """Sends candidates to a worker process. Use as a context manager.

    Args:
        candidate_seconds: time-out of one candidate.
        command: the worker; for tests.
        target: canonical target; for the linker of a remote device alone.
        device: measure there instead of on this machine.
    """

    def __init__(
        self,
        candidate_seconds: float = CANDIDATE_SECONDS,
        command: Sequence[str] | None = None,
        target: str = "",
        device: RemoteDevice | None = None,
    ):
        self._candidate_seconds = candidate_seconds
        self._command = command or [sys.executable, "-m", f"{__package__}.worker"]
        if device:
            setup = {"device": dataclasses.asdict(device), "target": target, "seconds": candidate_seconds}
            self._command = [*self._command, json.dumps(setup)]
        self._process: subprocess.Popen[str] | None = None
        self._replies: queue.Queue[str | None] = queue.Queue()
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the measurer
        self._threads = 0
        self.limits = Limits()

    def __enter__(self) -> Measurer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._complaints.close()

    def close(self) -> None:
        """Ends the worker."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                stream.close()
        self._process = None

    def threads(self) -> int:
        """Size of the thread pool of the machine that is measured on.

        Raises:
            KernelError: no worker can be started.
        """
        self._running()
        return self._threads

    def measure(self, request: Request) -> list[Outcome]:
        """One outcome per candidate. Where a batch kills the worker, its candidates are measured one by one.

        Raises:
            KernelError: no worker can be started.
        """
        reply = self._ask(request, self._candidate_seconds * len(request.schedules))
        if reply is not None:
            self.limits = Limits(**reply["limits"])
            return [Outcome(**fields) for fields in reply["outcomes"]]
        if len(request.schedules) == 1:
            return [Outcome(None, "it crashed or hung")]
        return [self.measure(dataclasses.replace(request, schedules=[schedule]))[0] for schedule in request.schedules]

    def _ask(self, request: Request, seconds: float) -> dict[str, Any] | None:
        """The worker's reply, or None when it died or took too long (it is gone then)."""
        process = self._running()
        assert process.stdin
        try:
            process.stdin.write(request.to_json() + "\n")
            process.stdin.flush()
            line = self._replies.get(timeout=seconds)
        except (BrokenPipeError, queue.Empty):
            line = None
        if line is None:
            self.close()
            return None
        return json.loads(line)

    def _running(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        for _ in range(STARTS):
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
                text=True,
                env=environment,
            )
            # A queue of its own for each worker: a late reply of a killed one must not answer the next request.
            self._replies = queue.Queue()
            threading.Thread(target=_forward, args=(self._process, self._replies), daemon=True).start()
            try:
                greeting = self._replies.get(timeout=START_SECONDS)
            except queue.Empty:
                greeting = None
            if greeting is not None:
                fields = json.loads(greeting)
                if "failure" in fields:  # it knows why, so another attempt would fail alike
                    self.close()
                    raise KernelError(fields["failure"])
                self._threads = int(fields["threads"])
                return self._process
            self.close()
        self._complaints.seek(0)
        last = self._complaints.read().decode(errors="replace").strip().rpartition("\n")[2]
        raise KernelError(
            f"the process that measures kernels does not start ({last or 'it says nothing'});"
            " check free memory and 'lbllm-compile doctor'"
        )


def _forward(process: subprocess.Popen[str], replies: queue.Queue[str | None]) -> None:
    """Moves a worker's lines into a queue; None says that it has ended."""
    assert process.stdout
    try:
        for line in process.stdout:
            replies.put(line)
    except ValueError:  # the stream was closed while it was read
        pass
    replies.put(None)
