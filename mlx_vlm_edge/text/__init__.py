"""Tokenizers, chat templates, and prompts with images in them."""
