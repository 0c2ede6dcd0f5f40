"""Listening sockets, and what is known of them in each process that holds them."""
