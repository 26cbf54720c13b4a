"""The files in workflows/: how they are drawn, written and run."""
