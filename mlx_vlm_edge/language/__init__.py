"""Language models and their KV caches: input embeddings -> logits."""
