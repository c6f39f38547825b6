"""Gaussians to bytes and back: the .air format of docs/format.md. It knows no images and no fitting."""
