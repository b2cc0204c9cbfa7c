"""Files: atomic writes, strict readers of safetensors, JSON and adapter folders; no torch."""
