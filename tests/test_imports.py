"""The directions of imports in ``app``, kept by walking its syntax trees."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "app").rglob("*.py"))

# Part of the application -> the parts it may import, beside itself and app.errors.
ALLOWED = {
    "errors": set[str](),
    "settings": set[str](),
    "logs": set[str](),
    "core": set[str](),
    "storage": set[str](),
    "object_storage": {"storage"},
    "store": {"core", "storage", "object_storage"},
    "offline": {"core", "store"},
    "serving": {"core", "store", "settings"},
    "api": {"core", "store", "serving", "settings"},
    "tracing": {"serving", "api"},
    "main": {"core", "store", "serving", "settings", "api", "tracing"},
    "client": set[str](),
    "connection": {"api"},
    "listener": set[str](),
    "server": {
        "connection",
        "listener",
        "core",
        "store",
        "serving",
        "settings",
        "api",
        "main",
        "logs",
    },
    "distributed": {"core", "store", "offline", "serving", "settings", "api", "main", "logs"},
    "cli": {
        "core",
        "store",
        "offline",
        "serving",
        "settings",
        "api",
        "main",
        "server",
        "distributed",
    },
}


def dotted(path: Path) -> str:
    """``app.core.images`` of ``app/core/images.py``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> Iterator[str]:
    """Every module that a file may import, inside functions too; relative names resolved."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            # ``from app import core`` names the module in its alias.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def part(module: str) -> str:
    """``core`` of ``app.core.images``."""
    return module.split(".")[1]


def imports_package(path: Path, package: str) -> bool:
    """Whether a file imports ``package`` or anything in it."""
    return any(name == package or name.startswith(f"{package}.") for name in imported(path))


def in_part(name: str) -> list[Path]:
    """The files of one part of the application."""
    return [path for path in MODULES if dotted(path).startswith(f"app.{name}")]


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_direction(path: Path) -> None:
    """Imports run core <- store <- offline, serving <- api <- main, cli."""
    if dotted(path) == "app":
        assert not list(imported(path))
        return
    own = part(dotted(path))
    parts = {part(name) for name in imported(path) if name.startswith("app.")}

    assert parts - {own, "errors"} <= ALLOWED[own]


@pytest.mark.parametrize("package", ["fastapi", "starlette", "prometheus_client"])
@pytest.mark.parametrize("path", in_part("core"), ids=dotted)
def test_core_knows_no_service(path: Path, package: str) -> None:
    """The core imports neither the web framework nor the metrics."""
    assert not imports_package(path, package)


@pytest.mark.parametrize("package", ["torch", "fastapi"])
def test_batcher_knows_neither_torch_nor_fastapi(package: str) -> None:
    """The batcher batches anything, for anyone."""
    assert not imports_package(ROOT / "app" / "serving" / "batcher.py", package)


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_only_settings_read_the_environment(path: Path) -> None:
    """``os.environ`` and ``os.getenv`` appear in app/settings.py alone."""
    tree = ast.parse(path.read_text())
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names = {name.rpartition(".")[2] for name in imported(path) if name.startswith("os.")}

    reads = (attributes | names) & {"environ", "environb", "getenv", "getenvb"}

    assert bool(reads) == (dotted(path) == "app.settings")


def test_the_walk_sees_imports() -> None:
    """The walk finds imports at the top, in functions, and of packages."""
    assert imports_package(ROOT / "app" / "cli.py", "app.server")
    assert imports_package(ROOT / "app" / "store.py", "app.core")
    assert imports_package(ROOT / "app" / "core" / "images.py", "torch")
    assert not imports_package(ROOT / "app" / "core" / "images.py", "torch.nn")
