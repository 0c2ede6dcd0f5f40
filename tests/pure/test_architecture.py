"""DESIGN.md's "who may import whom", held by reading the imports."""

from __future__ import annotations

import ast
import functools
import graphlib
import importlib
import pkgutil
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import zdd_web

PACKAGE = Path(zdd_web.__file__).parent
FRAMEWORKS = {"django", "flask", "asgiref", "werkzeug", "starlette", "jinja2"}

#: Each part of the package and the parts that it may use. A new part needs a line here, which is a decision.
MAY_USE = {
    "errors": set(),
    "system": {"errors"},
    "log": {"system"},
    "lifecycle": {"errors"},
    "settings": {"errors"},
    "health": {"lifecycle", "settings"},
    "board": {"errors", "lifecycle", "system"},
    # What a release is called, and what was done to a service: both sides, the master and the commands, need them.
    "release": set(),
    "history": set(),
    "deploy_request": {"errors", "settings", "system"},
    "lookup": {"board", "errors", "lifecycle", "system"},
    "waitgroup": {"errors", "log"},
    "checks": {"errors", "log", "board", "health", "settings", "system", "waitgroup"},
    "listeners": {"board", "errors", "system"},
    "process": {"checks", "waitgroup", "board", "lifecycle", "settings", "errors", "system"},
    "probes": {"checks", "process", "board", "health", "lifecycle", "settings", "system"},
    "wsgi": {"probes"},
    "asgi": {"probes"},
    "access_log": {"errors", "probes", "process", "settings"},
    "watch": {"lifecycle", "log", "process"},
    "probe_server": {"board", "errors", "health", "lifecycle", "log", "metrics", "settings", "probes", "system"},
    "flask": {"cli", "checks", "probes", "wsgi", "asgi", "process", "health", "settings", "errors"},
    "django": {
        "checks", "cli", "lifecycle", "log", "probes", "wsgi", "asgi", "process", "health", "settings", "errors",
        "watch",
    },
    "apps": {"django"},
    "gunicorn": {
        "errors", "log", "lifecycle", "settings", "board", "waitgroup", "listeners", "process", "probe_server",
        "access_log", "checks", "health", "metrics", "probes", "service", "keeper", "lookup", "system", "watch",
        "release", "history", "deploy_request",
    },
    "metrics": {"board", "health", "lifecycle", "system"},
    "service": {"errors", "lookup", "system"},
    "keeper": {"errors", "lifecycle", "log", "board", "service", "system"},
    "cli": {
        "checks", "errors", "health", "lifecycle", "lookup", "settings", "system", "board", "service", "gunicorn",
        "__init__", "release", "history", "deploy_request",
    },
    "__main__": {"cli"},
    # A plugin of pytest: no other part may need it. The rehearsal is a process of its own, so no use of cli.
    "testing": {"process"},
    "__init__": set(),
}  # fmt: skip

#: The same inside gunicorn/, where an import for typing alone counts too: a role that names another one's type depends
#: on it. From what knows gunicorn alone to what knows everything.
GUNICORN_MAY_USE: dict[str, set[str]] = {
    "adapter": set(),
    "boot_progress": set(),
    "pid_file": set(),
    "process_exit": set(),
    "termination_message": {"adapter"},
    "log_rotation": {"adapter"},
    "context": {"adapter"},
    "read_django_settings": set(),
    "settings_in_force": {"adapter", "context", "read_django_settings"},
    "handoff": {"adapter", "context", "settings_in_force"},
    "systemd_notifier": {"adapter", "context", "settings_in_force", "handoff"},
    "sockets": {"adapter", "context", "settings_in_force", "handoff"},
    "workers": {"adapter", "context", "settings_in_force", "handoff", "sockets", "log_rotation", "process_exit"},
    "upgrade": {
        "adapter", "context", "settings_in_force", "handoff", "systemd_notifier", "sockets", "boot_progress",
        "pid_file",
    },
    "master": {
        "adapter", "context", "settings_in_force", "handoff", "systemd_notifier", "sockets", "workers", "upgrade",
        "boot_progress", "log_rotation", "pid_file", "process_exit", "termination_message",
    },
    # What a start would refuse, the number of workers included.
    "start_problems": {"adapter", "settings_in_force", "handoff", "master"},
    "hooks": {
        "adapter", "context", "settings_in_force", "handoff", "workers", "upgrade", "master", "start_problems",
        "pid_file", "termination_message",
    },
    "__init__": {"hooks"},
}  # fmt: skip

#: Modules that may name the type of the whole master: every other role receives what it needs of it.
KNOW_THE_MASTER = {"zdd_web.gunicorn.hooks"}

