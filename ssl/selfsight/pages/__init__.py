"""Pages that open anywhere: one HTML file, nothing loaded from elsewhere, for light and dark, for
phones and projectors. Knows nothing of what is shown."""
