"""Just enough of huggingface_hub and its cache: files come in parts, then under their hashes."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

REPO = "apple/FastVLM-0.5B"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Just enough of huggingface_hub: its cache's layout, parts of files, links to whole ones."""

    files = {  # noqa: RUF012
        "config.json": json.dumps({"model_type": "llava_qwen2"}).encode(),
        "generation_config.json": b'{"eos_token_id": [1, 2]}',
        "tokenizer.json": b"t" * 300,
        "tokenizer_config.json": b"c" * 200,
        "model.safetensors": bytes(3000),
    }

    @staticmethod
    def hash(name: str) -> str:
        content = Hub.files[name]
        if name.endswith(".safetensors"):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def model_info(self, repo: str, **_: object) -> SimpleNamespace:
        siblings = [
            SimpleNamespace(
                rfilename=name, size=len(content), blob_id=self.hash(name),
                lfs=SimpleNamespace(sha256=self.hash(name)) if name.endswith("tensors") else None,
            )
            for name, content in self.files.items()
        ]  # fmt: skip
        return SimpleNamespace(sha=COMMIT, siblings=siblings, tags=["license:mit"], card_data=None)


def download(repo: str, *, allow_patterns: list[str], cache_dir: Path, **_: object) -> str:
    home = Path(cache_dir) / ("models--" + repo.replace("/", "--"))
    snapshot = home / "snapshots" / COMMIT
    for folder in (home / "refs", home / "blobs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (home / "refs" / "main").write_text(COMMIT)
    for name in allow_patterns:
        blob = home / "blobs" / Hub.hash(name)
        if not blob.exists():
            partial = blob.with_name(f"{blob.name}.5cd1.incomplete")
            with partial.open("wb") as file:
                file.write(Hub.files[name])
            shutil.move(partial, blob)
        if not os.path.lexists(snapshot / name):
            (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    return str(snapshot)


def hub_double(root: Path) -> None:
    import huggingface_hub

    os.environ |= {"HF_HUB_CACHE": str(root / "hub"), "HF_HUB_OFFLINE": "0"}
    huggingface_hub.HfApi = Hub  # type: ignore[misc,assignment]
    huggingface_hub.snapshot_download = download  # type: ignore[assignment]
