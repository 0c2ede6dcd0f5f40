"""What runs in a worker process: its way in, its work, its way out, and what differs per worker class."""
