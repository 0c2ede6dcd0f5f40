import os

from django.core.wsgi import get_wsgi_application
from django.urls import get_resolver

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "mysite.settings")
application = get_wsgi_application()

# Django imports the URLconf, and so the views, at the first request. Here broken views stop a new
# generation before it serves.
get_resolver().url_patterns  # noqa: B018
