import os

from zdd_web.gunicorn import install

chdir = os.path.abspath(os.path.dirname(__file__))
wsgi_app = "app:application"
workers = 2
install(globals(), name="channels")
