"""Writing to the terminal: colour and a progress line where there is one, plain text everywhere else."""

from __future__ import annotations

import shutil
import sys
from time import perf_counter
from typing import Any, TextIO

STYLES = {
    "accepted": "green",
    "recovery": "bold red",
    "bonus": "bold cyan",
    "head": "bold",
    "dim": "dim",
    "prompt": "dim",
}
MARKS = {"recovery": ("‹", "›"), "bonus": ("«", "»")}
ASCII_MARKS = {"recovery": ("<", ">"), "bonus": ("[", "]")}


class Screen:
    """Styled text on `out`, a progress line on `err`.

    Without a terminal, or without rich, styles become nothing and tokens get `marks`; without a terminal the
    progress line is left out.
    """

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.out, self.err = out or sys.stdout, err or sys.stderr
        self._console: Any = None
        if self.out.isatty():
            try:
                from rich.console import Console
            except ImportError:
                pass
            else:
                self._console = Console(file=self.out, highlight=False, soft_wrap=True)
        try:
            str(MARKS).encode(self.out.encoding or "ascii")
            self.marks = MARKS
        except UnicodeEncodeError:
            self.marks = ASCII_MARKS
        self._moving = self.err.isatty()
        self._shown = 0

    @property
    def coloured(self) -> bool:
        """Whether styles are seen."""
        return self._console is not None

    def write(self, text: str, style: str | None = None) -> None:
        """Text without a line break of its own."""
        if self._console is not None:
            self._console.print(text, style=STYLES.get(style or ""), end="", markup=False)
        else:
            self.out.write(text)
        self.out.flush()

    def line(self, text: str = "", style: str | None = None) -> None:
        """A whole line."""
        self.clear_progress()
        self.write(text + "\n", style)

    def token(self, text: str, kind: str) -> None:
        """A token of a text, told apart by `kind`."""
        if self.coloured:
            self.write(text, kind)
        else:
            before, after = self.marks.get(kind, ("", ""))
            self.write(f"{before}{text}{after}")

    def growing(self) -> GrowingText:
        """A text that grows while it is shown, over a line that says how far it has come."""
        return GrowingText(self, self._console)

    def progress(self, text: str, share: float | None = None) -> None:
        """Replace the progress line."""
        if not self._moving:
            return
        width = shutil.get_terminal_size().columns - 1
        if share is not None:
            full = round(20 * share)
            text = f"[{'#' * full}{'.' * (20 - full)}] {100 * share:3.0f}%  {text}"
        self.err.write("\r" + text[:width].ljust(self._shown))
        self.err.flush()
        self._shown = min(len(text), width)

    def clear_progress(self) -> None:
        """Take the progress line away."""
        if self._shown:
            self.err.write("\r" + " " * self._shown + "\r")
            self.err.flush()
            self._shown = 0


class GrowingText:
    """A context in which tokens are shown as they come: on a terminal the last lines and a progress line.

    When it closes the whole text stands there. Without colour every token is written at once.
    """

    _FRAME = 0.06  # seconds: drawing costs milliseconds, and decoding has better things to do

    def __init__(self, screen: Screen, console: Any) -> None:
        self._screen, self._console = screen, console
        self._live: Any = None
        self._pieces: list[tuple[str, str]] = []
        self._drawn = 0.0

    def __enter__(self) -> GrowingText:
        if self._console is not None:
            from rich.live import Live

            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            for text, kind in self._pieces:
                self._screen.token(text, kind)

    def push(self, text: str, kind: str) -> None:
        """Add a token."""
        if self._live is None:
            self._screen.token(text, kind)
        else:
            self._pieces.append((text, kind))

    def progress(self, text: str) -> None:
        """Show what was pushed, and `text` below it."""
        if self._live is None or perf_counter() - self._drawn < self._FRAME:
            return
        from rich.text import Text

        rows = max(4, self._console.size.height - 4)
        end, lines = [], 0
        for piece, kind in reversed(self._pieces):
            lines += piece.count("\n")
            if lines > rows:
                break
            end.append((piece, STYLES[kind]))
        self._live.update(Text.assemble(*reversed(end), "\n\n", (text, "dim")), refresh=True)
        self._drawn = perf_counter()
