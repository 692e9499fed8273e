"""Configs of every family, safetensors and their indices, PyTorch's zips and pickles, bundles."""

import json
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_vlm_edge.checkpoint import configs, files
from mlx_vlm_edge.checkpoint.config import read_config
from mlx_vlm_edge.checkpoint.weights import read_safetensors
from mlx_vlm_edge.hub.models import ALIASES
from mlx_vlm_edge.loading import cost

from .harness import Attempt
from .mutate import odd, spoiled, written

GOLDEN = Path(__file__).parents[1] / "golden"
SHORT = ("num_hidden_layers", "layers")  # a model of two layers has the same values to check


def _shortened(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    short = {key: _shortened(item) for key, item in value.items()}
    for key in SHORT:
        if isinstance(short.get(key), int):
            short[key] = min(short[key], 4)
        elif isinstance(short.get(key), list):
            short[key] = [1] * len(short[key])
    return short


def _configs() -> list[dict[str, Any]]:
    found = [_shortened(configs.read(name)) for name in sorted(ALIASES)]
    for path in sorted(GOLDEN.glob("*/config*.json")):
        found.append(json.loads(path.read_text()))
    return found


def prepare_configs(folder: Path) -> Attempt:
    seeds = _configs()

    def attempt(rng: random.Random) -> None:
        config = rng.choice(seeds)
        if rng.random() < 0.95:
            config = odd(config, rng)
        text = written(config)
        if rng.random() < 0.05:
            (folder / "config.json").write_bytes(spoiled(text.encode(), rng))
        else:
            (folder / "config.json").write_text(text)
        plan = cost.blueprint(cost.native(read_config(folder)))
        assert plan.nbytes > 0

    return attempt


def prepare_models(folder: Path) -> Attempt:
    """Whole loads of a small model with one of its files spoiled."""
    from mlx_vlm_edge.loading.load import load

    source = GOLDEN / "eve_tiny"
    config = json.loads((source / "config.json").read_text())
    weights = mx.load(str(source / "model.safetensors"))
    target = folder / "model"
    shutil.copytree(source, target)

    def attempt(rng: random.Random) -> None:
        spoilt = odd(config, rng)
        arrays = dict(weights)
        name = rng.choice(sorted(arrays))
        way = rng.randrange(5)
        if way == 0:
            (target / "config.json").write_text(written(spoilt))
        else:
            shutil.copy(source / "config.json", target)
        if way == 1:
            del arrays[name]
        elif way == 2:
            arrays[name] = arrays[name].astype(rng.choice((mx.int32, mx.uint8, mx.float16)))
        elif way == 3:
            arrays[name] = arrays[name].reshape(-1)
        elif way == 4:
            arrays[f"{name.rpartition('.')[0]}.scales"] = mx.ones((4, 2))
        mx.save_safetensors(str(target / "model.safetensors"), arrays)
        model, processor = load(str(target))
        logits = model(processor("What?"))
        assert bool(mx.isfinite(logits).all().item())

    return attempt


def prepare_safetensors(folder: Path) -> Attempt:
    arrays = {
        "a.weight": mx.ones((3, 4)), "b.weight": mx.zeros((2, 2, 2), mx.bfloat16),
        "b.scales": mx.ones(5, mx.uint8), "empty": mx.zeros((0, 3)), "c": mx.array(3),
    }  # fmt: skip
    whole = folder / "whole.safetensors"
    mx.save_safetensors(str(whole), arrays, {"format": "mlx"})
    content = whole.read_bytes()
    whole.unlink()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = {"metadata": {"total_size": 1}, "weight_map": {"a": shards[0], "b": shards[1]}}

    def attempt(rng: random.Random) -> None:
        for path in folder.iterdir():
            path.unlink()
        way = rng.randrange(4)
        spoilt = content
        if way == 0:
            spoilt = spoiled(content, rng)
        elif way == 1:
            text = written(odd(header, rng)).encode("utf-8", "surrogatepass")
            spoilt = len(text).to_bytes(8, "little") + text + data
        if way < 2:
            (folder / "model.safetensors").write_bytes(spoilt)
        else:
            for name in shards[: rng.randint(1, 2)]:
                (folder / name).write_bytes(spoilt)
            text = written(odd(index, rng)).encode("utf-8", "surrogatepass")
            if way == 3:
                text = spoiled(text, rng)
            (folder / "model.safetensors.index.json").write_bytes(text)
        read = read_safetensors(files.weight_files(folder, [files.SAFETENSORS]))
        mx.eval([array + array for array in read.values() if array.dtype != mx.bool_])

    return attempt


def _text(word: str) -> bytes:
    return b"X" + len(word).to_bytes(4, "little") + word.encode()


def _tensor(name: str, key: str, shape: tuple[int, ...], kind: str, extra: bytes = b"") -> bytes:
    """An entry of a state dict, as torch pickles it."""
    strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
    count = int(np.prod(shape))
    sizes, steps = (
        b"(" + b"".join(b"J" + n.to_bytes(4, "little") for n in numbers) + b"t"
        for numbers in (shape, strides)
    )
    storage = b"(" + _text("storage") + b"ctorch\n" + kind.encode() + b"\n" + _text(key)
    storage += _text("cpu") + b"J" + count.to_bytes(4, "little") + b"tQ"
    arguments = storage + b"K\x00" + sizes + steps + b"\x89ccollections\nOrderedDict\n)R" + extra
    return _text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


PIECES = (
    b"cos\nsystem\n", b"cbuiltins\nexec\n", b"(", b"t", b"\x85", b"\x86", b"\x87", b")", b"]", b"}",
    b"0", b"1", b"2", b"R", b"b", b"Q", b"s", b"u", b"a", b"e", b"q\x00", b"h\x00", b"\x94",
    b"\x93", b"\x81", b"\x91", b"K\x01", b"M\xff\xff", b"J\xff\xff\xff\x7f", b"N", b"\x88",
    b"\x8a\x08" + b"\xff" * 8, b"G" + b"\xff" * 8, b"i__main__\nx\n", b"\x82\x01", b"\x96",
    b"\x8b\xff\xff\xff\x7f", _text("storage"), b"ctorch\nFloatStorage\n", b"I99999999999\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"h\x00h\x00\x86q\x00",
)  # fmt: skip


def prepare_torch(folder: Path) -> Attempt:
    from mlx_vlm_edge_convert.torch_zip import read_torch

    neg = b"}" + _text("neg") + b"\x88s"
    entries = (
        _tensor("w", "0", (2, 3), "FloatStorage")
        + _tensor("v", "0", (6,), "FloatStorage", neg)
        + _tensor("h", "1", (4,), "BFloat16Storage")
    )
    pickled = b"\x80\x02ccollections\nOrderedDict\n)R(" + entries + b"u."
    path = folder / "m.bin"

    def zipped(description: bytes, kind: int) -> bytes:
        with zipfile.ZipFile(path, "w", kind) as archive:
            archive.writestr("m/data.pkl", description)
            archive.writestr("m/byteorder", b"little")
            archive.writestr("m/data/0", np.arange(6, dtype=np.float32).tobytes())
            archive.writestr("m/data/1", bytes(8))
        return path.read_bytes()

    sound = [zipped(pickled, kind) for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)]

    def attempt(rng: random.Random) -> None:
        way = rng.randrange(3)
        if way == 0:
            path.write_bytes(spoiled(rng.choice(sound), rng))
        elif way == 1:
            zipped(spoiled(pickled, rng), zipfile.ZIP_STORED)
        else:
            at = rng.randrange(2, len(pickled))
            inner = b"".join(rng.choices(PIECES, k=rng.choice((1, 3, 10, 60))))
            zipped(pickled[:at] + inner * rng.choice((1, 1, 50)) + pickled[at:], zipfile.ZIP_STORED)
        for array in read_torch(path).values():
            assert isinstance(array, mx.array)

    return attempt


