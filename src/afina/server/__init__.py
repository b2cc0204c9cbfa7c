"""The HTTP side: OpenAI's API over the engine, fine-tuning jobs, keys, limits, metrics, logs."""
