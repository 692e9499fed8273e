"""The claims of the papers, as data with their sources, held against measurements and counts."""
