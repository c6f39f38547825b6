"""The compact predictor: a small convolutional network on the patch grid, and its kernels."""
