"""What a machine is asked before a model is blamed: its parts, its arithmetic, one real model."""
