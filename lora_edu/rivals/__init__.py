"""LoRA's rivals: other ways to adapt a frozen model, one file each. Lesson 15 compares them."""
