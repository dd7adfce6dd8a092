"""Images from bytes to the uint8 tensors a network is fed: header, decode, resize and crop.

Calibration and serving both go through this module, so that a score has one meaning. JPEG is
decoded by simplejpeg (libjpeg-turbo), everything else by Pillow, whose header parser also
guards the JPEG path: nothing is decoded before its format and pixel count are accepted.
Where the preprocessing says so, libjpeg-turbo decodes large JPEGs at 1/2, 1/4 or 1/8.

Errors::

    ImageError
    ├── UnsupportedImageError   not one of FORMATS
    ├── ImageTooLargeError      more pixels than the limit
    └── UndecodableImageError   truncated or corrupt
"""

import hashlib
import io
import re
import struct
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Final, Literal

import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from app.core.resizing import Interpolation, Pixels, crop_centre, resize
from app.errors import ImageTooLargeError, UndecodableImageError, UnsupportedImageError

# Pillow's own bomb check cannot name the image's size; read_header checks every image instead.
Image.MAX_IMAGE_PIXELS = None

FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
DEFAULT_MAX_PIXELS: Final = 50_000_000
DEFAULT_MAX_SCANS: Final = 100
"""A progressive JPEG as encoders write it has about ten."""
SCANS_OF_LARGEST: Final = 12
"""Scans that a JPEG of the largest accepted size may have; a smaller one may have more."""
MAX_SCALED_PIXELS: Final = 50_000_000
"""Most pixels of an image whose shorter side has been scaled: a line becomes many times its own."""
MAX_READS: Final = 100_000
"""Pieces that a file is read in: Pillow walks from segment to segment, some microseconds each."""
REDUCTIONS: Final = (8, 4, 2)
"""Whole and fast scales of libjpeg-turbo, as divisors of both sides."""
LEAST_REDUCED: Final = 2
"""Shorter side of an image that was decoded smaller, in lengths of what it is then resized to.

From twice the size on, what is left for the resize averages four pixels or more into one: its own
filter goes on deciding what the network sees.
"""
REFERENCE_JPEG: Final = Path(__file__).with_name("reference.jpg")

# ITU T.81, B.1.1: 0xff and another byte that is no stuffing, no restart and stands alone.
_MARKER: Final = re.compile(rb"\xff+([^\x00\x01\xff\xd0-\xd8])", re.DOTALL)
_START_OF_SCAN: Final = b"\xda"
_SCAN: Final = b"\xff" + _START_OF_SCAN
_END_OF_IMAGE: Final = b"\xd9"
_STRIP_PIXELS: Final = 2**20
_SMALL_FILE: Final = 2**16
_COUNTED_BYTES: Final = 2**14
"""Up to here ``bytes.count`` is fast enough for the event loop, and lets no other thread have the
interpreter; of 100 kB numpy takes a sixth of its time."""
_MODES: Final = {"Gray": "L", "YCbCr": "RGB", "RGB": "RGB"}
"""Pillow's names of the colours of a JPEG that the decoder makes RGB."""

# What Pillow and its plugins raise on hostile bytes, beside its documented OSError.
_DECODE_ERRORS: Final = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
)


