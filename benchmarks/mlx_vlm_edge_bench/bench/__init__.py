"""The benchmark: cases and the paper's claims in, measured figures with their spread out."""
