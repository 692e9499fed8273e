"""One side of the comparison with mlx-vlm: orders as JSON lines on stdin, results on stdout.

python benchmarks/worker.py ours|peer       run by that side's own interpreter

Both sides do the same thing with the same files, each through its own public calls where it has
some. Times are wall seconds around evaluated results. Only numpy and Pillow are taken for granted.
"""

import copy
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from typing import Any

STARTED = time.perf_counter()
GREEDY = {"temperature": 0.0}


class Ours:
    """mlx-vlm-edge."""

    def __init__(self, folder: str, whole: bool = True) -> None:
        """whole: wait for all weights, as `load` does; the command line sets out without."""
        from mlx_vlm_edge.loading.load import LoadOptions, start_loading

        self.folder = folder
        self.model, self.processor = start_loading(folder, LoadOptions(dtype="float32"))
        if whole:
            self.model.finish_loading()
        self.native = self.model.config.image_size

    def at(self, side: int | None) -> None:
        """Take pictures at this side from now on."""
        from mlx_vlm_edge.picture.preprocessing import Preprocessing

        asked = Preprocessing(resolution=side or self.native)
        self.processor = type(self.processor)(self.model.config, self.processor.tokenizer, asked)

    def ids(self, question: str, image: str) -> list[int]:
        return self.processor(question, images=[image]).input_ids[0].tolist()

    def inputs(self, prompt: str, image: str) -> None:
        self.processor(prompt, images=[image], raw=True)

    def pixels(self, image: str, draft: bool = False) -> Any:
        """File -> float pixels on the device, NHWC."""
        import mlx.core as mx

        opened = self._drafted(image) if draft else self.prepared(image)
        found = mx.array(opened.data)[None].astype(mx.float32) * (1 / 255)
        mx.eval(found)
        return found

    def _drafted(self, image: str) -> Any:
        """By a second processor with JPEG draft; it needs no model."""
        if not hasattr(self.processor, "jpeg_draft"):
            raise MissingError("JPEG draft is not in this version of mlx-vlm-edge")
        drafting = copy.copy(self.processor)
        drafting.jpeg_draft = True
        return drafting("<image>", images=[image], raw=True).pixels[0]

    def prepared(self, image: str) -> Any:
        return self.processor.preprocess(self._opened(image))

    @staticmethod
    def _opened(image: str) -> Any:
        from mlx_vlm_edge.picture.image import open_picture

        return open_picture(image)

    def features(self, pixels: Any) -> Any:
        """Prepared pixels -> the tower's features [N, C], lazily."""
        import mlx.core as mx

        x = mx.array(pixels.data)[None].astype(mx.float32) * (1 / 255)
        return self.model.vision_tower(x)[0]

    def prefill(self, ids: list[int], tokens: Any) -> int:
        """Ids with one placeholder, visual tokens [1, N, D] -> the first token's id."""
        import mlx.core as mx
        import numpy as np

        from mlx_vlm_edge.models.base import merge

        at, count = ids.index(PLACEHOLDER), tokens.shape[1]
        whole = ids[:at] + [0] * count + ids[at + 1 :]
        model = self.model.language_model
        embeddings = model.embed(mx.array([whole]))
        embeddings = merge(embeddings, [tokens[0]], np.arange(at, at + count))
        logits = model(embeddings, self.model.make_cache(), last_only=True)[:, -1]
        return mx.argmax(logits, axis=-1).item()

    def stream(
        self, prompt: str, image: str | None, count: int, cache: Any = None
    ) -> Iterator[int]:
        from mlx_vlm_edge import stream_generate

        if cache is None and find_spec("mlx_vlm_edge.generation.opening"):
            cache = False  # nothing is taken over from the last run, by the peer neither
        more = {} if cache is None else {"prefix_cache": cache}
        images = [image] if image else []
        chunks = stream_generate(
            self.model, self.processor, prompt, images, raw=True, max_tokens=count, **more
        )
        for chunk in chunks:
            if chunk.token is not None:
                yield chunk.token

    def new_cache(self) -> Any:
        """For a second question: KV of the prompt's start and the image's features."""
        try:
            from mlx_vlm_edge.generation.prefix import PrefixCache
        except ImportError:
            raise MissingError("the prefix cache is not in this version of mlx-vlm-edge") from None
        return PrefixCache()

    reuse = "PrefixCache: key/value cache of the prompt up to the new words, image not encoded"


