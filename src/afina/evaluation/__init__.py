"""Losses, metrics, retention loss, confidence intervals, and a verdict in sentences."""