#: What a decision needs of the standard library; nothing of it touches the world.
PURE = {"errors", "settings", "lifecycle", "health"}
PURE_STDLIB = {"__future__", "collections", "dataclasses", "difflib", "enum", "functools", "itertools", "math", "re"}
PURE_STDLIB |= {"json", "typing", "urllib"}


@dataclass(frozen=True)
class Import:
    """One import: `name` is the module, as far as one is named; `where` is "module", "function" or "typing"."""

    importer: str
    name: str
    where: str
    line: int

    @property
    def top(self) -> str:
        return self.name.partition(".")[0]

    @property
    def part(self) -> str:
        """The part of this package that is imported: `board` for zdd_web.board."""
        assert self.top == "zdd_web"
        names = self.name.split(".")
        return names[1] if len(names) > 1 else "__init__"

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.name} ({self.where})"


def part_of(module: str) -> str:
    names = module.split(".")
    return names[1] if len(names) > 1 else "__init__"


# Read when they are asked for: this file is imported by each process of a test run.
@functools.cache
def trees() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        names = ["zdd_web", *path.relative_to(PACKAGE).with_suffix("").parts]
        if names[-1] == "__init__":
            names.pop()
        found[".".join(names)] = ast.parse(path.read_text(), str(path))
    return found


class Reader(ast.NodeVisitor):
    def __init__(self, module: str) -> None:
        self.module, self.where = module, "module"
        self.found: list[Import] = []

    def note(self, name: str, line: int) -> None:
        self.found.append(Import(self.module, name, self.where, line))

    def within(self, where: str, nodes: list[ast.stmt]) -> None:
        outer, self.where = self.where, where if self.where == "module" else self.where
        for node in nodes:
            self.visit(node)
        self.where = outer

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.note(alias.name, node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, f"{self.module}:{node.lineno}: imports here are absolute"
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            # `from gunicorn import sock` names a module, `from zdd_web.board import Board` does not.
            self.note(whole if whole in trees() or "." not in str(node.module) else str(node.module), node.lineno)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.within("function", node.body)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self.within("function", node.body)

    def visit_If(self, node: ast.If) -> None:
        typing = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        self.within("typing" if typing else self.where, node.body)
        self.within(self.where, node.orelse)


def imports_of(module: str) -> list[Import]:
    reader = Reader(module)
    reader.visit(trees()[module])
    return reader.found


@functools.cache
def imports() -> list[Import]:
    return [each for module in trees() for each in imports_of(module)]


def real_imports() -> list[Import]:
    return [each for each in imports() if each.where != "typing"]


def test_this_test_reads_what_it_is_meant_to_read() -> None:
    found = {str(each).partition(":")[0] + str(each).partition(" imports")[2] for each in imports()}
    assert {
        "zdd_web.wsgi zdd_web.probes (module)",
        "zdd_web.wsgi _typeshed.wsgi (typing)",
        "zdd_web.gunicorn zdd_web.gunicorn.hooks (function)",
        "zdd_web.gunicorn.adapter.versions gunicorn (module)",
        "zdd_web.gunicorn.adapter.sockets gunicorn.sock (module)",
        "zdd_web.gunicorn.adapter.worker gunicorn.http.wsgi (module)",
        "zdd_web zdd_web.board (typing)",
    } - found == {"zdd_web zdd_web.board (typing)"}


# -- who may use whom


def test_every_part_has_its_place_in_the_order() -> None:
    assert {part_of(module) for module in trees()} <= set(MAY_USE)


def test_parts_use_only_those_that_they_may() -> None:
    wrong = [
        str(each)
        for each in real_imports()
        if each.top == "zdd_web"
        and each.part != part_of(each.importer)
        and each.part not in MAY_USE[part_of(each.importer)]
    ]
    assert wrong == []


def test_order_has_no_circles() -> None:
    done: list[str] = []
    while len(done) < len(MAY_USE):
        ready = [part for part, used in MAY_USE.items() if part not in done and used <= set(done)]
        assert ready, f"a circle among {sorted(set(MAY_USE) - set(done))}"
        done += ready


def part_inside_gunicorn(module: str) -> str:
    names = module.split(".")
    return names[2] if len(names) > 2 else "__init__"


def inside_gunicorn() -> list[Import]:
    return [
        each for each in imports() if part_of(each.importer) == "gunicorn" and each.name.startswith("zdd_web.gunicorn.")
    ]


def test_every_part_of_gunicorn_has_its_place_in_the_order() -> None:
    assert {part_inside_gunicorn(module) for module in trees() if part_of(module) == "gunicorn"} == set(
        GUNICORN_MAY_USE
    )


def test_parts_of_gunicorn_use_only_those_that_they_may() -> None:
    wrong = [
        str(each)
        for each in inside_gunicorn()
        if (importer := part_inside_gunicorn(each.importer)) != (used := part_inside_gunicorn(each.name))
        and used not in GUNICORN_MAY_USE[importer]
    ]
    assert wrong == []


def test_order_inside_gunicorn_has_no_circles() -> None:
    done: set[str] = set()
    for part, used in GUNICORN_MAY_USE.items():
        assert used <= done, f"{part} is listed before {used - done}"
        done.add(part)


def test_modules_import_each_other_in_no_circle_not_even_for_type_checkers() -> None:
    graph: dict[str, set[str]] = {module: set() for module in trees()}
    for each in imports():
        # A name of a module is an import of the module.
        target = each.name if each.name in graph else each.name.rpartition(".")[0]
        if target in graph and target != each.importer:
            graph[each.importer].add(target)
    tuple(graphlib.TopologicalSorter(graph).static_order())


def test_no_role_receives_the_whole_master() -> None:
    users = {each.importer for each in imports() if each.name == "zdd_web.gunicorn.master.master"}
    assert users == KNOW_THE_MASTER


def test_decisions_touch_nothing_of_the_world() -> None:
    wrong = [
        str(each)
        for each in real_imports()
        if part_of(each.importer) in PURE and each.top != "zdd_web" and each.top not in PURE_STDLIB
    ]
    assert wrong == []
    # ... nor by way of another part.
    assert [part for part in PURE if not MAY_USE[part] <= PURE] == []


def test_decisions_open_no_file_and_print_nothing() -> None:
    for module, tree in trees().items():
        if part_of(module) in PURE:
            names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            assert names & {"open", "print", "input", "exec", "eval", "__import__"} == set(), module


@pytest.mark.parametrize(("framework", "home"), [("django", {"django", "apps"}), ("flask", {"flask"})])
def test_framework_is_imported_by_its_adaptor_alone(framework: str, home: set[str]) -> None:
    assert {part_of(each.importer) for each in imports() if each.top == framework} == home


def test_no_other_framework_is_imported_by_anybody_else() -> None:
    wrong = [
        str(each)
        for each in imports()
        if each.top in FRAMEWORKS and part_of(each.importer) not in ("django", "flask", "apps")
    ]
    assert wrong == []


def test_click_and_rich_are_the_commands_alone() -> None:
    users = {part_of(each.importer) for each in imports() if each.top in ("click", "rich")}
    assert users == {"cli"}
    # The probe port's process reads HTTP; it alone of all that runs in a service.
    assert {part_of(each.importer) for each in imports() if each.top == "h11"} == {"cli", "probe_server"}
    forked = [
        each
        for each in real_imports()
        if each.name.startswith("zdd_web.probe_server") and part_of(each.importer) == "gunicorn"
    ]
    assert {each.where for each in forked} == {"function"}


# -- who knows versions


def test_one_module_knows_which_gunicorn_this_is() -> None:
    bare = {
        each.importer for each in real_imports() if each.name == "gunicorn" and part_of(each.importer) == "gunicorn"
    }
    assert bare == {"zdd_web.gunicorn.adapter.versions"}
    known = []
    for module, tree in trees().items():
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and node.attr in ("__version__", "version_info", "hexversion", "VERSION")
                and not (isinstance(node.value, ast.Name) and node.value.id == "zdd_web")
            ):
                known.append(module)
    metadata = [
        each.importer for each in imports() if each.name in ("importlib.metadata", "packaging", "pkg_resources")
    ]
    assert {*known, *metadata} == {"zdd_web.gunicorn.adapter.versions"}