class Peer:
    """mlx-vlm."""

    def __init__(self, folder: str, whole: bool = True) -> None:
        """It reads all weights in any case."""
        from mlx_vlm import load

        self.model, self.processor = load(folder)
        self.native = self.processor.image_processor.crop_size["height"]

    def at(self, side: int | None) -> None:
        side = side or self.native
        self.processor.image_processor.size = {"shortest_edge": side}
        self.processor.image_processor.crop_size = {"height": side, "width": side}

    def ids(self, question: str, image: str) -> list[int]:
        from mlx_vlm.prompt_utils import apply_chat_template

        text = apply_chat_template(self.processor, self.model.config, question, num_images=1)
        inputs = self.processor(images=[self._opened(image)], text=text)
        return inputs["input_ids"][0].tolist()

    def inputs(self, prompt: str, image: str) -> None:
        self.processor(images=[self._opened(image)], text=prompt)

    @staticmethod
    def _opened(image: str) -> Any:
        from mlx_vlm.utils import load_image

        return load_image(image)

    def pixels(self, image: str, draft: bool = False) -> Any:
        import mlx.core as mx

        prepared = self.processor.image_processor.preprocess([self._opened(image)])
        found = mx.array(prepared["pixel_values"]).transpose(0, 2, 3, 1)
        mx.eval(found)
        return found

    def prepared(self, image: str) -> Any:
        return self.processor.image_processor.preprocess([self._opened(image)])["pixel_values"]

    def features(self, pixels: Any) -> Any:
        import mlx.core as mx

        x = mx.array(pixels).transpose(0, 2, 3, 1)
        found = self.model.vision_tower(x)[1]
        return found.reshape(-1, found.shape[-1])

    def prefill(self, ids: list[int], tokens: Any) -> int:
        import mlx.core as mx
        from mlx_vlm.generate.ar import generate_step

        steps = generate_step(
            mx.array([ids]), self.model, mx.zeros((1, 3, 64, 64)), None, max_tokens=1, **GREEDY,
            cached_image_features=tokens,
        )  # fmt: skip
        token = next(steps)[0]
        steps.close()
        return int(token)

    def stream(
        self, prompt: str, image: str | None, count: int, cache: Any = None
    ) -> Iterator[int]:
        from mlx_vlm import stream_generate

        more = {} if cache is None else {"vision_cache": cache}
        images = [image] if image else None
        chunks = stream_generate(
            self.model, self.processor, prompt, images, max_tokens=count, **GREEDY, **more
        )
        for index, chunk in enumerate(chunks):
            if index < count:  # a last chunk repeats the last token
                yield int(chunk.token)

    def new_cache(self) -> Any:
        from mlx_vlm.vision_cache import VisionFeatureCache

        return VisionFeatureCache()

    reuse = (
        "vision_cache=VisionFeatureCache(), which its FastVLM never fills; its prompt cache is "
        "left out, since with an image it answers from a cut context"
    )


PLACEHOLDER = -200
Reply = dict[str, Any]
SIDES = {"ours": Ours, "peer": Peer}


class MissingError(RuntimeError):
    """This version of the program cannot do what was asked; a row says so."""


