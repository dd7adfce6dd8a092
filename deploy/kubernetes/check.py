"""The manifests, rendered and held against the schemas of Kubernetes; a part of ``make lint``.

``python -m deploy.kubernetes.check FOLDER`` leaves what was rendered there. It runs kubectl.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import kubernetes_validate
import yaml

HERE: Final = Path(__file__).resolve().parent
OVERLAYS: Final = sorted(path.name for path in (HERE / "overlays").iterdir())
COMPONENTS: Final = sorted(path.name for path in (HERE / "components").iterdir())
VERSIONS: Final = ("1.30", "1.37")
"""The oldest Kubernetes that knows every field used here, and the newest with schemas."""
CUSTOM: Final = frozenset({"PrometheusRule", "ScaledObject", "ServiceMonitor"})
"""Kinds that operators bring, whose schemas Kubernetes does not have."""
_WITH_COMPONENT: Final = """\
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
namespace: normgate
resources: [{base}]
components: [{component}]
"""

Object = Mapping[str, Any]


def main() -> int:
    """1 if an object does not keep to its schema, after a line for each."""
    found = 0
    for name, text in rendered():
        for problem in problems(yaml.safe_load_all(text)):
            print(f"{name}: {problem}", file=sys.stderr)
            found += 1
        for folder in map(Path, sys.argv[1:]):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.yaml").write_text(text)
    return int(found > 0)


def rendered() -> Iterator[tuple[str, str]]:
    """The name and the objects, as YAML, of each overlay, and of the base with each component."""
    for name in OVERLAYS:
        yield name, render(HERE / "overlays" / name)
    for name in COMPONENTS:
        yield f"base-{name}", render_with(name)


def render(folder: Path) -> str:
    """What ``kubectl apply -k`` would send, as YAML."""
    command = ["kubectl", "kustomize", str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise ValueError(f"{folder} cannot be rendered: {ended.stderr}")
    return ended.stdout


def render_with(component: str) -> str:
    """The base with one component, as an overlay would have it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        text = _WITH_COMPONENT.format(
            base=os.path.relpath(HERE / "base", folder),
            component=os.path.relpath(HERE / "components" / component, folder),
        )
        (folder / "kustomization.yaml").write_text(text)
        return render(folder)


def problems(objects: Iterator[Object]) -> Sequence[str]:
    """What does not keep to the schemas: unknown fields, missing ones, values of another type."""
    found = []
    for one in objects:
        if one["kind"] in CUSTOM:
            continue
        for version in VERSIONS:
            try:
                kubernetes_validate.validate(one, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                where = f"{one['kind']} {one['metadata']['name']}"
                found.append(f"{where} (Kubernetes {version}): {error.json_path}: {error.message}")
    return found


if __name__ == "__main__":
    sys.exit(main())
