"""What predictors and codecs reach on images, beside baselines."""
