"""Killed anywhere, or without power: nothing half-written is believed, nothing whole is lost, the
same command finishes the work, nothing is left over. `make test-kills` tries every operation."""

import sys

import pytest

from .commands import COMMANDS
from .host import interrupted

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="files are named by /proc")


@pytest.mark.parametrize("command", [name for name in COMMANDS if not name.startswith("export")])
def test_killed_at_operations_on_files(command):
    told = interrupted(command)
    assert told["problems"] == []
    assert told["points"] >= 5
    assert told["kills"] >= 5
