"""What a prefix cache remembers, in a folder: the next process skips the picture as well.

One safetensors file an entry, named by what it is of and by its own content's hash. A file appears
whole or not at all; one that is damaged is dropped with a line, and the least recently used ones go
when there is too much. Entries of other models and weights are never looked at.
"""

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np

from ..checkpoint.weights import read_header
from ..errors import UsageError
from ..paths import expand
from ..whole_file import remove_abandoned, write
from ..wording import say

MAX_BYTES = 4 * 2**30
FORMAT = 1  # raised when other numbers would be computed for the same model
SUFFIX = ".safetensors"
Layers = list[tuple[mx.array, mx.array]]


class DiskStore:
    """Visual tokens and prompts' keys and values, up to `max_bytes` in a folder that is made.

    model: what stands for a model with its weights and settings (`VisionLanguageModel.identity`).
    Raises UsageError when the folder cannot be used.
    """

    def __init__(self, folder: str | Path, max_bytes: int = MAX_BYTES) -> None:
        self.folder, self.max_bytes = expand(folder), max_bytes
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"{self.folder}: cannot keep a cache there ({error.strerror})"
            ) from None
        with suppress(OSError):  # one that cannot be written may be read
            remove_abandoned(self.folder)
        self._prompt_keys: dict[Path, np.ndarray] = {}

    def image(self, model: str, name: bytes) -> mx.array | None:
        """An image's visual tokens [N, D], None where they are not there."""
        for path in self.folder.glob(f"{_name(model, 'image', name)}-*{SUFFIX}"):
            if (arrays := self._read(path)) is not None:
                return arrays["tokens"]
        return None

    def keep_image(self, model: str, name: bytes, tokens: mx.array) -> None:
        """Remember an image's visual tokens, unless they are there."""
        stem = _name(model, "image", name)
        if not any(self.folder.glob(f"{stem}-*{SUFFIX}")):
            self._write(stem, {"tokens": tokens})

    def prompts(self, model: str) -> Iterator[tuple[Path, np.ndarray]]:
        """Every prompt of a model: its file and its positions' keys, int64[L, 3].

        Of a file that is not known yet the keys alone are read; `layers` sees any other damage.
        """
        for path in self.folder.glob(f"{_name(model, 'prompt')}-*{SUFFIX}"):
            keys = self._prompt_keys.get(path)
            if keys is None:
                keys = self._read_keys(path)
            if keys is not None:
                self._prompt_keys[path] = keys
                yield path, keys

    def layers(self, path: Path) -> Layers | None:
        """A prompt's keys and values, [1, heads, L, D] of each layer; None where it is gone."""
        arrays = self._read(path)
        if arrays is None:
            return None
        depth = (len(arrays) - 1) // 2
        return [(arrays[f"k{index}"], arrays[f"v{index}"]) for index in range(depth)]

    def keep_prompt(
        self, model: str, keys: np.ndarray, layers: Sequence[tuple[mx.array, ...]]
    ) -> None:
        """Remember a prompt; those that it continues are dropped for it."""
        length, covered = len(keys), []
        for path, other in self.prompts(model):
            common = min(len(other), length)
            if np.array_equal(other[:common], keys[:common]):
                if len(other) >= length:
                    return
                covered.append(path)
        arrays = {"keys": mx.array(keys)}
        for index, (k, v) in enumerate(layers):
            arrays |= {f"k{index}": k[..., :length, :], f"v{index}": v[..., :length, :]}
        if self._write(_name(model, "prompt"), arrays, keys):
            for path in covered:
                self._drop(path)

    def _write(
        self, stem: str, arrays: dict[str, mx.array], keys: np.ndarray | None = None
    ) -> bool:
        """Add a file, a prompt's with its keys; whether it is there. A folder that cannot be
        written to is told of, and harms no answer."""
        try:
            saved = io.BytesIO()
            mx.save_safetensors(saved, arrays)
            content = saved.getvalue()
            path = self.folder / f"{stem}-{_content(content)}{SUFFIX}"
            write(path, content, mode=0o600)
            if keys is not None:
                self._prompt_keys[path] = keys
            self._evict()
        except (OSError, RuntimeError) as error:
            say(f"{self.folder}: the cache cannot be written ({error})")
            return False
        return True

    def _read_keys(self, path: Path) -> np.ndarray | None:
        """A prompt's keys, for which no more of its file is read; None as `_read` has it."""
        try:
            info = read_header(path)["keys"]
            with path.open("rb") as file:
                file.seek(info.start)
                content = file.read(info.nbytes)
            return np.frombuffer(content, "<i8").reshape(-1, 3)
        except OSError:
            return None
        except (UsageError, KeyError, ValueError):
            self._drop_damaged(path)
            return None

    def _read(self, path: Path) -> dict[str, mx.array] | None:
        """A file's arrays, for use now, None where it is gone; one that is not what it was written
        as is dropped."""
        try:
            content = path.read_bytes()
        except OSError:  # another process may have dropped it
            return None
        if _content(content) != path.stem.rpartition("-")[2]:
            self._drop_damaged(path)
            return None
        with suppress(OSError):  # where nothing can be written
            os.utime(path)
        try:
            # By name: MLX's own threads read a Python file under Python's lock, which another
            # thread may hold while it waits for them (mx.clear_cache does).
            arrays = cast(dict[str, mx.array], mx.load(str(path)))
        except RuntimeError:  # dropped meanwhile
            return None
        mx.eval(arrays)
        return arrays

    def _drop_damaged(self, path: Path) -> None:
        say(f"{path}: damaged, and dropped from the cache")
        self._drop(path)

    def _drop(self, path: Path) -> None:
        self._prompt_keys.pop(path, None)
        with suppress(OSError):  # where nothing can be written, it is met again
            path.unlink(missing_ok=True)

    def _evict(self) -> None:
        """Remove what was used longest ago until the rest fits."""
        entries = sorted(
            (info.st_mtime, info.st_size, path)
            for path in self.folder.glob(f"[!.]*{SUFFIX}")
            if (info := _state(path)) is not None
        )
        total = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if total <= self.max_bytes:
                return
            self._drop(path)
            total -= size


def _name(model: str, kind: str, name: bytes = b"") -> str:
    """What a file's name begins with: hexadecimal digits of a model, a kind and a picture."""
    told = f"{FORMAT}|{model}|{kind}|".encode()
    return blake2b(told + name, digest_size=16).hexdigest()


def _state(path: Path) -> os.stat_result | None:
    """A file's size and times; None where another process has dropped it."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _content(content: bytes) -> str:
    return blake2b(content, digest_size=16).hexdigest()
