"""Variants of LoRA, one file a method: each brings its layer and its config together and registers itself."""
