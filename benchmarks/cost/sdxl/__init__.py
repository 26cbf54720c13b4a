"""SDXL of full size with random weights: its files, and its workflows made small."""
