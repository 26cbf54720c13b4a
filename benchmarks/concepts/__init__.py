"""Benchmarks of taught words."""
