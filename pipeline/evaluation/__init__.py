"""Measures the quality and time of predictors and codecs on images, beside baselines. Nothing here knows how the rows
are printed, plotted or written.
"""
