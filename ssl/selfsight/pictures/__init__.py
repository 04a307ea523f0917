"""Pictures of what a trunk sees: where it attends, what its patches mean, which images it finds
alike. Tensors in, arrays and images out; nothing here reads files or knows runs."""
