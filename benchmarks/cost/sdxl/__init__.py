"""SDXL of full size with random weights: its files, its workflows made small, one run measured."""
