"""Packages that several tests run; coremltools is imported once, when one is made."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tools():
    pytest.importorskip("coremltools", reason="Core ML export is an extra")
    from mlx_vlm_edge_convert.coreml.emit.toolkit import tools

    return tools()


@pytest.fixture(scope="session")
def save(tools) -> Callable[..., Path]:
    """Save MIL programs, by function name, as a package."""
    from mlx_vlm_edge_convert.coreml.package.save import save_package
    from mlx_vlm_edge_convert.coreml.part import Function

    def save(path: Path, **programs: Callable[[], Any]) -> Path:
        functions = [Function(name, program) for name, program in programs.items()]
        save_package(SimpleNamespace(functions=lambda: functions, minimum="iOS18"), path)
        return path

    return save
