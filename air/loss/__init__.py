"""0.7 L1 + 0.3 (1 - SSIM): the definition (`reference`) and one file per backend. It knows no Gaussians."""
