"""Pictures that the tests draw, as encoded files."""

import io
import zlib

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image


def pixels(seed: int, *, height: int = 32, width: int = 32) -> NDArray[np.uint8]:
    """A smooth random picture ``[H, W, 3]``: coarse noise, scaled up."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    scaled = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(scaled)


def jpeg(seed: int, *, height: int = 32, width: int = 32) -> bytes:
    """The same as a JPEG of quality 75."""
    encoded: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels(seed, height=height, width=width)), quality=75
    )
    return encoded


def encoded(seed: int, image_format: str, *, height: int = 32, width: int = 32) -> bytes:
    """The same in any format that Pillow writes."""
    file = io.BytesIO()
    Image.fromarray(pixels(seed, height=height, width=width)).save(file, image_format)
    return file.getvalue()


def huge_png_header(side: int) -> bytes:
    """The beginning of a PNG that says it is ``side`` x ``side`` pixels, and no pixels."""
    content = bytearray(encoded(0, "PNG"))
    content[16:24] = side.to_bytes(4, "big") * 2
    # The header's checksum has to be right: a wrong one is noticed before the size.
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)
