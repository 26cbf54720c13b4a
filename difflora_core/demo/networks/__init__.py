"""The demo world's networks: its base model, encoders and judges."""
