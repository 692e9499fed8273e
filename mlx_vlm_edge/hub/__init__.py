"""Models by name: aliases, what is on this machine, and what must be fetched for the rest."""
