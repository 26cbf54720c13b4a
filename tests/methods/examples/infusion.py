"""What Infusion could have trained on the small network."""


def example(prepared, encodings):
    """A concept, and encodings in which it stands once."""
    part = prepared(method="infusion")
    return part, encodings(part.adaptation.shared["direction"])
