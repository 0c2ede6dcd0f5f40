"""A Wagtail site as `wagtail start` makes it, with zdd_web added as its how-to says, and rehearsals of it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PACKAGES = ("wagtail",)
WORKER_CLASSES = ("sync", "gthread")
#: The home page, the search, and the admin's login form.
PATHS = ("/", "/search/?query=home", "/admin/login/")

SETTINGS = """\
from .base import *

DEBUG = False
SECRET_KEY = "of-a-rehearsal"
ALLOWED_HOSTS = ["*"]
INSTALLED_APPS = ["zdd_web", *INSTALLED_APPS]
MIDDLEWARE = ["zdd_web.django.middleware.ProbeMiddleware", *MIDDLEWARE]
"""

CONFIGURATION = """\
import os

from zdd_web.gunicorn import install

chdir = os.path.abspath(os.path.dirname(__file__))
wsgi_app = "mysite.wsgi"
raw_env = ["DJANGO_SETTINGS_MODULE=mysite.settings.rehearsal"]
workers, threads = 2, 4
install(globals(), name="wagtail", warmup=["/"])
"""


def make_site(python: Path, directory: Path) -> None:
    """Make a new site with a migrated SQLite database in `directory`, which exists and is empty."""

    def run(*command: str) -> None:
        environ = {"DJANGO_SETTINGS_MODULE": "mysite.settings.rehearsal", "PATH": "/usr/bin:/bin"}
        subprocess.run(command, cwd=directory, env=environ, check=True, stdout=subprocess.DEVNULL)

    run(str(python.with_name("wagtail")), "start", "mysite", ".")
    (directory / "mysite" / "settings" / "rehearsal.py").write_text(SETTINGS)
    (directory / "gunicorn.conf.py").write_text(CONFIGURATION)
    run(str(python), "manage.py", "migrate", "--no-input")


def rehearse(python: Path, worker_class: str, upgrades: int, clients: int) -> dict[str, Any] | None:
    """Rehearse a new site with `zdd-web rehearse`; return its report, None when the rehearsal could not be held."""
    with tempfile.TemporaryDirectory(prefix="zdd-web-benchmark-") as directory:
        site, report = Path(directory, "site"), Path(directory, "report.json")
        site.mkdir()
        make_site(python, site)
        command = [str(python), "-m", "zdd_web.cli", "rehearse", str(site), "--upgrades", str(upgrades),
                   "--clients", str(clients), "--json", str(report)]  # fmt: skip
        command += [word for path in PATHS for word in ("--path", path)]
        # sync is what gunicorn makes of one thread.
        command += ["--", "--worker-class", worker_class, *(["--threads", "1"] if worker_class == "sync" else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode not in (0, 1) or not report.exists() or not report.stat().st_size:
            return None
        if done.returncode == 1:
            print(done.stdout, file=sys.stderr)
        held: dict[str, Any] = json.loads(report.read_text())
        return held
