"""lora_edu: LoRA by hand, in modules that read from top to bottom. The lessons build it piece by piece."""

import lora_edu.fast.layers  # noqa: F401  (lesson 21: makes fast=True known)
from lora_edu.core.config import LoraConfig  # lesson 04
from lora_edu.core.inject import InjectionReport, inject, list_adapters, set_adapter  # lesson 04
from lora_edu.core.layer import LoRAConv1D, LoRAEmbedding, LoRALinear  # lesson 03
from lora_edu.core.merging import disable_adapter, merge, merge_and_unload, unmerge  # lessons 04 and 09
from lora_edu.core.peft_io import load_adapter, save_adapter  # lessons 04 and 08
from lora_edu.counting import count_parameters  # lesson 05
from lora_edu.lab.bases import load_base  # lesson 01
from lora_edu.lab.datasets import load_dataset  # lesson 02
from lora_edu.serving.hotswap import hotswap_adapter  # lesson 09
from lora_edu.serving.mixed import adapter_names  # lesson 09

__all__ = [
    "InjectionReport",
    "LoRAConv1D",
    "LoRAEmbedding",
    "LoRALinear",
    "LoraConfig",
    "adapter_names",
    "count_parameters",
    "disable_adapter",
    "hotswap_adapter",
    "inject",
    "list_adapters",
    "load_adapter",
    "load_base",
    "load_dataset",
    "merge",
    "merge_and_unload",
    "save_adapter",
    "set_adapter",
    "unmerge",
]
