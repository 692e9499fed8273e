"""A model of any size without a download: random weights and a tokenizer that fits them."""
