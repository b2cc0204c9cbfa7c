"""Files: atomic writes, the strict readers of safetensors, JSON and adapter folders. No torch here."""
