"""Benchmarks of the demo world: one command per table; nothing imports them."""
