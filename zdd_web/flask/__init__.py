"""The Flask extension: `ZddWeb(app)`, or `zdd = ZddWeb()` and `zdd.init_app(app)`."""

from __future__ import annotations

import flask

from zdd_web.wsgi import ProbeMiddleware

__all__ = ["ZddWeb"]

EXTENSION = "zdd_web"


class ZddWeb:
    """Make a Flask app answer probes, before its own routing, `before_request` functions and extensions.

    The object holds no state: one may serve several apps.
    """

    def __init__(self, app: flask.Flask | None = None) -> None:
        if app is not None:
            self.init_app(app)

    def init_app(self, app: flask.Flask) -> None:
        """Wrap `app.wsgi_app`. A second call for the same app does nothing."""
        if EXTENSION in app.extensions:
            return
        app.extensions[EXTENSION] = True
        app.wsgi_app = ProbeMiddleware(app.wsgi_app)  # type: ignore[method-assign]
