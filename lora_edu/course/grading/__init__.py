"""Running exercises and saying what their checks found: one notebook, a learner's folder, a class."""
