"""DiffLoRA's own recipes: the corpus, the autoencoder, the condition and the DiT."""
