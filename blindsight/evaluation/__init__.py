"""What evaluation and sweeps run, measure and draw."""
