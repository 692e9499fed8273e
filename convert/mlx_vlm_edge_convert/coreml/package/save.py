"""Functions -> a saved .mlpackage; arrays -> a file beside it."""

import hashlib
import json
import shutil
from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.wording import first_line

from ..emit.toolkit import quiet, tools
from ..names import MAIN
from ..part import Function, Part
from .messages import parse
from .saved import MANIFEST, model_file

PASSES = (
    "noop_elimination",
    "const_elimination",
    "const_deduplication",
    "remove_redundant_ops",
    "dedup_op_and_var_names",
    "add_fp16_cast",
    "cast_optimization",
    "canonicalize_inplace_pattern",
    "topological_reorder",
    "dead_code_elimination",
)


def save_package(part: Part, path: Path) -> None:
    """Write a part as the package `path`. Raises UsageError when the disk is full."""
    functions = part.functions()
    shutil.rmtree(path, ignore_errors=True)
    try:
        _save(functions, getattr(tools().ct.target, part.minimum), path)
        _make_reproducible(path)
        readable(path)
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) or "write" in str(error).lower():
            raise UsageError(f"{path.name}: cannot be written ({_reason(error)})") from error
        raise


def save_arrays(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Write them as the safetensors file `path`. Raises UsageError when the disk is full."""
    try:
        save_file(dict(arrays), str(path))
        readable(path)
    except (OSError, SafetensorError) as error:  # the library wraps some of the system's
        raise UsageError(f"{path.name}: cannot be written ({_reason(error)})") from error


def readable(path: Path) -> None:
    """Whoever may read the folder that `path` is in may read it and all in it.

    coremltools and safetensors write files for their owner alone.
    """
    folder = path.parent.stat().st_mode & 0o777
    for each in (path, *path.rglob("*")):
        each.chmod(folder if each.is_dir() else folder & 0o666)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or first_line(error)


def _save(functions: Sequence[Function], target: Any, path: Path) -> None:
    """Convert them together, equal weights stored once; the first is the default."""
    with quiet():
        tools().ct.convert(
            _program(functions), convert_to="mlprogram", minimum_deployment_target=target,
            compute_precision=_precision(functions[0]), skip_model_load=True,
            package_dir=str(path), pass_pipeline=_passes(),
        )  # fmt: skip


def _make_reproducible(path: Path) -> None:
    """The same program is the same bytes, in every process: coremltools names a package's files by
    random numbers, and protobuf's maps have another order each time."""
    content = json.loads((path / MANIFEST).read_text())
    model = model_file(path, content)
    model.write_bytes(parse(model.read_bytes()).SerializeToString(deterministic=True))
    items = content["itemInfoEntries"]
    names = {item: str(uuid5(NAMESPACE_URL, entry["path"])) for item, entry in items.items()}
    content["itemInfoEntries"] = {names[item]: entry for item, entry in items.items()}
    content["rootModelIdentifier"] = names[content["rootModelIdentifier"]]
    text = json.dumps(content, indent=4, sort_keys=True)
    (path / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _program(functions: Sequence[Function]) -> Any:
    """One program of all of them."""
    ct, (first, *others) = tools().ct, functions
    program = ct.converters.mil.mil.Program()
    for function in functions:
        emitted = function.program().functions[MAIN]
        emitted.set_input_types(tuple(_image(*item) for item in function.images.items()))
        program.add_function(function.name, emitted)
    program.default_function_name = first.name
    program.export_as_multifunction = bool(others)
    return program


def _image(name: str, shape: tuple[int, ...]) -> Any:
    ct = tools().ct
    image = ct.ImageType(name=name, shape=shape, color_layout=ct.colorlayout.RGB)
    image.channel_first = True
    return image


@cache
def _sharing() -> str:
    """The name of a pass by which equal constants of several functions become one record."""
    passes = import_module("coremltools.converters.mil.mil.passes.graph_pass")
    registry = import_module("coremltools.converters.mil.mil.passes.pass_registry")

    def apply(_: Any, program: Any) -> None:
        if len(program.functions) > 1:
            _share(program)

    registry.register_pass("emitted")(type("share", (passes.AbstractGraphPass,), {"apply": apply}))
    return "emitted::share"


def _share(program: Any) -> None:
    """Equal constants of several functions are one record of the weight file."""
    hashes: dict[Hashable, str] = {}
    for function in program.functions.values():
        for op in function.operations:
            value = op.outputs[0].val if op.op_type == "const" else None
            if isinstance(value, np.ndarray):
                kind = (tools().types.builtin_to_string(op.outputs[0].dtype), value.shape)
                place = (value.__array_interface__["data"], value.strides, *kind)
                if place not in hashes:  # most are one array, which is read once
                    content = np.ascontiguousarray(value)
                    hashes[place] = f"{kind} {hashlib.sha256(content.data).hexdigest()}"
                op.weight_id = hashes[place]


def _passes() -> Any:
    """The passes of coremltools that have something to do in what is emitted here.

    All of them would take most of an export: the program is validated after each.
    """
    names = [*(f"common::{name}" for name in PASSES), _sharing()]
    return tools().ct.PassPipeline(names, "emitted")


def _precision(function: Function) -> Any:
    """Programs come in their dtypes; one with islands comes in float32 and is rounded here."""
    ct, islands = tools().ct, function.islands
    if islands is None:
        return ct.precision.FLOAT32

    def rounded(op: Any) -> bool:
        """What reads an island's output must read it in float32 as well."""
        read = [x for arg in op.inputs.values() for x in (arg if isinstance(arg, tuple) else [arg])]
        makers = {x.op.name for x in read if x is not None and x.op is not None}
        return islands.isdisjoint({op.name, *makers})

    return ct.transform.FP16ComputePrecision(op_selector=rounded)
