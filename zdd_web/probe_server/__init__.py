"""The probe port's process: it answers probes while every worker is busy, stopped or dead.

Theory of operation
-------------------
A child of the master (gunicorn/master/probe_process.py forks it) with one event loop, which never waits for anything
but its sockets. It holds the listening socket, which is the master's for the whole of the master's life, and the board,
mapped read-only. Each answer is a look at the board and a decision of zdd_web.health: microseconds.

Ten times a second, and at each request, it reads what its master says in the board's header:

    probe_pid       another pid than its own: this process was replaced. It accepts no more, and goes.
    probe_accepts   whether it accepts. Not while its generation boots beside one that serves, and not once a
                    successor serves on the same socket; again when that successor is lost. A successor's process
                    begins when its predecessor's board says that the one there accepts no more.

Kept connections outlive the moment at which it stops to accept: the next reply says `Connection: close`, and those that
stay silent are closed after `LINGER` seconds, so that no request that is on its way runs into the close.

It goes when its master is gone, which the kernel says by SIGTERM; from anybody else that signal means nothing.

HTTP is h11's business. What a client can cost is bounded: connections, bytes of a head, seconds for a head, bytes that
it does not read. Only the forked child imports `server`, so that no master and no worker loads asyncio or h11.
"""
