"""What holds for every family's tests."""

import pytest

from mlx_vlm_edge.text.prompt import Processor


@pytest.fixture(autouse=True)
def every_row(monkeypatch):
    """Rows that only pad a vocabulary may be chosen, as the originals choose them: tiny models with
    random weights often do, and are held to the originals' own greedy ids."""
    monkeypatch.setattr(
        Processor, "rows", property(lambda processor: processor.config.text.vocab_size)
    )
