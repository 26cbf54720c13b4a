"""The command line: one file a command, with its settings and what it does."""
