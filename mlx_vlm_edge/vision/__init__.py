"""Vision towers: pixels -> image features."""
