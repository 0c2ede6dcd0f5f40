"""What is left of a worker in a process that its app forks."""

from __future__ import annotations

import mmap
import os
import signal
import socket
import sys
import time
from types import SimpleNamespace

from tests.helpers.forks import PATIENCE, in_child, spawn, status_of
from zdd_web.board import Board
from zdd_web.board.record import WORD
from zdd_web.gunicorn.adapter.worker import HANDLERS, WorkerFacade
from zdd_web.gunicorn.workers import app_forks
from zdd_web.system.shared_memory import write_to_a_copy


def test_what_a_child_writes_to_its_workers_slot_is_its_own_and_the_header_is_not() -> None:
    board = Board.create("test-app-forks", slots=3)
    slot, other = board.slot(1), board.slot(2)
    words, at = slot.words, slot.base + type(slot).in_flight.index
    slot.in_flight, other.in_flight, slot.error = 7, 8, "before"
    go, say = os.pipe()

    def child() -> list[object]:
        write_to_a_copy(slot.memory, slot.base * WORD, slot.WORDS * WORD)
        # As the closures do that count requests.
        words[at] += 1
        slot.error = "of the child"
        os.read(go, 1)
        return [slot.in_flight, slot.error, other.in_flight, board.header.deadline]

    def parent() -> list[object]:
        board.header.deadline = 5
        os.write(say, b".")
        return child()

    assert in_child(parent) == [8, "of the child", 8, 5]
    assert [slot.in_flight, slot.error, other.in_flight] == [7, "before", 8]
    board.close()
    os.close(go)
    os.close(say)


def test_a_copied_range_may_begin_and_end_anywhere_in_a_page() -> None:
    memory = mmap.mmap(-1, 3 * mmap.PAGESIZE)
    view = memoryview(memory)
    view[:] = bytes(range(256)) * (len(view) // 256)

    def child() -> bool:
        before = bytes(view)
        write_to_a_copy(view, mmap.PAGESIZE - 8, 16)
        view[mmap.PAGESIZE - 8 : mmap.PAGESIZE + 8] = bytes(16)
        # It is on a page of its own, and still the parent's.
        view[2 * mmap.PAGESIZE] = 9
        return bytes(view[: mmap.PAGESIZE - 8]) == before[: mmap.PAGESIZE - 8]

    assert in_child(child) is True
    assert view[mmap.PAGESIZE - 8 : mmap.PAGESIZE + 8] == bytes([*range(248, 256), *range(8)])
    assert view[2 * mmap.PAGESIZE] == 9


def test_a_handler_acts_in_its_own_process_alone() -> None:
    def worker() -> None:
        signal.signal(signal.SIGTERM, app_forks.OwnHandler(lambda sig, frame: handled.append(sig)))
        handled: list[int] = []
        os.kill(os.getpid(), signal.SIGTERM)
        assert handled == [signal.SIGTERM]
        # Here nothing has replaced the handler: the child finds that it is another process.
        child = spawn(lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert status_of(child) == -signal.SIGTERM
        assert handled == [signal.SIGTERM]

    assert status_of(spawn(worker)) == 0


def test_default_actions_take_the_place_of_own_handlers_and_of_no_others() -> None:
    def child() -> list[bool]:
        def own(sig: int, frame: object) -> None: ...

        signal.signal(signal.SIGTERM, app_forks.OwnHandler(own))
        signal.signal(signal.SIGUSR2, own)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        app_forks.reset_handlers()
        return [
            signal.getsignal(signal.SIGTERM) is signal.SIG_DFL,
            signal.getsignal(signal.SIGUSR2) is own,
            signal.getsignal(signal.SIGHUP) is signal.SIG_IGN,
        ]

    assert in_child(child) == [True, True, True]


def test_a_closed_copy_leaves_the_parents_listener_open_and_later_files_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as gone:
        inodes = {each.fileno(): os.fstat(each.fileno()).st_ino for each in (server, gone)}
        number = gone.fileno()
        reader, writer = os.pipe()
        gone.close()
        os.dup2(reader, number)

        def child() -> list[str]:
            app_forks.close_copies(inodes)
            return [os.readlink(f"/proc/self/fd/{fd}") for fd in inodes]

        listener, file = in_child(child)
        assert listener == os.devnull
        assert file.startswith("pipe:")
        socket.create_connection(server.getsockname()).close()
        for fd in (reader, writer, number):
            os.close(fd)


def test_a_signal_that_reaches_a_child_before_its_handlers_are_replaced_is_not_lost() -> None:
    def worker() -> list[int]:
        board = Board.private("test-app-forks")
        signal.signal(signal.SIGTERM, app_forks.OwnHandler(lambda sig, frame: None))
        gunicorns = WorkerFacade(SimpleNamespace(**dict.fromkeys(HANDLERS, lambda sig, frame: None)))
        app_forks.attach(gunicorns, board.slot(0), (), lambda: None)
        ended = []
        for _ in range(20):
            child = spawn(lambda: time.sleep(PATIENCE))
            # At once: the child has hardly begun.
            os.kill(child, signal.SIGTERM)
            ends = time.monotonic() + 1
            while not (status := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < ends:
                time.sleep(0.001)
            if status[0]:
                ended.append(os.waitstatus_to_exitcode(status[1]))
            else:
                os.kill(child, signal.SIGKILL)
                ended.append(status_of(child))
        # The mask is what it was, here and in a child.
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
        assert status_of(spawn(lambda: sys.exit(len(signal.pthread_sigmask(signal.SIG_BLOCK, ()))))) == 0
        return ended

    assert in_child(worker) == [-signal.SIGTERM] * 20
