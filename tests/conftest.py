"""Every test, and every notebook that nbval runs, sees the environment in which the stored outputs were made."""

import os

from lora_edu.course.notebooks.execute import ENVIRONMENT

os.environ.update(ENVIRONMENT)
