"""Metrics as pure functions of features, and the statistics that make a table of them."""
