"""Folders of images: a fixed order, bounded batches, bad files named and left out."""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from app.core.images import DEFAULT_MAX_PIXELS, Preprocessing, load
from app.errors import CalibrationError
from app.offline.reading import Batch, ImageFolder
from tests.conftest import draw_images
from tests.pictures import encoded, jpeg

PREPROCESSING = Preprocessing(resize=16, crop=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def read(
    folder: ImageFolder, *, batch_size: int = 8, max_pixels: int = DEFAULT_MAX_PIXELS
) -> list[Batch]:
    """All batches of a folder."""
    return list(folder.batches(PREPROCESSING, batch_size=batch_size, max_pixels=max_pixels))


def found(images: ImageFolder) -> list[str]:
    """The names of the files, below their folder."""
    return [file.relative_to(images.folder).as_posix() for file in images.files]


def fingerprint_of(root: Path, names: Iterable[str]) -> str:
    """The hash over sorted names and contents, from its definition."""
    summary = hashlib.sha256()
    for name in sorted(names):
        summary.update(name.encode() + b"\0" + hashlib.sha256((root / name).read_bytes()).digest())
    return summary.hexdigest()


def test_images_are_found_in_class_folders(tmp_path: Path) -> None:
    """All suffixes count in any case and at any depth, sorted by path; other files do not."""
    for name in ("b/2.PNG", "b/1.jpeg", "a/x/3.WebP", "0.bmp", "c.gif", "d.JPG"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
    (tmp_path / "labels.txt").write_text("a")
    (tmp_path / "b" / "weights.pt").write_bytes(b"")

    images = ImageFolder.find(tmp_path)

    assert found(images) == ["0.bmp", "a/x/3.WebP", "b/1.jpeg", "b/2.PNG", "c.gif", "d.JPG"]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    """The message names the folder."""
    with pytest.raises(CalibrationError, match="absent is not a folder"):
        ImageFolder.find(tmp_path / "absent")


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    """The message names the suffixes that were looked for."""
    (tmp_path / "notes.txt").write_text("no image")

    with pytest.raises(CalibrationError, match=r"holds no image with a suffix of \.bmp, \.gif"):
        ImageFolder.find(tmp_path)


def test_a_draw_is_seeded(tmp_path: Path) -> None:
    """``max_images`` draws distinct files: the same with the same seed, others with another."""
    draw_images(tmp_path, range(40))

    first, again, other = (
        found(ImageFolder.find(tmp_path, max_images=10, seed=seed)) for seed in (0, 0, 1)
    )

    assert first == again == sorted(set(first))
    assert len(first) == len(other) == 10
    assert first != other
    # Not the first ones: class folders are sorted too.
    assert first != found(ImageFolder.find(tmp_path))[:10]


@pytest.mark.parametrize("max_images", [None, 5, 100])
def test_a_draw_of_enough_takes_all(tmp_path: Path, max_images: int | None) -> None:
    """No bound, or one that is not below the number of files, takes every file."""
    draw_images(tmp_path, range(5))

    assert len(ImageFolder.find(tmp_path, max_images=max_images).files) == 5


@pytest.mark.parametrize("batch_size", [1, 3, 10, 64])
def test_batches_keep_the_order(tmp_path: Path, batch_size: int) -> None:
    """The batches joined are the images of the files in order, whatever the batch size."""
    draw_images(tmp_path, range(10))

    images = ImageFolder.find(tmp_path)
    batches = read(images, batch_size=batch_size)

    expected = torch.stack([load(jpeg(seed), PREPROCESSING) for seed in range(10)])
    assert torch.equal(torch.cat([batch.images for batch in batches]), expected)
    assert [index for batch in batches for index in batch.indices] == list(range(10))
    assert [batch.files for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert sum(batch.files for batch in batches) == 10


def test_a_fingerprint_is_of_names_and_contents(tmp_path: Path) -> None:
    """It is the hash of the definition, and the same wherever the folder lies."""
    names = ["0003.jpg", "z/0001.jpg", "z/0002.jpg"]
    for root in (tmp_path / "here", tmp_path / "there"):
        draw_images(root / "z", (1, 2))
        draw_images(root, (3,))
        images = ImageFolder.find(root)
        read(images)

        fingerprint = images.fingerprint()

        assert fingerprint.sha256 == fingerprint_of(root, names)
        assert (fingerprint.count, fingerprint.unreadable) == (3, ())


def test_a_fingerprint_notices_one_byte(tmp_path: Path) -> None:
    """One byte after the image's end changes the fingerprint."""
    draw_images(tmp_path, range(3))
    prints = []
    for extra in (b"", b"\0"):
        with (tmp_path / "0001.jpg").open("ab") as file:
            file.write(extra)
        images = ImageFolder.find(tmp_path)
        read(images)
        prints.append(images.fingerprint().sha256)

    assert prints[0] != prints[1]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"not an image", "are not an image"),
        (b"", "start with nothing are not an image"),
        (jpeg(0)[:200], "JPEG is truncated or corrupt|JPEG header is truncated"),
        (encoded(0, "TIFF"), "accepted formats"),
        (encoded(0, "PNG", height=100, width=100), "image is 100x100 pixels"),
    ],
    ids=["text", "empty", "truncated", "tiff", "too-large"],
)
def test_an_unreadable_image_is_left_out_and_named(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    """One bad file of a hundred is left out, counted, and named with its reason."""
    draw_images(tmp_path, range(100))
    (tmp_path / "0042.jpg").write_bytes(content)

    images = ImageFolder.find(tmp_path)
    batches = read(images, max_pixels=32 * 32)
    fingerprint = images.fingerprint()

    assert [index for batch in batches for index in batch.indices] == [
        index for index in range(100) if index != 42
    ]
    assert sum(len(batch.images) for batch in batches) == fingerprint.count == 99
    assert len(fingerprint.unreadable) == 1
    assert fingerprint.unreadable[0].startswith("0042.jpg: ")
    assert re.search(reason, fingerprint.unreadable[0])


def test_a_file_that_cannot_be_opened_is_left_out(tmp_path: Path) -> None:
    """A dangling link is one unreadable image, not a failure."""
    draw_images(tmp_path, range(99))
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")

    images = ImageFolder.find(tmp_path)
    read(images)

    assert images.unreadable == ["gone.jpg: No such file or directory"]


def test_a_batch_without_a_readable_image_is_empty(tmp_path: Path) -> None:
    """A batch of one bad file has no images, and still counts its file."""
    draw_images(tmp_path, range(100))
    (tmp_path / "0042.jpg").write_bytes(b"")

    batch = read(ImageFolder.find(tmp_path), batch_size=1)[42]

    assert (len(batch.images), batch.indices, batch.files) == (0, [], 1)


def test_more_than_one_percent_unreadable_is_refused(tmp_path: Path) -> None:
    """Two bad files of a hundred stop the reading, and both are named."""
    draw_images(tmp_path, range(100))
    for name in ("0010.jpg", "0020.jpg"):
        (tmp_path / name).write_bytes(b"broken")

    with pytest.raises(
        CalibrationError, match=r"2 of 100 images .* more than 1%: 0010\.jpg: .*; 0020\.jpg: "
    ):
        read(ImageFolder.find(tmp_path))
