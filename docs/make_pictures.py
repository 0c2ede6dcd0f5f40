"""Make docs/pictures/rehearsal-*: `python docs/make_pictures.py`; needs Chromium (Debian's package `chromium`).

Rehearses the Flask example, which loses nothing, and measures a plain gunicorn with `reuse_port` and `max_requests`,
which does. Both run on 127.0.0.1 for some twenty seconds. Then each report is photographed: light, dark, and at the
width of a phone.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from terminal import photograph

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
REHEARSE = [sys.executable, "-m", "zdd_web.cli", "rehearse"]

PLAIN = """
import time
def app(environ, start_response):
    time.sleep(0.005)
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]
"""

#: Chromium makes no window narrower than 500 pixels, but a frame as narrow as it is told to.
PHONE = '<body style="margin:0"><iframe src="{page}" style="border:0;width:390px;height:1500px"></iframe>'


def rehearse_the_example(page: Path) -> None:
    """Rehearse with everything that is done to a service."""
    command = [*REHEARSE, "example_flask", "--upgrades", "2", "--scenario", "all", "--clients", "16", "--path", "/"]
    command += ["--path", "3:/items", "--upload", "/upload", "--html", str(page)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "DATABASE_PATH": str(page.parent / "db.sqlite3")}, check=False)


def measure_plain_gunicorn(page: Path) -> None:
    """Measure workers that are recycled, each of which drops what waits in its own queue."""
    (page.parent / "plain.py").write_text(PLAIN)
    with socket.socket() as reserved:
        # Each worker binds the port itself, so it cannot be 0. This socket holds it, and never listens.
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        command = [sys.executable, "-m", "gunicorn", "plain:app", "--bind", f"127.0.0.1:{port}", "--workers", "2"]
        command += ["--reuse-port", "--max-requests", "150"]
        with (page.parent / "log").open("wb") as log:
            gunicorn = subprocess.Popen(command, cwd=page.parent, stdout=log, stderr=log)
        try:
            _wait_for(port)
            do = f"sleep 2; kill -HUP {gunicorn.pid}; sleep 3"
            command = [*REHEARSE, "--url", f"http://127.0.0.1:{port}/", "--do", do, "--clients", "32"]
            subprocess.run([*command, "--html", str(page), "--timeout", "3"], cwd=ROOT, check=False)
        finally:
            gunicorn.terminate()
            gunicorn.wait()


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise SystemExit("gunicorn did not start within 30 s")


def take(page: Path, name: str, *, dark: bool = False, phone: bool = False) -> None:
    """Take a picture of a report."""
    shown = page
    if phone:
        shown = page.with_name(f"{page.stem}-phone.html")
        shown.write_text(PHONE.format(page=page.name))
    width, height = (500, 1500) if phone else (1100, 1300)
    photograph(shown, DOCS / "pictures" / f"{name}.png", width=width, height=height, dark=dark)


def main() -> None:
    """Make all pictures."""
    (DOCS / "pictures").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        rehearse_the_example(directory / "kept.html")
        measure_plain_gunicorn(directory / "lost.html")
        for page in (directory / "kept.html", directory / "lost.html"):
            take(page, f"rehearsal-{page.stem}")
            take(page, f"rehearsal-{page.stem}-dark", dark=True)
            take(page, f"rehearsal-{page.stem}-phone", phone=True)


if __name__ == "__main__":
    main()
