"""The Swift example's own code, run where there is a Swift compiler: its answers are Python's.

Apple's modules are stand-ins (apple.swift); behind them is the interpreter. It shows that the code
compiles and computes what it should, not that Apple's modules are called as they want to be.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from mlx_vlm_edge_convert.coreml.check.interpreter import Package

from mlx_vlm_edge.picture.image import fit, open_image
from mlx_vlm_edge.text.tokenizer import Tokenizer

from ..demo import IMAGES, ROOT
from .test_coreml_answer import example  # noqa: F401

HERE = Path(__file__).parent
SOURCES = ROOT / "examples" / "swift" / "Sources" / "EdgeVLM"
APPLE = r"import (CoreGraphics|CoreML|CoreVideo|CryptoKit|ImageIO|Tokenizers)\n"
DTYPES = {"float16": np.float16, "float32": np.float32, "int32": np.int32}
# More than one chunk of prefill.
LONG = "What does it say? " * 8 + "What does it say?"

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("swift") is None, reason="no Swift compiler on Linux"
)


class Behind:
    """What Swift's calls come to; `calls` counts functions."""

    def __init__(self, bundle, folder):
        self.bundle, self.folder, self.calls = bundle, folder, []
        self.tokenizer, self.packages, self.states = Tokenizer.from_folder(bundle), {}, {}

    def serve(self):
        with open(self.folder / "asked") as asked, open(self.folder / "answered", "w") as answered:
            for line in asked:
                told = json.loads(line)
                answered.write(json.dumps(getattr(self, told.pop("call"))(**told)) + "\n")
                answered.flush()

    def hash(self, file):
        return {"bytes": [*hashlib.sha256(Path(file).read_bytes()).digest()]}

    def encode(self, text):
        return {"ids": self.tokenizer.encode(text, special=True)}

    def decode(self, ids):
        return {"text": self.tokenizer.decode(ids)}

    def run(self, package, function, state, inputs):
        self.calls.append(function)
        if package not in self.packages:
            self.packages[package] = Package(self.bundle / package)
        runs = self.packages[package]
        kept = self.states.setdefault(state, runs.new_state(function)) if state else None
        arrays = {name: self.array(**entry) for name, entry in inputs.items()}
        outputs = {}
        for name, array in runs.run(function, arrays, kept).items():
            file = self.folder / f"out_{name}"
            array.astype(np.float16).tofile(file)
            outputs[name] = {"shape": array.shape, "file": str(file)}
        return {"outputs": outputs}

    def array(self, dtype, shape, file, width=None):
        raw = Path(file).read_bytes()
        if dtype != "bgra":
            return np.frombuffer(raw, DTYPES[dtype]).reshape(shape)
        rgb = np.frombuffer(raw, np.uint8).reshape(shape)[:, :width, 2::-1]
        return rgb.transpose(2, 0, 1)[None].astype(np.float32)


def program() -> str:
    """The example's files and the stand-ins, as one."""
    files = [HERE / "apple.swift", *sorted(SOURCES.glob("*.swift")), HERE / "ask.swift"]
    text = "\n".join(path.read_text() for path in files)
    return re.sub(r"public (private\(set\) )?", r"\1", re.sub(APPLE, "", text))


@pytest.mark.parametrize(
    ("form", "picture", "question", "prefills"),
    [("stateful", "shapes.png", "Describe the image.", 1), ("readonly", "text.png", LONG, 2)],
)
def test_swift_answers_as_python_does(
    demo_bundles, example, tmp_path, form, picture, question, prefills  # noqa: F811
):  # fmt: skip
    folder = demo_bundles[form]
    python = example.Bundle(folder, lambda name: Package(folder / name))
    expected = python.tokenizer.decode([*python.answer(IMAGES / picture, question, 24)])
    wanted = python.manifest["preprocessing"]
    size = (wanted["width"], wanted["height"])
    np.asarray(fit(open_image(IMAGES / picture), size, "pad")).tofile(tmp_path / "picture")
    (tmp_path / "all.swift").write_text(program())
    for name in ("asked", "answered"):
        os.mkfifo(tmp_path / name)
    behind = Behind(folder, tmp_path)
    threading.Thread(target=behind.serve, daemon=True).start()
    command = ["swift", "-swift-version", "5", "-suppress-warnings", str(tmp_path / "all.swift")]
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [*command, str(tmp_path), str(folder), question, "24"], env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == expected, done.stderr[-2000:]
    assert len(expected) > 2
    assert behind.calls.count("prefill") == prefills
