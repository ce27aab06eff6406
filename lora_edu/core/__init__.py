"""The core: LoRA layers, putting them into a model, merging, saving. Lessons 03, 04, 08 and 09."""
