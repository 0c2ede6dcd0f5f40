"""What the operating system does; nothing here knows gunicorn, a board or a service."""
