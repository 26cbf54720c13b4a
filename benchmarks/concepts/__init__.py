"""Benchmarks of new words."""
