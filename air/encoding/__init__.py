"""An image to an .air file that meets a target of bits, decibels or Gaussians."""
