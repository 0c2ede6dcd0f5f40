"""A small Flask app to try zdd_web's promises on: see README.md."""

import fcntl
import hashlib
import json
import os
import sqlite3
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path

from flask import Flask, Response, abort, current_app, g, request
from werkzeug.exceptions import HTTPException

import zdd_web
from zdd_web.flask import ZddWeb

BASE_DIR = Path(__file__).resolve().parent
# Read once: a running worker goes on naming the code that it runs.
VERSION = (BASE_DIR / "VERSION").read_text().strip()
MAX_SECONDS = 120

SCHEMA = """
CREATE TABLE IF NOT EXISTS items (id INTEGER PRIMARY KEY, name TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY,
    status TEXT NOT NULL,
    seconds REAL NOT NULL,
    version TEXT NOT NULL,
    generation INTEGER NOT NULL,
    finished_at TEXT NOT NULL
);
"""


def create_app() -> Flask:
    app = Flask(__name__)
    app.config["DATABASE"] = BASE_DIR / os.environ.get("DATABASE_PATH", "db.sqlite3")
    app.teardown_appcontext(close_db)
    app.register_error_handler(HTTPException, http_error)
    app.add_url_rule("/", view_func=index)
    app.add_url_rule("/items", view_func=list_items, methods=["GET"])
    app.add_url_rule("/items", view_func=add_item, methods=["POST"])
    app.add_url_rule("/slow", view_func=slow)
    app.add_url_rule("/stream", view_func=stream)
    app.add_url_rule("/upload", view_func=upload, methods=["POST", "PUT"])
    app.add_url_rule("/jobs", view_func=jobs, methods=["GET", "POST"])
    create_tables(app.config["DATABASE"])
    # New code without its database does not take over, and a service that has lost it is not ready.
    zdd_web.check("database")(lambda: ask(app.config["DATABASE"]))
    ZddWeb(app)
    return app


# --- database ---------------------------------------------------------------------------------------------


def connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=20)
    db.row_factory = sqlite3.Row
    return db


def ask(path: Path) -> None:
    with closing(connect(path)) as db:
        db.execute("SELECT 1 FROM items LIMIT 1")


def create_tables(path: Path) -> None:
    # Workers start together, and SQLite does not wait, whatever the timeout, when two connections
    # switch a new database to WAL. The lock is on the directory, so it leaves no file behind.
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        with closing(connect(path)) as db:
            db.execute("PRAGMA journal_mode=WAL")
            db.executescript(SCHEMA)
    finally:
        os.close(directory)


def get_db() -> sqlite3.Connection:
    if "db" not in g:
        g.db = connect(current_app.config["DATABASE"])
    return g.db


def close_db(_error: BaseException | None = None) -> None:
    db = g.pop("db", None)
    if db is not None:
        db.close()


# --- replies ----------------------------------------------------------------------------------------------


def envelope(**body: object) -> dict[str, object]:
    return {**body, "version": VERSION, "generation": zdd_web.generation()}


def http_error(error: HTTPException) -> Response:
    response = error.get_response()  # keeps headers such as Allow
    response.data = json.dumps(envelope(error=error.description))
    response.content_type = "application/json"
    return response


def seconds_argument(default: float) -> float:
    text = request.args.get("seconds")
    if text is None:
        return default
    try:
        seconds = float(text)
    except ValueError:
        seconds = float("nan")
    if not 0 <= seconds <= MAX_SECONDS:  # false for nan, too
        abort(400, f"seconds must be a number from 0 to {MAX_SECONDS}, not {text!r}")
    return seconds


# --- views ------------------------------------------------------------------------------------------------


def index():
    return envelope(app="example-flask", pid=os.getpid())


def list_items():
    rows = get_db().execute("SELECT id, name FROM items ORDER BY id DESC LIMIT 100")
    return envelope(items=[dict(row) for row in rows])


def add_item():
    body = request.get_json(silent=True, force=True)
    name = body.get("name") if isinstance(body, dict) else None
    if not isinstance(name, str) or not name:
        abort(400, 'send JSON with a name: {"name": "..."}')
    with get_db() as db:
        item_id = db.execute("INSERT INTO items (name) VALUES (?)", (name,)).lastrowid
    return envelope(id=item_id, name=name), 201


def slow():
    seconds = seconds_argument(default=2)
    time.sleep(seconds)
    return envelope(slept=seconds, pid=os.getpid())


def stream():
    return Response(lines(seconds_argument(default=5)), content_type="application/x-ndjson")


def lines(seconds: float) -> Iterator[str]:
    start = time.monotonic()
    end = start + seconds
    while (now := time.monotonic()) < end:
        yield json.dumps(envelope(elapsed=round(now - start, 1), done=False)) + "\n"
        time.sleep(min(0.5, max(0, end - time.monotonic())))
    yield json.dumps(envelope(elapsed=round(time.monotonic() - start, 1), done=True)) + "\n"


def upload():
    digest, size = hashlib.sha256(), 0
    while chunk := request.stream.read(64 * 1024):
        digest.update(chunk)
        size += len(chunk)
    return envelope(bytes=size, sha256=digest.hexdigest())


def jobs():
    if request.method == "GET" and "seconds" not in request.args:
        rows = get_db().execute("SELECT * FROM jobs ORDER BY finished_at")
        # A job carries the version and generation that finished it, the reply those that answer.
        return envelope(jobs=[dict(row) for row in rows])
    seconds = seconds_argument(default=5)
    job_id = uuid.uuid4().hex
    # zdd_web waits for it: at a stop, and before a retired generation exits.
    zdd_web.background.go(work, current_app.config["DATABASE"], job_id, seconds, name=f"job {job_id} ({seconds:g} s)")
    return envelope(job=job_id, seconds=seconds), 202


def work(database: Path, job_id: str, seconds: float) -> None:
    time.sleep(seconds)
    row = (job_id, "done", seconds, VERSION, zdd_web.generation(), datetime.now(timezone.utc).isoformat())
    with closing(connect(database)) as db, db:
        db.execute("INSERT INTO jobs VALUES (?, ?, ?, ?, ?, ?)", row)
