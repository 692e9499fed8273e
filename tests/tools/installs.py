"""Build wheel and source archive, install each in empty environments, and ask the demo model.

python tests/tools/installs.py [--python 3.12 ...]     # every Python from 3.11 on that is here
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
VERSIONS = ("3.11", "3.12", "3.13")
LARGEST = 25_000_000  # bytes of either archive
QUESTION = ("generate", "--model", "demo", "--offline", "--prompt", "Describe the image.")
PICTURE = ROOT / "examples" / "images" / "shapes.png"


def interpreters(version: str) -> list[str]:
    """Programs that may be that Python: on the path, and pyenv's where there is one."""
    named = shutil.which(f"python{version}")
    pyenv = shutil.which("pyenv")
    if pyenv is None:
        return [named] if named else []
    root = subprocess.run(
        [pyenv, "root"], capture_output=True, text=True, check=True
    ).stdout.strip()
    own = sorted(Path(root).glob(f"versions/{version}.*/bin/python"))
    return [*map(str, own), *([named] if named else [])]


def python_of(version: str) -> str | None:
    """One of them that runs, and can make an environment with pip in it."""
    for program in interpreters(version):
        command = [program, "-c", "import ensurepip, venv"]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return program
    return None


def built(folder: Path) -> list[Path]:
    """The wheel and the source archive, each small enough."""
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder, ROOT], check=True,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    archives = sorted(folder.iterdir())
    for archive in archives:
        size = archive.stat().st_size
        print(f"{archive.name}: {size / 1e6:.1f} MB")
        if size > LARGEST:
            raise SystemExit(f"{archive.name} is larger than {LARGEST / 1e6:.0f} MB")
    if [path.suffix for path in archives] != [".whl", ".gz"]:
        raise SystemExit(f"built {', '.join(path.name for path in archives)}")
    return archives


def asked(python: str, archive: Path, folder: Path) -> str:
    """What the demo model of a fresh installation answers."""
    subprocess.run([python, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", archive], check=True)
    command = [folder / "bin" / "mlx-vlm-edge", *QUESTION, "--image", PICTURE]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    return done.stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", nargs="*", default=VERSIONS, metavar="VERSION")
    versions = parser.parse_args().python
    answers = set()
    with tempfile.TemporaryDirectory() as temporary:
        wheel, source = built(Path(temporary) / "dist")
        for version in versions:
            if (python := python_of(version)) is None:
                print(f"Python {version}: not on this machine, not tried")
                continue
            # The source archive is the same for all; one Python shows that it builds.
            for archive in (wheel, source) if version == versions[0] else (wheel,):
                place = Path(temporary) / f"{version}{archive.suffix}"
                answers.add(asked(python, archive, place))
                print(f"Python {version}, {archive.name}: installed, answers")
                shutil.rmtree(place)
    print(f"answer: {' / '.join(sorted(answers))}")
    return 0 if len(answers) == 1 and all(answers) else 1


if __name__ == "__main__":
    sys.exit(main())
