"""What drafts save and cost: python benchmarks/prompt_lookup.py [--runs N] [--tokens N] [--bits 4]

A full-size Qwen2-0.5B decoder with random weights computes every pass as it is; what it says is put
into its logits, so that answers repeat a document, in part or not at all. Prints one JSON object:
passes, drafts, and seconds of the clock and of the processor, with drafts and without, in turns.
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import mlx_vlm_edge.blas
from mlx_vlm_edge.generation import drafting, loop
from mlx_vlm_edge.generation.choosing import TokenSampler
from mlx_vlm_edge.generation.sampling import Sampling
from mlx_vlm_edge.text.prompt import Inputs

mlx_vlm_edge.blas.check()

import mlx.core as mx  # noqa: E402  (after the BLAS)
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402
from mlx.utils import tree_map  # noqa: E402
from random_checkpoint import TEXT  # noqa: E402

from mlx_vlm_edge.kernels import on_cpu, quantized  # noqa: E402
from mlx_vlm_edge.language.llama import LanguageModel, TextConfig  # noqa: E402

DOCUMENT = 400  # tokens of the prompt


class Scripted:
    """A decoder that says `script` after a prompt of DOCUMENT tokens, and counts its passes."""

    def __init__(self, language_model: LanguageModel, script: list[int]) -> None:
        self.language_model, self.script = language_model, script
        self.pass_costs, self.passes = None, 0

    def follow(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        self.passes += 1
        first = cache[0].offset + 1 - DOCUMENT
        logits = self.language_model(self.language_model.embed(tokens), cache)
        rows = mx.arange(tokens.shape[1])
        logits[:, rows, mx.array(self.script[first : first + tokens.shape[1]])] = 1e4
        return logits

    def step(self, token: mx.array, cache: list[Any]) -> mx.array:
        return self.follow(token[:, None], cache)[:, -1]


def language_model(bits: int | None) -> LanguageModel:
    model = LanguageModel(TextConfig.from_dict(TEXT, "qwen2"))
    model.update(tree_map(lambda array: mx.random.normal(array.shape) * 0.03, model.parameters()))
    if bits:
        nn.quantize(model, 64, bits)
        if on_cpu():
            quantized.for_cpu(model)
    if bits or not on_cpu():
        model.fuse(quantized.for_cpu if on_cpu() else None)
    mx.eval(model.parameters())
    return model


def scripts(document: list[int], count: int) -> dict[str, list[int]]:
    """Answers: the document again; with every eighth token another; other words altogether; and
    three of the document, which a draft goes on from, then always another."""
    generator = np.random.default_rng(1)
    other = generator.integers(1000, 150000, count + 50).tolist()
    again = (document * (1 + count // len(document) + 1))[: count + 50]
    edited = [other[i] if i % 8 == 7 else token for i, token in enumerate(again)]
    misled = [other[i] if i % 4 == 3 else document[i % 396] for i in range(count + 50)]
    return {"repeats": again, "repeats, one in eight changed": edited, "nothing": other,
            "three known, then another": misled}  # fmt: skip


def answered(
    model: Scripted, prompt: Any, prefilled: Any, count: int, draft: bool
) -> dict[str, Any]:
    """One answer's seconds, passes and drafts; checks that it is the script."""
    cache = model.language_model.make_cache()
    for layer, (keys, values) in zip(cache, prefilled, strict=True):
        layer.state = keys, values, DOCUMENT
    logits = mx.zeros((1, TEXT["vocab_size"]))
    logits[0, model.script[0]] = 1
    sample, model.passes = TokenSampler(Sampling(), mx.array(prompt.input_ids[0])), 0
    lookup = drafting.PromptLookup(prompt, frozenset(), partial(drafting.pass_costs, model))
    steps = (
        drafting.decode_drafted(model, logits, cache, count, sample, lookup) if draft
        else loop.decode(model, logits, cache, count, sample)
    )  # fmt: skip
    clock, processor = time.perf_counter(), time.process_time()
    said = list(steps)
    took = time.perf_counter() - clock, time.process_time() - processor
    assert said == model.script[:count]
    return {"seconds": took[0], "processor": took[1], "passes": model.passes,
            "drafted": lookup.drafted, "accepted": lookup.accepted}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--bits", type=int, choices=(4, 8))
    parser.add_argument("--only", nargs="+", metavar="ANSWER")
    args = parser.parse_args()
    language = language_model(args.bits)
    document = np.random.default_rng(0).integers(1000, 150000, DOCUMENT).tolist()
    prompt = Inputs(np.array([document], np.int32), np.array([], np.int32), [])
    cache = language.make_cache()
    mx.eval(language(language.embed(mx.array(prompt.input_ids)), cache, last_only=True))
    prefilled = [(layer.keys, layer.values) for layer in cache]
    mx.eval(prefilled)
    costs = drafting.pass_costs(SimpleNamespace(pass_costs=None, language_model=language))
    record: dict[str, Any] = {
        "blas": mlx_vlm_edge.blas.status(), "bits": args.bits, "tokens": args.tokens,
        "costs": {str(size): round(cost, 2) for size, cost in costs.items()}, "answers": {},
    }  # fmt: skip
    for name, script in scripts(document, args.tokens).items():
        if args.only and name not in args.only:
            continue
        model = Scripted(language, script)
        model.pass_costs = costs
        runs: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
        for turn in range(args.runs):
            for draft in (False, True) if turn % 2 else (True, False):
                runs[draft].append(answered(model, prompt, prefilled, args.tokens, draft))
        pairs = list(zip(runs[False], runs[True], strict=True))
        ratios = {
            what: round(median(plain[what] / drafted[what] for plain, drafted in pairs), 3)
            for what in ("seconds", "processor")
        }
        record["answers"][name] = {"ratio": ratios, "plain": runs[False], "drafted": runs[True]}
        print(name, ratios, runs[True][0], file=sys.stderr)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
