"""Two instances behind a load balancer, restarted in turn; see ../README.md."""
