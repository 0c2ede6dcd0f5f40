"""Measurements of zdd_web; see README.md. They print and never assert."""
