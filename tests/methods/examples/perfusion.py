"""What Perfusion could have trained on the small network."""


def example(prepared, encodings):
    """A concept, and encodings in which it stands once."""
    part = prepared(method="perfusion")
    return part, encodings(part.adaptation.shared["direction"])
