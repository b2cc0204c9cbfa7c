"""Is this adapter safe to load? Gates on its files, its origin, its weights and what it does; each fails closed."""
