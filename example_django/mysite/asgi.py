"""For WORKER_CLASS=asgi."""

import os

from django.core.asgi import get_asgi_application
from django.urls import get_resolver

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "mysite.settings")
application = get_asgi_application()

# As in wsgi.py: broken views stop a new generation before it serves.
get_resolver().url_patterns  # noqa: B018