# -- gunicorn's objects: adapter/ alone imports gunicorn or writes an attribute of them, and adapter/patches.py has a
# table of all that are written

ADAPTER = "zdd_web.gunicorn.adapter"

#: What the arbiter and a worker of gunicorn's are called in this package.
OBJECTS = {"server", "worker", "arbiter", "_server", "_worker", "_arbiter", "raw", "_raw"}


def is_in_adapter(module: str) -> bool:
    return module == ADAPTER or module.startswith(f"{ADAPTER}.")


def is_gunicorns(node: ast.expr) -> bool:
    """Tell whether an expression is the arbiter or a worker, or something of theirs: `self._server.app`."""
    if isinstance(node, ast.Name):
        return node.id in OBJECTS
    return isinstance(node, ast.Attribute) and (node.attr in OBJECTS or is_gunicorns(node.value))


def targets_of(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, (ast.Assign, ast.Delete)):
        found = list(node.targets)
    elif isinstance(node, (ast.AugAssign, ast.AnnAssign, ast.For)):
        found = [node.target]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("setattr", "delattr"):
        return [ast.Attribute(value=node.args[0], attr="?", ctx=ast.Store())]
    else:
        return []
    flat: list[ast.expr] = []
    for each in found:
        flat += each.elts if isinstance(each, (ast.Tuple, ast.List)) else [each]
    return [each.value if isinstance(each, (ast.Subscript, ast.Starred)) else each for each in flat]


