"""HyperLoRA (arXiv:2503.16944): a resampler predicts how basis matrices mix into a LoRA."""
