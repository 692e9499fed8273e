"""A saved package is run, audited and linted here, without a Mac."""
