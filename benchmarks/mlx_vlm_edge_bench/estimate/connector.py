"""The connectors: the cost of the way from image features to visual tokens."""

from .work import Work, depthwise, linear, norm

POOLED = 12  # side of LDPv2's grid, fixed by its authors


def mlp(rows: int, features: int, width: int) -> Work:
    """LLaVA's two layers."""
    return linear(rows, features, width) + linear(rows, width, width)


def ldpv2(side: int, features: int, width: int) -> Work:
    """MobileVLM V2's, on a grid of side x side; the second layer comes after the pooling."""
    pooled = POOLED**2
    first, second = linear(side**2, features, width), linear(pooled, width, width)
    return first + second + depthwise(pooled, width, 3)


def ldp(side: int, features: int, width: int) -> Work:
    """MobileVLM V1's: two layers, then two MobileNetV3 blocks, the second of stride 2."""
    half = ldp_side(side)
    return mlp(side**2, features, width) + _block(side**2, width, 1) + _block(half**2, width, 2)


def ldp_side(side: int) -> int:
    """Of the grid that LDP leaves of side x side: 24 -> 12."""
    return -(-side // 2)


def _block(positions: int, width: int, stride: int) -> Work:
    reduced = -(-width // 4 // 8) * 8
    convolution = depthwise(positions, width, 3, stride=stride)
    return (
        convolution
        + Work(vectors=-width)  # it has no bias
        + norm(positions, width).layers(2)
        + linear(1, width, reduced)
        + linear(1, reduced, width)
        + linear(positions, width, width, bias=False)
    )


def pixel_shuffle(rows: int, features: int, width: int, scale: int) -> Work:
    """Idefics3's: `rows` visual tokens, each made of scale x scale features by one matmul."""
    return linear(rows, features * scale**2, width, bias=False)
