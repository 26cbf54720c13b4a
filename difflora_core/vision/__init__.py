"""Reference images to features: face recogniser and CLIP vision, and the pictures they see."""
