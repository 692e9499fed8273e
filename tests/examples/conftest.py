"""Bundles that the examples are held against, each exported once, and the Swift programs."""

import importlib.util
from pathlib import Path

import pytest

from .swift_build import HERE, STRICT, SWIFT, package
from .swift_session import CONTEXT, SIDE

SCRIPT = HERE.parents[1] / "examples" / "coreml_answer.py"


@pytest.fixture(scope="session")
def export():
    pytest.importorskip("coremltools", reason="Core ML export is an extra")
    from mlx_vlm_edge_convert.coreml.export import export

    return export


@pytest.fixture(scope="session")
def bundles(export, native_folder, tmp_path_factory) -> dict[str, Path]:
    """The tiny FastVLM: whole and verified for the GPU, in parts for the Neural Engine."""
    from mlx_vlm_edge_convert.coreml.part import Options

    folder = tmp_path_factory.mktemp("bundles")
    size = (64, 64)
    gpu = Options(size=size, context=64)
    parts = Options(compute="cpu-ne", size=size, context=64, fused=False, image_input=False)
    return {
        "stateful": export(native_folder, folder / "gpu", options=gpu, show_lint=True),
        "readonly": export(native_folder, folder / "ne", options=parts, verify=False),
    }


@pytest.fixture(scope="session")
def demo_bundles(export, tmp_path_factory) -> dict[str, Path]:
    """The demo model with both caches, in float16 and, for the GPU, in float32."""
    from mlx_vlm_edge_convert.coreml.part import Options

    shape = {"context": CONTEXT, "size": (SIDE, SIDE)}
    folder, forms = (
        tmp_path_factory.mktemp("demo"),
        {
            "stateful": Options(**shape),
            "readonly": Options(compute="cpu-ne", fused=False, image_input=False, **shape),
            "float32": Options(precision="fp32", **shape),
        },
    )
    return {
        name: export("demo", folder / name, options=options, verify=False)
        for name, options in forms.items()
    }


@pytest.fixture(scope="session")
def example():
    """examples/coreml_answer.py as a module."""
    spec = importlib.util.spec_from_file_location("coreml_answer", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tools():
    """Debian's Swift, with EdgeVLM compiled."""
    return package()


@pytest.fixture(scope="session")
def ask(tools):
    return tools.program("edge-ask", [SWIFT / "edge-ask" / "main.swift"], *STRICT)


@pytest.fixture(scope="session")
def checks(tools):
    return tools.program("checks", [HERE / "swift_checks" / "main.swift"])
