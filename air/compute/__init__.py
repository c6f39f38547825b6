"""The compiler toolbox: register vectors, planes, threads, launches, and which backend a tensor asks for. It knows no
Gaussians.
"""
