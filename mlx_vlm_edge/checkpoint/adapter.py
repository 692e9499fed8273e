"""An adapter's folder -> the low-rank updates and whole weights that it has for named layers.

Three kinds of folder: PEFT's (LoRA, DoRA, `modules_to_save`; LLaVA's has `non_lora_trainables.bin`
beside it), mlx-lm's and mlx-vlm's. Every tensor becomes part of an update, or reading raises.
Sources: huggingface/peft, tuners/lora; ml-explore/mlx-lm, tuner/lora.py and dora.py;
Blaizzy/mlx-vlm, trainer; haotian-liu/LLaVA, llava/train/train.py.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard, cast

import mlx.core as mx

from ..errors import UsageError
from ..wording import some
from .files import read_json
from .weights import check_finite, read_safetensors

CONFIG = "adapter_config.json"
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
MLX_WEIGHTS = ("adapters.safetensors", "weights.safetensors")
LLAVA_WEIGHTS = "non_lora_trainables.bin"
# PEFT's settings that change what a module computes and are not known here.
_UNKNOWN = (
    "fan_in_fan_out", "lora_bias", "layer_replication", "alora_invocation_tokens", "use_qalora",
    "trainable_token_indices", "target_parameters", "megatron_config", "use_bdlora", "arrow_config",
    "kasa_config", "monteclora_config",
)  # fmt: skip
# Initialisations that change the base's weights: such an adapter does not fit the published ones.
_MOVES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
# What patterns of layers are made of, and their steps: a character of some kind, once or repeated.
_PLAIN = re.compile(r"\^?(?:[\w|]|\\?\.|\.\*|\\d\+?|\[[\d-]+\])*\$?")
_STEP = re.compile(r"(\\.|\[[\d-]+\]|.)([*+]?)")
_WRAPPERS = ("base_layer.", "original_module.", "modules_to_save.default.", "modules_to_save.")

LARGEST = 1e30  # of numbers, and of what an update may add up to: float32 ends at 3e38

Torch = Callable[[Path], dict[str, mx.array]]  # reads a .bin file


@dataclass(frozen=True)
class LowRank:
    """An update of a layer's weight [out, in]: scale * b @ a, with a [r, in] and b [out, r].

    magnitude: DoRA's [out], the norms of the updated weight's rows; None without it. embedding:
    whether the layer is a table [rows, width], updated by (b @ a) turned over. tied: whether an
    output head that is tied to the table was trained with the update.
    """

    a: mx.array
    b: mx.array
    scale: float
    magnitude: mx.array | None = None
    embedding: bool = False
    tied: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight that it updates."""
        out, inner = self.b.shape[0], self.a.shape[1]
        return (inner, out) if self.embedding else (out, inner)

    @property
    def delta(self) -> mx.array:
        """float32, of the weight's shape. Lazy."""
        product = self.b.astype(mx.float32) @ self.a.astype(mx.float32)
        return self.scale * (product.T if self.embedding else product)

    def merged(self, weight: mx.array) -> mx.array:
        """The weight [out, in] with its update, in its own dtype. Lazy."""
        moved = weight.astype(mx.float32) + self.delta
        if self.magnitude is not None:
            moved = moved * self.factor(moved)[:, None]
        return moved.astype(weight.dtype)

    def factor(self, moved: mx.array) -> mx.array:
        """DoRA's factor of every output [out], float32, from the weight with its delta."""
        if self.magnitude is None:
            raise ValueError("only DoRA has magnitudes")
        return self.magnitude.astype(mx.float32) / mx.linalg.norm(moved, axis=1)

    @property
    def of_head(self) -> "LowRank":
        """A table's update as that of an output head with the same weight."""
        return replace(self, a=self.b.T, b=self.a.T, embedding=False, tied=False)


@dataclass(frozen=True)
class Adapter:
    """What a folder has. low_rank: by the layer's name; whole: by the weight's.

    published: whether names are those of the original code, not of the native layout. base: the
    model that it says it was trained on, "" where it says nothing. note: what its user should know.
    """

    path: Path
    base: str
    low_rank: Mapping[str, LowRank]
    whole: Mapping[str, mx.array]
    published: bool
    note: str = ""

    @property
    def arrays(self) -> list[mx.array]:
        """All that it holds."""
        updates = self.low_rank.values()
        parts = [part for u in updates for part in (u.a, u.b, u.magnitude) if part is not None]
        return [*parts, *self.whole.values()]

    @property
    def called(self) -> str:
        trained = f", trained on {self.base}" if self.base else ""
        return f"adapter {self.path}{trained}"


