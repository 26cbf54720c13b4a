"""Benchmarks of styles."""
