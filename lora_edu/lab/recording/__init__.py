"""Experiments that take hours: which runs they consist of, doing them, and reading what was recorded."""
