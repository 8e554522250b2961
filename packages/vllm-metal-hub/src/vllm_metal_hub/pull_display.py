"""How a pull looks: bars on a terminal (one overall, one per file in flight), plain lines elsewhere."""

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from vllm_metal_hub.sizes import bytes_text

_LINE_EVERY_S = 5.0


class PullDisplay:
    """Listens to the events of a pull; silent until there is something to fetch or to say."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._total = self._have = self._files = self._done = 0
        self._since = self._said = time.monotonic()
        self._tasks: dict[str, TaskID] = {}
        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
            TimeRemainingColumn(compact=True), console=console, transient=True,
        )  # fmt: skip

    def __enter__(self) -> "PullDisplay":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._bars.live.is_started:
            self._bars.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        """Take one event of the fetching process."""
        getattr(self, "_on_" + event["event"])(event)

    def _on_note(self, event: dict[str, Any]) -> None:
        self._console.print(f"  {event['text']}", markup=False, highlight=False, soft_wrap=True)

    def _on_plan(self, event: dict[str, Any]) -> None:
        self._total, self._files = event["fetch_bytes"], event["fetch_files"]
        self._since = time.monotonic()
        if not self._files:
            return
        self._console.print(
            f"{self._title}: fetching {self._files} of {event['files']} files, {bytes_text(self._total)}",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
        if self._console.is_terminal:
            self._tasks[""] = self._bars.add_task("all files", total=self._total)
            self._bars.start()

    def _on_start(self, event: dict[str, Any]) -> None:
        if self._console.is_terminal:
            self._tasks[event["path"]] = self._bars.add_task(event["path"], total=event["size"])

    def _on_bytes(self, event: dict[str, Any]) -> None:
        for path, count in event["counts"].items():
            self._have += count
            if path in self._tasks:
                self._bars.advance(self._tasks[path], count)
                self._bars.advance(self._tasks[""], count)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._said >= _LINE_EVERY_S:
            self._said = now
            rate = self._have / max(now - self._since, 1e-6)
            left = (self._total - self._have) / max(rate, 1.0)
            self._console.print(
                f"  {self._done} of {self._files} files, {bytes_text(self._have)} of {bytes_text(self._total)}, "
                f"{bytes_text(rate)}/s, {left:.0f} s left",
                highlight=False, soft_wrap=True,
            )  # fmt: skip

    def _on_done(self, event: dict[str, Any]) -> None:
        self._done += 1
        task = self._tasks.pop(event["path"], None)
        if task is not None:
            self._bars.remove_task(task)
