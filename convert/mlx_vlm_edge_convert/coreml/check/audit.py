"""Where activations leave float16, and the powers of two that bring them back.

The largest |x| of every operation is known from running the package. A site's values are held
smaller by one power, so that its sums stay within as well, which some devices form in float16;
what lies at no site can only stay in float32.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

HELD = 2.0**15  # float16 ends at 65504: what comes closer than a factor of two is repaired
AIM = 2.0**14  # where a repaired site ends at the most

Sites = Mapping[str, tuple[str, int]]


@dataclass(frozen=True)
class Repair:
    """powers: by site, in all. beyond: operations that leave float16 all the same."""

    powers: Mapping[str, int]
    beyond: frozenset[str]


def leaving(ranges: Mapping[str, float]) -> list[str]:
    """Operations whose output comes near the end of float16, or is not finite."""
    return [name for name, largest in ranges.items() if not largest <= HELD]


def sums(ranges: Mapping[str, float], summed: Mapping[str, float]) -> dict[str, float]:
    """Ranges, of a mean that of its sum. summed: of how many values a mean is."""
    return {name: largest * summed.get(name, 1) for name, largest in ranges.items()}


def repair(
    ranges: Mapping[str, float],
    sites: Sites,
    powers: Mapping[str, int],
    summed: Mapping[str, float] | None = None,
) -> Repair:
    """What to do about true ranges, measured in float32 with sites held smaller by `powers`.

    A stage that reaches 2 ** 17 is held smaller by 2 ** 3; one whose squares reach 2 ** 20, too.
    """
    chosen, whole = dict(powers), sums(ranges, summed or {})
    for name in leaving(whole):
        if name in sites and math.isfinite(whole[name]):
            site, degree = sites[name]
            more = math.ceil(math.log2(whole[name] / AIM) / degree)
            chosen[site] = max(chosen.get(site, 0), powers.get(site, 0) + more)
    after = {name: _predicted(name, ranges[name], sites, powers, chosen) for name in ranges}
    return Repair(chosen, frozenset(leaving(after)))


def _predicted(
    name: str, largest: float, sites: Sites, before: Mapping[str, int], after: Mapping[str, int]
) -> float:
    if name not in sites:
        return largest
    site, degree = sites[name]
    return largest * 2.0 ** (degree * (before.get(site, 0) - after.get(site, 0)))
