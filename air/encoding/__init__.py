"""Encodes an image as an .air file that meets a target of bits, decibels or Gaussians. It knows nothing of folders of
images or jobs.
"""
