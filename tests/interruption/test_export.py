"""The exporter, killed at operations on files: as the other commands, with coremltools."""

import sys

import pytest

from .host import interrupted

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="files are named by /proc")


@pytest.mark.parametrize("command", ["export", "export-overwrite"])
def test_killed_at_operations_on_files(command):
    pytest.importorskip("coremltools", reason="Core ML export is an extra")
    told = interrupted(command)
    assert told["problems"] == []
    assert told["kills"] >= 5
