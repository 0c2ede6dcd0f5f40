"""A real systemd, as PID 1 of namespaces of its own, for tests.

It boots in half a second from the machine's own systemd, over a copy-on-write view of the machine's files: what is
written inside vanishes with it. Inside, /tmp, /run and /dev are its own. Of the machine's, only the directory that a
test shares is bound so that it can be written to; a checkout or a virtualenv below /tmp or /run is bound read-only,
for a booting systemd empties both (and the units that would are masked as well). The network is the machine's, so that
a test's clients reach the services.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from zdd_web.system import proc

ROOT = Path(__file__).resolve().parents[2]

#: Directories that are not the machine's inside: what is needed of them is bound there read-only.
HIDDEN = ("/tmp/", "/run/")

PROGRAMS = ("unshare", "nsenter", "mount", "pivot_root")

#: Another tree than the machine's own may be booted, for another version: one that debootstrap has made.
TREE = Path(os.environ.pop("ZDD_WEB_TEST_SYSTEMD_TREE", "/"))
SYSTEMD = TREE / "usr/lib/systemd/systemd"

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PATIENCE = 30.0

#: What the machine's own boot would do and this one must not, or need not.
MASKED = (
    "systemd-tmpfiles-setup.service", "systemd-tmpfiles-setup-dev.service", "systemd-tmpfiles-clean.service",
    "systemd-tmpfiles-clean.timer", "systemd-udevd.service", "systemd-udev-trigger.service",
    "systemd-udevd-control.socket", "systemd-udevd-kernel.socket", "systemd-timesyncd.service",
    "systemd-hwdb-update.service", "systemd-modules-load.service", "systemd-sysctl.service",
    "systemd-random-seed.service", "systemd-pstore.service", "systemd-remount-fs.service",
    "systemd-update-utmp.service", "systemd-binfmt.service", "proc-sys-fs-binfmt_misc.automount",
    "dev-hugepages.mount", "dev-mqueue.mount", "sys-kernel-debug.mount", "sys-kernel-tracing.mount",
    "sys-fs-fuse-connections.mount", "sys-kernel-config.mount", "tmp.mount", "systemd-firstboot.service",
    "systemd-sysusers.service", "kmod-static-nodes.service", "systemd-journal-flush.service",
    "systemd-machine-id-commit.service", "systemd-networkd.service", "systemd-resolved.service", "timers.target",
)  # fmt: skip

#: Runs as PID 1 before systemd does, in namespaces of its own: `sh -ec INSIDE sh BOX SHARED READ_ONLY ...`.
INSIDE = r"""
box=$1 shared=$2
shift 2
new=$box/root
mount -t tmpfs -o mode=755 box "$box/layer"
mkdir "$box/layer/upper" "$box/layer/work"
mount -t overlay -o "lowerdir=$TREE,upperdir=$box/layer/upper,workdir=$box/layer/work" overlay "$new"
mount -t proc proc "$new/proc"
mount --bind "$new/proc/sys" "$new/proc/sys"
mount -o remount,bind,ro "$new/proc/sys"
mount -t sysfs -o ro sysfs "$new/sys"
mount -t cgroup2 cgroup2 "$new/sys/fs/cgroup"
mount -t tmpfs -o mode=755 tmpfs "$new/dev"
for name in null zero full random urandom tty; do
    : > "$new/dev/$name"
    mount --bind "/dev/$name" "$new/dev/$name"
done
mkdir "$new/dev/shm" "$new/dev/pts"
mount -t tmpfs tmpfs "$new/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$new/dev/pts"
ln -s /proc/self/fd "$new/dev/fd"
ln -s fd/0 "$new/dev/stdin"
ln -s fd/1 "$new/dev/stdout"
ln -s fd/2 "$new/dev/stderr"
mount -t tmpfs -o mode=755 tmpfs "$new/run"
mount -t tmpfs -o mode=1777 tmpfs "$new/tmp"
for shown in "$@" "$shared"; do
    mkdir -p "$new$shown"
    mount --bind "$shown" "$new$shown"
    [ "$shown" = "$shared" ] || mount -o remount,bind,ro "$new$shown"
done
units=$new/etc/systemd/system
rm -rf "$units"
mkdir -p "$units" "$new/etc/systemd/journald.conf.d"
: > "$new/etc/fstab"
for unit in $MASKED; do ln -s /dev/null "$units/$unit"; done
printf '[Unit]\nRequires=basic.target\nAfter=basic.target\nAllowIsolate=yes\n' > "$units/box.target"
printf '[Journal]\nStorage=volatile\nReadKMsg=no\nAudit=no\nRateLimitBurst=0\n' \
    > "$new/etc/systemd/journald.conf.d/box.conf"
mkdir -p "$new/.old"
cd "$new"
pivot_root . .old
umount -l /.old
exec env -i container=zdd_web-test PATH="$PATH" LANG=C.UTF-8 \
    /lib/systemd/systemd --system --unit=box.target --log-level=notice --log-target=console --show-status=no
"""


def cgroup2() -> Path | None:
    """Return where the second version's hierarchy is mounted, alone or beside the first."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, kind, options = line.split()[:4]
        if kind == "cgroup2" and "rw" in options.split(",") and os.access(where, os.W_OK):
            return Path(where)
    return None


