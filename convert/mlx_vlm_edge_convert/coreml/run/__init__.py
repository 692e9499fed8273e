"""A package on a Mac: one runner for the vision back end and the recorded benchmark."""
