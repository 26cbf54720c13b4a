"""LoRA files of every family: names to layers, and layers to names."""
