"""Font files to draw with: families installed from packages -> faces at a size.

python examples/demo_model/fonts.py prints the families that are there, and those held out;
with --packages, the Debian packages that training and evaluation need.
"""

from __future__ import annotations

import subprocess
import sys
from functools import cache, lru_cache
from zlib import crc32

from PIL import ImageFont

# Debian packages; fontconfig lists their files. Pillow's own Aileron needs none.
PACKAGES = """
fonts-adf-accanthis fonts-adf-baskervald fonts-adf-berenis fonts-adf-gillius fonts-adf-ikarius
fonts-adf-irianis fonts-adf-libris fonts-adf-mekanus fonts-adf-romande fonts-adf-switzera
fonts-adf-tribun fonts-adf-universalis fonts-adf-verana fonts-allerta fonts-anonymous-pro
fonts-arapey fonts-averia-sans-gwf fonts-averia-serif-gwf fonts-b612 fonts-breip fonts-cabin
fonts-cantarell fonts-cardo fonts-century-catalogue fonts-clear-sans fonts-cmu fonts-comfortaa
fonts-comic-neue fonts-courier-prime fonts-croscore fonts-crosextra-caladea
fonts-crosextra-carlito fonts-dancingscript fonts-dejavu fonts-dkg-handwriting fonts-dosis
fonts-ebgaramond fonts-essays1743 fonts-eurofurence fonts-fantasque-sans fonts-fanwood
fonts-femkeklaver fonts-firacode fonts-freefont-ttf fonts-gfs-didot fonts-gfs-neohellenic fonts-go
fonts-goudybookletter fonts-hack fonts-inconsolata fonts-inter fonts-jetbrains-mono fonts-joscelyn
fonts-junction fonts-jura fonts-karla fonts-kaushanscript fonts-kristi fonts-lato
fonts-league-mono fonts-league-spartan fonts-leckerli-one fonts-liberation fonts-lindenhill
fonts-linuxlibertine fonts-lobstertwo fonts-manrope fonts-monofur fonts-mononoki fonts-noto-core
fonts-oldstandard fonts-open-sans fonts-opendyslexic fonts-oxygen fonts-paratype fonts-play
fonts-prociono fonts-quattrocento fonts-quicksand fonts-roboto-slab fonts-roboto-unhinted
fonts-sil-charis fonts-sil-gentium fonts-sora fonts-stix fonts-texgyre fonts-tiresias fonts-tuffy
fonts-urw-base35 fonts-vollkorn fonts-yanone-kaffeesatz
"""
OTHER_PACKAGES = (
    "wamerican", "lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04", "ukui-wallpapers",
    "mate-backgrounds", "chromium", "libcairo2",
)  # fmt: skip
NOTO = ("Noto Sans", "Noto Sans Display", "Noto Serif", "Noto Sans Mono", "Noto Serif Display")
NO_LETTERS = ("Symbol", "D050000L", "Keyboard", "Math", "Smallcaps", "Titling", "Keyfont",
              "Bebas", "Dingbats", "Code Retina", "Mono O")  # fmt: skip
COMMON = ("DejaVu Sans", "Liberation Sans", "Liberation Serif", "Roboto", "Open Sans", "Noto Sans",
          "Nimbus Sans", "Nimbus Roman", "Tinos", "Arimo")  # fmt: skip
HELD_OUT = ("Lato", "Carlito", "Gentium", "Fira Code", "PT Serif", "Cabin", "TeX Gyre Pagella",
            "Comic Neue")  # fmt: skip
OWN = "Aileron"  # Pillow's own face, held by the empty path


@cache
def families() -> dict[str, tuple[str, ...]]:
    """Family -> paths of its faces, in a fixed order; Pillow's own has the empty path."""
    command = ["fc-list", "--format", "%{family[0]}|%{variable}|%{file}\n", ":lang=en"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    table: dict[str, list[str]] = {OWN: [""]}
    for line in sorted(set(listed.splitlines())):
        family, variable, path = line.split("|")
        wanted = not family.startswith("Noto") or family in NOTO
        if not wanted or variable == "True" or any(word in family for word in NO_LETTERS):
            continue
        if path.endswith((".ttf", ".otf", ".t1")) and not path.endswith(".t1"):
            table.setdefault(family, []).append(path)
    return {family: tuple(paths) for family, paths in table.items()}


@cache
def trained() -> tuple[str, ...]:
    """Families to train on."""
    return tuple(family for family in families() if family not in HELD_OUT)


def choose(number: int) -> str:
    """The path of a face for a random number: any family alike, the common ones twice."""
    names = trained()
    names += tuple(name for name in (OWN, OWN, *COMMON) if name in names)
    faces = families()[names[number % len(names)]]
    return faces[crc32(str(number).encode()) % len(faces)]


@lru_cache(600)
def face(path: str, pixels: int) -> ImageFont.FreeTypeFont:
    """The face at a size in pixels per em."""
    if not path:
        own = ImageFont.load_default(pixels)
        assert isinstance(own, ImageFont.FreeTypeFont)
        return own
    return ImageFont.truetype(path, pixels, layout_engine=ImageFont.Layout.BASIC)


def main() -> None:
    if "--packages" in sys.argv[1:]:
        print(" ".join([*PACKAGES.split(), *OTHER_PACKAGES]))
        return
    print(f"{len(trained())} families: {', '.join(trained())}")
    missing = [name for name in HELD_OUT if name not in families()]
    print(f"held out: {', '.join(HELD_OUT)}; of these not installed: {', '.join(missing) or '-'}")
    if len(trained()) < 60:
        sys.exit("install the fonts first: apt-get install with the names that --packages prints")


if __name__ == "__main__":
    main()
