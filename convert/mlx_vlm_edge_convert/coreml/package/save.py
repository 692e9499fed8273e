"""Functions -> a saved .mlpackage; arrays -> a file beside it."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.wording import first_line

from ..emit.toolkit import quiet, tools
from ..names import MAIN, PACKAGE_SUFFIX
from ..part import Function, Part


def save_package(part: Part, path: Path) -> None:
    """Write a part as the package `path`. Raises UsageError when the disk is full."""
    functions = part.functions()
    try:
        if len(functions) == 1:
            _save(functions[0], part.minimum, path)
        else:
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                _save_together([*functions], part.minimum, Path(folder), path)
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


def _save(function: Function, minimum: str, path: Path) -> None:
    ct = tools().ct
    target = getattr(ct.target, minimum)
    images = [
        ct.ImageType(name=name, shape=shape, color_layout=ct.colorlayout.RGB)
        for name, shape in function.images.items()
    ]
    shutil.rmtree(path, ignore_errors=True)
    with quiet():
        ct.convert(
            function.program(), convert_to="mlprogram", minimum_deployment_target=target,
            compute_precision=_precision(function), inputs=images or None, skip_model_load=True,
            package_dir=str(path),
        )  # fmt: skip


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


def _save_together(functions: list[Function], minimum: str, folder: Path, path: Path) -> None:
    """Several functions in one package, equal weights stored once; the first is the default."""
    ct = tools().ct
    joined = ct.utils.MultiFunctionDescriptor()
    for function in functions:
        single = folder / f"{function.name}{PACKAGE_SUFFIX}"
        _save(function, minimum, single)
        joined.add_function(str(single), src_function_name=MAIN, target_function_name=function.name)
    joined.default_function_name = functions[0].name
    with quiet():
        shutil.rmtree(path, ignore_errors=True)
        ct.utils.save_multifunction(joined, str(path))
