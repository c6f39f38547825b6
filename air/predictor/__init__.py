"""Predictors, which turn the missing part of an image into Gaussians, and their checkpoints. They know nothing of
optimisers or stage control.
"""
