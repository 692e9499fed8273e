"""The Swift package: it parses, it cannot trap on what it is given, and its names are a bundle's.

No Swift compiler is needed: the grammar is tree-sitter's. The names are held against manifests of
bundles that were exported just now, in both directions.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest

pytest.importorskip("tree_sitter_swift", reason="Swift is parsed with tree-sitter's grammar")

from mlx_vlm_edge.generation.conversation import RESERVE
from mlx_vlm_edge.picture.image import MAX_PIXELS, Strategy

from . import swift

PACKAGE = Path(__file__).parents[2] / "examples" / "swift"
LIBRARY = PACKAGE / "Sources" / "EdgeVLM"
MANIFEST = "Models/Manifest.swift"
APP = PACKAGE.parent / "app"
FILES = sorted(path for folder in (PACKAGE, APP) for path in folder.rglob("*.swift"))
NUMBERS = {"Int": int, "Double": (int, float), "String": str, "Bool": bool}
PORTS = ("inputs", "outputs", "states")


@pytest.fixture(scope="session")
def manifests(bundles, demo_bundles) -> list[dict[str, Any]]:
    folders = [*bundles.values(), *demo_bundles.values()]
    return [json.loads((folder / "manifest.json").read_text()) for folder in folders]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_is_swift_and_cannot_trap_by_force(path):
    assert swift.faults(path.read_bytes()) == []


@pytest.mark.parametrize(
    "source", ["let a = b!", "let a = try! b()", "let a = b as! C", "var a: B!", "func a( {"]
)
def test_what_must_not_be_is_seen(source):
    assert swift.faults(source.encode())


def test_the_files_are_those_that_the_readme_names():
    for folder, sources in ((PACKAGE, "Sources"), (APP, "Logic/Sources")):
        told, files = (folder / "README.md").read_text(), (folder / sources).rglob("*.swift")
        assert [path.name for path in files if path.name not in told] == []


@pytest.mark.parametrize(("file", "name", "python"), [
    ("PromptPlan.swift", "reserve", RESERVE), ("Pictures/Picture.swift", "mostPixels", MAX_PIXELS),
])  # fmt: skip
def test_limits_are_those_of_the_python_package(file, name, python):
    (number,) = re.findall(rf"static let {name} = ([\d_]+)", (LIBRARY / file).read_text())
    assert int(number) == python


def test_every_file_says_what_it_is_for():
    for path in FILES:
        lines = path.read_text().splitlines()
        if lines[0].startswith("// swift-tools-version"):
            lines = lines[1:]
        opening = next(i for i, line in enumerate(lines) if not line.startswith("//"))
        assert 1 <= opening <= 6, path.name
        assert max(map(len, lines)) <= 100, path.name


# Types of SwiftUI that a model's or an app's might be called like.
SWIFTUI = """
Alignment Angle Animation App Axis Binding Button Canvas Color Commands Divider Edge Environment
Font Form Gauge Gesture Gradient Grid Group Image Label Layout Link List Material Menu Namespace
Path Picker Scene Section Settings Shader Shape Slider Spacer State Stepper Table Text Toggle
Transaction Transition View Window
"""


def test_no_public_type_is_called_like_one_of_swiftuis():
    """A file that imports both could not name it."""
    known = set()
    for path in (*LIBRARY.rglob("*.swift"), *(APP / "Logic").rglob("*.swift")):
        words = re.findall(
            r"^public (?:final )?(?:struct|class|enum|actor|protocol) (\w+)", path.read_text(), re.M
        )
        known.update(words)
    assert {"AppSettings", "Session", "Picture"} <= known
    assert known & {*SWIFTUI.split()} == set()


def decoded(value: Any, kind: str, structs: dict[str, swift.Struct], seen: set, at: str) -> list:
    """What JSONDecoder would refuse in `value`, and keys that no struct has; `seen` gets the
    keys that had a value."""
    if kind.endswith("?"):
        return [] if value is None else decoded(value, kind[:-1], structs, seen, at)
    if kind in NUMBERS:
        right = isinstance(value, NUMBERS[kind]) and (kind == "Bool") == isinstance(value, bool)
        return [] if right else [f"{at}: {value!r} is no {kind}"]
    if kind.startswith("[String:"):
        inner, items = kind[len("[String:") : -1].strip(), value.items()
        return [f for key, v in items for f in decoded(v, inner, structs, seen, f"{at}.{key}")]
    if kind.startswith("["):
        return [f for v in value for f in decoded(v, kind[1:-1], structs, seen, f"{at}[]")]
    keys, found = structs[kind].by_key(), []
    found += [f"{at}.{key}: {kind} does not know it" for key in value.keys() - keys.keys()]
    for key, inner in keys.items():
        if value.get(key) is not None:
            seen.add((kind, key))
        if key not in value and not inner.endswith("?"):
            found.append(f"{at}.{key}: is not there, and {kind} needs it")
        elif key in value:
            found += decoded(value[key], inner, structs, seen, f"{at}.{key}")
    return found


def check_manifest(library: Path, manifests: list[dict[str, Any]]) -> list[str]:
    """Where the Swift structs and the manifests differ."""
    structs, seen = swift.structs(library / MANIFEST), set()
    if found := [f"{name}: CodingKeys" for name, each in structs.items() if not each.whole()]:
        return found
    for number, content in enumerate(manifests):
        found += decoded(content, "Manifest", structs, seen, f"manifest {number}")
    known = {(name, key) for name, struct in structs.items() for key in struct.by_key()}
    # Only families that cut pictures into tiles have the one, only --embedding-bits the other.
    unseen = known - seen - {("EncoderPart", "tiles"), ("EmbeddingsFile", "bits")}
    return found + [f"{name}.{key}: no manifest has it" for name, key in sorted(unseen)]


def names(manifests: list[dict[str, Any]], parts: tuple[str, ...]) -> tuple[set[str], set[str]]:
    """Functions of some parts of all manifests, and the names that go in and out of them."""
    functions, ports = set(), set()
    for content in manifests:
        for part in content["parts"].keys() & {*parts}:
            for function, entry in content["parts"][part]["functions"].items():
                functions.add(function)
                ports |= {port["name"] for kind in PORTS for port in entry[kind]}
    return functions, ports


def values(content: Any) -> set[str]:
    """Every text in a manifest that is not a key."""
    if isinstance(content, str):
        return {content}
    inner = content.values() if isinstance(content, dict) else content
    return {v for x in inner for v in values(x)} if isinstance(content, dict | list) else set()


def check_names(library: Path, manifests: list[dict[str, Any]]) -> list[str]:
    """Names of functions, inputs and outputs in the Swift code that no package has."""
    enums = swift.enums(library / MANIFEST)
    every = ("vision", "connector", "decoder")
    _, vision = names(manifests, every[:2])
    _, decoder = names(manifests, every[2:])
    wanted = {**dict.fromkeys(enums["FunctionName"].values(), names(manifests, every)[0])}
    found = [name for name, known in wanted.items() if name not in known]
    found += [name for name in enums["VisionName"].values() if name not in vision]
    found += [name for name in enums["DecoderName"].values() if name not in decoder]
    cached = {*decoder, *(name[len("new_") :] for name in decoder if name.startswith("new_"))}
    for prefix in enums["DecoderPrefix"].values():
        if not any(name.startswith(prefix) for name in cached):
            found.append(prefix)
    rest = vision | decoder
    rest -= {*enums["VisionName"].values(), *enums["DecoderName"].values()}
    found += [name for name in rest if not name.startswith((*enums["DecoderPrefix"].values(),))]
    told = {text for content in manifests for text in values(content)}
    for file in ("Models/Decoder.swift", "Models/VisionEncoder.swift"):
        found += sorted(swift.literals(library / file) - told)
    return found


def test_the_structs_and_the_manifest_have_the_same_keys_and_types(manifests):
    assert check_manifest(LIBRARY, manifests) == []


def test_every_name_is_one_of_a_package(manifests):
    assert check_names(LIBRARY, manifests) == []


def test_the_choices_are_those_of_the_exporter():
    from mlx_vlm_edge_convert.coreml import manifest

    assert {*get_args(Strategy)} <= swift.literals(LIBRARY / "Pictures" / "Resampling.swift")
    units = swift.enums(LIBRARY / "Models" / "Packages.swift")["ComputeUnits"]
    assert {*manifest.UNITS.values()} <= units.keys()
    assert f"known = {manifest.FORMAT}\n" in (LIBRARY / MANIFEST).read_text()


def test_the_embeddings_file_has_what_is_read_of_it(bundles):
    entry = swift.structs(LIBRARY / "Models" / "Embeddings.swift")["Entry"]
    raw = (bundles["stateful"] / "embeddings.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert decoded(header["embeddings"], "Entry", {"Entry": entry}, set(), "header") == []
    assert header["embeddings"]["dtype"] == "F16"


PLANTED = [
    (MANIFEST, '"kv_heads"', '"kv_head"'),
    (MANIFEST, '"minimum_os"', '"minimumOS"'),
    (MANIFEST, "let chunk: Int", "let chunk: String"),
    (MANIFEST, "let eos: [Int]", "let eos: Int?"),
    (MANIFEST, "        public let resample: String\n", ""),
    (MANIFEST, "public let context: Int?", "public let context: Int?\n let more: Int?"),
    (MANIFEST, '"visual_tokens"', '"visual_token"'),
    (MANIFEST, "case main, prefill, decode", "case main, prefill, generate"),
    (MANIFEST, "position, pick", "positions, pick"),
    (MANIFEST, "    case keys\n", "    case caches\n"),
    ("Models/Decoder.swift", '"stateful"', '"states"'),
    ("Models/VisionEncoder.swift", "VisionName.visualTokens.rawValue", '"tokens"'),
]


@pytest.mark.parametrize(("file", "old", "new"), PLANTED, ids=[p[2].strip()[:30] for p in PLANTED])
def test_a_name_that_was_changed_is_found(manifests, tmp_path, file, old, new):
    library = shutil.copytree(LIBRARY, tmp_path / "EdgeVLM")
    source = (library / file).read_text()
    assert old in source
    (library / file).write_text(source.replace(old, new))
    assert check_manifest(library, manifests) + check_names(library, manifests)