def writes_of(tree: ast.AST) -> list[str]:
    """Return each write to an attribute of gunicorn's objects in a module."""
    return [
        f"line {target.value.lineno}: {ast.unparse(target)}"
        for node in ast.walk(tree)
        for target in targets_of(node)
        if isinstance(target, ast.Attribute) and is_gunicorns(target.value)
    ]


def test_writes_are_found() -> None:
    found = writes_of(
        ast.parse(
            "server.x = 1\nself._server.x, other = 1, 2\nself.worker.x += 1\nsetattr(worker, 'x', 1)\n"
            "del arbiter.x\nworker.cfg.settings['x'] = 1\nself._server = server\nthis.x = worker.y\n"
        )
    )
    assert sorted(each.partition(": ")[0] for each in found) == [f"line {line}" for line in range(1, 7)]


def test_adapter_alone_imports_gunicorn() -> None:
    assert [str(each) for each in imports() if each.top == "gunicorn" and not is_in_adapter(each.importer)] == []


def test_adapter_alone_writes_attributes_of_the_arbiter_and_its_workers() -> None:
    # State.worker in hooks.py is our own WorkerRuntime.
    found = [
        f"{module}: {each}"
        for module, tree in trees().items()
        for each in writes_of(tree)
        if part_of(module) == "gunicorn" and not is_in_adapter(module) and "state.worker." not in each
    ]
    assert found == []


def test_in_the_adapter_one_module_writes_them() -> None:
    assert [each for module, tree in trees().items() if is_in_adapter(module) for each in writes_of(tree)] == []


CONTRACT = Path(__file__).parents[1] / "contract"
SOURCES = {path: path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}


def test_facts_of_gunicorns_that_comments_name_have_a_test() -> None:
    there = set(re.findall(r"def (test_\w+)", "".join(path.read_text() for path in CONTRACT.glob("*.py"))))
    # The examples of the pytest plugin have names of their own.
    ours = {path: text for path, text in SOURCES.items() if "testing" not in path.parts}
    named = {name for text in ours.values() for name in re.findall(r"\btest_[a-z]\w+(?![\w.]*\.py\b)", text)}
    assert len(there) > 60
    assert named - there == set()
    assert len(named) > 40


def test_no_comment_names_a_line_of_a_library() -> None:
    # It rots with the next release, and no test says so.
    found = [f"{path}: {line}" for path, text in SOURCES.items() for line in re.findall(r"\w+\.py:\d+", text)]
    assert found == []


# -- the package itself

#: A reader keeps a module of so many lines in mind; past it there are two things in one.
LINES = 400


def test_no_module_is_long() -> None:
    lengths = {str(path.relative_to(PACKAGE)): len(text.splitlines()) for path, text in SOURCES.items()}
    assert {name: length for name, length in lengths.items() if length > LINES} == {}


def test_package_imports_nothing_until_it_is_asked_for_a_name() -> None:
    assert {each.name for each in imports_of("zdd_web") if each.where == "module"} == {
        "__future__.annotations",
        "importlib",
        "typing.TYPE_CHECKING",
        "typing.Any",
    }


def test_public_names_resolve_and_are_the_same_everywhere() -> None:
    assert sorted(zdd_web.__all__) == zdd_web.__all__
    assert set(zdd_web._HOME) == set(zdd_web.__all__)
    assert set(zdd_web.__all__) <= set(dir(zdd_web))
    for name in zdd_web.__all__:
        assert getattr(zdd_web, name) is getattr(importlib.import_module(zdd_web._HOME[name]), name)


def test_type_checkers_are_told_the_same_names() -> None:
    told = {}
    for node in trees()["zdd_web"].body:
        if isinstance(node, ast.If):
            for each in node.body:
                assert isinstance(each, ast.ImportFrom)
                told |= {alias.name: each.module for alias in each.names}
    assert told == zdd_web._HOME


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'zdd_web' has no attribute 'backround'"):
        _ = zdd_web.backround


def test_no_public_name_is_the_name_of_a_module() -> None:
    # Its first import would put the module in the place of the object.
    modules = {module.name for module in pkgutil.iter_modules(zdd_web.__path__)} | set(MAY_USE)
    assert modules & set(zdd_web.__all__) == set()


