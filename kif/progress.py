"""Progress of a run on the terminal: one bar a task, with round, loss and time left."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from tqdm.auto import tqdm


class Progress:
    """A bar for the present task, written to standard error.

    Args:
        enabled: false shows nothing at all.
    """

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._bar: tqdm[Any] | None = None

    def start(self, title: str) -> None:
        """Begin the bar of a task; its length is known with the first update."""
        self._close()
        self._bar = tqdm(desc=title, unit="step", disable=not self._enabled)

    def update(self, record: dict[str, Any]) -> None:
        """Show a round's record as the training loop logs it."""
        if self._bar is None:
            return
        self._bar.total = record["steps"]
        self._bar.update(record["step"] - self._bar.n)
        shown = {"round": f"{record['round'] + 1}/{record['rounds']}"}
        shown |= {
            name: f"{record[key]:.3f}"
            for name, key in (("loss", "loss"), ("memory", "memory_loss"))
            if record[key] is not None
        }
        if record["skipped"]:
            shown["skipped"] = str(record["skipped"])
        self._bar.set_postfix(shown)

    def say(self, text: str) -> None:
        """Show what is going on beside the bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(text)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
