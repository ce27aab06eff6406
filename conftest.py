"""Every test, and every notebook that nbval runs, sees the environment in which the stored outputs were made.

So ``pytest`` and ``pytest --nbval lessons/03_lora_layer.ipynb``, typed anywhere in the repository, do what
``lora-edu test`` does.
"""

import os
import runpy
from pathlib import Path

from lora_edu.quick import ENVIRONMENT

TESTS = Path(__file__).parent / "tests"
CELL_SECONDS = 180

os.environ.update(ENVIRONMENT)
os.environ.pop("MPLBACKEND", None)
# No sockets beyond loopback: here, and in every Python that is started from here.
os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS / "offline"), *filter(None, [os.environ.get("PYTHONPATH")])])
runpy.run_path(str(TESTS / "offline" / "sitecustomize.py"))


def pytest_configure(config):
    """What nbval has to know to run the course's notebooks; nothing if nbval is not installed."""
    if getattr(config.option, "nbval", False) or getattr(config.option, "nbval_lax", False):
        config.option.nbval_current_env = True
        config.option.nbval_sanitize_with = str(TESTS / "nbval_sanitize.cfg")
        config.option.nbval_cell_timeout = CELL_SECONDS
