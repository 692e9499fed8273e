"""What a model costs before it runs, and how long it would take on a chip.

Everything here is an estimate, and what prints it says so.
"""
