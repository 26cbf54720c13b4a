"""The LoRA weight autoencoder: LoRA weights to a latent and back.

All encoders and decoders are made from the same four: `config`, sizes; `groups`, token order of the
layout; `operations`, namespace of layer classes; `generator`, which draws the initial weights.

Shapes: B LoRAs of T tokens, padded to L values, P in all; groups of T_g tokens of L_g values each;
latents of K tokens of Dz numbers.
"""
