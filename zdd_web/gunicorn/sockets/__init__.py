"""The sockets that a master listens on: made, inherited, and given to its workers."""
