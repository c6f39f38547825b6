"""Fits one image with Gaussians, without a network: closed-form starts, and optimisation from them. It knows no files."""
