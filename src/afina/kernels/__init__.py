"""The few hot operations, each with a plain PyTorch reference."""
