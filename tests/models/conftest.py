"""What holds for every family's tests."""

import pytest


@pytest.fixture(autouse=True)
def as_the_originals(every_row):
    """Tiny models with random weights often choose rows that pad a vocabulary, as their originals
    do; their greedy ids are held to the originals' own."""
