"""How the styles that ship are trained: one file a method, each with its `STYLE`."""
