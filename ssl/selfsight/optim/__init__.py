"""Optimisers whose step can be masked on the device, and their parameter groups."""