def test_all_that_a_module_announces_is_there() -> None:
    for module in trees():
        if not module.endswith("__main__"):
            loaded = importlib.import_module(module)
            missing = [name for name in getattr(loaded, "__all__", []) if not hasattr(loaded, name)]
            assert missing == [], f"{module}.__all__ names what is not there"


LAZY = """
import sys
import zdd_web
forbidden = {"django", "flask", "gunicorn", "click", "rich", "h11", "asgiref"}
loaded = sorted(forbidden & set(sys.modules))
assert not loaded, loaded
ours = sorted(name for name in sys.modules if name.startswith("zdd_web."))
assert not ours, ours
"""


@pytest.mark.parametrize(
    "then",
    [
        "",
        "[getattr(zdd_web, name) for name in zdd_web.__all__]",
        "with zdd_web.background.track(): zdd_web.phase()",
        "import zdd_web.wsgi",
        "import zdd_web.asgi, zdd_web.access_log, zdd_web.watch",
        "import zdd_web.gunicorn",
        "import zdd_web.system.boot_log, zdd_web.gunicorn.upgrade.successor_process",
    ],
)
def test_package_drags_no_framework_in(then: str) -> None:
    check = "loaded = sorted(forbidden & set(sys.modules)); assert not loaded, loaded"
    subprocess.run([sys.executable, "-Ic", f"{LAZY}\n{then}\n{check}"], check=True, timeout=60)


@pytest.mark.parametrize("module", ["zdd_web.gunicorn.hooks", "zdd_web.keeper"])
def test_service_runs_without_the_commands_libraries(module: str) -> None:
    script = f"import sys, {module}; assert not {{'click', 'rich', 'h11', 'django', 'flask'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-Ic", script], check=True, timeout=60)


#: What a start does without: each takes milliseconds of CPU, in the master and in every upgrade. gunicorn itself loads
#: `importlib.metadata`, from 24 on.
LAZY_IMPORTS = {"asyncio", "difflib", "hashlib", "importlib.metadata", "wsgiref"}

BESIDE_GUNICORN = """
import gunicorn.app.wsgiapp, sys
before = set(sys.modules)
import zdd_web.gunicorn.hooks
print(*sorted(set(sys.modules) - before))
"""


def test_a_start_does_not_load_what_it_does_not_need() -> None:
    run = [sys.executable, "-Ic", BESIDE_GUNICORN]
    loaded = subprocess.run(run, check=True, timeout=60, capture_output=True, text=True).stdout.split()
    assert "zdd_web.gunicorn.master.master" in loaded
    assert LAZY_IMPORTS & set(loaded) == set()


#: What a command that prints to a pipe does without: a deploy script runs several.
LAZY_IN_COMMANDS = {"rich.live", "rich.table", "subprocess", "tempfile", "socket", "asyncio", "h11"}


def test_a_command_does_not_load_what_it_does_not_need() -> None:
    run = [sys.executable, "-Ic", "import sys, zdd_web.cli; print(*sys.modules)"]
    loaded = subprocess.run(run, check=True, timeout=60, capture_output=True, text=True).stdout.split()
    assert {"zdd_web.cli.upgrade", "zdd_web.cli.rehearse.command"} <= set(loaded)
    assert LAZY_IN_COMMANDS & set(loaded) == set()


def test_types_of_gunicorns_objects_are_for_type_checkers_alone() -> None:
    users = {each.where for each in imports() if each.name.startswith("zdd_web.gunicorn.adapter.protocols")}
    assert users == {"typing"}


@pytest.mark.parametrize(
    ("module", "missing"),
    [("zdd_web.django.middleware", "flask"), ("zdd_web.flask", "django"), ("zdd_web.cli", "gunicorn")],
)
def test_adaptor_needs_its_own_framework_only(module: str, missing: str) -> None:
    script = f"import sys; sys.modules[{missing!r}] = None; import {module}"
    subprocess.run([sys.executable, "-Ic", script], check=True, timeout=60)


def test_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").exists()


def test_apps_run_without_gunicorn_where_there_is_no_unix() -> None:
    script = "\n".join(
        [
            "import sys",
            "for module in ('fcntl', 'grp', 'pwd', 'resource'):",
            "    sys.modules[module] = None",
            "import zdd_web, zdd_web.asgi, zdd_web.flask, zdd_web.wsgi",
            "with zdd_web.background.track():",
            "    assert zdd_web.phase().label == 'serving'",
        ]
    )
    subprocess.run([sys.executable, "-Ic", script], check=True, timeout=60)
