"""A model folder -> what it says of its licence, as people read it."""

from pathlib import Path


def licence(folder: Path) -> str:
    """The licence that README.md's front matter names, else the licence file's first line."""
    readme = folder / "README.md"
    if readme.is_file():
        front = readme.read_text(encoding="utf-8", errors="replace").split("---")
        for line in front[1].splitlines() if len(front) > 2 else []:
            key, _, value = line.partition(":")
            if key.strip() in ("license_name", "license") and value.strip():
                return value.strip()
    for path in sorted(folder.glob("LICENSE*")):
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        return f"{path.name}: {next((line.strip() for line in lines if line.strip()), '')}"
    return "not stated in its files"
