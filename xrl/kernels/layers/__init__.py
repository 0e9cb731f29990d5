"""The layers of the training pass, forward and backward."""
