"""Everything that knows of more than one process: it knows no model."""
