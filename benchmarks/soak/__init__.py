"""A long chain of upgrades under load; see ../README.md."""
