"""A real terminal that a script types into and takes pictures of: tmux, with a server of its own, and Chromium."""

from __future__ import annotations

import io
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.ansi import AnsiDecoder
from rich.console import Console
from rich.terminal_theme import TerminalTheme

PATIENCE = 60.0
PROMPT = "$"
NUMBERS = itertools.count()

#: What the sixteen colours are in a dark and a light terminal: xterm's own, the hardest to read.
XTERM = [(0, 0, 0), (205, 0, 0), (0, 205, 0), (205, 205, 0), (0, 0, 238), (205, 0, 205), (0, 205, 205), (229, 229, 229)]
BRIGHT = [(127, 127, 127), (255, 0, 0), (0, 255, 0), (255, 255, 0), (92, 92, 255), (255, 0, 255), (0, 255, 255)]
THEMES = {
    "dark": TerminalTheme((18, 18, 18), (220, 220, 220), XTERM, [*BRIGHT, (255, 255, 255)]),
    "light": TerminalTheme((255, 255, 255), (30, 30, 30), XTERM, [*BRIGHT, (255, 255, 255)]),
}

#: Pixels of a character of DejaVu Sans Mono at 14 px, of a line, and around all of it.
CHARACTER, LINE, MARGIN = 8.43, 18, 12

PAGE = """<!doctype html><meta charset="utf-8"><body style="margin:{margin}px;background:{back};color:{fore}">
<pre style="margin:0;font:14px/{line}px 'DejaVu Sans Mono',monospace">{code}</pre>"""


class Terminal:
    """A shell in tmux, at the top of which `$ ` waits for a command."""

    def __init__(self, columns: int, lines: int, directory: Path, **environ: str) -> None:
        self.columns = columns
        self._tmux = ["tmux", "-L", f"zdd_web-{os.getpid()}-{next(NUMBERS)}", "-f", "/dev/null"]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        said = {"PATH": path, "HOME": str(directory), "PS1": f"{PROMPT} ", "LANG": "C.UTF-8", "HISTFILE": "", **environ}
        shell = " ".join(["env", "-u", "NO_COLOR", *(f"'{name}={value}'" for name, value in said.items())])
        self._run("new-session", "-d", "-x", str(columns), "-y", str(lines), "-c", str(directory),
                  f"{shell} bash --noprofile --norc")  # fmt: skip
        self.ready()

    def _run(self, *words: str) -> str:
        done = subprocess.run([*self._tmux, *words], check=True, capture_output=True, text=True, timeout=PATIENCE)
        return done.stdout

    def type(self, command: str) -> None:
        """Type a command on a screen that is cleared first, and press Enter."""
        self.ready()
        self._run("send-keys", "C-l")
        until("an empty screen", lambda: self.text().strip() == PROMPT)
        self._run("send-keys", "-l", command)
        # Before Enter: an empty screen with a prompt is what is waited for at the end.
        until("the command", lambda: command in self.text().replace("\n", ""), self)
        self._run("send-keys", "Enter")

    def press(self, key: str) -> None:
        """Press a key, as tmux calls it: `C-c`."""
        self._run("send-keys", key)

    def ready(self) -> None:
        """Wait until the shell waits for a command."""
        until("the prompt", lambda: self.text().rstrip().splitlines()[-1:] == [PROMPT], self)

    def shows(self, pattern: str) -> str:
        """Wait until the screen shows a text, and return the screen with its colours."""

        def found() -> str | None:
            screen = self.screen()
            return screen if re.search(pattern, plain(screen)) else None

        return until(f"{pattern!r}", found, self)

    def runs(self, command: str) -> str:
        """Type a command, and return the screen when it has ended."""
        self.type(command)
        return self.ends()

    def ends(self) -> str:
        """Wait until the command has ended, and return the screen without the prompt that follows."""
        self.ready()
        return self.screen().rstrip().rpartition("\n")[0]

    def text(self) -> str:
        """Return what the screen shows, without colours."""
        return plain(self.screen())

    def screen(self) -> str:
        """Return what the screen shows, with the escape sequences of its colours."""
        return self._run("capture-pane", "-e", "-p").rstrip("\n")

    def close(self) -> None:
        """End the shell and the server."""
        subprocess.run([*self._tmux, "kill-server"], check=False, timeout=PATIENCE)


@contextmanager
def terminal(columns: int, lines: int, directory: Path, **environ: str) -> Iterator[Terminal]:
    """Open a terminal for a block."""
    opened = Terminal(columns, lines, directory, **environ)
    try:
        yield opened
    finally:
        opened.close()


def until(what: str, probe, terminal: Terminal | None = None):  # type: ignore[no-untyped-def]
    """Return the first true value of `probe()`; end the script at the deadline, with the screen."""
    deadline = time.monotonic() + PATIENCE
    while not (found := probe()):
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {PATIENCE:g} s for {what}\n{terminal.text() if terminal else ''}")
        time.sleep(0.05)
    return found


def plain(screen: str) -> str:
    """Return a screen without its colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", screen)


def draw(screen: str, columns: int, picture: Path, *, dark: bool) -> None:
    """Make a picture of a screen, as high as it is filled."""
    theme = THEMES["dark" if dark else "light"]
    console = Console(record=True, width=columns, file=io.StringIO(), color_system="truecolor")
    for line in AnsiDecoder().decode(screen):
        console.print(line, soft_wrap=True)
    code = console.export_html(theme=theme, code_format="{code}", inline_styles=True)
    text = PAGE.format(
        code=code, margin=MARGIN, line=LINE, back=theme.background_color.hex, fore=theme.foreground_color.hex
    )
    # Chromium leaves the lower part of lower windows blank.
    height = max(300, LINE * len(screen.splitlines()) + 2 * MARGIN)
    with tempfile.TemporaryDirectory() as directory:
        page = Path(directory) / "screen.html"
        page.write_text(text)
        photograph(page, picture, width=round(columns * CHARACTER) + 2 * MARGIN, height=height)


def photograph(page: Path, picture: Path, *, width: int, height: int, dark: bool = False) -> None:
    """Have Chromium take a picture of a page, beside which it leaves a profile."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
               f"--user-data-dir={page.parent / 'profile'}", f"--blink-settings=preferredColorScheme={int(not dark)}",
               f"--window-size={width},{height}", f"--screenshot={picture}", page.as_uri()]  # fmt: skip
    subprocess.run(command, check=True, timeout=120, stderr=subprocess.DEVNULL)
