"""mlx-vlm-edge's benchmark: what is measured, what papers claim, and what arithmetic predicts.

Imported by the command line alone; nothing here is needed to run a model.
"""
