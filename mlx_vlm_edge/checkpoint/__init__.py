"""What a model folder holds: its files, config and weights, checked before they are used."""
