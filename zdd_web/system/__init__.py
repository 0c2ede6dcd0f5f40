"""What this package needs of the operating system and of text, without gunicorn."""
