"""Loss functions and the assignment problems behind them: plain functions of tensors."""
