"""The diffusion process: targets, loss weights, sampling loop; it knows no network."""
