"""Modules and weights -> MIL operations."""
