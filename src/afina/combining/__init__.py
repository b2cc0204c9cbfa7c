"""Adapters and bases made into one: merged models, with proof."""
