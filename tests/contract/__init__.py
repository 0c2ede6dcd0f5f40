"""What this package relies on in gunicorn: one test for each fact, run against each gunicorn that is supported.

Comments in zdd_web refer to these tests by name. One that fails with a new gunicorn names the fact that has changed,
and `grep` finds what was built on it. Nothing of zdd_web is imported here but the table of what it replaces.
"""
