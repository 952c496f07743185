"""What calibration measures of a model, and how it chooses categories from that."""