def prepare_bundles(folder: Path) -> Attempt:
    from mlx_vlm_edge_convert.coreml import manifest
    from mlx_vlm_edge_convert.coreml.package.messages import model_class

    package = folder / "vision.mlpackage"
    data = package / "Data" / "com.apple.CoreML"
    data.mkdir(parents=True)
    model = model_class()()
    function = model.mlProgram.functions["main"]
    function.opset = "CoreML7"
    given = function.inputs.add(name="x")
    given.type.tensorType.dataType = 11
    given.type.tensorType.rank = 1
    given.type.tensorType.dimensions.add().constant.size = 4
    block = function.block_specializations["CoreML7"]
    operation = block.operations.add(type="relu")
    operation.inputs["x"].arguments.add().name = "x"
    operation.outputs.add(name="y").type.CopyFrom(given.type)
    block.outputs.append("y")
    listed = {
        "rootModelIdentifier": "1",
        "itemInfoEntries": {"1": {"path": "com.apple.CoreML/model.mlmodel"}},
    }
    spec, inner = model.SerializeToString(), json.dumps(listed)
    (data / "model.mlmodel").write_bytes(spec)
    (package / "Manifest.json").write_text(inner)
    part = {"package": package.name, "minimum_os": {}, "functions": manifest.interface(package),
            "precision": "fp16", "compute_units": "cpuAndGPU", "fallback_units": [],
            "memory": {}, "parity": []}  # fmt: skip
    manifest.write(folder, {"model": "x", "licence": "y", "minimum_os": {},
                            "parts": {"vision": part}, "tokens": {}})  # fmt: skip
    outer = json.loads((folder / manifest.NAME).read_text())
    assert manifest.read(folder) == outer

    def attempt(rng: random.Random) -> None:
        way = rng.randrange(4)
        content, own, said = spec, inner.encode(), outer
        if way == 0:
            content = spoiled(spec, rng)
        elif way == 1:
            own = written(odd(listed, rng)).encode("utf-8", "surrogatepass")
        elif way == 2:
            said = odd(outer, rng)
        (data / "model.mlmodel").write_bytes(content)
        (package / "Manifest.json").write_bytes(own)
        if way < 2 and rng.random() < 0.8:  # hashes that hold
            said = {**outer, "files": {}}
            for name in outer["files"]:
                said["files"][name] = manifest.digest(folder / name)
        text = written(said).encode("utf-8", "surrogatepass")
        (folder / manifest.NAME).write_bytes(spoiled(text, rng) if way == 3 else text)
        assert manifest.read(folder)["format"] == manifest.FORMAT

    return attempt
