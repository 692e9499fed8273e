"""The golden ConvLLaVA with its tower in a folder of its own, and as the last training stage saves
it: the tower among the weights."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
from mlx_vlm_edge_convert.checkpoint import read_checkpoint
from mlx_vlm_edge_convert.families.convllava import ORIGINAL_TOWER

SOURCE = Path(__file__).parents[1] / "golden" / "convllava"


def apart(root: Path) -> Path:
    """A folder without its tower, which its config names; that is beside it."""
    ignored = shutil.ignore_patterns("*.npz", "*.png")
    folder = Path(shutil.copytree(SOURCE, root / "apart", ignore=ignored))
    (folder / "vision_tower").rename(tower := root / "ConvNeXt-256")
    set_config(folder, mm_vision_tower=str(tower))
    return folder


def inside(root: Path) -> Path:
    """A folder that has everything, the norm that is not run included, of whatever width."""
    folder = Path(shutil.copytree(apart(root), root / "inside-256"))
    set_config(folder, mm_vision_tower="ConvLLaVA/ConvLLaVA-ConvNeXt-256", model_type="llava")
    weights = dict(mx.load(str(folder / "model.safetensors")))
    tower = read_checkpoint(root / "ConvNeXt-256")
    weights |= {ORIGINAL_TOWER + name: array for name, array in tower.items()}
    weights |= {f"{ORIGINAL_TOWER}layernorm.{x}": mx.zeros((40,)) for x in ("weight", "bias")}
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


def set_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
