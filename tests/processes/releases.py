"""Release directories, each with code and a virtualenv of its own, and a symlink that leads to one of them."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from contextlib import AbstractContextManager
from pathlib import Path

from tests.processes.harness import Service, until
from zdd_web import deploy_request
from zdd_web.deploy_request import DeployRequest, Standing
from zdd_web.service import Generation

ROOT = Path(__file__).parents[2]

#: Answers with what it was started as.
TELLING = """
    import json, os, sys
    import zdd_web
    from zdd_web.wsgi import ProbeMiddleware

    CWD = os.getcwd()

    def app(environ, start_response):
        told = {
            "release": RELEASE, "generation": zdd_web.generation(), "prefix": sys.prefix, "executable": sys.executable,
            "cwd": CWD, "environ": dict(os.environ), "uid": os.getuid(), "gid": os.getgid(),
        }
        body = json.dumps(told).encode()
        start_response("200 OK", [("Content-Length", str(len(body)))])
        return [body]

    app = ProbeMiddleware(app)
"""


def told(service: Service, generation: int = 0) -> dict:
    """What the app tells; of that generation, whose predecessor may answer a moment longer."""

    def ask() -> dict | None:
        found = json.loads(service.get().body)
        return found if generation in (0, found["generation"]) else None

    return until(f"an answer of generation {generation}", ask, service)


class Releases:
    """`releases/r1`, `releases/r2`, ..., each with its own code and virtualenv, and `current` that leads to one."""

    def __init__(self, base: Path, conf: str) -> None:
        self.base, self.conf = base, conf
        self.current = base / "current"

    def path(self, name: str) -> Path:
        return self.base / "releases" / name

    def add(self, name: str) -> Path:
        path = self.path(name)
        scripts = path / "bin"
        scripts.mkdir(parents=True)
        (path / "app.py").write_text(f"RELEASE = {name!r}\n" + textwrap.dedent(TELLING))
        (path / "gunicorn.conf.py").write_text(self.conf)
        base_python = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
        (scripts / "python").symlink_to(base_python)
        (path / "pyvenv.cfg").write_text(
            f"home = {base_python.parent}\ninclude-system-site-packages = false\n"
            f"version = {sys.version_info[0]}.{sys.version_info[1]}.{sys.version_info[2]}\n"
        )
        packages = path / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
        packages.mkdir(parents=True)
        roots = [entry for entry in sys.path if entry.endswith("-packages")] + [str(ROOT)]
        (packages / "shared.pth").write_text("\n".join(roots) + "\n")
        script = scripts / "gunicorn"
        # As pip writes it: with the path of the release, not that of the symlink.
        script.write_text(
            f"#!{scripts}/python\nimport sys\nfrom gunicorn.app.wsgiapp import run\n"
            f"if __name__ == '__main__':\n    sys.exit(run())\n"
        )
        script.chmod(0o755)
        return path

    def flip(self, name: str) -> None:
        fresh = self.base / "current.new"
        fresh.symlink_to(self.path(name))
        fresh.replace(self.current)


def by_script(where: Path) -> list[str]:
    return [str(where / "bin" / "gunicorn")]


def by_module(where: Path) -> list[str]:
    return [str(where / "bin" / "python"), "-m", "gunicorn"]


def runs(service: Service, releases: Releases, name: str, generation: int) -> None:
    """Require that code, directory and virtualenv are all those of one release."""
    found = told(service, generation)
    assert found["release"] == name
    assert Path(found["cwd"]).resolve() == releases.path(name).resolve()
    assert Path(found["prefix"]).resolve() == releases.path(name).resolve()
    assert Path(found["executable"]).parent.resolve() == (releases.path(name) / "bin").resolve()


def standing(generation: Generation, request: DeployRequest) -> AbstractContextManager[Standing]:
    """Have a request stand in a master's box, as a command does before it sends its signal."""
    return deploy_request.standing(generation.pid, generation.header.request_fd, os.geteuid(), request)
