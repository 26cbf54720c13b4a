"""The LoRA weight autoencoder: LoRA weights to a latent and back."""
