"""Tuning on a device behind a TVM RPC tracker; here the device is this machine, reached over the loopback."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lbllm_compile.codegen.targets import host
from lbllm_compile.codegen.tune.measure import Measurer, RemoteDevice, Request
from test_errors import fails
from test_tune import SPEC
from test_tune_cli import cache, succeeds

__all__ = ["cache"]

pytestmark = pytest.mark.slow

KEY = "board"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def on_port(port: int) -> list[str]:
    """Where a tracker or server listens: there or nowhere."""
    return ["--host", "127.0.0.1", "--port", str(port), "--port-end", str(port + 1), "--silent"]


@contextlib.contextmanager
def running(*command: str) -> Iterator[None]:
    """A child process; it and all of its own children end with the block."""
    environment = {**os.environ, "TVM_NUM_THREADS": "2"}
    child = subprocess.Popen(
        [sys.executable, "-m", *command],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


@pytest.fixture(scope="module")
def tracker() -> Iterator[str]:
    """The address of a tracker with one device."""
    for package in ("tornado", "cloudpickle", "psutil"):
        pytest.importorskip(package)
    from lbllm_compile.codegen.errors import KernelError
    from lbllm_compile.codegen.tvm_api import Tracker

    port, end = free_port(), time.monotonic() + 60
    device = ["--tracker", f"127.0.0.1:{port}", "--key", KEY]
    with (
        running("tvm.exec.rpc_tracker", *on_port(port)),
        running("tvm.exec.rpc_server", *on_port(free_port()), *device),
    ):
        while True:
            try:
                Tracker("127.0.0.1", port, KEY)
                break
            except KernelError:
                assert time.monotonic() < end, "the tracker or its server does not start"
                time.sleep(0.2)
        yield f"127.0.0.1:{port}"


def device(tracker: str, compiler: str | None = None) -> RemoteDevice:
    address, _, port = tracker.rpartition(":")
    return RemoteDevice(address, int(port), KEY, compiler)


def test_a_search_on_a_device_is_stored_under_its_key(tracker: str, cache: Path) -> None:
    command = ["tune", "--shapes", "96x128", "--group", "64", "--tokens", "1,2-16", "--target", "cpu:generic"]
    command += ["--trials", "3", "--rpc", tracker, "--key", KEY, "--json"]
    document = json.loads(succeeds(*command))
    assert (document["cpu"], document["threads"]) == (KEY, 2) and document["bandwidth_gb_per_s"] > 0
    assert [row["source"] for row in document["results"]] == ["search", "search"]
    assert all(0 < row["microseconds"] <= row["default_microseconds"] for row in document["results"])
    stored = [json.loads(line)["key"] for line in (cache / "tuning.jsonl").read_text().splitlines()]
    assert {(key["cpu"], key["threads"]) for key in stored} == {(KEY, 2)}
    assert [row["source"] for row in json.loads(succeeds(*command))["results"]] == ["stored", "stored"]


def test_tiles_are_asked_for_on_the_device(tracker: str) -> None:
    if not host.grants_tiles():
        pytest.skip("this machine has no tiles, or does not grant them")
    schedule = {"layout": "lut8", "rows": 32, "tokens": 8, "prefetch": 0, "parallel": True}
    with Measurer(target="cpu:avx512-amx", device=device(tracker)) as measurer:
        for _ in range(2):
            (outcome,) = measurer.measure(Request(SPEC, "cpu:avx512-amx", "2-16", [schedule], 0.01))
            assert outcome.microseconds is not None, outcome.failure


def test_candidates_are_checked_on_the_device(tracker: str) -> None:
    """A worker whose reference is off in one value discards every candidate."""
    wrong = (
        "from lbllm_compile.codegen import prove\n"
        "from lbllm_compile.codegen.tune import worker\n"
        "cases = prove.linear_cases\n"
        "def wrong(spec):\n"
        "    found = cases(spec)\n"
        "    found[0].expected[0, 3] = 0.125\n"
        "    return found\n"
        "prove.linear_cases = wrong\n"
        "worker.main()\n"
    )
    request = Request(SPEC, "cpu:generic", "1", [{"layout": "portable", "rows": 8, "parallel": False}], 0.01)
    command = [sys.executable, "-c", wrong]
    with Measurer(command=command, target="cpu:generic", device=device(tracker)) as measurer:
        (outcome,) = measurer.measure(request)
    assert outcome.microseconds is None and "1 of 96 outputs differ for random values" in outcome.failure


def test_what_a_tracker_lacks_is_said(tracker: str) -> None:
    command = ["tune", "--shapes", "4x4", "--target", "cpu:generic", "--rpc", tracker, "--key"]
    assert f"has no device 'other'; its keys are {KEY};" in fails(*command, "other")
    assert "there is no compiler 'no-such-cc'" in fails(*command, KEY, "--cc", "no-such-cc")


def test_a_device_takes_part_again_after_a_candidate_hung(tracker: str) -> None:
    """The time-out ends the worker; the server gives the device back when the session's time is over."""
    good = Request(SPEC, "cpu:generic", "1", [{"layout": "portable", "rows": 8, "parallel": False}], 0.01)
    with Measurer(candidate_seconds=0.01, target="cpu:generic", device=device(tracker)) as measurer:
        (outcome,) = measurer.measure(good)
        assert outcome.microseconds is None and "crashed or hung" in outcome.failure
    with Measurer(target="cpu:generic", device=device(tracker)) as measurer:
        assert measurer.measure(good)[0].microseconds is not None
