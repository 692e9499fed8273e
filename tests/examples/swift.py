"""A Swift file -> its tree, its structs with the JSON keys they decode, its enums' raw values."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import tree_sitter
import tree_sitter_swift

PARSER = tree_sitter.Parser(tree_sitter.Language(tree_sitter_swift.language()))
UNSAFE = ("try!", "as!")


@dataclass
class Struct:
    """properties: name -> type as written. keys: property -> its JSON key."""

    name: str
    properties: dict[str, str] = field(default_factory=dict)
    keys: dict[str, str] | None = None

    def by_key(self) -> dict[str, str]:
        """JSON key -> Swift type; what CodingKeys leaves out is not decoded."""
        if self.keys is None:
            return dict(self.properties)
        return {key: self.properties.get(name, "") for name, key in self.keys.items()}

    def whole(self) -> bool:
        """Whether CodingKeys, if there are any, name every property and nothing else."""
        return self.keys is None or self.keys.keys() == self.properties.keys()


def parse(source: bytes) -> tree_sitter.Node:
    return PARSER.parse(source).root_node


def walk(node: tree_sitter.Node) -> Iterator[tree_sitter.Node]:
    yield node
    for child in node.children:
        yield from walk(child)


def text(node: tree_sitter.Node | None) -> str:
    return "" if node is None or node.text is None else node.text.decode()


def faults(source: bytes) -> list[str]:
    """Where the grammar does not hold, and what would stop a program instead of telling why."""
    found = []
    for node in walk(parse(source)):
        line = node.start_point[0] + 1
        if node.is_error or node.is_missing:
            found.append(f"line {line}: not Swift: {text(node)[:40]!r}")
        kinds = ("postfix_expression", "type_annotation")
        forced = node.type in kinds and text(node).endswith("!")
        if forced or (node.type in ("try_operator", "as_operator") and text(node) in UNSAFE):
            found.append(f"line {line}: may trap: {text(node)[:40]!r}")
    return found


def structs(path: Path) -> dict[str, Struct]:
    """The structs of a file by name, those of one in another as well."""
    found: dict[str, Struct] = {}
    for node in walk(parse(path.read_bytes())):
        if node.type == "class_declaration" and node.children_by_field_name("declaration_kind"):
            if text(node.child_by_field_name("declaration_kind")) != "struct":
                continue
            made = found.setdefault(_name(node), Struct(_name(node)))
            _read(node.child_by_field_name("body"), made)
    return found


def enums(path: Path) -> dict[str, dict[str, str]]:
    """Raw values of a file's `enum Name: String`, by enum and case."""
    found = {}
    for node in walk(parse(path.read_bytes())):
        if text(node.child_by_field_name("declaration_kind")) == "enum":
            found[_name(node)] = _cases(node.child_by_field_name("body"))
    return found


def literals(path: Path) -> set[str]:
    """Texts of a file that are one word."""
    nodes = [node for node in walk(parse(path.read_bytes())) if node.type == "line_string_literal"]
    words = (text(node).strip('"') for node in nodes)
    return {word for word in words if word != "_" and word.isidentifier()}


def _name(node: tree_sitter.Node) -> str:
    return text(node.child_by_field_name("name"))


def _read(body: tree_sitter.Node | None, struct: Struct) -> None:
    for member in body.children if body is not None else ():
        if member.type == "property_declaration" and "static" not in _modifiers(member):
            annotation = next(c for c in member.children if c.type == "type_annotation")
            struct.properties[_name(member)] = text(annotation).lstrip(": ")
        if member.type == "class_declaration" and _name(member) == "CodingKeys":
            struct.keys = _cases(member.child_by_field_name("body"))


def _modifiers(node: tree_sitter.Node) -> str:
    return " ".join(text(child) for child in node.children if child.type == "modifiers")


def _cases(body: tree_sitter.Node | None) -> dict[str, str]:
    """`case a, b = "c"` -> {"a": "a", "b": "c"}."""
    cases: dict[str, str] = {}
    for entry in body.children if body is not None else ():
        if entry.type != "enum_entry":
            continue
        last = ""
        for child in entry.children:
            if child.type == "simple_identifier":
                last = text(child)
                cases[last] = last
            elif child.type == "line_string_literal":
                cases[last] = text(child).strip('"')
    return cases
