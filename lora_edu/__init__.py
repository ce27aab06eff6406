"""lora_edu: LoRA by hand, in modules that read from top to bottom. The lessons build it piece by piece.

The public names are loaded when they are first asked for, so that ``lora-edu --help`` does not wait for PyTorch.
"""

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING, Any

from lora_edu.quick import prepare_kernel

if TYPE_CHECKING:
    from lora_edu.core.config import LoraConfig
    from lora_edu.core.inject import InjectionReport, count_parameters, inject
    from lora_edu.core.layer import LoRAConv1D, LoRAEmbedding, LoRALinear
    from lora_edu.core.merging import disable_adapter, merge, merge_and_unload, unmerge
    from lora_edu.core.peft_io import load_adapter, save_adapter
    from lora_edu.core.state import list_adapters, set_adapter
    from lora_edu.lab.bases import load_base
    from lora_edu.lab.datasets import load_dataset
    from lora_edu.rivals.bitfit import BitFitConfig
    from lora_edu.rivals.bottleneck import BottleneckConfig
    from lora_edu.rivals.ia3 import IA3Config
    from lora_edu.rivals.prefix import PrefixTuningConfig
    from lora_edu.rivals.prompt import PromptTuningConfig
    from lora_edu.serving.hotswap import hotswap_adapter
    from lora_edu.serving.mixed import adapter_names
    from lora_edu.variants.eva import EvaConfig
    from lora_edu.variants.four_bit_base import quantize_base
    from lora_edu.variants.gora import GoraConfig
    from lora_edu.variants.loha import LoHaConfig
    from lora_edu.variants.lokr import LoKrConfig
    from lora_edu.variants.loraga import LoraGAConfig
    from lora_edu.variants.loraplus import create_loraplus_optimizer
    from lora_edu.variants.lotr import LotrConfig
    from lora_edu.variants.qlora import dequantize_base
    from lora_edu.variants.shira import ShiraConfig
    from lora_edu.variants.vera import VeraConfig

# Public name → the module it comes from, by the lesson that builds it or uses it first.
_HOMES = {
    "load_base": "lora_edu.lab.bases",  # 01
    "load_dataset": "lora_edu.lab.datasets",  # 02
    "LoRAConv1D": "lora_edu.core.layer",  # 03
    "LoRAEmbedding": "lora_edu.core.layer",
    "LoRALinear": "lora_edu.core.layer",
    "InjectionReport": "lora_edu.core.inject",  # 04
    "LoraConfig": "lora_edu.core.config",
    "count_parameters": "lora_edu.core.inject",
    "disable_adapter": "lora_edu.core.merging",
    "inject": "lora_edu.core.inject",
    "list_adapters": "lora_edu.core.state",
    "load_adapter": "lora_edu.core.peft_io",
    "save_adapter": "lora_edu.core.peft_io",
    "set_adapter": "lora_edu.core.state",
    "adapter_names": "lora_edu.serving.mixed",  # 09
    "hotswap_adapter": "lora_edu.serving.hotswap",
    "merge": "lora_edu.core.merging",
    "merge_and_unload": "lora_edu.core.merging",
    "unmerge": "lora_edu.core.merging",
    "dequantize_base": "lora_edu.variants.qlora",  # 14
    "quantize_base": "lora_edu.variants.four_bit_base",
    "BitFitConfig": "lora_edu.rivals.bitfit",  # 15
    "BottleneckConfig": "lora_edu.rivals.bottleneck",
    "IA3Config": "lora_edu.rivals.ia3",
    "PrefixTuningConfig": "lora_edu.rivals.prefix",
    "PromptTuningConfig": "lora_edu.rivals.prompt",
    "EvaConfig": "lora_edu.variants.eva",  # 16
    "GoraConfig": "lora_edu.variants.gora",
    "LoraGAConfig": "lora_edu.variants.loraga",
    "create_loraplus_optimizer": "lora_edu.variants.loraplus",
    "LoHaConfig": "lora_edu.variants.loha",  # 17
    "LoKrConfig": "lora_edu.variants.lokr",
    "LotrConfig": "lora_edu.variants.lotr",
    "ShiraConfig": "lora_edu.variants.shira",
    "VeraConfig": "lora_edu.variants.vera",
}
__all__ = list(_HOMES)

prepare_kernel()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lora_edu' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


@cache
def register_methods() -> None:
    """Import every method's file, so that it registers. The core calls this when it is first asked for a method."""
    for room in ("core", "variants", "rivals", "fast"):
        package = importlib.import_module(f"lora_edu.{room}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"lora_edu.{room}.{module.name}")
