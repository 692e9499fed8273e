"""Adapters that a request names: in the list of models, in every API, and together in one batch."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from safetensors.numpy import save_file

from mlx_vlm_edge import PrefixCache, load, stream_generate
from mlx_vlm_edge.checkpoint.adapter_choice import AdapterChoice
from mlx_vlm_edge.generation.engine import Engine
from mlx_vlm_edge.loading.load import LoadOptions
from mlx_vlm_edge.loading.variants import Variants
from mlx_vlm_edge.server.app import Served
from mlx_vlm_edge.server.errors import ApiError

from .conftest import IMAGES, httpx, question, running

QUESTION = "Describe the image."
TOKENS = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two adapters of the demo model whose updates are random."""
    root, named = tmp_path_factory.mktemp("adapters"), {}
    for seed, (name, layer, out) in enumerate(
        [("loud", "self_attn.v_proj", 128), ("odd", "self_attn.q_proj", 256)]
    ):
        draw = np.random.default_rng(seed)
        folder = root / name
        folder.mkdir()
        tensors = {
            f"base_model.model.model.layers.{index}.{layer}.lora_{part}.weight": draw.normal(
                0, 0.8, shape
            ).astype(np.float32)
            for index in range(3)
            for part, shape in (("A", (2, 256)), ("B", (out, 2)))
        }
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        named[name] = folder
    return named


@pytest.fixture(scope="module")
def texts(folders):
    """What a model says that is loaded with each adapter, and without."""

    def said(adapter):
        model, processor = load("demo", adapter=adapter)
        picture = IMAGES / "shapes.png"
        stream = stream_generate(model, processor, QUESTION, [picture], max_tokens=TOKENS)
        return "".join(piece.text for piece in stream)

    return {f"demo:{name}" if name else "demo": said(folders.get(name)) for name in ("", *folders)}


@pytest.fixture(scope="module")
def client(demo, folders):
    named = {name: AdapterChoice(folder) for name, folder in folders.items()}
    adapters = Variants("demo", LoadOptions(), named).of(demo[0])
    engine = Engine(*demo, prefix_cache=PrefixCache(), adapters=adapters)
    served = Served("demo", engine=engine, adapters=tuple(named))
    with running(served) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client
    engine.close()


def chat(client, model, **fields):
    body = {"model": model, "messages": [question(QUESTION)], "max_tokens": TOKENS, **fields}
    return client.post("/v1/chat/completions", json=body)


def test_they_are_listed_with_the_model(client, texts):
    listed = client.get("/v1/models").json()["data"]
    assert [entry["id"] for entry in listed] == ["demo", "demo:loud", "demo:odd"]
    assert client.get("/v1/models/demo:odd").json()["id"] == "demo:odd"
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    assert "demo:loud" in json.dumps(schemas["ChatRequest"]["properties"]["model"])


def test_each_request_is_answered_by_its_own_all_at_once(client, texts):
    """Twice, so that the second time the prefix cache knows each prompt."""
    assert len(set(texts.values())) == len(texts)
    for _ in range(2):
        with ThreadPoolExecutor(len(texts) * 2) as pool:
            answers = list(pool.map(lambda name: chat(client, name).json(), [*texts] * 2))
        for answer in answers:
            assert answer["choices"][0]["message"]["content"] == texts[answer["model"]]
    assert all(answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers)
    assert chat(client, None).json()["model"] == "demo"


def test_every_api_takes_one(client, texts):
    image, text = question(QUESTION)["content"]
    url = image["image_url"]["url"]
    source = {"type": "base64", "media_type": "image/png", "data": url.partition(",")[2]}
    content = [{"type": "image", "source": source}, text]
    body = {"model": "demo:loud", "messages": [{"role": "user", "content": content}]}
    answer = client.post("/v1/messages", json={**body, "max_tokens": TOKENS}).json()
    assert (answer["model"], answer["content"][0]["text"]) == ("demo:loud", texts["demo:loud"])
    assert client.post("/v1/messages/count_tokens", json=body).json()["input_tokens"] > 0
    parts = [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": QUESTION}]
    body = {"model": "demo:odd", "input": [{"role": "user", "content": parts}]}
    answer = client.post("/v1/responses", json={**body, "max_output_tokens": TOKENS}).json()
    assert answer["model"] == "demo:odd"
    assert answer["output"][0]["content"][0]["text"] == texts["demo:odd"]
    body = {"model": "demo:odd", "prompt": "A red", "max_tokens": 3}
    assert client.post("/v1/completions", json=body).json()["model"] == "demo:odd"


def test_another_s_name_is_refused_in_one_line(client):
    refused = chat(client, "demo:french")
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["message"] == "the adapters served here are loud, odd"
    assert (error["param"], error["code"]) == ("model", "adapter_not_found")
    assert client.get("/v1/models/demo:french").status_code == 400
    assert chat(client, "other").status_code == 404
    with pytest.raises(ApiError) as nowhere:
        Served("demo").adapter("demo:loud")
    assert nowhere.value.status == 404
