"""One file per family: its published layouts -> the native one."""

from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

from mlx_vlm_edge.models import family_name


def source_family(config: Mapping[str, Any]) -> ModuleType:
    """The converter's file of a family: `families/<the runtime's name of it>.py`.

    It offers to_native(config, weights, preprocessor), config_alone(config) where there are no
    weights, write_files(folder, config) for what a model folder has beside weights and config,
    probe(config), pixels for `--verify`, and adapter_rules() where adapters of it are known.
    Raises UsageError for a model_type this version does not know.
    """
    return import_module(f".{family_name(config)}", __package__)
