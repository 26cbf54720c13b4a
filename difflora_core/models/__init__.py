"""Networks: tensors in, tensors out; no files, no device names, no global random state."""
