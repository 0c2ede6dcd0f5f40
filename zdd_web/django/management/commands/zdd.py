"""`manage.py zdd status|history|upgrade|rollback|cancel|drain|check`: `zdd-web` where `manage.py` is at hand.

    manage.py zdd upgrade --name shop

It touches no database, and runs Django's system checks only for `check`. Exit statuses are those of `zdd-web`.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any

from django.conf import settings
from django.core.checks import CheckMessage, run_checks
from django.core.management.base import BaseCommand, CommandParser

from zdd_web import checks
from zdd_web.cli.frameworks import COMMANDS, group, report, run, switch
from zdd_web.django import system_checks
from zdd_web.errors import SettingsError
from zdd_web.settings import FrameworkSettings

NAMES = (*(str(each.name) for each in COMMANDS), "check")


def check(deploy: bool) -> None:
    """Run the system checks of zdd_web and, once, the checks that the app has registered."""
    found = run_checks(tags=[system_checks.TAG], include_deployment_checks=deploy)
    said = [each for each in found if not each.is_silenced()]
    serious = [_text(each) for each in said if each.is_serious()]
    try:
        checks.load(FrameworkSettings.of_django(settings).values.get("checks", ()))
    except SettingsError as error:
        # One in ZDD_WEB itself is among those that were found.
        if not any(str(error) in text for text in serious):
            serious.append(str(error))
    report(serious, [_text(each) for each in said if not each.is_serious()])


def _text(message: CheckMessage) -> str:
    return f"({message.id}) {message.msg}" + (f"\n  {message.hint}" if message.hint else "")


class Command(BaseCommand):
    """See the module's text."""

    help = f"Deploy and look at this service: {', '.join(NAMES)}. Each has --help."
    requires_system_checks = ()

    def add_arguments(self, parser: CommandParser) -> None:
        """Leave everything to the commands."""
        parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar=f"{'|'.join(NAMES)} ...")

    def handle(self, *args: Any, arguments: list[str], **options: Any) -> None:
        """Run one; SystemExit with its status when that is not 0."""
        commands = group(check, switch("--deploy", "With the checks for production."))
        with contextlib.ExitStack() as stack:
            # From `call_command()`.
            if options.get("stdout") is not None:
                stack.enter_context(contextlib.redirect_stdout(options["stdout"]))
            if options.get("stderr") is not None:
                stack.enter_context(contextlib.redirect_stderr(options["stderr"]))
            status = run(commands, _without_djangos(arguments), "manage.py zdd")
        if status:
            sys.exit(status)


def _without_djangos(arguments: list[str]) -> list[str]:
    # `manage.py` has obeyed them, wherever they stand.
    djangos = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--settings", "--pythonpath"):
        djangos.add_argument(option)
    for option in ("--traceback", "--no-color", "--force-color"):
        djangos.add_argument(option, action="store_true")
    return djangos.parse_known_args(arguments)[1]
