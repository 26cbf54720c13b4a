"""Trained edits of one layer, side by side behind one small contract (``base.LayerAdapter``)."""
