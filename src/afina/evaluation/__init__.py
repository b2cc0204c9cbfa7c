"""How good is it? Losses, metrics, forgetting, a verdict in plain words."""
