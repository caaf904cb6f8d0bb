"""Confidence intervals, paired tests and statistical power; arrays in, values out."""
