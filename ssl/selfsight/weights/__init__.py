"""Weights of other codes in, weights for other codes out."""
