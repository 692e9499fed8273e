"""What a package's inputs, states and outputs are called, for its emitter and for its host."""

IMAGE, FEATURES, TOKENS = "image", "image_features", "visual_tokens"
EMBEDDINGS, MASK, COS, SIN, POSITION, PICK, LOGITS, TOKEN = (
    "embeddings", "mask", "cos", "sin", "position", "pick", "logits", "token",
)  # fmt: skip
CACHES = KEYS, VALUES = "keys", "values"  # of every layer, as states or inputs
MAIN, PREFILL, DECODE = "main", "prefill", "decode"  # functions
PACKAGE_SUFFIX, COMPILED_SUFFIX = ".mlpackage", ".mlmodelc"


def prefill_name(size: int, smallest: int) -> str:
    """The function that takes so many positions; the smallest is `prefill`."""
    return PREFILL if size == smallest else f"{PREFILL}_{size}"


def context_name(function: str, context: int) -> str:
    """The same function of the decoder, for a cache of a further size."""
    return f"{function}_context_{context}"


def sized_name(height: int, width: int) -> str:
    """The function that takes pictures of a further size; those of the first go into `main`."""
    return f"{MAIN}_{width}x{height}"


def new_name(cache: str) -> str:
    """The output that holds what the host must write into a read-only cache."""
    return f"new_{cache}"


def logits_part(index: int) -> str:
    """An output of the head's part, where the head is cut into several."""
    return f"{LOGITS}_{index}"


def in_order(outputs: list[str]) -> list[str]:
    """The outputs that are logits, first parts first: logits_2 before logits_10."""
    names = [name for name in outputs if name.startswith(LOGITS)]
    return sorted(names, key=lambda name: int(name.removeprefix(LOGITS).lstrip("_") or 0))
