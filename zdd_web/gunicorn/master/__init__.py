"""gunicorn's master: its loop, its workers, and how it stops."""
