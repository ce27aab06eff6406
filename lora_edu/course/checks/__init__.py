"""The checks of all exercises, by name: ``checks.lora_layer(MyLoRA)``.

One module a lesson; every public function of ``lesson_NN.py`` that returns a ``Report`` can be called from here. It
then takes the learner's objects with the care that ``candidates.py`` describes.
"""

import importlib
import pkgutil
from collections.abc import Callable

from lora_edu.course.checks import autograding
from lora_edu.course.checks.candidates import examined
from lora_edu.course.checks.report import Report, Wrong, run_steps
from lora_edu.course.checks.your_turn import use

CHECKS: dict[str, Callable[..., Report]] = {}
for _module in sorted(info.name for info in pkgutil.iter_modules(__path__) if info.name.startswith("lesson_")):
    _lesson = importlib.import_module(f"{__name__}.{_module}")
    for _name, _object in vars(_lesson).items():
        if _name.startswith("_") or getattr(_object, "__module__", "") != _lesson.__name__ or not callable(_object):
            continue
        if getattr(_object, "__annotations__", {}).get("return") not in (Report, "Report"):
            continue
        if _name in CHECKS:
            raise ImportError(f"two checks are called {_name!r}: in {CHECKS[_name].__module__} and {_lesson.__name__}")
        CHECKS[_name] = examined(_object)
globals().update(CHECKS)
if autograding.is_on():
    autograding.route_stderr()

__all__ = ["CHECKS", "Report", "Wrong", "run_steps", "use", *CHECKS]
