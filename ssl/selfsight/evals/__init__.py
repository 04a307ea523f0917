"""What the features are worth: one file per evaluator."""
