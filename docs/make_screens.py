"""Make docs/pictures/screen-*: `python docs/make_screens.py`; needs tmux and Chromium (packages of those names).

Deploys the Flask example, in releases of its own under a temporary directory, from a real terminal: good, broken and
bad releases, taken back and stopped. Each screen is taken at 80 and at 200 columns; some become pictures, on a dark
and a light background. `--all DIR` writes all of them there instead, as pictures and as they came from the terminal:
look at each after a change of what a command prints.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from terminal import Terminal, draw, plain, terminal, until

from zdd_web import service as finder

DOCS = Path(__file__).resolve().parent
EXAMPLE = DOCS.parent / "example_flask"
LINES = 50
NAME = "shop"
ONE = f"--name {NAME}"

#: What is shown in place of the directory under /tmp: as long as that, so that lines break where they would.
BASE = Path("/srv/shop")

#: In the docs, at 80 columns: the name of the screen, and how many lines of its end.
SHOWN = {"canary-board": LINES, "upgrade-failed": 16, "canary-withdrawn": LINES, "history": LINES}

BROKEN = "from catalogue import prices\n"
#: Of ten requests to a worker one fails.
COUNT = "SEEN = []\n\n\ndef index():\n    SEEN.append(1)\n    if len(SEEN) % 10 == 0:\n        abort(500)\n"
BAD = ("def index():\n", COUNT)


class Example:
    """The Flask example as a service that is deployed by symlink."""

    def __init__(self, base: Path) -> None:
        self.base, self.current = base, base / "current"
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.asked: list[threading.Thread] = []

    def release(self, name: str, *, first: str = "", change: tuple[str, str] | None = None) -> None:
        """Put a release on disk and have `current` lead to it."""
        directory = self.base / "releases" / name
        shutil.copytree(EXAMPLE, directory, ignore=shutil.ignore_patterns("*.sqlite3*", "__pycache__"))
        app = directory / "app.py"
        text = app.read_text()
        if change is not None:
            assert change[0] in text
            text = text.replace(*change)
        app.write_text(text.replace("import fcntl\n", f"{first}import fcntl\n", 1))
        (directory / "VERSION").write_text(name)
        conf = directory / "gunicorn.conf.py"
        conf.write_text(conf.read_text().replace("example-flask", NAME))
        self.flip(name)

    def flip(self, name: str) -> None:
        """Have `current` lead to a release."""
        (self.base / "new").symlink_to(Path("releases") / name)
        (self.base / "new").replace(self.current)

    def start(self, **environ: str) -> None:
        """Start the service, and wait until it serves."""
        log = self.base / "log"
        log.unlink(missing_ok=True)
        said = {"PORT": "0", "WEB_CONCURRENCY": "4", "DATABASE_PATH": str(self.base / "db.sqlite3"), **environ}
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gunicorn", "-c", "gunicorn.conf.py"], cwd=self.current, stdout=file,
                stderr=file, stdin=subprocess.DEVNULL, env={**os.environ, "PWD": str(self.current), **said},
            )  # fmt: skip
        until("the service", lambda: "event=phase.serving" in log.read_text())
        found = re.search(r"Listening at: http://127\.0\.0\.1:(\d+)", log.read_text())
        assert found
        self.port = int(found[1])

    def ask(self, path: str) -> None:
        """Send a request in a thread of its own; its reply is of no interest."""

        def send() -> None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60).close()

        self.asked.append(threading.Thread(target=send, daemon=True))
        self.asked[-1].start()

    @contextlib.contextmanager
    def load(self) -> Iterator[None]:
        """Send requests to `/` for a block, some hundred a second."""
        over = threading.Event()

        def send() -> None:
            while not over.is_set():
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{self.port}/", timeout=60).close()
                over.wait(0.02)

        threads = [threading.Thread(target=send) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in threads:
                thread.join()

    def generations(self) -> list[finder.Generation]:
        """Return the generations of this service, and of no other that has its name; the oldest first."""
        found = [each for each in finder.generations() if self.base in Path(f"/proc/{each.pid}/cwd").resolve().parents]
        return sorted(found, key=lambda each: each.header.generation)

    def kill(self) -> None:
        """End what is left of the service."""
        for each in self.generations():
            with contextlib.suppress(OSError):
                each.signal(signal.SIGQUIT)
        if self.process is not None:
            self.process.wait()
        until("the end of the service", lambda: not self.generations())


def busy(example: Example) -> None:
    """Give the service something to do that is seen."""
    for path in ("/slow?seconds=9", "/slow?seconds=9", "/jobs?seconds=14", "/jobs?seconds=9"):
        example.ask(path)
    until("work in hand", lambda: sum(each.snapshot().tasks for each in example.generations()) == 2)


def scenes(example: Example, screens: Terminal) -> Iterator[tuple[str, str]]:
    """Play everything that is done to a service; yield the name of each screen, and the screen."""
    example.release("1")
    example.start()
    yield "status", screens.runs(f"zdd-web status {ONE}")
    yield "status-no-color", screens.runs(f"NO_COLOR=1 zdd-web status {ONE}")
    yield "status-pipe", screens.runs(f"zdd-web status {ONE} | cat")

    busy(example)
    example.release("2", first="import time\ntime.sleep(2)\n")
    screens.type(f"zdd-web upgrade {ONE}")
    yield "upgrade-boots", screens.shows("waiting for")
    yield "upgrade-commits", screens.shows("commit window;")
    yield "upgrade-good", screens.ends()
    yield "status-two", screens.runs(f"zdd-web status {ONE}")
    screens.type(f"zdd-web status {ONE} --watch")
    yield "board", screens.shows(r"generation 1: retiring(?s:.*)requests")
    screens.press("C-c")

    example.release("3", first=BROKEN)
    yield "upgrade-failed", screens.runs(f"zdd-web upgrade {ONE}")
    yield "upgrade-failed-pipe", screens.runs(f"zdd-web upgrade {ONE} 2>&1 | cat")
    yield "status-failed", screens.runs(f"zdd-web status {ONE}")

    example.release("4", change=BAD)
    with example.load():
        screens.type(f"zdd-web upgrade {ONE} --watch 60 --canary 1 --max-errors 1%")
        yield "canary-watched", screens.shows(r"[1-9]\s+with\s+status")
        yield "canary-withdrawn", screens.ends()
        example.release("5")
        screens.type(f"zdd-web upgrade {ONE} --watch 5 --canary 50%")
        screens.shows(r"canary\s+of\s+2\s+of\s+4")
        with terminal(screens.columns, LINES, example.base) as beside:
            beside.type(f"zdd-web status {ONE} --watch")
            yield "canary-board", beside.shows("is a canary")
            beside.press("C-c")
        yield "canary-good", screens.ends()
    example.release("6", first="import time\ntime.sleep(3)\n")
    screens.type(f"zdd-web upgrade {ONE}")
    screens.shows("waiting for")
    screens.press("C-c")
    yield "upgrade-cancelled", screens.ends()
    yield "cancel-none", screens.runs(f"zdd-web cancel {ONE}")
    yield "upgrade-to-pipe", screens.runs(f"zdd-web upgrade {ONE} --to {example.base}/releases/2 | cat")
    yield "rollback", screens.runs(f"zdd-web rollback {ONE}")
    yield "history", screens.runs(f"zdd-web history {ONE}")
    master = example.generations()[-1]
    os.kill(master.pid, signal.SIGSTOP)
    try:
        until("a master that hangs", lambda: time.monotonic_ns() - master.header.tick_at > 6e9)
        yield "status-hangs", screens.runs(f"zdd-web status {ONE}")
    finally:
        os.kill(master.pid, signal.SIGCONT)
    busy(example)
    screens.type(f"zdd-web drain {ONE}")
    yield "drain-waits", screens.shows("draining: .*(?s:.*)cut off in")
    yield "drain", screens.ends()
    yield "status-none", screens.runs(f"zdd-web status {ONE}")

    example.flip("5")
    example.start(ZDD_WEB_GRACE_PERIOD="8")
    busy(example)
    yield "drain-cut-off", screens.runs(f"zdd-web drain {ONE}")


def remove(base: Path) -> None:
    """Remove a directory in which processes that are about to end may still write: SQLite's files of the example."""

    def is_gone() -> bool:
        shutil.rmtree(base, ignore_errors=True)
        return not base.exists()

    until(f"nothing to be written in {base}", is_gone)


