"""docs/bundle.schema.json, for the tests of bundles."""

import json
from pathlib import Path
from typing import Any

import jsonschema

SCHEMA = Path(__file__).parents[3] / "docs" / "bundle.schema.json"


def faults(content: Any) -> list[str]:
    """Where a manifest is not as the schema has it."""
    schema = json.loads(SCHEMA.read_text())
    found = jsonschema.Draft202012Validator(schema).iter_errors(content)
    return [f"{fault.json_path}: {fault.message}" for fault in found]
