"""Adapters and bases made into one: merged models, with proof; adapters combined on their updates."""
