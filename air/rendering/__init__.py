"""Gaussians to image, differentiable: the float64 definition (`reference`) and one file per backend. It knows no loss
and no optimiser.
"""
