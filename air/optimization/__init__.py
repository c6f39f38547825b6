"""Steps of Adam on raw Gaussians against an image: the definition (`reference`) and one file per backend. It knows no
stages, networks or files.
"""
