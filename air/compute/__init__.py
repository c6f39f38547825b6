"""The compiler toolbox: register vectors, image planes, threads, launches, choosing a backend. It knows no
Gaussians.
"""
