"""A checkpoint on disk: config.json, safetensors, tokenizer files."""
