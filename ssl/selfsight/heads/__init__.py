"""Projection and prototype heads."""
