"""Decoding and prefill of language models in turns, and the loading and memory of fresh processes.

Everyone is fed the same token ids, one sequence, and chooses none. *Decoding* is tokens one by one behind a prompt,
*prefill* a long prompt. Every decoder lives in a process of its own; a turn starts with a pause, in which the threads
of the others stop spinning, and the first round does not count.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lbllm_compile.bench.decoders import MODULE, Child, Loading
from lbllm_compile.bench.turns import PAUSE_SECONDS
from lbllm_compile.codegen.progress import Progress
from lbllm_compile.codegen.threads import in_words


@dataclass(frozen=True)
class Settings:
    """How much to measure.

    Attributes:
        prompt: tokens before decoding.
        steps: tokens to decode in a round.
        prefill: tokens of the prompt whose speed is measured.
        rounds: that count.
        processes: fresh processes whose loading and memory are measured.
        pause: seconds before a turn.
        warm: one more round and process of each come first and do not count.
    """

    prompt: int = 32
    steps: int = 64
    prefill: int = 512
    rounds: int = 5
    processes: int = 3
    pause: float = PAUSE_SECONDS
    warm: bool = True

    @property
    def capacity(self) -> int:
        """Tokens that a decoder needs room for."""
        return max(self.prompt + self.steps, self.prefill)

    def within(self, context: int | None) -> Settings:
        """As much of it as a context of so many tokens holds; all where that is unknown."""
        if context is None or context >= self.capacity:
            return self
        prompt = max(1, min(self.prompt, context // 2))
        steps = max(1, min(self.steps, context - prompt))
        return dataclasses.replace(self, prompt=prompt, steps=steps, prefill=min(self.prefill, context))


@dataclass
class Times:
    """Of one decoder.

    Attributes:
        rounds: seconds of every decoded token, by round.
        prefill: seconds of every long prompt.
    """

    rounds: list[list[float]] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)


def in_turns(
    competing: Mapping[str, Loading], settings: Settings, progress: Progress, module: str = MODULE
) -> dict[str, Times]:
    """Seconds of decoding and prefill, by name.

    Args:
        competing: decoders by name, all of one number of threads.
        settings: how much to measure.
        progress: told about each decoder and round.
        module: the children's.

    Raises:
        LbllmError: a decoder cannot be loaded, or its process ended.
    """
    times = {name: Times() for name in competing}
    threads = in_words(next(iter(competing.values())).threads)
    with contextlib.ExitStack() as stack:
        children = {}
        with progress.task(f"loading, {threads}", len(competing)) as task:
            for name, loading in competing.items():  # one after the other: loading takes memory for a while
                children[name] = stack.enter_context(Child(loading, module))
                task.advance(name)
        known = min(child.loaded["vocabulary"] for child in children.values())
        with progress.task(f"decoding and prefill in turns, {threads}", settings.rounds + settings.warm) as task:
            for index in range(settings.rounds + settings.warm):
                for name, child in children.items():
                    time.sleep(settings.pause)
                    # behind its prompt, decoding is warm; it in turn warms the threads for the long prompt
                    decoded = child.ask({"prompt": settings.prompt, "steps": settings.steps, "vocabulary": known})
                    prompt = child.ask({"prompt": settings.prefill, "steps": 0, "vocabulary": known})
                    if index >= settings.warm:
                        times[name].rounds.append(decoded["steps"])
                        times[name].prefill.append(prompt["prefill"])
                task.advance()
    return times


def fresh_processes(
    competing: Mapping[str, Loading], settings: Settings, progress: Progress, module: str = MODULE
) -> dict[str, list[dict[str, Any]]]:
    """Loading and memory of fresh processes that decode once, in turns, by name.

    Returns:
        Of each process ``load_seconds``; ``first_logits_seconds``, of loading and the short prompt, because mapped
        weights are read when they are used; and bytes as :func:`~.decoders.memory` has them, with ``bare_`` in front
        those of the process with all its packages before it loads the model.

    Raises:
        LbllmError: a decoder cannot be loaded, or its process ended.
    """
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in competing}
    known: list[int] = []  # vocabularies; of all of them only behind the first process of each
    threads = in_words(next(iter(competing.values())).threads)
    with progress.task(f"fresh processes, {threads}", (settings.processes + settings.warm) * len(competing)) as task:
        for index in range(settings.processes + settings.warm):  # the first may have read files
            for name, loading in competing.items():
                time.sleep(settings.pause)
                with Child(loading, module) as child:
                    known.append(child.loaded["vocabulary"])
                    decoded = child.ask({"prompt": settings.prompt, "steps": settings.steps, "vocabulary": min(known)})
                    row = {
                        "load_seconds": child.loaded["load_seconds"],
                        "first_logits_seconds": child.loaded["load_seconds"] + decoded["prefill"],
                        **{f"bare_{name}": size for name, size in child.loaded["bare"].items()},
                        **child.ask("memory"),
                    }
                if index >= settings.warm:
                    measured[name].append(row)
                task.advance(name)
    return measured
