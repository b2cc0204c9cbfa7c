"""A package outside afina: a method, its settings and a merge method, found by entry points."""
