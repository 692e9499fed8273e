"""The grid's models as folders in float32, float16 and bfloat16, small enough to export quickly."""

import json
import shutil
from pathlib import Path

import mlx.core as mx

from mlx_vlm_edge.hub.models import obtain

GOLDEN = Path(__file__).parents[3] / "golden"
SOURCES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def _demo(folder: Path) -> Path:
    return shutil.copytree(obtain("demo"), folder)


def _fastvlm(folder: Path) -> Path:
    from ....reference import fastvlm, native

    return native.save(native.weights(fastvlm.build()), native.config(64), folder)


def _mobilevlm(folder: Path) -> Path:
    """The golden one, its MLP 352 wide by zeros: at 344 it has no groups of 32."""
    shutil.copytree(GOLDEN / "mobilevlm_v2", folder)
    path = folder / "model.safetensors"
    weights = mx.load(str(path))
    for name, array in weights.items():
        if ".mlp." in name and "layers" in name and 344 in array.shape:
            more = [(0, 8 if size == 344 else 0) for size in array.shape]
            weights[name] = mx.pad(array, more)
    mx.eval(weights)
    mx.save_safetensors(str(path), weights, metadata={"format": "mlx"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 352}))
    return folder


def _idefics3(folder: Path) -> Path:
    from ....reference import idefics3

    case = idefics3.CASES["idefics3"]
    return idefics3.save(idefics3.build(case), case, folder)


MODELS = {"demo": _demo, "fastvlm": _fastvlm, "mobilevlm_v2": _mobilevlm, "idefics3": _idefics3}


class Folders:
    """A model's folder by name and dtype, each made once."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, model: str, source: str) -> Path:
        folder = self.root / f"{model}-{source}"
        if not folder.exists():
            _cast(MODELS[model](folder), source)
        return folder


def _cast(folder: Path, source: str) -> None:
    """Every floating weight in another dtype."""
    path = folder / "model.safetensors"
    weights = {
        name: array.astype(SOURCES[source]) if mx.issubdtype(array.dtype, mx.floating) else array
        for name, array in mx.load(str(path)).items()
    }
    mx.eval(weights)  # the file that is overwritten is the one they are read from
    mx.save_safetensors(str(path), weights, metadata={"format": "mlx"})
    config = json.loads((folder / "config.json").read_text())
    for key in ("torch_dtype", "dtype"):
        if key in config:
            config[key] = source
    (folder / "config.json").write_text(json.dumps(config))
