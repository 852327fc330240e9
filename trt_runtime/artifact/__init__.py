"""The artifact: the graph contract, the manifest, the tokenizer and its chat template."""
