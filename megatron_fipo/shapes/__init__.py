"""Dimensions of models, their layouts, and packing of sequences: plain numbers, without torch."""
