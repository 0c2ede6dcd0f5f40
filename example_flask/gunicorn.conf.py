# Run from the root of the project: gunicorn -c example_flask/gunicorn.conf.py
import os

chdir = os.path.abspath(os.path.dirname(__file__))
wsgi_app = "app:create_app()"

bind = f"127.0.0.1:{os.environ.get('PORT', '8000')}"
workers = int(os.environ.get("WEB_CONCURRENCY", "2"))
worker_class = os.environ.get("WORKER_CLASS", "gthread")
if worker_class == "gthread":
    threads = 8  # not for the others: gunicorn turns sync with threads into gthread
# A sync worker is alive to gunicorn only between requests, and /slow may take 120 s.
timeout = 130
if os.environ.get("PIDFILE"):
    # Absolute, since gunicorn creates it after chdir.
    pidfile = os.path.abspath(os.environ["PIDFILE"])

from zdd_web.gunicorn import install  # noqa: E402

install(globals(), name="example-flask")
