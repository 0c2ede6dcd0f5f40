"""The mode in which each worker has an accept queue of its own: SO_REUSEPORT."""
