"""What recipes and evaluation need of a text-to-image model, and its implementations."""
