"""Listening sockets, and what is said about them to whoever holds them."""
