"""Further versions of a stored bundle, whole or damaged in every way that must be refused."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from app.store import BUNDLE_FILE, WEIGHTS_FILE, Store

Document = dict[str, Any]


def add_version(model: Path, version: int, *, of: int = 1) -> Path:
    """A copy of version ``of`` under another number, put in place at once; its folder."""
    staged = model / f".partial-{version}"
    shutil.copytree(model / str(of), staged)
    edit(staged, lambda document: document.update(version=version))
    return staged.rename(model / str(version))


def edit(folder: Path, change: Callable[[Document], object]) -> None:
    """Change the description of a version on disk."""
    file = folder / BUNDLE_FILE
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def move_threshold(folder: Path, *, rank: int) -> None:
    """Make the ``rank``-th calibration score the threshold: 1 finds the fewest images OOD."""
    scores = Store(folder.parents[1]).load(folder.parent.name, int(folder.name)).calibration_scores
    value = float(np.float32(scores[rank - 1]))
    edit(folder, lambda document: document["threshold"].update(k=rank, value=value))


def _corrupt_weights(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS_FILE).read_bytes())
    content[len(content) // 2] ^= 0xFF
    (folder / WEIGHTS_FILE).write_bytes(content)


def _wrong_hash(folder: Path) -> None:
    edit(folder, lambda document: document.update(weights_sha256="0" * 64))


def _wrong_schema(folder: Path) -> None:
    edit(folder, lambda document: document.update(schema_version=99))


def _missing_block(folder: Path) -> None:
    def rename(document: Document) -> None:
        for block in document["norm_ratios"]["blocks"]:
            if block["block"] == document["block"]:
                block["block"] = "layer9"
        document["block"] = "layer9"

    edit(folder, rename)


def _half_written(folder: Path) -> None:
    os.remove(folder / WEIGHTS_FILE)


def _other_golden_score(folder: Path) -> None:
    edit(folder, lambda document: document.update(golden_score=document["golden_score"] * 1.1))


DAMAGES: Mapping[str, tuple[Callable[[Path], None], str]] = {
    "corrupt weights": (_corrupt_weights, "sha256"),
    "wrong hash": (_wrong_hash, "sha256"),
    "wrong schema": (_wrong_schema, "schema_version"),
    "missing block": (_missing_block, "block"),
    "half-written folder": (_half_written, "weights.safetensors"),
    "golden score off": (_other_golden_score, "reference image"),
}
"""What is done to a version's folder, and a word of the reason that must be given."""
