"""Where long work reports: the protocols, a listener that says nothing, and warnings for who does not listen."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from typing import Protocol


class LbllmWarning(UserWarning):
    """Something works, but worse than it could, or not as its user may believe."""


class Task(Protocol):
    """One running progress bar."""

    def advance(self, note: str = "") -> None:
        """One unit is done; ``note`` is a short figure to show beside the bar."""
        ...


class Progress(Protocol):
    """Where long work reports. On a terminal: a bar with an ETA; elsewhere: plain lines."""

    def task(self, title: str, total: int) -> AbstractContextManager[Task]: ...

    def note(self, text: str) -> None:
        """One line worth keeping above the bars."""
        ...


class NoProgress:
    """Reports nowhere."""

    class _Task:
        def advance(self, note: str = "") -> None:
            pass

        def __enter__(self) -> NoProgress._Task:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    def task(self, title: str, total: int) -> AbstractContextManager[Task]:
        return self._Task()

    def note(self, text: str) -> None:
        pass


_warned: set[str] = set()
"""Kinds of warnings that this process has given."""


def warn(progress: Progress | None, kind: str | None, text: str) -> None:
    """Says what must not go unheard: to ``progress``, or where nobody listens as a warning, once for each kind.

    Args:
        progress: None or a plain :class:`NoProgress` where nobody listens.
        kind: what the texts that say the same of different things have in common; None for what is said every time.
        text: one sentence.
    """
    if progress is not None and type(progress) is not NoProgress:
        progress.note(text)
    elif kind is None or kind not in _warned:
        if kind is not None:
            _warned.add(kind)
        warnings.warn(text, LbllmWarning, stacklevel=3)