def read_adapter(path: Path, scale: float, torch: Torch) -> Adapter:
    """The adapter of a folder, its low-rank updates times `scale`. Lazy.

    torch: what reads a .bin file. Raises UsageError for a folder that is no adapter, a kind that is
    not known, and tensors that are damaged, doubled or of no update.
    """
    if not path.is_dir():
        what = "a file, not a folder" if path.exists() else "no such folder"
        raise UsageError(
            f"adapter {path}: {what}; give one with {CONFIG} and the adapter's weights"
        )
    config = read_json(path / CONFIG)
    if not config:
        raise UsageError(f"adapter {path}: no {CONFIG} in it")
    if "peft_type" in config:
        adapter = _read_peft(path, config, torch)
    elif config.keys() & {"fine_tune_type", "lora_parameters", "rank"}:
        adapter = _read_mlx(path, config, scale)
    else:
        raise UsageError(f"adapter {path}: {CONFIG} is neither PEFT's nor mlx-lm's or mlx-vlm's")
    if scale != 1 and adapter.whole:
        raise UsageError(
            f"adapter {path}: holds {some(adapter.whole)} whole, which no scale goes with; leave "
            "the scale out"
        )
    if not adapter.low_rank and not adapter.whole:
        raise UsageError(f"adapter {path}: its file of weights is empty; save it again")
    scaled = {name: replace(u, scale=u.scale * scale) for name, u in adapter.low_rank.items()}
    return replace(adapter, low_rank=scaled)


def check_values(adapter: Adapter) -> None:
    """Raises UsageError for numbers that make no weights: NaN, infinities, whole numbers, and
    updates that are too large. Evaluates all of it."""
    if any(not mx.issubdtype(array.dtype, mx.floating) for array in adapter.arrays):
        raise UsageError(f"{adapter.called}: a tensor holds whole numbers, not weights")
    sums = mx.stack([(array.astype(mx.float32) * 0).sum() for array in adapter.arrays])
    mx.eval(adapter.arrays)
    check_finite({f"{adapter.called}: a tensor": sums})
    if not adapter.low_rank:
        return
    updates = adapter.low_rank.values()
    largest = [mx.abs(u.a).max().astype(mx.float32) * mx.abs(u.b).max() for u in updates]
    products = cast(list[float], mx.stack(largest).tolist())
    for (layer, update), product in zip(adapter.low_rank.items(), products, strict=True):
        if not abs(update.scale) * product < LARGEST:
            raise UsageError(
                f"{adapter.called}: the update of {layer} is larger than any weight; it is damaged"
            )


def _read_peft(path: Path, config: Mapping[str, Any], torch: Torch) -> Adapter:
    _check_peft(path, config)
    arrays = _one_of(path, PEFT_WEIGHTS, torch)
    tensors = _Tensors(path, {_own_name(name): array for name, array in arrays.items()}, arrays)
    low_rank = {}
    for layer in tensors.layers(".lora_A.weight"):
        a, b = tensors.take(f"{layer}.lora_A.weight"), tensors.take(f"{layer}.lora_B.weight")
        magnitude = tensors.find(f"{layer}.lora_magnitude_vector", ".weight")
        update = LowRank(a, b, _peft_scale(path, config, layer, a), magnitude)
        low_rank[layer] = _checked(path, layer, update)
    for layer in tensors.layers(".lora_embedding_A"):
        a, b = tensors.take(f"{layer}.lora_embedding_A"), tensors.take(f"{layer}.lora_embedding_B")
        if tensors.find(f"{layer}.lora_magnitude_vector", ".weight") is not None:
            raise UsageError(f"adapter {path}: DoRA of an embedding ({layer}) is not known")
        update = LowRank(a, b, _peft_scale(path, config, layer, a), embedding=True)
        low_rank[layer] = _checked(path, layer, update)
    if (path / LLAVA_WEIGHTS).is_file():
        tensors.add({_own_name(name): a for name, a in torch(path / LLAVA_WEIGHTS).items()})
    whole = tensors.rest()
    if odd := [name for name in whole if ".lora_" in name or "trainable_tokens" in name]:
        raise UsageError(f"adapter {path}: {some(odd)} is of an update that is not known")
    return Adapter(path, str(config.get("base_model_name_or_path") or ""), low_rank, whole, True)


