"""Connectors: image features -> visual tokens."""
