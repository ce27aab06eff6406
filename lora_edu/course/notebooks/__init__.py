"""Notebooks: where they lie, their stored form, running them, exercises, the learner's copies."""
