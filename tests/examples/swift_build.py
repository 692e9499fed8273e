"""Swift sources -> programs, by Debian 13's compiler, which is unpacked beside the system once.

Modules are what a package's targets are: each is compiled as a whole, in Swift 6 mode, and sees
those before it. What was compiled stays beside the compiler, until its sources change.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
SCRIPT = HERE / "swift_toolchain.sh"
SWIFT = HERE.parents[1] / "examples" / "swift" / "Sources"
# Stand-ins for Apple's modules, in the order in which they see each other.
APPLE = ("Link", "CoreGraphics", "ImageIO", "CoreVideo", "CryptoKit", "CoreML")
BUILDS = 4  # of each module that stay, for checkouts side by side
STRICT = ("-warnings-as-errors",)  # what is ours compiles without a warning


class Toolchain:
    """The compiler, and the modules that were compiled so far."""

    def __init__(self) -> None:
        done = subprocess.run([SCRIPT], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        self.folder = Path(done.stdout.splitlines()[-1])
        self.root = self.folder.parents[3]
        self.libraries = self.root / "usr" / "lib" / "x86_64-linux-gnu"
        self.modules: list[Path] = []  # folders with an object and what an import reads
        self._digest = hashlib.sha256(SCRIPT.read_bytes())

    def _compile(
        self, name: str, sources: Sequence[Path], arguments: Sequence[str | Path], label: str = ""
    ) -> Path:
        """The folder of what comes of sources and all modules so far; compiled where it is new.

        label: of the folder, in the place of the name.
        """
        label, digest = label or name, self._digest.copy()
        digest.update(" ".join(map(str, arguments)).encode())
        for path in sorted(sources):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        folder = self.root / "built" / f"{label}-{digest.hexdigest()[:16]}"
        if folder.exists():
            return folder
        older = sorted(folder.parent.glob(f"{label}-*"), key=lambda path: path.stat().st_mtime)
        for path in older[:-BUILDS]:
            shutil.rmtree(path, ignore_errors=True)
        seen = [word for module in self.modules for word in ("-I", module)]
        command = [self.folder / "swiftc", "-sdk", self.root, "-swift-version", "6", *seen,
                   "-module-name", name.replace("-", "_"), *arguments, *sources]  # fmt: skip
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            done = subprocess.run(
                [str(word) for word in command], capture_output=True, text=True, check=False,
                cwd=work,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-6000:]
            if not folder.exists():
                Path(shutil.copytree(work, f"{work}-whole")).rename(folder)
        return folder

    def module(self, name: str, sources: Sequence[Path], *more: str, label: str = "") -> None:
        """A module that later ones may import."""
        whole = ("-wmo", "-parse-as-library", "-enable-testing", "-emit-module", "-c", "-o")
        folder = self._compile(name, sources, [*whole, f"{name}.o", *more], label)
        self.modules.append(folder)
        self._digest.update(folder.name.encode())

    def program(self, name: str, sources: Sequence[Path], *more: str) -> Path:
        """A program with all modules so far."""
        loader = self.root / "usr" / "lib64" / "ld-linux-x86-64.so.2"
        objects = [path for folder in self.modules for path in folder.glob("*.o")]
        linked = ["-use-ld=lld", "-tools-directory", self.folder, "-Xclang-linker",
                  f"--sysroot={self.root}", "-Xlinker", f"-dynamic-linker={loader}"]  # fmt: skip
        return self._compile(name, sources, [*linked, "-o", name, *more, *objects]) / name

    def manifest(self, path: Path) -> str:
        """What SwiftPM reads of a Package.swift, as JSON."""
        folder = self.root / "usr" / "libexec" / "swift" / "lib" / "swift" / "pm" / "ManifestAPI"
        known = ["-I", str(folder), "-L", str(folder), "-lPackageDescription"]
        program = self.program("manifest", [path], *known, "-package-description-version", "6.0.0")
        paths = f"{self.libraries}:{folder}"
        done = subprocess.run(
            [program, "-fileno", "1"], capture_output=True, text=True, check=True,
            env=self.environment(LD_LIBRARY_PATH=paths),
        )  # fmt: skip
        return done.stdout

    def environment(self, **more: str) -> dict[str, str]:
        """For a program that `program` made."""
        return {**os.environ, "LD_LIBRARY_PATH": str(self.libraries), **more}


def package(
    kit: str = "UIKit", *more: str, library: Path = SWIFT / "EdgeVLM"
) -> Toolchain:  # fmt: skip
    """The toolchain with EdgeVLM compiled, and what it imports; kit: UIKit, or a Mac's AppKit."""
    tools = Toolchain()
    for name in (*APPLE, kit):
        speed = "-O" if name == "CryptoKit" else "-Onone"
        tools.module(name, [HERE / "apple" / f"{name}.swift"], speed)
    described = ("-emit-symbol-graph", "-emit-symbol-graph-dir", ".")
    form = more or ("-O", *described, *STRICT)
    sources = sorted(library.rglob("*.swift"))
    tools.module("EdgeVLM", sources, *form, label=f"EdgeVLM.{kit}")
    return tools
