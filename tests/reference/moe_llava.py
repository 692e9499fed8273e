"""The golden MoE-LLaVAs in other forms: as `.bin` shards, wider, with other configs."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

GOLDEN = Path(__file__).parents[1] / "golden"
BASES = ("stablelm", "qwen", "phi")


def folder_of(base: str) -> Path:
    return GOLDEN / f"moe_llava_{base}"


def copied(base: str, target: Path, **changes: Any) -> Path:
    """A golden folder without its numbers, with other keys in its config and in its `moe`."""
    shutil.copytree(folder_of(base), target, ignore=shutil.ignore_patterns("*.npz", "meta.json"))
    moe = {key: changes.pop(key) for key in tuple(changes) if key in _read(target)["moe"]}
    config = _read(target)
    config |= changes
    if "moe" in config:
        config["moe"] = config["moe"] | moe
    (target / "config.json").write_text(json.dumps(config))
    return target


def _read(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def weights(folder: Path) -> dict[str, mx.array]:
    return {
        name: array
        for file in sorted(folder.glob("*.safetensors"))
        for name, array in mx.load(str(file)).items()
    }


def as_bin(base: str, target: Path) -> Path:
    """As the published Qwen is: two pytorch_model-*.bin and their index."""
    import torch

    copied(base, target)
    named = weights(target)
    for path in (*target.glob("*.safetensors"), *target.glob("*.index.json")):
        path.unlink()
    index = {}
    for number, names in enumerate(np.array_split(sorted(named), 2), 1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        index |= dict.fromkeys(map(str, names), file)
        tensors = {str(name): torch.from_numpy(np.array(named[str(name)])) for name in names}
        torch.save(tensors, target / file)
    content = {"metadata": {}, "weight_map": index}
    (target / "pytorch_model.bin.index.json").write_text(json.dumps(content))
    return target


def widened(base: str, target: Path) -> Path:
    """The same model whose MLPs groups of 64 divide, by zeros; a Phi stays 80 wide."""
    copied(base, target)
    named = weights(target)
    for path in (*target.glob("*.safetensors"), *target.glob("*.index.json")):
        path.unlink()
    inner = 128
    for name, array in named.items():
        if ".mlp." in name and "gate.wg" not in name and "tower" not in name:
            named[name] = _padded(name, array, inner)
    config = _read(target)
    config["intermediate_size"] = 2 * inner if base == "qwen" else inner
    (target / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(target / "model.safetensors"), named)
    return target


def _padded(name: str, array: mx.array, inner: int) -> mx.array:
    """The dimension that is the MLP's own, filled up with zeros."""
    down = any(part in name for part in ("down_proj", "mlp.c_proj", "c_proj", "fc2"))
    if array.ndim == 1:
        return array if down else mx.pad(array, [(0, inner - array.shape[0])])
    axis = 1 if down else 0
    more = [(0, 0), (0, 0)]
    more[axis] = (0, inner - array.shape[axis])
    return mx.pad(array, more)
