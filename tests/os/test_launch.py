"""The command that started this process is found again: asked of real processes, and carried out once more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import zdd_web
from zdd_web.errors import SettingsError
from zdd_web.gunicorn.handoff.launch import ONCE, Launch, command, read_env_file
from zdd_web.gunicorn.handoff.release_paths import move_environ

#: Where the package under test is, which is not beside its tests when the wheel is tested.
ROOT = Path(zdd_web.__file__).parents[1]

#: Says how it would be started again.
BODY = """
import json, sys
from zdd_web.gunicorn.handoff.launch import Launch
launch = Launch.record()
said = {"real_directory": launch.real_directory, "command": launch.command}
print(json.dumps({**said, "argv0": sys.orig_argv[0], "dev": sys.flags.dev_mode}))
"""


def say(*argv: str | Path, cwd: Path) -> dict[str, Any]:
    environ = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{cwd}"}
    done = subprocess.run(list(map(str, argv)), cwd=cwd, env=environ, stdout=subprocess.PIPE, check=True, timeout=60)
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def says_the_same_again(said: dict[str, Any], cwd: Path) -> bool:
    again = say(*said["command"], cwd=cwd)
    return (again["command"], again["dev"]) == (said["command"], said["dev"])


@pytest.fixture
def interpreter(tmp_path: Path) -> Path:
    """The interpreter under another path, as a virtualenv of a release has it."""
    link = tmp_path / "release" / "bin" / "python3"
    link.parent.mkdir(parents=True)
    link.symlink_to(sys.executable)
    return link


def script(path: Path, first_lines: str, *, mode: int = 0o755) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(first_lines + BODY)
    path.chmod(mode)
    return path


def test_console_script_is_started_by_its_own_path(tmp_path: Path, interpreter: Path) -> None:
    server = script(tmp_path / "bin" / "server", f"#!{interpreter}\n")
    said = say(server, "-c", "conf.py", "app:app", cwd=tmp_path)
    assert said["argv0"] == str(interpreter)
    assert said["command"] == [str(server), "-c", "conf.py", "app:app"]
    assert says_the_same_again(said, tmp_path)


def test_console_script_follows_a_flipped_symlink(tmp_path: Path, interpreter: Path) -> None:
    server = script(tmp_path / "release" / "bin" / "server", f"#!{interpreter}\n")
    current = tmp_path / "current"
    current.symlink_to(tmp_path / "release")
    said = say(current / "bin" / "server", cwd=tmp_path)
    assert said["command"] == [str(current / "bin" / "server")]
    assert Path(said["command"][0]).samefile(server)


def test_console_script_by_a_relative_path_stays_relative(tmp_path: Path, interpreter: Path) -> None:
    script(tmp_path / "bin" / "server", f"#!{interpreter}\n")
    assert say("bin/server", cwd=tmp_path)["command"] == ["bin/server"]


@pytest.mark.parametrize("quote", ["", '"'])
def test_console_script_with_a_long_path_to_its_interpreter_is_started_by_its_own_path(
    tmp_path: Path, interpreter: Path, quote: str
) -> None:
    # What pip writes when the path is too long for the kernel, and with quotes when it holds a space.
    first_lines = f"#!/bin/sh\n'''exec' {quote}{interpreter}{quote} \"$0\" \"$@\"\n' '''\n"
    server = script(tmp_path / "bin" / "server", first_lines)
    said = say(server, "app:app", cwd=tmp_path)
    assert said["argv0"] == str(interpreter)
    assert said["command"] == [str(server), "app:app"]
    assert says_the_same_again(said, tmp_path)


def test_console_script_by_env_is_started_by_its_own_path(tmp_path: Path) -> None:
    name = Path(sys.executable).name
    server = script(tmp_path / "bin" / "server", f"#!/usr/bin/env {name}\n")
    environ_path = os.environ["PATH"]
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environ_path}"
    try:
        assert say(server, cwd=tmp_path)["command"] == [str(server)]
    finally:
        os.environ["PATH"] = environ_path


@pytest.mark.parametrize(
    "options",
    [
        ["-m", "server"],
        ["-X", "dev", "-m", "server"],
        ["-W", "error", "-m", "server", "-c", "conf.py"],
        ["server.py", "app:app"],
        ["-X", "dev", "server.py"],
    ],
    ids=" ".join,
)
def test_everything_else_is_started_by_this_interpreter_with_the_same_arguments(
    tmp_path: Path, options: list[str]
) -> None:
    script(tmp_path / "server.py", "", mode=0o644)
    said = say(sys.executable, *options, cwd=tmp_path)
    assert said["command"] == [sys.executable, *options]
    assert said["dev"] is ("dev" in options)
    assert says_the_same_again(said, tmp_path)


def test_interpreter_found_by_its_name_is_kept_by_its_path(tmp_path: Path) -> None:
    script(tmp_path / "server.py", "", mode=0o644)
    assert command(["python", "server.py"], "/venv/bin/python") == ("/venv/bin/python", "server.py")


@pytest.mark.parametrize("first_line", ["#!/venv/of/another/release/bin/python3", "#!/usr/bin/env python3.99"])
def test_script_given_to_an_interpreter_by_hand_stays_with_that_interpreter(tmp_path: Path, first_line: str) -> None:
    server = script(tmp_path / "server", f"{first_line}\n")
    assert command(["python", str(server)], "/venv/bin/python") == ("/venv/bin/python", str(server))


def test_program_without_arguments_is_its_interpreter() -> None:
    assert command(["python3"], "/usr/bin/python3") == ("/usr/bin/python3",)


@pytest.mark.parametrize("mode", [0o644, 0o600])
def test_script_that_cannot_be_executed_needs_the_interpreter(tmp_path: Path, mode: int) -> None:
    server = script(tmp_path / "server", f"#!{sys.executable}\n", mode=mode)
    assert command([sys.executable, str(server)], sys.executable) == (sys.executable, str(server))


def test_directory_is_no_script(tmp_path: Path) -> None:
    assert command([sys.executable, str(tmp_path)], sys.executable) == (sys.executable, str(tmp_path))


# -- the directory


@pytest.fixture
def current(tmp_path: Path) -> Path:
    """`current` -> `r1`, beside `r2`."""
    (tmp_path / "r1").mkdir()
    (tmp_path / "r2").mkdir()
    (tmp_path / "current").symlink_to("r1")
    return tmp_path / "current"


def test_directory_is_the_symlink_that_the_shell_was_in(current: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(current)
    monkeypatch.setenv("PWD", str(current))
    assert Launch.record().directory == str(current)


@pytest.mark.parametrize("pwd", ["r2", "gone", "relative", "unset", "empty"])
def test_directory_is_the_kernels_when_the_shells_is_not_true(
    current: Path, monkeypatch: pytest.MonkeyPatch, pwd: str
) -> None:
    monkeypatch.chdir(current)
    match pwd:
        case "unset":
            monkeypatch.delenv("PWD", raising=False)
        case "empty":
            monkeypatch.setenv("PWD", "")
        case "relative":
            monkeypatch.setenv("PWD", ".")
        case _:
            monkeypatch.setenv("PWD", str(current.parent / pwd))
    assert Launch.record().directory == str((current.parent / "r1").resolve())


@pytest.mark.parametrize("program", ["venv/bin/server", "server"])
def test_directory_is_the_symlink_that_the_program_was_started_by(current: Path, program: str) -> None:
    # A systemd unit: no PWD, WorkingDirectory=/srv/current, ExecStart=/srv/current/venv/bin/gunicorn.
    body = "from zdd_web.gunicorn.handoff.launch import Launch\nprint(Launch.record().directory)\n"
    server = script(current / program, f"#!{sys.executable}\n{body}sys = exit()\n")
    environ = {key: value for key, value in os.environ.items() if key != "PWD"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([server], cwd=current, env=environ, stdout=subprocess.PIPE, check=True, text=True, timeout=60)
    assert done.stdout == f"{current}\n"


def test_program_beside_the_directory_does_not_tell_its_name(
    current: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(current)
    monkeypatch.delenv("PWD", raising=False)
    monkeypatch.setattr(sys, "orig_argv", [str(tmp_path / "r2" / "python"), "-m", "gunicorn"])
    monkeypatch.setattr(sys, "executable", str(tmp_path / "r2" / "python"))
    assert Launch.record().directory == str((tmp_path / "r1").resolve())


def test_environment_is_kept_but_for_what_was_said_to_this_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ONCE:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SHOP_DATABASE", "postgres://")
    environ = Launch.record().environ
    assert environ["SHOP_DATABASE"] == "postgres://"
    assert not set(ONCE) & set(environ)
    monkeypatch.setenv("SHOP_DATABASE", "changed by the app")
    assert environ["SHOP_DATABASE"] == "postgres://"


# -- obstacles


def launch(directory: Path, program: str | Path) -> Launch:
    return Launch(directory=str(directory), command=(str(program), "app:app"), environ={})


def test_nothing_is_in_the_way_of_a_program_that_is_there(tmp_path: Path) -> None:
    server = script(tmp_path / "bin" / "server", "#!/bin/sh\n")
    assert launch(tmp_path, server).obstacle() is None
    assert launch(tmp_path, "bin/server").obstacle() is None
    assert launch(tmp_path, sys.executable).obstacle() is None
    assert launch(tmp_path, "sh").obstacle() is None


def test_directory_that_is_gone_is_named(tmp_path: Path) -> None:
    gone = tmp_path / "r1"
    assert launch(gone, sys.executable).obstacle() == f"the directory it is started in is gone: {gone}"


def test_dangling_symlink_is_a_directory_that_is_gone(current: Path) -> None:
    (current.parent / "r1").rmdir()
    assert launch(current, sys.executable).obstacle() == f"the directory it is started in is gone: {current}"


def test_program_that_is_gone_is_named(tmp_path: Path) -> None:
    server = script(tmp_path / "bin" / "server", "#!/bin/sh\n", mode=0o644)
    for program in (server, tmp_path / "none", "bin/none", "no-such-program-anywhere", tmp_path):
        assert launch(tmp_path, program).obstacle() == f"the program is gone or not executable: {program}"


def test_relative_program_is_looked_for_where_it_will_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tmp_path / "start" / "server", "#!/bin/sh\n")
    monkeypatch.chdir(tmp_path)
    assert launch(tmp_path / "start", "./server").obstacle() is None
    assert launch(tmp_path, "./server").obstacle() == "the program is gone or not executable: ./server"


# -- a launch that follows the release


def test_launch_follows_a_release_that_its_launcher_had_resolved() -> None:
    old = Launch(
        directory="/srv/shop/r1",
        command=(
            "/srv/shop/r1/venv/bin/gunicorn",
            "-c",
            "/srv/shop/r1/conf.py",
            "--pid",
            "/run/shop.pid",
            "r1/app:app",
        ),
        environ={"PWD": "/srv/shop/r1", "LANG": "C.UTF-8"},
    )
    new = old.following("/srv/shop/current")
    assert new.directory == "/srv/shop/current"
    assert new.command == (
        "/srv/shop/current/venv/bin/gunicorn",
        "-c",
        "/srv/shop/current/conf.py",
        "--pid",
        "/run/shop.pid",
        "r1/app:app",
    )
    assert new.environ == {"PWD": "/srv/shop/current", "LANG": "C.UTF-8"}
    assert old.following("") is old


def test_launch_follows_no_directory_that_only_begins_alike() -> None:
    old = Launch("/srv/shop/r1", ("/srv/shop/r10/bin/gunicorn",), {})
    assert old.following("/srv/shop/current") == Launch("/srv/shop/current", ("/srv/shop/r10/bin/gunicorn",), {})


@pytest.mark.parametrize(
    ("word", "moved"),
    [
        ("--config=/srv/shop/r1/conf.py", "--config=/srv/shop/current/conf.py"),
        ("--chdir=/srv/shop/r1", "--chdir=/srv/shop/current"),
        ("/srv/shop/r1", "/srv/shop/current"),
    ],
)
def test_launch_follows_in_every_word_that_names_the_old_release(word: str, moved: str) -> None:
    old = Launch("/srv/shop/r1", ("gunicorn", word), {})
    assert old.following("/srv/shop/current").command == ("gunicorn", moved)


#: What agents put into the environment, by the real path of the release that they run from.
SITE = "/.venv/lib/python3.11/site-packages"
AGENTS = {
    "PYTHONPATH": f"{{}}{SITE}/newrelic/bootstrap:{{}}{SITE}/ddtrace/bootstrap:/opt/lib",
    "NEW_RELIC_PYTHON_PREFIX": "{}/.venv",
    "NEW_RELIC_CONFIG_FILE": "{}/newrelic.ini",
    "NEW_RELIC_INITIAL_PYTHONPATH": "{}",
    "OTEL_PYTHON_CONFIG": "file:{}/otel.yaml,mode=strict",
    "DD_TAGS": "dir:{}/app,env:prod",
    "VIRTUAL_ENV": "{}/.venv",
    "PATH": "{}/.venv/bin:/usr/bin:/bin",
}


@pytest.mark.parametrize("name", AGENTS)
def test_paths_of_the_old_release_move_with_it(name: str) -> None:
    old, new = "/srv/shop/releases/1", "/srv/shop/releases/2"
    said = {name: AGENTS[name].replace("{}", old)}
    assert move_environ(said, old, new, lambda path: True) == ({name: AGENTS[name].replace("{}", new)}, ())
    assert move_environ(said, old, new, lambda path: False) == (said, (name,))


@pytest.mark.parametrize(
    "value",
    ["/srv/shop/releases/10/bin", "/backup/srv/shop/releases/1/bin", "/srv/shop/releases/1.old", "/srv/shop", "1", ""],
)
def test_other_paths_stay(value: str) -> None:
    said = {"NAME": value, "OLDPWD": "/srv/shop/releases/1"}
    assert move_environ(said, "/srv/shop/releases/1", "/srv/shop/releases/2", lambda path: True) == (said, ())


def test_only_what_the_new_release_has_is_moved() -> None:
    said = {"PYTHONPATH": "/r/1/lib:/r/1/gone"}
    moved = move_environ(said, "/r/1", "/r/2", lambda path: path == "/r/2/lib")
    assert moved == ({"PYTHONPATH": "/r/2/lib:/r/1/gone"}, ("PYTHONPATH",))


def test_launch_moves_what_names_the_release_before_a_flip(tmp_path: Path) -> None:
    for release in ("1", "2"):
        (tmp_path / "releases" / release / "venv" / "bin").mkdir(parents=True)
    one, two = tmp_path / "releases" / "1", tmp_path / "releases" / "2"
    (two / "conf.py").touch()
    current = tmp_path / "current"
    current.symlink_to(one)
    old = Launch(
        str(current), (f"{one}/venv/bin/gunicorn", f"--config={one}/conf.py"), {"A": f"{one}/venv", "B": f"{one}/x"},
        real_directory=str(one),
    )  # fmt: skip
    assert old.following("") is old
    current.unlink()
    current.symlink_to(two)
    new = old.following("")
    # There is no program yet.
    assert new.command == (f"{one}/venv/bin/gunicorn", f"--config={two}/conf.py")
    assert new.environ == {"A": f"{two}/venv", "B": f"{one}/x"}
    assert new.left == ("B",)
    assert new.refreshed({}, {"B": "set by hand"}).left == ()
    (two / "venv" / "bin" / "gunicorn").touch()
    assert old.following("").command[0] == f"{two}/venv/bin/gunicorn"


def test_launch_knows_the_directory_that_a_symlink_led_to(tmp_path: Path) -> None:
    (tmp_path / "releases").mkdir()
    (tmp_path / "current").symlink_to(tmp_path / "releases")
    script(tmp_path / "server.py", "", mode=0o644)
    script(tmp_path / "releases" / "server.py", "", mode=0o644)
    said = say(sys.executable, "server.py", cwd=tmp_path / "current")
    assert said["real_directory"] == str((tmp_path / "releases").resolve())


def test_variables_of_an_environment_file_are_as_they_are_now() -> None:
    old = Launch("/", ("gunicorn",), {"A": "1", "B": "2", "C": "3"})
    assert old.refreshed({"A": "1", "B": "2"}, {"B": "20", "D": "4"}).environ == {"B": "20", "C": "3", "D": "4"}
    assert old.environ == {"A": "1", "B": "2", "C": "3"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", {}),
        ("A=1\nB=2\n", {"A": "1", "B": "2"}),
        ("A=1\nA=2\n", {"A": "2"}),
        ("\n  \n# a comment\n  # another\nA=1 # why\n", {"A": "1"}),
        ("export A=1\n", {"A": "1"}),
        ("A=\n", {"A": ""}),
        ("A='two words'\nB=\"two words\"\n", {"A": "two words", "B": "two words"}),
        ("A=postgres://u:p@h/db?x=1\n", {"A": "postgres://u:p@h/db?x=1"}),
        ("A='# no comment'\n", {"A": "# no comment"}),
        ("A=zu\u00e4\n", {"A": "zu\u00e4"}),
        pytest.param(
            "A=postgres://u:p#w@h/db\n",
            {"A": "postgres://u:p#w@h/db"},
        ),
    ],
)
def test_environment_file_is_read_as_a_shell_reads_it(tmp_path: Path, text: str, found: dict[str, str]) -> None:
    path = tmp_path / "env"
    path.write_text(text)
    assert read_env_file(str(path)) == found
    # ... and as a shell does read it:
    script = f"set -a; . {path}; exec {sys.executable} -c 'import json, os; print(json.dumps(dict(os.environ)))'"
    done = subprocess.run(["/bin/sh", "-c", script], env={}, capture_output=True, check=True, timeout=60)
    shells = json.loads(done.stdout)
    assert {key: shells[key] for key in found} == found


@pytest.mark.parametrize("line", ["two words", "A", "=1", "A=1 B=2", "A='open", "1A=2", "A-B=1", "A = 1"])
def test_line_of_an_environment_file_that_is_none_is_refused_by_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "env"
    path.write_text(f"A=1\n{line}\n")
    with pytest.raises(SettingsError) as caught:
        read_env_file(str(path))
    assert str(caught.value).startswith(f"{path}, line 2: ")


def test_line_of_an_environment_file_that_is_none_is_not_quoted(tmp_path: Path) -> None:
    path = tmp_path / "env"
    path.write_text("DATABASE_PASSWORD=correct horse battery staple\n")
    with pytest.raises(SettingsError) as caught:
        read_env_file(str(path))
    assert "DATABASE_PASSWORD" in str(caught.value)
    assert "horse" not in str(caught.value)


def test_environment_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "env"
    path.write_bytes(b"A=caf\xe9\n")
    with pytest.raises(SettingsError, match="env"):
        read_env_file(str(path))


def test_environment_file_that_is_gone_is_refused_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"ENV_FILE = '.*/gone': No such file or directory"):
        read_env_file(str(tmp_path / "gone"))
