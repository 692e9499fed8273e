"""A bundle's prompt cache: the keys and values of the ids that its prompts begin with.

File and manifest entry -> what a host writes at the start of its cache, in the cache's own layout.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from ..names import CACHES
from ..package.malformed import reading

PROMPT_CACHE_FILE = "prompt_cache.safetensors"


@dataclass(frozen=True)
class PromptCache:
    """ids: token ids from the first position on. arrays: `keys` and `values`, of as many positions.

    [layers, kv_heads, positions, head_dim] for the stateful form, for the other one
    [layers, kv_heads, head_dim, positions].
    """

    ids: tuple[int, ...]
    arrays: Mapping[str, np.ndarray]

    @classmethod
    def read(
        cls, folder: Path, entry: Mapping[str, Any], shape: Sequence[int], axis: int
    ) -> "PromptCache":
        """Of a bundle's folder. entry: the manifest's. shape: of the host's cache, whose positions
        are `axis`. Raises UsageError for what does not fit it."""
        with reading(folder, "the prompt cache is damaged"):
            file, ids = folder / entry["file"], tuple(entry["ids"])
            if file.parent != folder or not all(type(each) is int for each in ids):
                raise ValueError(f"{entry['file']} of {ids[:3]}")
            whole = load_file(file)
            arrays = {name: whole[name] for name in CACHES}
            wanted = [*shape]
            wanted[axis] = len(ids)
            for name, array in arrays.items():
                if [*array.shape] != wanted or array.dtype.kind != "f":
                    raise ValueError(f"{name} are {array.dtype} {array.shape}")
        return cls(ids, arrays)

    def shared(self, ids: Sequence[int]) -> int:
        """How many of the first ids of a prompt are these."""
        pairs = zip(self.ids, ids, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
