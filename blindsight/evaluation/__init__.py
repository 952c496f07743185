"""What evaluations and sweeps run, measure and draw."""
