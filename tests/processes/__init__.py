"""Tests of real gunicorn processes."""

import pytest

# What they share holds assertions too: a failure of one shows the values.
pytest.register_assert_rewrite("tests.processes.harness", "tests.processes.trial")
