"""Looks into the data of a run before it is trained on: what is in it, and how fast it is."""
