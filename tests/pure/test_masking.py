"""No secret of a command line, a variable or an address is logged or shown."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zdd_web.system import masking

SECRET = "hunter2"


@pytest.mark.parametrize(
    "command",
    [
        "gunicorn -e DATABASE_URL=postgres://shop:hunter2@db/shop app:app",
        "gunicorn -e LEVEL=hunter2",
        "gunicorn -eLEVEL=hunter2",
        "gunicorn --env LEVEL=hunter2",
        "gunicorn --env=LEVEL=hunter2",
        "gunicorn --raw-env LEVEL=hunter2",
        "gunicorn -De LEVEL=hunter2 -b :8000",
        "gunicorn -e hunter2",
        "env SECRET_KEY=hunter2 gunicorn",
        "gunicorn --db-password hunter2",
        "gunicorn --db-password=hunter2",
        "run --dsn https://hunter2@sentry/5 gunicorn",
        "run --api-key hunter2",
        "run --statsd redis://:hunter2@cache:6379/0",
        "run postgres://shop:p/hunter2@db/shop",
        "run 'postgres://shop:p@hunter2@db/shop'",
    ],
)
def test_secret_of_a_command_line_is_not_shown(command: str) -> None:
    shown = masking.command(shlex.split(command))
    assert SECRET not in " ".join(shown)
    assert masking.MASK in " ".join(shown)
    assert len(shown) == len(shlex.split(command))


@pytest.mark.parametrize(
    "command",
    [
        "gunicorn -c gunicorn.conf.py --keyfile /etc/key.pem --keep-alive 5 -k gthread -b 127.0.0.1:8000 shop.wsgi:app",
        "python -Wignore -m gunicorn --error-logfile - --access-logfile /var/log/shop -R",
        "gunicorn --env-file",
        "newrelic-admin run-program gunicorn --paste development.ini",
    ],
)
def test_what_is_no_secret_is_shown(command: str) -> None:
    assert " ".join(masking.command(shlex.split(command))) == command


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgres://shop:hunter2@db/shop", "postgres://***@db/shop"),
        ("(https://public@sentry.example/5)", "(https://***@sentry.example/5)"),
        ("redis://:hunter2@cache and amqp://a:b@c", "redis://***@cache and amqp://***@c"),
        ("http://127.0.0.1:8000/users/@me", "http://127.0.0.1:8000/users/@me"),
        ("https://example/a?mail=x@y", "https://example/a?mail=x@y"),
        ("x@y without an address", "x@y without an address"),
        ("unix:/run/shop.sock", "unix:/run/shop.sock"),
    ],
)
def test_address_loses_its_credentials_and_nothing_else(text: str, shown: str) -> None:
    assert masking.urls(text) == shown


@given(st.text())
def test_what_is_masked_stays_as_it_is(text: str) -> None:
    assert masking.urls(masking.urls(text)) == masking.urls(text)


SECRETS = (
    "PASSWORD PGPASSWORD DB_PASS MYSQL_PWD SECRET_KEY AWS_SECRET_ACCESS_KEY GITHUB_TOKEN SENTRY_DSN API_KEY apikey "
    "smtp-passwd"
)


@pytest.mark.parametrize("name", SECRETS.split())
def test_names_of_secrets(name: str) -> None:
    assert masking.variable(name, SECRET) == masking.MASK


@pytest.mark.parametrize("name", ["PWD", "OLDPWD", "LANG", "KEYMAP", "ZDD_WEB_NAME", "MONKEYTYPE", "COMPASS"])
def test_names_of_no_secrets(name: str) -> None:
    assert masking.variable(name, "/srv/shop") == "/srv/shop"
