"""Which patches of an image are still bad, and the loop that predicts and optimises stage after stage."""
