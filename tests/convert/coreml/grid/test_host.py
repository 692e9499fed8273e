"""An app written from docs/coreml.md and Hugging Face's definitions alone, on the second reader: it
answers with MLX's tokens, by both forms of the decoder and by every function."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx_vlm_edge_convert.coreml.export import export
from mlx_vlm_edge_convert.coreml.part import Options
from safetensors.numpy import load_file

from mlx_vlm_edge import load

from .reader import Reader

CONTEXT, COUNT = 320, 8


class App:
    """Embeds, masks, turns, and keeps the cache where the package does not."""

    def __init__(self, folder):
        entry = json.loads((folder / "manifest.json").read_text())["parts"]["decoder"]
        config = json.loads((folder / "config.json").read_text())
        self.chunks = entry["geometry"]["chunks"]
        self.stateful = bool(entry["functions"]["decode"]["states"])
        self.package = Reader(folder / entry["package"])
        self.table = load_file(folder / "embeddings.safetensors")["embeddings"]
        D = entry["geometry"]["head_dim"]
        self.frequencies = config["rope_theta"] ** (-np.arange(0, D, 2) / D)
        ports = entry["functions"]["decode"]["inputs"]
        self.caches = {p["name"]: np.zeros(p["shape"]) for p in ports if p["name"] in CACHES}
        self.offset = 0

    def run(self, function, size, ids):
        """Logits behind some tokens, padded to a function's size."""
        rows = np.zeros((size, self.table.shape[1]))
        rows[: len(ids)] = self.table[ids]
        last = self.offset + np.arange(size)[:, None] if self.stateful else self.offset - 1
        seen = np.arange(CONTEXT) <= np.broadcast_to(last, (size if self.stateful else 1, 1))
        angles = np.outer(np.arange(self.offset, self.offset + size), self.frequencies)
        angles = np.concatenate([angles, angles], 1).T[None, None]
        inputs = {
            "embeddings": rows[None] if self.stateful else rows.T[None, :, None],
            "mask": np.where(seen, 0.0, -1e4)[None, None],
            "cos": np.cos(angles), "sin": np.sin(angles), **self.caches,
        }  # fmt: skip
        if size > 1:
            one = np.eye(size)[len(ids) - 1]
            inputs["pick"] = one.reshape((1, 1, size) if self.stateful else (1, size, 1))
        if self.stateful:
            inputs["position"] = np.array([self.offset])
        outputs = self.package.run(function, inputs)
        for name, cache in self.caches.items():
            cache[..., self.offset : self.offset + len(ids)] = outputs[f"new_{name}"][
                ..., : len(ids)
            ]
        self.offset += len(ids)
        parts = sorted(name for name in outputs if name.startswith("logits"))
        logits = np.concatenate([outputs[name].ravel() for name in parts])
        assert outputs.get("token", logits.argmax()) == logits.argmax()
        return logits


CACHES = ("keys", "values")


@pytest.mark.parametrize("compute", ["cpu-gpu", "cpu-ne"])
def test_an_app_from_the_documents_answers_with_mlx_s_tokens(tools, tmp_path, compute):
    options = Options(compute=compute, precision="fp32", context=CONTEXT)
    app = App(export("demo", tmp_path / "out", parts=("decoder",), options=options, verify=False))
    model = load("demo", dtype="float32")[0].language_model
    ids = np.random.default_rng(3).integers(0, len(app.table), 300)
    first, second = app.chunks["prefill_256"], app.chunks["prefill"]
    assert (first, second) == (256, 64)
    logits = app.run("prefill_256", 256, ids[:256])
    logits = app.run("prefill", 64, ids[256:])  # padded
    answer = []
    for _ in range(COUNT):
        answer.append(int(logits.argmax()))
        logits = app.run("decode", 1, np.array(answer[-1:]))
    whole = model(model.embed(mx.array([[*ids.tolist(), *answer]])))[0]
    expected = np.array(whole[len(ids) - 1 :].argmax(-1)).tolist()
    assert answer == expected[:COUNT]
    assert int(logits.argmax()) == expected[COUNT]
