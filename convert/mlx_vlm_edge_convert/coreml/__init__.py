"""Core ML export: a model -> packages an app can embed, verified without a Mac.

`export` writes a bundle. Needs the extra `coreml`; nothing here is needed to run a model with MLX.
"""
