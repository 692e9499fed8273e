"""A path, bytes, a URL or a PIL image in; RGB, tiles and pixels out."""
