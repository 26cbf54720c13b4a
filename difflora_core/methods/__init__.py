"""Inference: one file per method, each turning a request into an AdapterSet."""
