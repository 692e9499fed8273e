"""The originals the models are held against: tiny random ones, in PyTorch."""
