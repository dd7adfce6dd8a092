"""Folders of images as tar shards and as Parquet files, with the same names in the same order."""

import io
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import parquet

ROWS_A_GROUP = 5


def names_in(folder: Path) -> list[str]:
    """What lies below a folder, sorted by path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path.relative_to(folder).as_posix() for path in files]


def write_tar(file: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """A tar file with these members."""
    with tarfile.open(file, "w") as archive:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return file


def as_tar_shards(folder: Path, out: Path, *, shards: int = 2) -> Path:
    """The folder's files in WebDataset's way: a class beside each image."""
    out.mkdir()
    for number, names in enumerate(_parted(names_in(folder), shards)):
        members: list[tuple[str, bytes]] = []
        for name in names:
            members.append((name, (folder / name).read_bytes()))
            members.append((f"{name.rpartition('.')[0]}.cls", b"3"))
        write_tar(out / f"part-{number}.tar", members)
    return out


def as_parquet_files(folder: Path, out: Path, *, files: int = 2) -> Path:
    """The folder's files in columns ``name``, ``bytes`` and ``label``, in small row groups."""
    out.mkdir()
    for number, names in enumerate(_parted(names_in(folder), files)):
        table = pyarrow.table(
            {
                "name": names,
                "bytes": [(folder / name).read_bytes() for name in names],
                "label": [3] * len(names),
            }
        )
        parquet.write_table(table, out / f"part-{number}.parquet", row_group_size=ROWS_A_GROUP)
    return out


def _parted(names: Sequence[str], parts: int) -> list[list[str]]:
    return [part.tolist() for part in np.array_split(np.array(names), parts)]
