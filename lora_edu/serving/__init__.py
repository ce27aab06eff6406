"""Many adapters on one model: mixed batches, swapping in place, a small server. Lesson 09."""