def describe_bind_error() -> str:
    """Say why no systemd can be booted here; "" when it can be tried."""
    if os.geteuid() != 0:
        return "not root"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"no {', '.join(missing)}"
    if not SYSTEMD.exists():
        return f"no {SYSTEMD}"
    devices = [where for where in _needed() if where.startswith("/dev/")]
    if devices:
        return f"{devices[0]} is below /dev, which the inside has of its own"
    return "" if cgroup2() is not None else "no cgroup2 that can be written to"


class CannotBoot(Exception):
    """The kernel, or whoever contains this machine, does not allow it."""


class Box:
    """A booted systemd. `directory` is the one that it shares with the machine."""

    def __init__(self, directory: Path, init: int, outer: subprocess.Popen[bytes]) -> None:
        self.directory, self.init, self._outer = directory, init, outer
        self.version = 0

    def run(self, *words: str, timeout: float = 120.0, check: bool = False) -> subprocess.CompletedProcess[str]:
        """Run a command inside."""
        return subprocess.run(self.words(*words), capture_output=True, text=True, timeout=timeout, check=check)

    def words(self, *words: str) -> list[str]:
        """Return the command that runs a command inside."""
        return ["nsenter", "-t", str(self.init), "-a", "--root", "--wd=/", "env", "-i", f"PATH={PATH}",
                "LANG=C.UTF-8", "SYSTEMD_PAGER=", "SYSTEMD_COLORS=0", *words]  # fmt: skip

    def systemctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.run("systemctl", *words)

    def show(self, unit: str, name: str) -> str:
        """Return a property of a unit."""
        return self.systemctl("show", "--value", "-p", name, unit).stdout.strip()

    def write_unit(self, name: str, text: str) -> None:
        target = self.run("sh", "-c", f"cat > /run/systemd/system/{name} <<'END'\n{text}\nEND")
        assert target.returncode == 0, target.stderr

    def journal(self, unit: str) -> str:
        return self.run("journalctl", "-o", "cat", "--no-pager", "-u", unit).stdout

    def is_alive(self) -> bool:
        return self._outer.poll() is None


@contextlib.contextmanager
def booted() -> Iterator[Box]:
    """Boot a systemd and take it down again, with everything in it. Raises `CannotBoot`."""
    hierarchy = cgroup2()
    assert hierarchy is not None
    name = f"zdd_web-test-{uuid.uuid4().hex[:8]}"
    cgroup, box = hierarchy / name, Path("/run") / name
    # Not in /tmp, which the inside has of its own.
    directory = Path("/var/tmp") / name
    outer: subprocess.Popen[bytes] | None = None
    try:
        cgroup.mkdir()
        for each in (box / "root", box / "layer", directory):
            each.mkdir(parents=True)
        with (box / "console").open("wb") as console:
            outer = subprocess.Popen(
                ["sh", "-ec", f'echo $$ > {cgroup}/cgroup.procs; exec "$@"', "sh",
                 "unshare", "--mount", "--propagation", "private", "--uts", "--ipc", "--cgroup", "--pid", "--fork",
                 "--kill-child", "sh", "-ec", INSIDE, "sh", str(box), str(directory), *_mounts_apart()],
                env={"PATH": PATH, "MASKED": " ".join(MASKED), "TREE": str(TREE)},
                stdin=subprocess.DEVNULL, stdout=console, stderr=console, start_new_session=True,
                # A test run that is killed leaves no systemd behind.
                preexec_fn=functools.partial(proc.die_with_parent, signal.SIGKILL, os.getpid()),
            )  # fmt: skip
        yield _wait_until_booted(Box(directory, 0, outer), box / "console")
    finally:
        if outer is not None:
            _end(outer)
        _remove_cgroups(cgroup)
        shutil.rmtree(box, ignore_errors=True)
        shutil.rmtree(directory, ignore_errors=True)


def _needed() -> set[str]:
    """Return where what the units run is: this project, its virtualenv, and the interpreter below that."""
    return {str(ROOT), sys.prefix, os.path.realpath(sys.base_prefix)}


def _mounts_apart() -> list[str]:
    """Return what to bind read-only so that all that is needed is seen inside."""
    if str(TREE) != "/":
        return sorted(_needed())
    hidden = {each for each in _needed() if each.startswith(HIDDEN)}
    # What lies on the root directory's mount is there anyway.
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    apart = {
        where
        for where in mounts
        if where not in ("/", "/tmp", "/run") and any(f"{each}/".startswith(f"{where}/") for each in _needed() - hidden)
    }
    return sorted(apart | hidden)


def _wait_until_booted(box: Box, console: Path) -> Box:
    deadline = time.monotonic() + PATIENCE
    state = ""
    while time.monotonic() < deadline and box.is_alive():
        children = [pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc")))
                    if proc.parent(pid) == box._outer.pid]  # fmt: skip
        if children and proc.name(children[0]) == "systemd":
            box.init = children[0]
            state = box.systemctl("is-system-running").stdout.strip()
            if state in ("running", "degraded"):
                box.version = int(box.systemctl("--version").stdout.split()[1])
                return box
        time.sleep(0.02)
    raise CannotBoot(f"systemd does not boot here ({state or 'it did not start'}): {console.read_text()[-500:]}")


def _end(outer: subprocess.Popen[bytes]) -> None:
    # PID 1 of a pid namespace takes everything in it along, and `unshare` takes that along.
    with contextlib.suppress(ProcessLookupError):
        os.kill(outer.pid, signal.SIGKILL)
    outer.wait()


def _remove_cgroups(top: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while top.exists() and time.monotonic() < deadline:
        for directory, _, _ in os.walk(top, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(directory)
        time.sleep(0.01)
