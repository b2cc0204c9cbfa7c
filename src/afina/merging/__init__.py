"""Merged models with proof, combinations of adapters, and exports."""
