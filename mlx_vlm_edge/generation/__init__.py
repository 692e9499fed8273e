"""A prompt with images -> text: prefill, decode, sampling, and what questions have in common."""