class Worker:
    """One method for each order; `self.side` is there after `load`."""

    def __init__(self, name: str) -> None:
        self.kind = SIDES[name]
        self.side: Any = None
        self.visual: dict[tuple[str, int], Any] = {}
        self.asked: list[int] = []

    def load(self, folder: str, whole: bool = True) -> Reply:
        began = time.perf_counter()
        self.side = self.kind(folder, whole)
        return {"seconds": time.perf_counter() - began}

    def versions(self) -> Reply:
        """What this side runs on, after it is loaded; torch only if it was imported."""
        import mlx.core as mx

        found = {"python": ".".join(map(str, sys.version_info[:3]))}
        found["device"] = str(mx.default_device())
        for name in NAMES:
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        loaded = [name for name in ("torch", "transformers", "mlx_lm") if name in sys.modules]
        return {"versions": found, "imported": loaded, "modules": len(sys.modules)}

    def blas(self) -> Reply:
        """The library that cblas_sgemm comes from, and MLX's speed with it."""
        import mlx.core as mx

        x, w = mx.random.normal((512, 896)), mx.random.normal((4864, 896))
        mx.eval(x, w)
        best = 1e9
        for _ in range(4):
            began = time.perf_counter()
            mx.eval(x @ w.T)
            best = min(best, time.perf_counter() - began)
        return {"gflops": 2 * 512 * 896 * 4864 / best / 1e9, "status": self._status()}

    def _status(self) -> str:
        if "mlx_vlm_edge" not in sys.modules:
            return os.environ.get("LD_PRELOAD", "")
        from mlx_vlm_edge import blas

        return blas.status()

    def ids(self, question: str, image: str, side: int) -> Reply:
        self.side.at(side)
        return {"ids": self.side.ids(question, image)}

    def answer(self, prompt: str, image: str | None, tokens: int, side: int) -> Reply:
        """Greedy ids."""
        self.side.at(side)
        return {"ids": list(self.side.stream(prompt, image, tokens))}

    def features(self, image: str, side: int, file: str) -> Reply:
        import numpy as np

        self.side.at(side)
        np.save(file, np.array(self.side.features(self.side.prepared(image))))
        return {}

    def pixels(self, image: str, side: int, file: str, draft: bool = False) -> Reply:
        import numpy as np

        self.side.at(side)
        np.save(file, np.array(self.side.pixels(image, draft)))
        return {}

    # What is timed: each returns the seconds of one go, and what it found.

    def time_vision(self, image: str, side: int) -> Reply:
        import mlx.core as mx

        self.side.at(side)
        key = (image, side)
        if key not in self.visual:
            self.visual = {key: self.side.prepared(image)}
        began = time.perf_counter()
        mx.eval(self.side.features(self.visual[key]))
        return {"seconds": time.perf_counter() - began}

    def time_prefill(self, ids: list[int], visual: int, width: int) -> Reply:
        import mlx.core as mx
        import numpy as np

        drawn = np.random.default_rng(1).standard_normal((1, visual, width), dtype=np.float32)
        tokens = mx.array(drawn)
        mx.eval(tokens)
        began = time.perf_counter()
        first = self.side.prefill(ids, tokens)
        seconds = time.perf_counter() - began
        mx.synchronize()
        return {"seconds": seconds, "found": first}

    def time_ttft(self, prompt: str, image: str, side: int) -> Reply:
        self.side.at(side)
        return self._first(self.side.stream(prompt, image, 1))

    def time_second(self, prompt: str, second: str, image: str, side: int) -> Reply:
        self.side.at(side)
        cache = self.side.new_cache()
        if not self.asked or self.kind is Ours:
            self.asked = list(self.side.stream(prompt, image, 4, cache))
        return self._first(self.side.stream(second, image, 1, cache)) | {"reuse": self.side.reuse}

    def _first(self, stream: Iterator[int]) -> Reply:
        import mlx.core as mx

        began = time.perf_counter()
        token = next(stream)
        seconds = time.perf_counter() - began
        list(stream)
        mx.synchronize()
        return {"seconds": seconds, "found": token}

    def time_decode(self, prompt: str, tokens: int) -> Reply:
        """Seconds per token, from the first to the last."""
        stream = self.side.stream(prompt, None, tokens)
        ids = [next(stream)]
        began = time.perf_counter()
        ids += stream
        return {"seconds": (time.perf_counter() - began) / (len(ids) - 1), "found": ids}

    def time_jpeg(self, image: str, side: int, draft: bool = False) -> Reply:
        self.side.at(side)
        began = time.perf_counter()
        self.side.pixels(image, draft)
        return {"seconds": time.perf_counter() - began}

    # Fresh processes: one order, then the end.

    def ready(self, folder: str, prompt: str, image: str, whole: bool = False) -> Reply:
        """Everything before the first forward pass: imports, weights, tokenizer, the inputs.

        Ours begins with the image while the language model's weights are read, but if `whole`.
        """
        self.load(folder, whole)
        self.side.inputs(prompt, image)
        return {"inside": time.perf_counter() - STARTED}

    def memory(self, folder: str, prompt: str, image: str, tokens: int) -> Reply:
        import mlx.core as mx

        self.load(folder)
        mx.reset_peak_memory()
        ids = list(self.side.stream(prompt, image, tokens))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        unit = 1 if sys.platform == "darwin" else 1024
        return {"rss": peak * unit, "mlx_peak": mx.get_peak_memory(), "found": ids}


NAMES = (
    "mlx", "mlx-cpu", "mlx-metal", "mlx-cuda", "mlx-vlm", "mlx-vlm-edge", "mlx-lm", "transformers",
    "torch", "tokenizers", "numpy", "pillow",
)  # fmt: skip


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what either program prints is not a reply
    worker = Worker(sys.argv[1])
    for line in sys.stdin:
        order = json.loads(line)
        name = order.pop("do")
        try:
            reply = getattr(worker, name)(**order)
        except MissingError as missing:
            reply = {"missing": str(missing)}
        print(json.dumps(reply), file=replies)


if __name__ == "__main__":
    main()