@dataclass(frozen=True)
class ImageHeader:
    """What an image says of itself before it is decoded."""

    format: str
    width: int
    height: int
    mode: str
    orientation: int

    @property
    def pixels(self) -> int:
        """Width times height."""
        return self.width * self.height

    @property
    def is_common_jpeg(self) -> bool:
        """Whether simplejpeg decodes it; Pillow does where colours are CMYK, and all else."""
        return self.format == "JPEG" and self.mode in ("L", "RGB")

    def reduced(self, by: int) -> "ImageHeader":
        """Of the image as libjpeg decodes it at a scale: a part of a pixel becomes a whole one."""
        if by == 1:
            return self
        return replace(self, width=-(-self.width // by), height=-(-self.height // by))


def read_header(
    data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS, max_scans: int = DEFAULT_MAX_SCANS
) -> ImageHeader:
    """Format, size and EXIF orientation of an image, read without decoding it.

    Args:
        data: the file's bytes.
        max_pixels: largest accepted width times height.
        max_scans: most scans of a JPEG, each of which may visit every pixel again.

    Raises:
        UnsupportedImageError: the first bytes are none of ``FORMATS``.
        ImageTooLargeError: the image has more than ``max_pixels`` pixels, or ``max_scans`` scans.
        UndecodableImageError: the header is truncated or corrupt.
    """
    header = _plain_jpeg_header(data) or _header_by_pillow(data)
    _check_size(data, header, max_pixels=max_pixels, max_scans=max_scans)
    return header


def read_plain_header(
    data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS, max_scans: int = DEFAULT_MAX_SCANS
) -> ImageHeader | None:
    """As :func:`read_header` for a small JPEG that costs no more than its pixels; else None.

    Pillow's formats may hold a thousand times their bytes, compressed, beside few pixels.
    """
    header = _plain_jpeg_header(data)
    if header is not None:
        _check_size(data, header, max_pixels=max_pixels, max_scans=max_scans)
    return header


def _check_size(data: bytes, header: ImageHeader, *, max_pixels: int, max_scans: int) -> None:
    if header.pixels > max_pixels:
        raise ImageTooLargeError(
            f"image is {header.width}x{header.height} pixels ({header.pixels / 1e6:.1f} MP); "
            f"the limit is {max_pixels / 1e6:.1f} MP"
        )
    if header.format == "JPEG":
        _check_scans(data, header, max_scans=max_scans, max_pixels=max_pixels)


def decode(
    data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS, max_scans: int = DEFAULT_MAX_SCANS
) -> Pixels:
    """The upright RGB pixels of an image: first frame, alpha over white, 8 bits a channel.

    Args:
        data: the bytes of a JPEG, PNG, WebP, GIF or BMP file.
        max_pixels: largest accepted width times height, checked before decoding.
        max_scans: most scans of a JPEG, checked before decoding.

    Returns:
        ``[H, W, 3]`` uint8, rotated as the EXIF orientation says.

    Raises:
        ImageError: the bytes are not an image that can be scored.
    """
    return decode_accepted(data, read_header(data, max_pixels=max_pixels, max_scans=max_scans))


def decode_accepted(data: bytes, header: ImageHeader, *, reduction: int = 1) -> Pixels:
    """As :func:`decode`, for an image whose header has been read and accepted.

    Args:
        data: the file's bytes.
        header: its header.
        reduction: 1 or one of ``REDUCTIONS``: the sides of a common JPEG are divided by it and
            rounded up; others are decoded whole.

    Raises:
        UndecodableImageError: the pixels are truncated or corrupt.
    """
    if header.is_common_jpeg:
        pixels = _decode_jpeg(data, header, reduction)
    else:
        pixels = _decode_with_pillow(data)
    # Contiguous: torch takes no view with negative strides, as a mirrored image is.
    return np.ascontiguousarray(_ORIENTATIONS.get(header.orientation, _as_stored)(pixels))


class Preprocessing(BaseModel):
    """How pixels become the network's input; stored in the bundle and applied by both sides.

    ``resize`` scales the shorter side, ``crop`` then cuts the centre square. Images already of
    the right size pass untouched. ``scaled_decode`` makes other pixels, and so other scores.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    resize: int = Field(gt=0, description="Length of the shorter side after scaling, in pixels.")
    crop: int = Field(gt=0, description="Side of the centre crop, in pixels.")
    interpolation: Interpolation = "bilinear"
    antialias: bool = True
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    colour: Literal["rgb"] = "rgb"
    scaled_decode: bool = Field(
        False, description="Whether JPEGs much larger than resize are decoded at 1/2, 1/4 or 1/8."
    )

    @model_validator(mode="after")
    def _crop_fits(self) -> "Preprocessing":
        if self.crop > self.resize:
            raise ValueError(
                f"crop is {self.crop} pixels; it must be at most resize, {self.resize}"
            )
        if min(self.std) <= 0:
            raise ValueError(f"std is {self.std}; every channel must be above 0")
        return self

    def reduction(self, header: ImageHeader) -> int:
        """How many times fewer pixels a side has when it is decoded: 1, 2, 4 or 8.

        The most that leaves the shorter side ``LEAST_REDUCED`` times ``resize``; 1 for all but
        common JPEGs. The orientation does not matter.
        """
        if not (self.scaled_decode and header.is_common_jpeg):
            return 1
        least = LEAST_REDUCED * self.resize
        sides = ((by, header.reduced(by)) for by in REDUCTIONS)
        return next((by for by, side in sides if min(side.width, side.height) >= least), 1)

    def scaled_pixels(self, width: int, height: int) -> int:
        """Pixels of an image of that size once its shorter side is ``resize``, before the crop.

        Raises:
            ImageTooLargeError: scaling, the image being long and thin, would make more of it than
                ``MAX_SCALED_PIXELS``.
        """
        shorter, longer = sorted((width, height))
        if shorter == self.resize:
            return width * height
        scaled = self.resize * (self.resize * longer // max(shorter, 1))
        if scaled > MAX_SCALED_PIXELS:
            raise ImageTooLargeError(
                f"image is {width}x{height} pixels, with the shorter side scaled to {self.resize} "
                f"{scaled / 1e6:.1f} MP; the limit is {MAX_SCALED_PIXELS / 1e6:.1f} MP"
            )
        return scaled

    def resize_and_crop(self, pixels: Pixels, *, shape: tuple[int, int] | None = None) -> Tensor:
        """The network's field of view as ``[3, crop, crop]`` uint8, on the CPU.

        Args:
            pixels: ``[H, W, 3]`` uint8.
            shape: the sides of the whole image where ``pixels`` are of it at a scale, which
                rounds them: the field of view is the whole image's.

        Raises:
            ImageTooLargeError: see :meth:`scaled_pixels`.
        """
        image = pixels.transpose(2, 0, 1)
        if min(image.shape[1:]) != self.resize:
            height, width = shape or image.shape[1:]
            self.scaled_pixels(width, height)
            image = resize(
                pixels,
                self.resize,
                interpolation=self.interpolation,
                antialias=self.antialias,
                shape=shape,
            )
        if image.shape[1:] != (self.crop, self.crop):
            image = crop_centre(image, self.crop)
        # By numpy: torch takes longer to turn so few pixels.
        return torch.from_numpy(np.ascontiguousarray(image))

    def normalise(self, images: Tensor) -> Tensor:
        """Network input from uint8 images.

        Args:
            images: ``[B, 3, H, W]`` uint8, on any device.

        Returns:
            ``[B, 3, H, W]`` float32 on the same device: scaled to 0..1, minus mean, over std.
        """
        return self.normaliser(images.device)(images)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance ``[3]`` of uint8 pixels that :meth:`normalise` turns into 0 and 1."""
        return 255 * torch.tensor(self.mean), (255 * torch.tensor(self.std)) ** 2

    def normaliser(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """:meth:`normalise` for images on one device, where its numbers lie already."""
        mean = torch.tensor(self.mean, device=device).view(3, 1, 1)
        std = torch.tensor(self.std, device=device).view(3, 1, 1)
        return lambda images: (images.float() / 255 - mean) / std


def load(
    data: bytes, preprocessing: Preprocessing, *, max_pixels: int = DEFAULT_MAX_PIXELS
) -> Tensor:
    """Decode, resize and crop in one step: bytes to ``[3, crop, crop]`` uint8.

    Raises:
        ImageError: the bytes are not an image that can be scored.
    """
    return load_accepted(data, read_header(data, max_pixels=max_pixels), preprocessing)


def load_accepted(data: bytes, header: ImageHeader, preprocessing: Preprocessing) -> Tensor:
    """As :func:`load`, for an image whose header has been read and accepted.

    Raises:
        ImageTooLargeError: see :meth:`Preprocessing.scaled_pixels`.
        UndecodableImageError: the pixels are truncated or corrupt.
    """
    reduction = preprocessing.reduction(header)
    pixels = decode_accepted(data, header, reduction=reduction)
    shape = (header.height, header.width) if reduction > 1 else None
    return preprocessing.resize_and_crop(pixels, shape=shape)


class Decoder(BaseModel):
    """The libraries that decode, and what they make of a reference JPEG.

    A threshold is only valid for the pixels it was calibrated on. The hash tells whether this
    installation decodes to the same pixels, whatever the version numbers say; the second is of
    the reference at every scale, where JPEGs are decoded at a scale.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    jpeg: str
    other: str
    reference_sha256: str
    scaled_sha256: str | None = None


@cache
def installed_decoder(*, scaled: bool = False) -> Decoder:
    """The decoder of this installation, and what it makes of the reference at a scale if asked."""
    return Decoder(
        jpeg=f"simplejpeg {version('simplejpeg')}",
        other=f"pillow {version('pillow')}",
        reference_sha256=_reference_sha256(1),
        scaled_sha256=_reference_sha256(*REDUCTIONS) if scaled else None,
    )


def _reference_sha256(*reductions: int) -> str:
    data = REFERENCE_JPEG.read_bytes()
    header, digest = read_header(data), hashlib.sha256()
    for reduction in reductions:
        digest.update(decode_accepted(data, header, reduction=reduction).tobytes())
    return digest.hexdigest()


class _Pieces(io.BytesIO):
    """A file in memory that is read in ``MAX_READS`` pieces at most.

    Millions of empty segments, chunks or runs would keep a thread for minutes.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._left = MAX_READS

    def read(self, size: int | None = -1, /) -> bytes:
        if not self._left:
            raise UndecodableImageError(f"image is in more than {MAX_READS} pieces, the limit")
        self._left -= 1
        return super().read(size)


def _plain_jpeg_header(data: bytes) -> ImageHeader | None:
    """The header of a small JPEG that the decoder can read and that lies upright; else None.

    Pillow takes several times as long for it as the decoder for the pixels of a small image.
    """
    # In a large file there is room for more pieces than anybody should walk through.
    if len(data) > _SMALL_FILE or _sniff(data) != "JPEG":
        return None
    # Pillow takes an orientation from EXIF or, failing that, from XMP.
    if b"Exif" in data or b"Orientation" in data:
        return None
    try:
        height, width, colour, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None  # for Pillow to say what is wrong
    mode = _MODES.get(colour)
    return None if mode is None else ImageHeader("JPEG", width, height, mode, orientation=1)


def _header_by_pillow(data: bytes) -> ImageHeader:
    with _open(data) as image:
        return ImageHeader(
            format=_sniff(data),
            width=image.width,
            height=image.height,
            mode=image.mode,
            orientation=_orientation(image),
        )


def _sniff(data: bytes) -> str:
    if data[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if data[:2] == b"BM":
        return "BMP"
    raise UnsupportedImageError(
        f"{len(data)} bytes that start with {data[:8].hex() or 'nothing'} are not an image; "
        f"accepted formats: {', '.join(FORMATS)}"
    )


def _check_scans(data: bytes, header: ImageHeader, *, max_scans: int, max_pixels: int) -> None:
    # At least as many as there are; looking for the true ones takes as long as decoding.
    scans = _most_scans(data)
    if scans > min(max_scans, SCANS_OF_LARGEST * max_pixels // max(1, header.pixels)):
        scans = _count_scans(data)
    if scans > max_scans:
        raise ImageTooLargeError(f"JPEG has {scans} scans; the limit is {max_scans}")
    # Each scan may visit every pixel, and a blank one takes no more than a few bytes.
    if scans * header.pixels > SCANS_OF_LARGEST * max_pixels:
        raise ImageTooLargeError(
            f"JPEG has {scans} scans of {header.pixels / 1e6:.1f} MP; the limit is "
            f"{SCANS_OF_LARGEST * max_pixels / 1e6:.0f} MP in all"
        )


def _most_scans(data: bytes) -> int:
    """How often a start of a scan can be read anywhere in a JPEG."""
    if len(data) <= _COUNTED_BYTES:
        return data.count(_SCAN)
    # As numbers of two bytes, that begin at even and at odd places.
    wanted = int.from_bytes(_SCAN, sys.byteorder)
    even = np.frombuffer(data, np.uint16, count=len(data) // 2)
    odd = np.frombuffer(data, np.uint16, count=(len(data) - 1) // 2, offset=1)
    return int(np.count_nonzero(even == wanted) + np.count_nonzero(odd == wanted))


def _count_scans(data: bytes) -> int:
    """Scans up to the end of the first image; cameras append more of them, and films."""
    place, scans = 2, 0
    while (marker := _MARKER.search(data, place)) and marker[1] != _END_OF_IMAGE:
        scans += marker[1] == _START_OF_SCAN
        place = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2])
    return scans


def _open(data: bytes) -> Image.Image:
    image_format = _sniff(data)
    try:
        return Image.open(_Pieces(data), formats=[image_format])
    except _DECODE_ERRORS as error:
        raise UndecodableImageError(f"{image_format} header is truncated or corrupt") from error


def _orientation(image: Image.Image) -> int:
    # Corrupt EXIF does not make the pixels unreadable: such an image is taken as stored.
    try:
        # Not image.getexif(): for a PNG that decodes the pixels, which nobody has accepted yet.
        return int(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))
    except _DECODE_ERRORS:
        return 1


def _decode_jpeg(data: bytes, header: ImageHeader, reduction: int) -> Pixels:
    # simplejpeg takes no scale, but the least sides: it chooses the scale that gives just those.
    reduced = header.reduced(reduction)
    least = {"min_height": reduced.height, "min_width": reduced.width} if reduction > 1 else {}
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(data, **least)
    except ValueError as error:
        raise UndecodableImageError(f"JPEG is truncated or corrupt: {error}") from error
    return pixels


def _decode_with_pillow(data: bytes) -> Pixels:
    with _open(data) as image:
        try:
            image.load()
            return _rgb(image)
        except _DECODE_ERRORS as error:
            raise UndecodableImageError(
                f"{image.format} is truncated or corrupt: {error}"
            ) from error


def _rgb(image: Image.Image) -> Pixels:
    """The pixels of any mode, a strip at a time: conversions need several times their memory."""
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        pixels[top:bottom] = _strip_rgb(image.crop((0, top, image.width, bottom)))
    return pixels


def _strip_rgb(image: Image.Image) -> Pixels:
    if image.mode.startswith("I"):
        # 16-bit gray: Pillow's own conversion clips instead of scaling.
        gray = (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def _as_stored(pixels: Pixels) -> Pixels:
    return pixels


# EXIF 2.32, tag 0x0112: where row 0 and column 0 of the stored pixels belong.
_ORIENTATIONS: Final[dict[int, Callable[[Pixels], Pixels]]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: pixels.transpose(1, 0, 2)[:, ::-1],
    7: lambda pixels: pixels.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda pixels: pixels.transpose(1, 0, 2)[::-1],
}
