"""LoRA weights as data: no networks, no files."""
