"""Comparison of adapter methods over several seeds with intervals, and advice without training."""
