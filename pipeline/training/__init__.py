"""Training predictor networks: the order of samples, losses, the loop, its state, its workers and its audit."""
