"""What a package's inputs, states and outputs are called, for its emitter and for its host."""

IMAGE, FEATURES, TOKENS = "image", "image_features", "visual_tokens"
EMBEDDINGS, MASK, COS, SIN, POSITION, PICK, LOGITS = (
    "embeddings", "mask", "cos", "sin", "position", "pick", "logits",
)  # fmt: skip
MAIN, PREFILL, DECODE = "main", "prefill", "decode"  # functions
PACKAGE_SUFFIX, COMPILED_SUFFIX = ".mlpackage", ".mlmodelc"


def cache_names(layer: int) -> tuple[str, str]:
    """A layer's keys and values, as states or inputs."""
    return f"keys_{layer}", f"values_{layer}"


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
