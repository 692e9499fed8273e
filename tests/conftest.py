"""Versions in the test header, and the references that several files share."""

import copy
import gc
import os
import signal
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from mlx_vlm_edge import blas  # before any test imports mlx, so that the fast BLAS is used

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MLX_ENABLE_TF32", "0")  # float32 means float32 on NVIDIA GPUs as well

# A shell that starts tests in the background has them, and all that they start, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

GOLDEN = Path(__file__).parent / "golden" / "fastvlm_tiny"
SHOWN = ("mlx", "numpy", "pillow", "tokenizers", "mlx-lm", "torch", "transformers", "timm")


@pytest.fixture(autouse=True, scope="module")
def nothing_left_over():
    """Models that earlier tests left in rings of references do not count as this one's memory."""
    gc.collect()


@pytest.fixture(autouse=True, scope="session")
def no_measurement_is_left(tmp_path_factory):
    """`bench` remembers its figures for --ttft-budget: not those of tests."""
    os.environ["MLX_VLM_EDGE_BENCH_FILE"] = str(tmp_path_factory.mktemp("bench") / "bench.json")


def pytest_report_header() -> str:
    found = []
    for name in SHOWN:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} missing")
    return f"{', '.join(found)}\nblas: {blas.status()}"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of fixed references; see tests/golden/README.md."""
    return GOLDEN


@pytest.fixture(scope="session")
def reference():
    """transformers' FastVLM, tiny, random, and in float64 so that its rounding does not count."""
    import torch

    from .reference import fastvlm

    torch.set_num_threads(1)
    return fastvlm.build().double()


@pytest.fixture(scope="session")
def reference_bfloat16(reference):
    """The same reference in bfloat16: how far the original itself is from float64."""
    import torch

    return copy.deepcopy(reference).to(torch.bfloat16)


@pytest.fixture(scope="session")
def hf_folder(reference, tmp_path_factory) -> Path:
    """The reference as a Hugging Face folder (`fast_vlm`), float32."""
    from .reference import fastvlm

    return fastvlm.save(copy.deepcopy(reference).float(), tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="session")
def native_weights(reference):
    """The reference's weights under their native names."""
    from .reference import native

    return native.weights(reference)


@pytest.fixture(scope="session")
def native_folder(native_weights, tmp_path_factory) -> Path:
    """The reference as a folder in the native layout, float32."""
    from .reference import native

    return native.save(native_weights, native.config(), tmp_path_factory.mktemp("native"))


@pytest.fixture
def every_row(monkeypatch):
    """Rows that only pad a vocabulary may be chosen, as others' programs choose them."""
    from mlx_vlm_edge.text.prompt import Processor

    monkeypatch.setattr(
        Processor, "rows", property(lambda processor: processor.config.text.vocab_size)
    )
