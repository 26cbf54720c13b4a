"""What Perfusion could have trained on the small network."""

RATES = {"value_rate": 0.5, "word_rate": 0.015}
"""Of a training of a few steps in ComfyUI."""
LEAST_CHANGE = 0.01
"""Of its values by another guidance."""


def example(prepared, encodings):
    """A concept, and encodings in which it stands once."""
    part = prepared(method="perfusion")
    return part, encodings(part.adaptation.shared["direction"])
