"""The frozen model: loading, flat attention, the fast block, the embedded base."""
