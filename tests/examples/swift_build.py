"""Swift sources -> programs, by Debian 13's compiler, which is unpacked beside the system once.

Modules are what a package's targets are: each is compiled as a whole, in Swift 6 mode, and sees
those before it. What was compiled stays beside the compiler, until its sources change.
"""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
SCRIPT = HERE / "swift_toolchain.sh"
SWIFT = HERE.parents[1] / "examples" / "swift" / "Sources"
# Stand-ins for Apple's modules, in the order in which they see each other.
APPLE = ("Link", "CoreGraphics", "ImageIO", "CoreVideo", "CryptoKit", "CoreML", "UIKit")
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

    def _compile(self, name: str, sources: Sequence[Path], arguments: Sequence[str | Path]) -> Path:
        """The folder of what comes of sources and all modules so far; compiled where it is new."""
        digest = self._digest.copy()
        digest.update(" ".join(map(str, arguments)).encode())
        for path in sorted(sources):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        folder = self.root / "built" / f"{name}-{digest.hexdigest()[:16]}"
        if not (folder / "whole").exists():
            for older in folder.parent.glob(f"{name}-*"):
                shutil.rmtree(older, ignore_errors=True)
            folder.mkdir(parents=True)
            seen = [word for module in self.modules for word in ("-I", module)]
            command = [self.folder / "swiftc", "-sdk", self.root, "-swift-version", "6", *seen,
                       "-module-name", name.replace("-", "_"), *arguments, *sources]  # fmt: skip
            done = subprocess.run(
                [str(word) for word in command], capture_output=True, text=True, check=False,
                cwd=folder,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-6000:]
            (folder / "whole").touch()
        self._digest = digest
        return folder

    def module(self, name: str, sources: Sequence[Path], *more: str) -> None:
        """A module that later ones may import."""
        whole = ("-wmo", "-parse-as-library", "-enable-testing", "-emit-module", "-c", "-o")
        self.modules.append(self._compile(name, sources, [*whole, f"{name}.o", *more]))

    def program(self, name: str, sources: Sequence[Path], *more: str) -> Path:
        """A program with all modules so far."""
        loader = self.root / "usr" / "lib64" / "ld-linux-x86-64.so.2"
        objects = [path for folder in self.modules for path in folder.glob("*.o")]
        linked = ["-use-ld=lld", "-tools-directory", self.folder, "-Xclang-linker",
                  f"--sysroot={self.root}", "-Xlinker", f"-dynamic-linker={loader}"]  # fmt: skip
        return self._compile(name, sources, [*linked, "-o", name, *more, *objects]) / name

    def environment(self, **more: str) -> dict[str, str]:
        """For a program that `program` made."""
        return {**os.environ, "LD_LIBRARY_PATH": str(self.libraries), **more}


def package() -> Toolchain:
    """The toolchain with EdgeVLM compiled, and what it imports."""
    tools = Toolchain()
    for name in APPLE:
        tools.module(
            name, [HERE / "apple" / f"{name}.swift"], "-O" if name == "CryptoKit" else "-Onone"
        )
    tools.module("EdgeVLM", sorted((SWIFT / "EdgeVLM").rglob("*.swift")), "-O", *STRICT)
    return tools
