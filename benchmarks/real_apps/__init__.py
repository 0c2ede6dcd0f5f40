"""Rehearsals of real applications from PyPI: a Wagtail site and a Channels app; see ../README.md."""
