# Run from the root of the project: gunicorn -c example_django/gunicorn.conf.py
import os
import subprocess
import sys

chdir = os.path.abspath(os.path.dirname(__file__))
bind = f"127.0.0.1:{os.environ.get('PORT', '8000')}"
workers = int(os.environ.get("WEB_CONCURRENCY", "2"))
worker_class = os.environ.get("WORKER_CLASS", "gthread")
wsgi_app = "mysite.asgi" if worker_class == "asgi" else "mysite.wsgi"
if worker_class == "gthread":
    threads = 8  # not for the others: gunicorn turns sync with threads into gthread
# A sync worker is alive to gunicorn only between requests, and /slow may take 120 s.
timeout = 130
if os.environ.get("PIDFILE"):
    # Absolute, since gunicorn creates it after chdir.
    pidfile = os.path.abspath(os.environ["PIDFILE"])


def on_starting(server):
    # Once per generation, before any worker exists. In a process of its own, since what the master
    # imports every worker inherits. A migration that fails ends this generation before it serves.
    # No system checks: they import the views, and whether those load is the workers' to find out.
    migrate = [sys.executable, "manage.py", "migrate", "--no-input", "--skip-checks"]
    subprocess.run(migrate, cwd=chdir, check=True)


from zdd_web.gunicorn import install  # noqa: E402

install(globals(), name="example-django")
