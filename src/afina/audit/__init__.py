"""Audit of adapters before loading: files, provenance, weights, behavior; it fails closed."""