def take(columns: int) -> dict[str, str]:
    """Take all screens at a width."""
    found: dict[str, str] = {}
    base = Path(tempfile.gettempdir()) / BASE.name
    base.mkdir()
    with contextlib.ExitStack() as stack:
        stack.callback(remove, base)
        screens = stack.enter_context(terminal(columns, LINES, base))
        example = Example(base)
        try:
            for each, screen in scenes(example, screens):
                colourless = each.endswith(("-pipe", "-no-color"))
                assert not (colourless and "\x1b" in screen), f"{each} has colours"
                too_long = [line for line in plain(screen).splitlines() if len(line) > columns]
                assert not too_long, too_long
                found[each] = screen.replace(str(base), str(BASE))
        finally:
            example.kill()
    return found


def main() -> None:
    """Take the screens and make the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", metavar="DIR", type=Path, help="write all screens there")
    everything: Path | None = parser.parse_args().all
    for columns in (80, 200):
        found = take(columns)
        if everything is not None:
            everything.mkdir(parents=True, exist_ok=True)
            for name, screen in found.items():
                (everything / f"{name}-{columns}.ansi").write_text(screen + "\n")
                for dark in (True, False):
                    background = "dark" if dark else "light"
                    draw(screen, columns, everything / f"{name}-{columns}-{background}.png", dark=dark)
        elif columns == 80:
            for name, lines in SHOWN.items():
                end = "\n".join(found[name].splitlines()[-lines:])
                for dark in (True, False):
                    draw(end, columns, DOCS / "pictures" / f"screen-{name}{'-dark' if dark else ''}.png", dark=dark)


if __name__ == "__main__":
    main()
