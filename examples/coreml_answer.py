"""Ask an exported bundle about a picture: packages, embeddings and manifest, no MLX.

python examples/coreml_answer.py BUNDLE PICTURE QUESTION [--compute cpu-ne] [--max-tokens 64]
    [--image-size 512 | --visual-tokens 64] [--context 4096]

On a Mac Core ML runs the packages; elsewhere the interpreter that verifies exports does, slowly.
It is what an app does, and examples/swift does the same in Swift.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from mlx_vlm_edge_convert.coreml import manifest
from mlx_vlm_edge_convert.coreml.names import IMAGE, TOKENS
from mlx_vlm_edge_convert.coreml.package.malformed import reading
from mlx_vlm_edge_convert.coreml.run.host import DecoderHost
from mlx_vlm_edge_convert.coreml.run.pictures import choose, picture_sizes
from mlx_vlm_edge_convert.coreml.run.runner import UNITS, Runner, runner

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.picture.image import fit, open_image
from mlx_vlm_edge.text.tokenizer import Tokenizer

Open = Callable[[str], Runner]  # a package's file name -> what runs it


class Bundle:
    """A bundle's folder, ready to answer."""

    def __init__(
        self,
        folder: Path,
        open_package: Open,
        image_size: str | None = None,
        visual_tokens: int | None = None,
        context: int | None = None,
    ) -> None:
        self.manifest = content = manifest.read(folder)
        with reading(folder / manifest.NAME):
            self._open(folder, content, open_package, context)
        self.size = choose(picture_sizes(content), image_size, visual_tokens)

    def _open(
        self, folder: Path, content: dict[str, Any], open_package: Open, context: int | None
    ) -> None:
        parts = content["parts"]
        if {"vision", "decoder"} - parts.keys():
            raise UsageError(f"{folder}: has no vision and decoder; export it with --part all")
        if content.get("prompt") is None or parts["vision"].get("tiles"):
            raise UsageError(f"{folder}: this family's pictures and prompts need its own code")
        self.packages = {name: open_package(part["package"]) for name, part in parts.items()}
        self.tokenizer = Tokenizer.from_folder(folder)
        self.ends = [int(token) for token in content["tokens"]["eos"]]
        wanted, told = content["preprocessing"], content["prompt"]
        self.fill, self.strategy = tuple(map(int, wanted["fill"])), str(wanted["strategy"])
        self.before, self.after = (list(map(int, told[f"{s}_image"])) for s in ("before", "after"))
        self.around = str(told["before_question"]), str(told["after_question"])
        self.special = list(map(str, told["special_tokens"]))
        self.decoder = DecoderHost.open(folder, parts["decoder"], self.packages["decoder"], context)

    def visual_tokens(self, picture: str | Path) -> np.ndarray:
        """A picture -> its visual tokens [N, D]."""
        size = (self.size.width, self.size.height)
        pixels = np.asarray(fit(open_image(picture), size, self.strategy, self.fill))
        outputs = {IMAGE: pixels.transpose(2, 0, 1)[None].astype(np.float32)}
        for name in ("vision", "connector"):
            if name in self.packages:
                outputs = dict(self.packages[name].run(self.size.function, outputs))
        return outputs[TOKENS][0]

    def prompt(self, picture: str | Path, question: str) -> np.ndarray:
        """Input embeddings [L, D] of a picture and a question."""
        embed, words = self.decoder.embed, question.strip()
        if odd := [token for token in self.special if token in words]:
            raise UsageError(f"the question has the chat's own {odd[0]} in it; take it out")
        text = self.around[0] + words + self.around[1]
        after = [*self.after, *self.tokenizer.encode(text, special=True)]
        tokens = self.visual_tokens(picture).astype(self.decoder.embeddings.dtype)
        return np.concatenate([embed(self.before), tokens, embed(after)])

    def answer(self, picture: str | Path, question: str, max_tokens: int) -> Iterator[int]:
        """Greedy token ids, without the one that ends the answer."""
        prompt = self.prompt(picture, question)
        known = self.decoder.begin(self.before)  # by the bundle's prompt cache
        for token in self.decoder.generate(prompt[known:], max_tokens, self.ends):
            if token not in self.ends:
                yield token


def opener(folder: Path, units: str, cache: Path) -> Open:
    """What runs a bundle's packages on this machine."""
    if sys.platform != "darwin":
        print("no Core ML on this machine: its packages run in the interpreter", file=sys.stderr)
    return lambda name: runner(
        folder / name, units, cache, lambda line: print(line, file=sys.stderr)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("bundle", type=Path, help="folder that `mlx-vlm-edge export` wrote")
    parser.add_argument("picture")
    parser.add_argument("question")
    parser.add_argument("--compute", choices=UNITS, default="cpu-ne", help="on a Mac")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--image-size", metavar="N|WxH", help="of those that the bundle takes")
    parser.add_argument(
        "--visual-tokens", type=int, metavar="N", help="the size of at most so many"
    )
    parser.add_argument(
        "--context", type=int, metavar="N", help="the smallest of the bundle's that has so many"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        runs = opener(args.bundle, args.compute, Path(cache))
        bundle = Bundle(args.bundle, runs, args.image_size, args.visual_tokens, args.context)
        detokenizer = bundle.tokenizer.detokenizer()
        for token in bundle.answer(args.picture, args.question, args.max_tokens):
            print(detokenizer.add(token), end="", flush=True)
        print(detokenizer.finish())


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        print(f"coreml_answer: error: {error}", file=sys.stderr)
        sys.exit(2)
