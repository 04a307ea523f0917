"""Pretraining of image trunks without labels."""
