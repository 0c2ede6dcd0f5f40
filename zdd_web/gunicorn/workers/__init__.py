"""What runs in a worker process: its boot, the gate, its shutdown, and what differs between worker classes."""
