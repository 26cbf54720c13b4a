"""The drawn world: people, things, scenes, and pools of their pictures."""
