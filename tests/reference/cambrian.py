"""The golden Cambrian-1 as it is published: its checkpoint, and a Hub cache with its four towers.

The golden's towers are tiny under the published names; how many heads its SigLIP has stands in the
config here, since the real one's name tells.
"""

import shutil
from pathlib import Path

import pytest
from mlx_vlm_edge_convert import convert

from .convllava import set_config

SOURCE = Path(__file__).parents[1] / "golden" / "cambrian_tiny"
REPOSITORIES = {
    "siglip": "timm/ViT-SO400M-14-SigLIP-384",
    "clip": "openai/clip-vit-large-patch14-336",
    "dinov2": "facebook/dinov2-giant",
    "convnext": "laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup",
}
HEADS = {"towers": [{"num_attention_heads": 4}]}


def checkpoint(root: Path) -> Path:
    """The folder of the checkpoint alone."""
    ignored = shutil.ignore_patterns("*.npz", "*.png", "towers", "meta.json")
    folder = Path(shutil.copytree(SOURCE, root / "cambrian", ignore=ignored))
    set_config(folder, vision_config=HEADS)
    return folder


def hub_cache(root: Path) -> Path:
    """A cache that has the towers' repositories."""
    for name, repository in REPOSITORIES.items():
        home = root / "hub" / f"models--{repository.replace('/', '--')}"
        shutil.copytree(SOURCE / "towers" / name, home / "snapshots" / "1234567")
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text("1234567")
    return root / "hub"


def native(root: Path) -> Path:
    """The whole model in the native layout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_CACHE", str(hub_cache(root)))
        return Path(convert(checkpoint(root), root / "native"))
