"""From stored bytes to batches of crops."""
