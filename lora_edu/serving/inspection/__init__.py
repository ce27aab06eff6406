"""``lora-edu inspect``: what is in an adapter's file, whether it fits a base, what it changes. Lessons 08 to 13."""
