"""Look at what a trunk sees: `launch/visualize.py`."""
