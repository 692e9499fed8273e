"""Model folders in the published layouts, made from the golden files."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_vlm_edge_convert.families.fastvlm import TIMM_TOWER

LAYOUTS = ("apple_llava", "transformers_native")


def golden_folder(golden: Path, layout: str, target: Path) -> Path:
    """A model folder in one of LAYOUTS."""
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(golden / f"config_{layout}.json", target / "config.json")
    shutil.copyfile(golden / f"model_{layout}.safetensors", target / "model.safetensors")
    (target / "tokenizer_config.json").write_text('{"model_max_length": 8192}')
    return target


@pytest.fixture
def apple(golden, tmp_path) -> Path:
    """The golden model in Apple's layout."""
    return golden_folder(golden, "apple_llava", tmp_path / "apple")


@pytest.fixture
def transformers_folder(golden, tmp_path) -> Path:
    """The golden model in transformers' layout."""
    return golden_folder(golden, "transformers_native", tmp_path / "hf")


@pytest.fixture
def unfused(golden, transformers_folder) -> Path:
    """The golden model in transformers' layout with its encoder in the training form."""
    path = transformers_folder / "model.safetensors"
    weights = {k: v for k, v in mx.load(str(path)).items() if not k.startswith(TIMM_TOWER)}
    encoder = mx.load(str(golden / "encoder_timm_trainform.safetensors"))
    weights |= {TIMM_TOWER + name: array for name, array in encoder.items()}
    mx.eval(weights)  # the file that is overwritten is the one they are read from
    mx.save_safetensors(str(path), weights)
    return transformers_folder


@pytest.fixture
def edit_config():
    """Change keys of a folder's config.json; None removes one."""

    def edit(folder: Path, **changes) -> Path:
        path = folder / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        return folder

    return edit
