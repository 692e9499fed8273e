"""What is exported: the vision tower with its connector, and the decoder."""
