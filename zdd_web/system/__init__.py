"""What the operating system does for zdd_web; knows nothing of gunicorn, frameworks or the board."""
