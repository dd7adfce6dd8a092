"""An environment for each peer: ``python -m benchmarks.peers.environments``.

Each lies in ``build/peers/<name>`` with the versions of ``benchmarks/peers/<name>.txt``. torch and
what NormGate itself needs come from the environment that this runs in, behind the peer's own
packages: the peer keeps its versions, and 5 GB are not copied four times.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Final

from benchmarks.server import ROOT

NAMES: Final = ("mosec", "litserve", "mlserver", "fastapi")
_SHARED: Final = "behind-the-peer.pth"


def folder(name: str) -> Path:
    """Where a peer's environment lies."""
    return ROOT / "build" / "peers" / name


def python(name: str) -> Path:
    """The interpreter of a peer's environment."""
    return folder(name) / "bin" / "python"


def is_made(name: str) -> bool:
    """Whether the environment has what its list of versions says now."""
    stamp = folder(name) / "installed.txt"
    return stamp.is_file() and stamp.read_bytes() == _requirements(name).read_bytes()


def make(name: str) -> None:
    """Make or renew an environment.

    Raises:
        RuntimeError: a package of the peer's own does not come from its environment.
    """
    if is_made(name):
        return
    subprocess.run(
        [sys.executable, "-m", "venv", "--clear", "--without-pip", folder(name)], check=True
    )
    pip = [sys.executable, "-m", "pip", "--python", str(python(name)), "--quiet"]
    pip += ["--disable-pip-version-check", "install", "-r", str(_requirements(name))]
    subprocess.run(pip, check=True)
    # Only now: pip would take what it finds there for installed. A path in a .pth file comes
    # after the folder that the file lies in.
    own = Path(_ask(name, "import sysconfig; print(sysconfig.get_path('purelib'))"))
    (own / _SHARED).write_text(sysconfig.get_path("purelib") + "\n")
    _check(name, own)
    (folder(name) / "installed.txt").write_bytes(_requirements(name).read_bytes())


def versions(name: str) -> dict[str, str]:
    """The versions of the peer's own packages, as pinned."""
    lines = _requirements(name).read_text(encoding="utf-8").splitlines()
    pins = (line.partition("==") for line in lines if "==" in line)
    return {package: version for package, _, version in pins}


def _check(name: str, own: Path) -> None:
    code = "import importlib.metadata as m, sys; print(*(m.version(n) for n in sys.argv[1:]))"
    pinned = versions(name)
    found = _ask(name, code, *pinned).split()
    wrong = [
        f"{package} {version}, pinned {pinned[package]}"
        for package, version in zip(pinned, found, strict=True)
        if version != pinned[package]
    ]
    module = Path(_ask(name, f"import {name}, torch; print({name}.__file__)"))
    if wrong or not module.is_relative_to(own):
        raise RuntimeError(f"environment of {name}: {', '.join(wrong) or module} is not its own")


def _ask(name: str, code: str, *arguments: str) -> str:
    command = [str(python(name)), "-c", code, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _requirements(name: str) -> Path:
    return Path(__file__).with_name(f"{name}.txt")


def main() -> None:
    """Make them all."""
    for name in NAMES:
        make(name)
        print(f"{folder(name)}: {name} {versions(name)[name]}")


if __name__ == "__main__":
    main()
