"""The lab: base models and data by name, one training loop, and figures in one style; what experiments need."""
