"""A model and a time to its first token -> the largest of its sizes that keeps within it.

By the last `bench` of the model on this machine, its stages scaled by the operations that the other
sizes take; without one, on a Mac, by `estimate`. Either counts a question about one picture.
"""

from dataclasses import replace

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.loading import cost
from mlx_vlm_edge.loading.cost import Blueprint, Cost
from mlx_vlm_edge.loading.load import LoadOptions
from mlx_vlm_edge.picture.preprocessing import Preprocessing

from .bench import last
from .estimate import chips, roofline


def largest_within(name: str, options: LoadOptions, limit: float) -> tuple[int, str]:
    """The side in pixels, and what to say of it. limit: milliseconds.

    Raises UsageError where no size keeps within it, and where nothing is known of the machine.
    """
    config = cost.config_of(name)
    plan = cost.blueprint(config, asked=options.preprocessing)
    costs = _costs(plan, options)
    sides = list(costs)
    times, source = _times(name, options, plan, costs)
    fitting = [side for side in sides if times[side] <= limit]
    if not fitting:
        least = sides[0]
        raise UsageError(
            f"--ttft-budget {limit:g}ms: even {least} px would take about {times[least]:.0f} ms "
            f"({source})"
        )
    side = fitting[-1]
    return side, f"up to {side} px, about {times[side]:.0f} ms to the first token ({source})"


def _costs(plan: Blueprint, options: LoadOptions) -> dict[int, Cost]:
    """Of each side that has as many visual tokens as are asked for, from the smallest.

    Raises UsageError where none has.
    """
    costs: dict[int, Cost] = {}
    for side in plan.config.adapted(options.preprocessing).sides:
        try:
            costs[side] = _cost(plan, side, options)
        except UsageError as error:
            refused = error
    if not costs:
        raise refused
    return costs


def _cost(plan: Blueprint, side: int, options: LoadOptions) -> Cost:
    asked = Preprocessing(resolution=side, budget=options.budget)
    sized = replace(plan, asked=asked)
    return cost.cost(sized, cost.question(sized))


def _times(
    name: str, options: LoadOptions, plan: Blueprint, costs: dict[int, Cost]
) -> tuple[dict[int, float], str]:
    """Milliseconds to the first token at each side, and where they are from."""
    measured = last.recall(name, options.bits, options.dtype)
    if measured is not None:
        whole = measured.resolution or plan.config.image_size
        then = _cost(plan, whole, replace(options, visual_tokens=None, token_method=None))
        times = {
            side: 1000 * (
                measured.vision * own.vision.flops / then.vision.flops
                + measured.prefill * own.prefill.flops / then.prefill.flops
                + measured.rest
            )
            for side, own in costs.items()
        }  # fmt: skip
        return times, f"by the last bench of {name} at {whole} px"
    try:
        chip = chips.own()
    except UsageError:
        raise UsageError(
            f"--ttft-budget: nothing is known of this machine's speed: run `mlx-vlm-edge bench "
            f"--model {name}` once"
        ) from None
    quantised = options.bits is not None or bool(plan.bits)
    return {
        side: sum(stage.ms for stage in roofline.first_token(own, chip, quantised=quantised))
        for side, own in costs.items()
    }, f"an estimate for {chip.name}"
