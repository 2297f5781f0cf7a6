"""What the weights are worth."""
