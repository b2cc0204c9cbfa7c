"""The HTTP side: OpenAI's API over the engine, fine-tuning jobs beside it, keys, limits, metrics, logs."""
