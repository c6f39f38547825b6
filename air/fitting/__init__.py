"""Fits Gaussians to one image without a network: closed-form starts, and optimisation from them. It knows no files."""
