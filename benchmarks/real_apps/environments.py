"""A virtualenv for each application, kept in a cache directory: none of them is a dependency of this project."""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

from benchmarks.servers import ROOT


def environment(cache: Path, name: str, packages: Sequence[str]) -> Path:
    """Return the Python of the virtualenv `name` below `cache`, with `packages` and this checkout installed in it.

    Made the first time, and used as it is afterwards: remove the directory for newer packages. Raises
    `subprocess.CalledProcessError` when pip fails, which has said why on stderr.
    """
    directory = cache / name
    python = directory / "bin" / "python"
    complete = directory / "complete"
    if not complete.exists():
        venv.create(directory, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *packages, "--editable", str(ROOT)], check=True, stdout=sys.stderr)
        complete.touch()
    return python


def version(python: Path, package: str) -> str:
    """Return which version of a package an environment has."""
    code = f"from importlib.metadata import version; print(version({package!r}), end='')"
    return subprocess.run([str(python), "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout
