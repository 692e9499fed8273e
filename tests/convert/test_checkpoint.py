"""PyTorch files are read without torch, exactly, and a hostile or broken one is refused."""

import collections
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_vlm_edge_convert.checkpoint import read_checkpoint
from mlx_vlm_edge_convert.torch_zip import read_torch

from mlx_vlm_edge.errors import UsageError

torch = pytest.importorskip("torch", reason="torch writes the files that are read here")

DTYPES = {
    "float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16, "uint8": mx.uint8,
    "int8": mx.int8, "int16": mx.int16, "int32": mx.int32, "int64": mx.int64, "bool": mx.bool_,
}  # fmt: skip


def save(path: Path, state: object) -> Path:
    torch.save(state, path)
    return path


def rewrite(path: Path, changes: dict[str, bytes | None], compress: bool = False) -> Path:
    """The same zip with members replaced (by the end of their name), added or left out."""
    out = path.with_name(f"changed-{path.name}")
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", kind) as new:
        for name in old.namelist():
            end = next((end for end in changes if name.endswith(end)), None)
            content = old.read(name) if end is None else changes[end]
            if content is not None:
                new.writestr(name, content)
    return out


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_read_bit_for_bit(name, tmp_path):
    values = torch.arange(-6, 6).reshape(3, 4) * 1.37
    tensor = values.to(getattr(torch, name))
    got = read_torch(save(tmp_path / "m.bin", {"w": tensor}))["w"]
    assert got.dtype == DTYPES[name]
    assert got.shape == (3, 4)
    want = tensor.float().numpy() if name == "bfloat16" else tensor.numpy()
    got = got.astype(mx.float32) if name == "bfloat16" else got
    assert np.array_equal(np.array(got), want)


def test_float64_becomes_float32(tmp_path):
    tensor = torch.linspace(0, 1, 7, dtype=torch.float64)
    got = read_torch(save(tmp_path / "m.bin", {"w": tensor}))["w"]
    assert got.dtype == mx.float32
    assert np.array_equal(np.array(got), tensor.float().numpy())


def test_views_scalars_parameters_and_shared_storages(tmp_path):
    base = torch.arange(60.0).reshape(5, 12)
    layer = torch.nn.Linear(3, 2)
    state = collections.OrderedDict(
        whole=base,
        transposed=base.T,
        columns=base[:, 3:7],
        every_other=base[::2, 1::3],
        scalar=torch.tensor(7),
        empty=torch.zeros(0, 4),
        parameter=layer.weight,
        same=base,
    )
    got = read_torch(save(tmp_path / "m.bin", state))
    assert list(got) == list(state)
    for name, tensor in state.items():
        assert got[name].shape == tuple(tensor.shape), name
        assert np.array_equal(np.array(got[name]), tensor.detach().numpy()), name
    assert got["same"] is got["whole"]


def test_a_state_dict_of_a_module_with_its_metadata(tmp_path):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    got = read_torch(save(tmp_path / "m.pth", module.state_dict()))
    assert set(got) == set(module.state_dict())
    nested = read_torch(save(tmp_path / "n.pth", {"state_dict": module.state_dict()}))
    assert set(nested) == set(got)


class Hostile:
    """Unpickled by pickle itself, this makes a file."""

    def __init__(self, target: str, module: str = "os", function: str = "system") -> None:
        self.target, self.module, self.function = target, module, function

    def __reduce__(self):
        return getattr(__import__(self.module), self.function), (f"touch {self.target}",)


@pytest.mark.parametrize(
    ("module", "function", "named"),
    [("os", "system", "(posix|nt).system"), ("builtins", "exec", "__builtin__.exec")],
)
def test_a_malicious_pickle_is_refused_and_not_run(module, function, named, tmp_path):
    mark = tmp_path / "was-run"
    path = save(tmp_path / "m.bin", {"w": torch.ones(2), "x": Hostile(str(mark), module, function)})
    with pytest.raises(UsageError, match=named):
        read_torch(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "name",
    [
        "torch.storage _load_from_bytes",
        "torch load",
        "numpy.core.multiarray _reconstruct",
        "builtins getattr",
        "torch FloatTensor",
        "torch._utils _rebuild_sparse_tensor",
    ],
)
def test_every_global_beyond_the_list_is_refused(name, tmp_path):
    module, function = name.split()
    pickled = b"\x80\x02c" + f"{module}\n{function}\n".encode() + b"."
    path = rewrite(save(tmp_path / "m.bin", {"w": torch.ones(2)}), {"data.pkl": pickled})
    with pytest.raises(UsageError, match=f"{module}.{function}"):
        read_torch(path)


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02}r\xff\xff\xff\x7f.",  # a memo number that would allocate gigabytes
        b"\x80\x02",
        b"",
        b"\x80\x02ccollections\nOrderedDict\n)R(K\x01K\x02u.",  # entries that are no tensors
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.",  # BUILD on an allowed function
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(X\x01\x00\x00\x00wK\x01ttR.",
        b"\x80\x02]q\x00.",
    ],
    ids=["memo", "cut", "empty", "numbers", "build", "arguments", "list"],
)
def test_odd_pickles_are_refused(pickled, tmp_path):
    path = rewrite(save(tmp_path / "m.bin", {"w": torch.ones(2)}), {"data.pkl": pickled})
    with pytest.raises(UsageError):
        read_torch(path)


def pickled_tensor(offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    """data.pkl of {"w": tensor} on storage "0" of ten floats, with any geometry."""

    def ints(numbers):
        return b"(" + b"".join(b"J" + n.to_bytes(4, "little", signed=True) for n in numbers) + b"t"

    def text(word):
        return b"X" + len(word).to_bytes(4, "little") + word.encode()

    storage = (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x0atQ"
    )
    arguments = storage + b"J" + offset.to_bytes(4, "little", signed=True)
    arguments += ints(shape) + ints(strides) + b"\x89" + b"ccollections\nOrderedDict\n)R"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"
    return b"\x80\x02}(" + text("w") + tensor + b"u."


def test_the_written_geometry_is_read(tmp_path):
    path = save(tmp_path / "m.bin", {"w": torch.arange(10.0)})
    got = read_torch(rewrite(path, {"data.pkl": pickled_tensor(1, (2, 3), (4, 1))}))["w"]
    assert got.tolist() == [[1, 2, 3], [5, 6, 7]]


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (8, (3,), (1,)),
        (0, (4, 3), (4, 1)),
        (-1, (3,), (1,)),
        (0, (3,), (-1,)),
        (0, (100_000, 100_000), (0, 0)),
        (0, (3,), (1, 1)),
        (10, (1,), (1,)),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(offset, shape, strides, tmp_path):
    path = save(tmp_path / "m.bin", {"w": torch.arange(10.0)})
    with pytest.raises(UsageError):
        read_torch(rewrite(path, {"data.pkl": pickled_tensor(offset, shape, strides)}))


def test_broken_files_are_refused_in_a_line_naming_them(tmp_path):
    whole = save(tmp_path / "m.bin", {"w": torch.ones(1000)})
    cut = tmp_path / "cut.bin"
    cut.write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(UsageError, match=r"cut\.bin: truncated"):
        read_torch(cut)
    empty = tmp_path / "empty.bin"
    empty.touch()
    with pytest.raises(UsageError, match=r"empty\.bin: neither"):
        read_torch(empty)
    for changes in ({"data/0": b"1234"}, {"data/0": None}):
        with pytest.raises(UsageError, match="the data of w is damaged"):
            read_torch(rewrite(whole, changes))
    with pytest.raises(UsageError, match="big-endian"):
        read_torch(rewrite(whole, {"byteorder": b"big"}))
    with pytest.raises(UsageError, match="not a PyTorch checkpoint"):
        read_torch(rewrite(whole, {"data.pkl": None}))


def test_deflated_files_and_expanded_tensors_are_read(tmp_path):
    state = {"w": torch.arange(1000.0), "row": torch.arange(3.0).expand(4, 3)}
    whole = save(tmp_path / "m.bin", state)
    for path in (whole, rewrite(whole, {}, compress=True)):
        got = read_torch(path)
        assert np.array_equal(np.array(got["w"]), state["w"].numpy())
        assert np.array_equal(np.array(got["row"]), state["row"].numpy())
    content = bytearray(rewrite(whole, {}, compress=True).read_bytes())
    start = content.index(b"data/0") + 60
    content[start : start + 40] = bytes(40)
    damaged = tmp_path / "damaged.bin"
    damaged.write_bytes(content)
    with pytest.raises(UsageError, match="the data of w is damaged"):
        read_torch(damaged)


def test_a_sign_that_torch_left_for_later(tmp_path):
    """A view with the neg bit: its storage holds the numbers with the other sign."""
    tensor = torch._neg_view(torch.arange(4.0))
    assert tensor.is_neg()
    half = torch._neg_view(torch.arange(4.0).bfloat16())
    got = read_torch(save(tmp_path / "m.bin", {"w": tensor, "half": half}))
    assert got["w"].tolist() == [-0.0, -1, -2, -3]
    assert got["half"].tolist() == [-0.0, -1, -2, -3]
    complex_view = torch.view_as_complex(torch.arange(8.0).reshape(4, 2)).conj().imag
    assert complex_view.is_neg()
    got = read_torch(save(tmp_path / "n.bin", {"w": complex_view}))
    assert got["w"].tolist() == [-1, -3, -5, -7]


def deep(levels: int) -> bytes:
    """A tuple in a tuple in a tuple ..., as a key of a dict."""
    return b"\x80\x02})" + b"\x85" * levels + b"K\x01s."


def shared(levels: int, close: bytes) -> bytes:
    """A tuple of the tuple before, twice, each time: two to the power of `levels` in all."""
    return b"\x80\x04}" + b")\x94" + b"2\x86\x94" * levels + close


def remembered(levels: int) -> bytes:
    """The same through the memo: each tuple is fetched twice."""
    twice = b"h\x00h\x00\x86"
    return b"\x80\x02}(K\x00q\x000" + (twice + b"q\x000") * levels + twice + b"K\x01s."


@pytest.mark.parametrize(
    ("pickled", "says"),
    [
        (deep(400_000), "a key that is no text"),
        (shared(60, b"K\x01s."), "DUP"),
        (remembered(60), "a damaged pickle"),
        (b"\x80\x04(\x91.", "FROZENSET"),
        (b"\x80\x02" + b"]" * 1_100_000 + b".", "operations"),
        (b"\x80\x02\x8b" + (2**31 - 1).to_bytes(4, "little") + b".", "damaged"),
    ],
    ids=["deep", "shared", "memo", "set", "operations", "long"],
)  # fmt: skip
def test_hostile_pickles_cost_nothing(pickled, says, tmp_path):
    """The first ended the process, the second and third ran for ever, in hash and in repr."""
    path = rewrite(save(tmp_path / "m.bin", {"w": torch.ones(2)}), {"data.pkl": pickled})
    with pytest.raises(UsageError, match=says):
        read_torch(path)


def test_a_word_that_unpacks_to_gigabytes_is_not_read(tmp_path):
    whole = save(tmp_path / "m.bin", {"w": torch.ones(2)})
    path = rewrite(whole, {"byteorder": b"little" + b" " * 3_000_000}, compress=True)
    assert path.stat().st_size < 20_000
    with pytest.raises(UsageError, match="big-endian"):
        read_torch(path)


def test_thousands_of_views_of_one_storage_are_counted(tmp_path):
    base = torch.zeros(200_000)
    state = {f"w{i}": base[i : i + 150_000] for i in range(300)}
    with pytest.raises(UsageError, match="180,000,000 bytes of weights"):
        read_torch(save(tmp_path / "m.bin", state))


def test_damaged_zips_are_one_line(tmp_path):
    whole = save(tmp_path / "m.bin", {"w": torch.arange(64.0), "v": torch.ones(3, 3)})
    content = np.frombuffer(whole.read_bytes(), np.uint8)
    rng = np.random.default_rng(0)
    for _ in range(150):
        damaged = content.copy()
        damaged[rng.integers(0, len(content), 4)] = rng.integers(0, 256, 4)
        path = tmp_path / "damaged.bin"
        path.write_bytes(damaged.tobytes()[: rng.choice([len(content), len(content) - 300])])
        try:
            read_torch(path)
        except UsageError as error:
            assert str(error).isprintable()  # noqa: PT017  (either outcome is right)


def test_the_old_format_and_torchscript_say_how_to_convert(tmp_path):
    old = tmp_path / "old.bin"
    torch.save({"w": torch.ones(2)}, old, _use_new_zipfile_serialization=False)
    with pytest.raises(UsageError, match="weights_only=True"):
        read_torch(old)
    path = save(tmp_path / "m.pt", {"w": torch.ones(2)})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(archive.namelist()[0].replace("data.pkl", "constants.pkl"), b"")
    with pytest.raises(UsageError, match=r"state_dict\(\)"):
        read_torch(path)


def test_what_is_not_a_state_dict_is_refused(tmp_path):
    for state in ([torch.ones(2)], {"w": 3}, {1: torch.ones(2)}, {"a": {"w": torch.ones(2)}}):
        with pytest.raises(UsageError, match="state"):
            read_torch(save(tmp_path / "m.bin", state))


def test_shards_are_found_by_the_index(tmp_path):
    save(tmp_path / "pytorch_model-00001-of-00002.bin", {"a": torch.ones(2)})
    save(tmp_path / "pytorch_model-00002-of-00002.bin", {"b": torch.zeros(3)})
    save(tmp_path / "training_args.bin", [1])
    assert set(read_checkpoint(tmp_path)) == {"a", "b"}
    index = tmp_path / "pytorch_model.bin.index.json"
    names = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    index.write_text(json.dumps({"weight_map": names}))
    save(tmp_path / "pytorch_model.bin", {"stale": torch.ones(1)})
    assert set(read_checkpoint(tmp_path)) == {"a", "b"}
    (tmp_path / names["b"]).unlink()
    with pytest.raises(UsageError, match="00002-of-00002"):
        read_checkpoint(tmp_path)


def test_a_name_in_two_shards_and_a_folder_without_weights(tmp_path):
    with pytest.raises(UsageError, match="no weights"):
        read_checkpoint(tmp_path)
    for number in (1, 2):
        save(tmp_path / f"pytorch_model-0000{number}-of-00002.bin", {"a": torch.ones(2)})
    with pytest.raises(UsageError, match="another shard"):
        read_checkpoint(tmp_path)


def test_a_truncated_safetensors_shard_is_refused(apple):
    path = apple / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(UsageError, match="truncated"):
        read_checkpoint(apple)


def test_reading_imports_no_torch(apple, tmp_path):
    shutil.rmtree(apple)
    save(tmp_path / "pytorch_model.bin", {"w": torch.ones(2)})
    program = (
        "import sys, pathlib; from mlx_vlm_edge_convert.checkpoint import read_checkpoint; "
        f"print(list(read_checkpoint(pathlib.Path({str(tmp_path)!r})))); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'huggingface_hub')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['w']"


def test_pickle_itself_would_have_run_the_hostile_file(tmp_path):
    """Holds the fixture to its word: the refusal above is a refusal of something."""
    mark = tmp_path / "was-run"
    pickle.loads(pickle.dumps(Hostile(str(mark))))
    assert mark.exists()
