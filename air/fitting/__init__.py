"""One image to Gaussians without a network: closed-form starts, and fits from them. It knows no files."""