def _check_peft(path: Path, config: Mapping[str, Any]) -> None:
    """Raises UsageError for what would be computed differently."""
    if config["peft_type"] != "LORA":
        raise UsageError(f"adapter {path}: peft_type {config['peft_type']!r}: only LORA is known")
    if unknown := [key for key in _UNKNOWN if config.get(key)]:
        raise UsageError(f"adapter {path}: {CONFIG} sets {unknown[0]}, which is not known")
    if not isinstance(config.get("use_rslora") or False, bool):
        raise UsageError(f"adapter {path}: {CONFIG}: use_rslora is neither true nor false")
    start = str(config.get("init_lora_weights") or "").lower()
    if start.startswith(_MOVES_BASE):
        raise UsageError(
            f"adapter {path}: init_lora_weights {start!r} moves the base's weights; save it with "
            "PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )


def _own_name(name: str) -> str:
    """A tensor's name without what PEFT puts around modules."""
    name = name.removeprefix("base_model.").removeprefix("model.") if _in_peft(name) else name
    for wrapper in _WRAPPERS:
        name = name.replace(f".{wrapper}", ".")
    return name


def _in_peft(name: str) -> bool:
    return name.startswith("base_model.model.")


def _peft_scale(path: Path, config: Mapping[str, Any], layer: str, a: mx.array) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA; a pattern's alpha and rank before the common."""
    rank = _matched(config.get("rank_pattern"), layer, config.get("r"))
    alpha = _matched(config.get("alpha_pattern"), layer, config.get("lora_alpha"))
    if type(rank) is not int or rank < 1 or not _finite(alpha):
        shown = f"r {str(rank)[:20]} or lora_alpha {str(alpha)[:20]}"
        raise UsageError(f"adapter {path}: {shown} is no number above 0")
    if a.ndim != 2 or a.shape[0] != rank:
        raise UsageError(
            f"adapter {path}: {layer} is {tuple(a.shape)}, of rank {rank} by its {CONFIG}"
        )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _matched(patterns: Any, layer: str, common: Any) -> Any:
    """What a pattern says of a layer, the first that matches the end of its name."""
    if not isinstance(patterns or {}, Mapping):
        raise UsageError(f"{CONFIG}: a pattern of ranks or alphas is no object")
    for pattern, value in (patterns or {}).items():
        if not _PLAIN.fullmatch(pattern):
            raise UsageError(
                f"{CONFIG}: the pattern {pattern[:80]!r} is not of names, dots, .*, \\d+ and |"
            )
        try:
            if any(_ends_as(layer, one) for one in pattern.split("|")):
                return value
        except re.error as error:
            raise UsageError(f"{CONFIG}: {pattern[:80]!r} is no pattern ({error})") from None
    return common


def _ends_as(layer: str, pattern: str) -> bool:
    """PEFT's re.match(rf"(.*\\.)?({pattern})$", layer), in time that no pattern makes long: all
    places that a step may begin at are followed at once."""
    places = {0} | {at + 1 for at, sign in enumerate(layer) if sign == "."}
    if pattern.startswith("^"):
        places = {0}
    for kind, repeated in _STEP.findall(pattern.removeprefix("^").removesuffix("$")):
        follows = re.compile(kind).match
        if not repeated:
            places = {at + 1 for at in places if follows(layer, at)}
            continue
        reached = set(places) if repeated == "*" else set()
        for at in sorted(places):
            while at + 1 not in reached and follows(layer, at):
                at += 1
                reached.add(at)
        places = reached
    return len(layer) in places


def _finite(value: Any) -> TypeGuard[float]:
    """Whether it is a number that float32 holds; JSON's may be of any length."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) < LARGEST


def _read_mlx(path: Path, config: Mapping[str, Any], asked: float) -> Adapter:
    """mlx-lm's names a and b by their last part, turned over: a [in, r], b [r, out].

    A table's are [rows, r] and [r, width], and were trained in a tied head as well.
    asked: how much of it is to count, for the note.
    """
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise UsageError(
            f"adapter {path}: fine_tune_type {kind!r}: lora and dora are known; a full fine-tune "
            "is a model of its own"
        )
    parameters = config.get("lora_parameters", config)
    if not isinstance(parameters, Mapping):
        raise UsageError(f"adapter {path}: lora_parameters is not an object")
    arrays = _one_of(path, MLX_WEIGHTS, None)
    tensors = _Tensors(path, arrays, arrays)
    low_rank, note = {}, ""
    for first, second in ((".lora_a", ".lora_b"), (".A", ".B")):  # mlx-vlm's were A and B once
        for layer in tensors.layers(first):
            a, b = tensors.take(layer + first), tensors.take(layer + second)
            magnitude = tensors.find(f"{layer}.m", "")
            scale, table = _mlx_scale(path, parameters, layer, a), layer.endswith("embed_tokens")
            update = LowRank(a.T, b.T, scale, magnitude, embedding=table, tied=table)
            low_rank[layer] = _checked(path, layer, update)
            if first == ".A" and parameters.get("scale") is None:
                note = _two_readings(path, parameters["alpha"], parameters["rank"], asked)
    if left := tensors.rest():
        raise UsageError(f"adapter {path}: {some(left)} is of an update that is not known")
    return Adapter(path, str(config.get("model") or ""), low_rank, {}, False, note)


def _two_readings(path: Path, alpha: float, rank: int, asked: float) -> str:
    """What is to be known of mlx-vlm's older folders, which do not say how they were trained; ""
    where both readings are the same, or the other one was chosen."""
    if asked == rank:
        return ""
    return (
        f"note: adapter {path}: its update counts {alpha / rank:g} times (alpha / rank), as "
        f"mlx-vlm reads it now; mlx-vlm of October 2024 to April 2026 trained it to count "
        f"{alpha:g} times (alpha): if yours is of then, say {path}:{rank}"
    )


def _mlx_scale(path: Path, parameters: Mapping[str, Any], layer: str, a: mx.array) -> float:
    rank, scale = parameters.get("rank"), parameters.get("scale")
    if type(rank) is not int or rank < 1 or a.ndim != 2 or a.shape[1] != rank:
        raise UsageError(
            f"adapter {path}: {layer} is {tuple(a.shape)}, of rank {rank} by its {CONFIG}"
        )
    if scale is None and _finite(alpha := parameters.get("alpha")):
        return float(alpha) / rank
    if not _finite(scale):
        raise UsageError(f"adapter {path}: scale {str(scale)[:20]} is no number")
    return float(scale)


def _checked(path: Path, layer: str, update: LowRank) -> LowRank:
    """An update, its magnitude flat. Raises UsageError for shapes that do not belong together."""
    a, b, magnitude = update.a, update.b, update.magnitude
    fits = a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] and a.size and b.size
    if not fits or (magnitude is not None and magnitude.size != update.shape[0]):
        shapes = " and ".join(str(tuple(array.shape)) for array in (a, b))
        raise UsageError(f"adapter {path}: {layer} has {shapes}, which is no update of a matrix")
    return update if magnitude is None else replace(update, magnitude=magnitude.reshape(-1))


def _one_of(path: Path, names: tuple[str, ...], torch: Torch | None) -> dict[str, mx.array]:
    """The tensors of the first of these files that is there. Raises UsageError for none."""
    for name in names:
        if (path / name).is_file():
            if name.endswith(".bin") and torch is not None:
                return torch(path / name)
            return read_safetensors([path / name])
    raise UsageError(f"adapter {path}: no weights in it: {' or '.join(names)}")


class _Tensors:
    """Named tensors handed out once each."""

    def __init__(
        self, path: Path, arrays: Mapping[str, mx.array], read: Mapping[str, mx.array]
    ) -> None:
        """arrays: `read` under their own names, of which no two may be the same."""
        self._path, self._left = path, dict(arrays)
        if len(arrays) != len(read):
            raise UsageError(f"adapter {path}: two tensors are of the same weight")

    def add(self, arrays: Mapping[str, mx.array]) -> None:
        if doubled := arrays.keys() & self._left.keys():
            raise UsageError(f"adapter {self._path}: {some(doubled)} is in two of its files")
        self._left.update(arrays)

    def layers(self, ending: str) -> list[str]:
        """The layers that have a tensor of that ending."""
        return [name.removesuffix(ending) for name in self._left if name.endswith(ending)]

    def take(self, name: str) -> mx.array:
        if name not in self._left:
            raise UsageError(f"adapter {self._path}: {name} is missing; it is not whole")
        return self._left.pop(name)

    def find(self, name: str, ending: str) -> mx.array | None:
        """The tensor of that name, or with an ending behind it; None without either."""
        return self._left.pop(name, self._left.pop(name + ending, None) if ending else None)

    def rest(self) -> dict[str, mx.array]:
        """What is left."""
        rest, self._left = self._left, {}
        return rest
