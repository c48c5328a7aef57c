"""Where long work reports: the protocols, and a listener that says nothing."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol


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
