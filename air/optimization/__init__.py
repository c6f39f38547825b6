"""Optimises raw Gaussians against an image with Adam: the definition (`reference`), and one file for each compiled
backend. It knows nothing of stages, networks or files.
"""
