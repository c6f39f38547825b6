"""The compiler toolbox: register vectors, image planes, threads, launches, choice of a backend. It knows no Gaussians."""
