"""A model folder -> what it says of its licence, as people read it."""

from pathlib import Path


def licence(folder: Path) -> str:
    """The licence that README.md's front matter names, else the licence file's first line."""
    readme = folder / "README.md"
    if readme.is_file():
        front = readme.read_text(encoding="utf-8", errors="replace").split("---")
        lines = front[1].splitlines() if len(front) > 2 else []
        pairs = [line.partition(":") for line in lines]
        said = {key.strip(): value.strip() for key, _, value in pairs}
        if name := said.get("license_name") or said.get("license"):
            return name
    for path in sorted(folder.glob("LICENSE*")):
        text = path.read_text(encoding="utf-8", errors="replace").split("\n")
        return f"{path.name}: {next((line.strip() for line in text if line.strip()), '')}"
    return "not stated in its files"
