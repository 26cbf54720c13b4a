"""What Infusion could have trained on the small network."""

RATES = {"learning_rate": 0.01}
"""Of a training of a few steps in ComfyUI."""
LEAST_CHANGE = 0.003
"""Of its values by another guidance."""


def example(prepared, encodings):
    """A concept, and encodings in which it stands once."""
    part = prepared(method="infusion")
    return part, encodings(part.adaptation.shared["direction"])
