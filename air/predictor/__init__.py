"""Predictors: what turns the missing part of an image into Gaussians, and their checkpoints. They know no optimiser and
no stage control.
"""
