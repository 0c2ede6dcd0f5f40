"""What `overhead.py` adds to gunicorn for the server with zdd_web; its counterpart is no configuration at all."""

from zdd_web.gunicorn import install

install(globals(), name="overhead")
