"""How progress looks: one live line on a terminal, one plain line per change elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class StageDisplay:
    """Shows what something slow does now, and for how long."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._started = time.monotonic()
        self._stage = ""
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), TextColumn("[dim]{task.fields[stage]}[/]"),
            TimeElapsedColumn(), console=console, transient=True,
        )  # fmt: skip
        self._task = self._progress.add_task(title, total=None, stage="")

    def __enter__(self) -> "StageDisplay":
        if self._console.is_terminal:
            self._progress.start()
        else:
            self._console.print(f"{self._title} …", highlight=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._progress.live.is_started:
            self._progress.stop()

    @property
    def elapsed_s(self) -> float:
        """Seconds since this was made."""
        return time.monotonic() - self._started

    def show(self, stage: str) -> None:
        """Say what happens from now on."""
        if stage == self._stage:
            return
        self._stage = stage
        if self._console.is_terminal:
            self._progress.update(self._task, stage=stage)
        else:
            self._console.print(f"  {self.elapsed_s:5.1f} s  {stage}", highlight=False)


class FlowingText:
    """Prints text piece by piece as it comes; on a terminal, lines break between words."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._word = ""
        self._column = 0

    def write(self, piece: str) -> None:
        """Print a piece; on a terminal its last word waits until it is complete."""
        if not self._console.is_terminal:
            self._print(piece)
            return
        for character in piece:
            if character.isspace():
                self._end_word(character)
            else:
                self._word += character

    def end(self) -> None:
        """Print what still waits."""
        self._end_word("\n")

    def _end_word(self, space: str) -> None:
        if self._column and self._column + len(self._word) > self._console.width:
            self._print("\n")
            self._column = 0
        self._print(self._word + space)
        self._column = 0 if space == "\n" else self._column + len(self._word) + 1
        self._word = ""

    def _print(self, text: str) -> None:
        self._console.print(text, end="", markup=False, highlight=False, soft_wrap=True)


def seconds_text(seconds: float) -> str:
    """A duration as people write it: 85 ms, 2.1 s."""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
