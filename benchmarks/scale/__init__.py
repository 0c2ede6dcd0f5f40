"""Many workers, kept connections and background tasks on one service; see ../README.md."""
