"""Image trunks: the networks that are pretrained."""
