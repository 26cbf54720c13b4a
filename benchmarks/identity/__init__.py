"""Benchmarks of people: likeness, identities as material, compression."""
