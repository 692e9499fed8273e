"""A model folder -> (model, processor): strict, and read in the order of need."""
