"""Run the tests away from the checkout, so that they meet the installed package and not the directory beside them.

Usage: python .ci/outside.py DIRECTORY [PYTEST ARGS]
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = (
    "tests", "example_django", "example_flask", "docs", "benchmarks", "README.md", "SECURITY.md", "CONTRIBUTING.md",
    "CHANGELOG.md", "setup.cfg", "tox.ini",
)  # fmt: skip


def main(directory: str, *arguments: str) -> int:
    away = Path(directory) / "away"
    shutil.rmtree(away, ignore_errors=True)
    away.mkdir(parents=True)
    for name in NEEDED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, away / name, ignore=shutil.ignore_patterns("__pycache__", "*.sqlite3*"))
        else:
            shutil.copy(source, away / name)
    return subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=away, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
