"""How the demo world is made, stage by stage: `make demo-world`."""
