"""Images from bytes to tensors: formats, orientation, limits, and hostile bytes."""

import hashlib
import io
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, ImageOps
from pydantic import ValidationError

from app.core.images import (
    FORMATS,
    REDUCTIONS,
    REFERENCE_JPEG,
    ImageHeader,
    Preprocessing,
    decode,
    decode_accepted,
    installed_decoder,
    load,
    read_header,
)
from app.core.resizing import Pixels
from app.errors import (
    ImageError,
    ImageTooLargeError,
    UndecodableImageError,
    UnsupportedImageError,
)
from tests.pictures import encoded, huge_png_header, pixels

LOSSLESS: dict[str, dict[str, Any]] = {"PNG": {}, "BMP": {}, "WEBP": {"lossless": True}}
PLAIN = Preprocessing(resize=32, crop=32, mean=(0, 0, 0), std=(1, 1, 1))


def picture(height: int = 24, width: int = 40) -> Image.Image:
    """A drawing that looks different from every side."""
    return Image.fromarray(pixels(0, height=height, width=width))


def encode(image: Image.Image, image_format: str, **options: Any) -> bytes:
    """The image as a file of some format."""
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def oriented(orientation: int, image_format: str = "JPEG") -> bytes:
    """A picture whose EXIF says how it was held."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encode(picture(), image_format, exif=exif)


def by_pillow(data: bytes) -> Pixels:
    """What Pillow alone makes of an upright image."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def assert_close(actual: Pixels, expected: Pixels, *, levels: int) -> None:
    """Same shape, and no channel more than some levels apart."""
    assert actual.shape == expected.shape
    assert np.abs(actual.astype(int) - expected.astype(int)).max() <= levels


SAMPLES: dict[str, bytes] = {
    "JPEG": encode(picture(), "JPEG"),
    "progressive JPEG": encode(picture(), "JPEG", progressive=True),
    "gray JPEG": encode(picture().convert("L"), "JPEG"),
    "CMYK JPEG": encode(picture().convert("CMYK"), "JPEG"),
    "turned JPEG": oriented(6),
    "PNG": encode(picture(), "PNG"),
    "RGBA PNG": encode(picture().convert("RGBA"), "PNG"),
    "palette PNG": encode(picture().convert("P"), "PNG", transparency=0),
    "16-bit PNG": encode(Image.fromarray(np.arange(960, dtype=np.uint16).reshape(24, 40)), "PNG"),
    "turned PNG": oriented(8, "PNG"),
    "WEBP": encode(picture(), "WEBP"),
    "lossless WEBP": encode(picture().convert("RGBA"), "WEBP", lossless=True),
    "animated WEBP": encode(
        picture(), "WEBP", lossless=True, save_all=True, append_images=[picture().rotate(180)]
    ),
    "GIF": encode(picture(), "GIF"),
    "animated GIF": encode(picture(), "GIF", save_all=True, append_images=[picture().rotate(180)]),
    "BMP": encode(picture(), "BMP"),
    "palette BMP": encode(picture().convert("P"), "BMP"),
}


@pytest.mark.parametrize("image_format", LOSSLESS)
def test_lossless_formats(image_format: str) -> None:
    """What was drawn comes back to the last bit."""
    data = encode(picture(), image_format, **LOSSLESS[image_format])

    np.testing.assert_array_equal(decode(data), np.asarray(picture()))


@pytest.mark.parametrize("name", SAMPLES)
def test_every_sample_decodes(name: str) -> None:
    """The pixels are an array of our own: uint8 RGB, contiguous and writable."""
    decoded = decode(SAMPLES[name])

    assert decoded.dtype == np.uint8
    assert decoded.shape in ((24, 40, 3), (40, 24, 3))
    assert decoded.flags.c_contiguous
    assert decoded.flags.writeable


@pytest.mark.parametrize("name", ["JPEG", "progressive JPEG", "gray JPEG", "CMYK JPEG", "WEBP"])
def test_lossy_formats(name: str) -> None:
    """Decoders agree with Pillow's within the rounding of their colour conversion."""
    assert_close(decode(SAMPLES[name]), by_pillow(SAMPLES[name]), levels=2)


@pytest.mark.parametrize("name", ["GIF", "palette BMP"])
def test_palette_formats(name: str) -> None:
    """Palette entries are looked up as Pillow does."""
    np.testing.assert_array_equal(decode(SAMPLES[name]), by_pillow(SAMPLES[name]))


@pytest.mark.parametrize(
    ("name", "still"), [("animated GIF", "GIF"), ("animated WEBP", "lossless WEBP")]
)
def test_animation(name: str, still: str) -> None:
    """Of an animation the first frame counts."""
    np.testing.assert_array_equal(decode(SAMPLES[name]), decode(SAMPLES[still]))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "BMP"])
def test_grayscale(image_format: str) -> None:
    """A gray image has three equal channels."""
    decoded = decode(encode(picture().convert("L"), image_format))

    assert (decoded == decoded[..., :1]).all()
    assert decoded.std() > 10


def test_one_bit() -> None:
    """Black and white are 0 and 255."""
    bits = picture().convert("1")

    decoded = decode(encode(bits, "PNG"))

    np.testing.assert_array_equal(decoded[..., 0] == 255, np.asarray(bits))
    assert set(np.unique(decoded)) == {0, 255}


def test_sixteen_bit_gray() -> None:
    """16 bits are scaled to 8 by their upper half, not clipped."""
    values = np.array([[0, 255, 256], [0x1234, 0x80FF, 0xFFFF]], dtype=np.uint16)

    decoded = decode(encode(Image.fromarray(values), "PNG"))

    assert decoded[..., 0].tolist() == [[0, 0, 1], [0x12, 0x80, 0xFF]]
    assert (decoded == decoded[..., :1]).all()


def test_alpha_over_white() -> None:
    """Transparent is white, half transparent halfway there, opaque itself."""
    colours = np.array([[[200, 0, 40, 0], [200, 0, 40, 51], [200, 0, 40, 255]]], np.uint8)

    decoded = decode(encode(Image.fromarray(colours), "PNG"))

    # A fifth (51 / 255) of the colour and four fifths of 255.
    expected = np.array([[[255, 255, 255], [244, 204, 212], [200, 0, 40]]], np.uint8)
    assert_close(decoded, expected, levels=1)


def test_gray_with_alpha() -> None:
    """A gray image's alpha counts too."""
    values = Image.merge("LA", [Image.new("L", (2, 1), 10), Image.new("L", (2, 1))])
    values.putpixel((1, 0), (10, 255))

    assert decode(encode(values, "PNG")).tolist() == [[[255] * 3, [10] * 3]]


@pytest.mark.parametrize("image_format", ["PNG", "GIF"])
def test_transparent_palette_entry(image_format: str) -> None:
    """Pixels of the transparent palette entry are white, the others keep their colour."""
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)

    decoded = decode(encode(image, image_format, transparency=0))

    assert decoded.tolist() == [[[255, 255, 255], [0, 0, 255]]]


def test_transparent_colour() -> None:
    """The colour that an RGB PNG declares transparent is white."""
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))

    decoded = decode(encode(image, "PNG", transparency=(1, 2, 3)))

    assert decoded.tolist() == [[[255, 255, 255], [9, 9, 9]]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_orientation(orientation: int, image_format: str) -> None:
    """An image stands upright however the camera was held, as Pillow turns it."""
    data = oriented(orientation, image_format)

    assert_close(decode(data), by_pillow(data), levels=2)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_image_loads(orientation: int) -> None:
    """A turned image becomes a tensor like any other."""
    data = oriented(orientation)

    tensor = load(data, PLAIN)

    upright = PLAIN.resize_and_crop(by_pillow(data).copy())
    assert tensor.shape == (3, 32, 32)
    assert (tensor.int() - upright.int()).abs().max() <= 3


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_header_of_a_plain_jpeg(mode: str) -> None:
    """A small JPEG without EXIF has the header that Pillow reads, whoever reads it."""
    file = io.BytesIO()
    Image.new(mode, (40, 30)).save(file, "JPEG")

    header = read_header(file.getvalue())

    assert header == ImageHeader("JPEG", 40, 30, mode, orientation=1)


def test_orientation_in_xmp() -> None:
    """An orientation that stands in XMP alone is followed, as Pillow follows it."""
    file = io.BytesIO()
    packet = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    Image.new("RGB", (40, 30)).save(file, "JPEG", xmp=packet)

    assert read_header(file.getvalue()).orientation == 6
    assert decode(file.getvalue()).shape == (40, 30, 3)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientation_out_of_range(orientation: int) -> None:
    """An orientation that does not exist leaves the image as it is stored."""
    assert_close(decode(oriented(orientation)), decode(SAMPLES["JPEG"]), levels=0)


def test_corrupt_exif() -> None:
    """Broken metadata does not make the pixels unreadable."""
    data = encode(picture(), "JPEG", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff garbage")

    np.testing.assert_array_equal(decode(data), decode(SAMPLES["JPEG"]))


@pytest.mark.parametrize("image_format", FORMATS)
def test_header(image_format: str) -> None:
    """The header tells format, size, mode and orientation."""
    header = read_header(encode(picture(), image_format))

    mode = "P" if image_format == "GIF" else "RGB"
    assert header == ImageHeader(image_format, width=40, height=24, mode=mode, orientation=1)
    assert header.pixels == 960


@pytest.mark.parametrize("read", [read_header, decode])
def test_huge_header(read: Any) -> None:
    """A header of 30000 x 30000 pixels is refused with its size and the limit."""
    data = huge_png_header(30_000)

    with pytest.raises(ImageTooLargeError) as refusal:
        read(data)

    assert str(refusal.value) == ("image is 30000x30000 pixels (900.0 MP); the limit is 50.0 MP")


def test_pixel_limit() -> None:
    """The limit itself is accepted, one pixel less is not."""
    assert decode(SAMPLES["JPEG"], max_pixels=960).shape == (24, 40, 3)
    with pytest.raises(ImageTooLargeError, match="image is 40x24 pixels"):
        decode(SAMPLES["JPEG"], max_pixels=959)
    with pytest.raises(ImageTooLargeError, match="image is 40x24 pixels"):
        load(SAMPLES["JPEG"], PLAIN, max_pixels=959)


def test_a_line_is_not_scaled() -> None:
    """An image so thin that scaling its shorter side makes 50 MP of it is refused, 422 in HTTP."""
    longest = 50_000_000 // 32 // 32
    assert PLAIN.scaled_pixels(1, longest) <= 50_000_000
    assert PLAIN.scaled_pixels(32, 10_000_000) == 320_000_000  # needs no scaling
    with pytest.raises(ImageTooLargeError, match=f"{longest + 1}x1 pixels, with the shorter side"):
        load(encode(picture(height=1, width=longest + 1), "PNG"), PLAIN)


@pytest.mark.parametrize(
    ("data", "begins"),
    [
        (b"", "0 bytes that start with nothing"),
        (b"hello, world", "12 bytes that start with 68656c6c6f2c2077"),
        (b"%PDF-1.7", "8 bytes that start with 255044462d312e37"),
        (b"RIFF\x00\x00\x00\x00WAVE", "12 bytes"),
        (encode(picture(), "TIFF"), "bytes that start with 49492a00"),
        (encode(picture(), "PPM"), "bytes that start with 5036"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "bytes that start with 3c737667"),
    ],
    ids=["empty", "text", "PDF", "WAV", "TIFF", "PPM", "SVG"],
)
def test_unsupported_bytes(data: bytes, begins: str) -> None:
    """Other files are refused by their first bytes; the message lists what is accepted."""
    with pytest.raises(UnsupportedImageError, match=begins) as refusal:
        decode(data)

    assert str(refusal.value).endswith("accepted formats: JPEG, PNG, WEBP, GIF, BMP")


@pytest.mark.parametrize("magic", [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM"])
def test_magic_alone(magic: bytes) -> None:
    """A file that ends after its first bytes has no header to read."""
    with pytest.raises(UndecodableImageError, match="header is truncated or corrupt"):
        decode(magic)


def _chunks(count: int) -> bytes:
    empty = struct.pack(">I4sI", 0, b"teXt", zlib.crc32(b"teXt"))
    content = encode(picture(), "PNG")
    return content[:33] + count * empty + content[33:]


def _comments(count: int) -> bytes:
    content = encode(picture(), "JPEG")
    return content[:2] + count * b"\xff\xfe\x00\x02" + content[2:]


def _fill_bytes(count: int) -> bytes:
    content = encode(picture(), "JPEG")
    return content[:2] + count * b"\xff" + content[2:]


def _runs(count: int) -> bytes:
    """A BMP whose rows are run-length encoded, one pixel a run."""
    pixels = count * b"\x01\x00" + b"\x00\x01"
    start, palette = 14 + 40 + 1024, bytes(1024)
    size = (40, 400, count // 400, 1, 8, 1, len(pixels), 0, 0, 256, 0)
    header = b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start)
    return header + struct.pack("<IiiHHIIiiII", *size) + palette + pixels


@pytest.mark.parametrize("draw", [_chunks, _comments, _fill_bytes, _runs])
def test_millions_of_pieces(draw: Callable[[int], bytes]) -> None:
    """A file in very many pieces is refused before it has kept its thread for minutes."""
    decode(draw(400))
    with pytest.raises(UndecodableImageError, match="more than 100000 pieces"):
        decode(draw(400_000))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1"])
def test_an_image_of_many_strips(mode: str) -> None:
    """The conversion to RGB, strip by strip, has no seams."""
    image = picture(1100, 1000).convert(mode)
    if image.mode.endswith("A"):
        image.putalpha(picture(1100, 1000).convert("L"))
    white = Image.new("RGBA", image.size, "white")
    whole = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")

    decoded = decode(encode(image, "PNG"))

    np.testing.assert_array_equal(decoded, np.asarray(whole))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", ["JPEG", "progressive JPEG", "CMYK JPEG", "PNG", "WEBP", "BMP"])
def test_truncated_image(name: str, share: float) -> None:
    """An image that ends early is refused, never filled up with gray."""
    data = SAMPLES[name]

    with pytest.raises(UndecodableImageError, match="truncated or corrupt"):
        decode(data[: int(len(data) * share)])


def test_corrupt_png() -> None:
    """A changed byte inside a PNG is noticed by its checksum."""
    data = bytearray(SAMPLES["PNG"])
    data[data.index(b"IDAT") + 20] ^= 0xFF

    with pytest.raises(UndecodableImageError, match="PNG is truncated or corrupt"):
        decode(bytes(data))


@pytest.mark.parametrize("name", SAMPLES)
@given(
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=4))),
    length=st.one_of(st.just(1.0), st.floats(0, 1)),
    is_head=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_hostile_bytes(
    name: str, changes: list[tuple[float, bytes]], length: float, is_head: bool
) -> None:
    """Whatever happens to a file, it decodes or is refused as an image."""
    data = bytearray(SAMPLES[name])
    # Most of what can confuse a decoder stands in the first bytes.
    reach = min(len(data), 64) if is_head else len(data)
    for place, replacement in changes:
        start = int(place * reach)
        data[start : start + len(replacement)] = replacement
    hostile = bytes(data[: int(len(data) * length)])

    for scaled in (PLAIN, preprocessing(resize=4, crop=4, scaled_decode=True)):
        with suppress(ImageError):
            tensor = load(hostile, scaled, max_pixels=100_000)
            assert tensor.shape == (3, scaled.crop, scaled.crop)


def preprocessing(**changes: Any) -> Preprocessing:
    """``PLAIN`` with some fields changed, and checked again."""
    return Preprocessing(**(PLAIN.model_dump() | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": 33}, "crop is 33 pixels; it must be at most resize, 32"),
        ({"std": (1, 0, 1)}, "every channel must be above 0"),
        ({"std": (1, 1)}, "std"),
        ({"resize": 0}, "resize"),
        ({"crop": -1}, "crop"),
        ({"interpolation": "lanczos"}, "interpolation"),
        ({"colour": "bgr"}, "colour"),
        ({"flip": True}, "flip"),
    ],
)
def test_invalid_preprocessing(changes: dict[str, Any], message: str) -> None:
    """A preprocessing that makes no sense is refused by the field's name."""
    with pytest.raises(ValidationError, match=message):
        preprocessing(**changes)


def test_image_of_the_right_size_is_untouched() -> None:
    """At the target size nothing is resampled, whatever the interpolation."""
    drawn = pixels(0).copy()

    for interpolation in ("bilinear", "bicubic", "nearest"):
        tensor = preprocessing(interpolation=interpolation).resize_and_crop(drawn)
        np.testing.assert_array_equal(tensor.permute(1, 2, 0).numpy(), drawn)


@pytest.mark.parametrize(("height", "width"), [(32, 48), (48, 32)])
def test_centre_crop(height: int, width: int) -> None:
    """Where the shorter side fits, the middle of the longer one is cut out untouched."""
    drawn = pixels(0, height=height, width=width).copy()

    tensor = PLAIN.resize_and_crop(drawn)

    top, left = (height - 32) // 2, (width - 32) // 2
    expected = drawn[top : top + 32, left : left + 32]
    np.testing.assert_array_equal(tensor.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (32, 32), (20, 31), (375, 500), (500, 375), (7, 300), (300, 1)]
)
@pytest.mark.parametrize(("resize", "crop"), [(32, 32), (40, 33)])
def test_shape(height: int, width: int, resize: int, crop: int) -> None:
    """Any image becomes a contiguous ``[3, crop, crop]`` of uint8."""
    drawn = pixels(0, height=height, width=width).copy()

    tensor = preprocessing(resize=resize, crop=crop).resize_and_crop(drawn)

    assert tensor.shape == (3, crop, crop)
    assert tensor.dtype == torch.uint8
    assert tensor.is_contiguous()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resize_with_antialias(interpolation: str) -> None:
    """The shorter side is scaled as Pillow does, which filters what it shrinks."""
    drawn = pixels(1, height=96, width=144).copy()
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

    tensor = preprocessing(interpolation=interpolation).resize_and_crop(drawn)

    resized = np.asarray(Image.fromarray(drawn).resize((48, 32), filters[interpolation]))
    assert_close(tensor.permute(1, 2, 0).numpy(), resized[:, 8:40], levels=2)


def test_normalise() -> None:
    """A value becomes (v / 255 - mean) / std of its channel, in float32."""
    settings_ = preprocessing(mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 0.25))
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 2, 2)

    normalised = settings_.normalise(images)

    assert normalised.dtype == torch.float32
    assert normalised.shape == (3, 3, 2, 2)
    expected: NDArray[np.float64] = np.array([[0, -1, -4], [0.2, -0.6, -3.2], [1, 1, 0]])
    np.testing.assert_allclose(normalised[:, :, 0, 0].numpy(), expected, atol=1e-6)


def test_load_is_decode_then_resize() -> None:
    """Loading is decoding, resizing and cropping, and nothing else."""
    data = SAMPLES["PNG"]

    assert torch.equal(load(data, PLAIN), PLAIN.resize_and_crop(decode(data)))


@pytest.mark.parametrize(
    ("width", "height", "reduction"),
    [
        (64, 64, 1),
        (126, 4000, 1),
        (127, 4000, 2),
        (4000, 128, 2),
        (252, 252, 2),
        (253, 253, 4),
        (504, 600, 4),
        (505, 505, 8),
        (8000, 8000, 8),
    ],
)
def test_reduction(width: int, height: int, reduction: int) -> None:
    """Twice the target, 64 pixels, are left of the shorter side, of which parts of a pixel count.

    An eighth of 505 pixels is 64 of them; 4:3 or the long side does not matter.
    """
    header = ImageHeader("JPEG", width, height, "RGB", orientation=1)

    assert preprocessing(scaled_decode=True).reduction(header) == reduction
    assert PLAIN.reduction(header) == 1


@pytest.mark.parametrize(
    ("image_format", "mode"), [("PNG", "RGB"), ("WEBP", "RGB"), ("JPEG", "CMYK")]
)
def test_what_pillow_decodes_is_decoded_whole(image_format: str, mode: str) -> None:
    """A scaled decode is of the JPEGs that simplejpeg decodes; it changes no other image."""
    data = encode(picture(height=600, width=800).convert(mode), image_format)
    scaled = preprocessing(scaled_decode=True)

    assert scaled.reduction(read_header(data)) == 1
    assert torch.equal(load(data, scaled), load(data, PLAIN))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("colours", ["4:4:4", "4:2:2", "4:2:0", "gray"])
def test_scaled_pixels(colours: str, progressive: bool, reduction: int) -> None:
    """At each scale there are the pixels of libjpeg-turbo, simplejpeg's and Pillow's build alike.

    The sides are odd: the last block of each colour is a part of one.
    """
    drawn, options = picture(height=203, width=301), {"subsampling": colours}
    if colours == "gray":
        drawn, options = drawn.convert("L"), {}
    data = encode(drawn, "JPEG", progressive=progressive, **options)
    height, width = -(-203 // reduction), -(-301 // reduction)

    pixels = decode_accepted(data, read_header(data), reduction=reduction)

    assert pixels.shape == (height, width, 3)
    assert np.array_equal(pixels, simplejpeg.decode_jpeg(data, min_height=height, min_width=width))
    with Image.open(io.BytesIO(data)) as image:
        image.draft(None, (301 // reduction, 203 // reduction))
        assert np.array_equal(pixels, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_scaled_image_lies_upright(orientation: int) -> None:
    """What was decoded at a scale is turned as the whole image is."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    drawn = picture(height=300, width=500)
    data = encode(drawn, "JPEG", exif=exif, quality=95)
    scaled = preprocessing(scaled_decode=True)
    assert scaled.reduction(read_header(data)) == 4

    whole, found = load(data, PLAIN).float(), load(data, scaled).float()

    assert (whole - found).abs().max() <= 3


def test_a_scaled_decode_is_what_is_resized() -> None:
    """Loading at a scale is that decode, then the resize; and it makes other pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (272, 256, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), "JPEG")
    scaled = preprocessing(scaled_decode=True)

    pixels = simplejpeg.decode_jpeg(data, min_height=68, min_width=64)

    assert pixels.shape == (68, 64, 3)
    assert torch.equal(load(data, scaled), scaled.resize_and_crop(pixels))
    assert not torch.equal(load(data, scaled), load(data, PLAIN))


def test_a_scale_keeps_the_field_of_view() -> None:
    """A scale rounds the sides up, and with them the proportions; the whole image's are kept.

    Of 260 x 781 pixels an eighth is 33 x 98: by these the longer side would become 47 pixels.
    """
    data = encode(picture(height=260, width=781), "JPEG")
    square = preprocessing(resize=16, crop=16, scaled_decode=True)
    pixels = decode_accepted(data, read_header(data), reduction=8)

    assert pixels.shape == (33, 98, 3)
    assert (16 * 781 // 260, 16 * 98 // 33) == (48, 47)
    assert torch.equal(load(data, square), square.resize_and_crop(pixels, shape=(260, 781)))
    assert not torch.equal(load(data, square), square.resize_and_crop(pixels))


def test_a_truncated_jpeg_is_no_image_at_any_scale() -> None:
    """What cannot be decoded whole is not scored from what there is of it."""
    data = encode(picture(height=600, width=800), "JPEG")

    with pytest.raises(UndecodableImageError, match="truncated"):
        load(data[: len(data) // 2], preprocessing(scaled_decode=True))


def test_installed_decoder() -> None:
    """The decoder is known by its libraries and by what it makes of the reference JPEG."""
    decoder = installed_decoder()

    reference = decode(REFERENCE_JPEG.read_bytes())
    assert decoder.reference_sha256 == hashlib.sha256(reference.tobytes()).hexdigest()
    assert decoder.jpeg.startswith("simplejpeg ")
    assert decoder.other.startswith("pillow ")
    assert decoder.scaled_sha256 is None


def test_installed_decoder_at_a_scale() -> None:
    """For a scaled decode it is known by what it makes of the reference at each scale, too."""
    data, digest = REFERENCE_JPEG.read_bytes(), hashlib.sha256()
    for side in (8, 16, 32):
        digest.update(simplejpeg.decode_jpeg(data, min_height=side, min_width=side).tobytes())

    decoder = installed_decoder(scaled=True)

    assert decoder.scaled_sha256 == digest.hexdigest()
    assert decoder.reference_sha256 == installed_decoder().reference_sha256


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_header_decodes_nothing(image_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a header never decodes, so that a small file cannot ask for much memory."""

    def refuse(image: ImageFile.ImageFile) -> None:
        raise AssertionError(f"{image.format} was decoded")

    data = encoded(1, image_format)
    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)

    header = read_header(data)

    assert (header.width, header.height) == (32, 32)


def progressive(scans: int, *, height: int, width: int) -> bytes:
    """A progressive JPEG with so many scans, the last one there again and again."""
    data = encode(picture(height, width), "JPEG", progressive=True)
    last, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:end] + data[last:end] * (scans - data.count(b"\xff\xda")) + data[end:]


@pytest.mark.parametrize(("scans", "is_accepted"), [(10, True), (100, True), (101, False)])
def test_scans_of_a_jpeg_are_bounded(scans: int, is_accepted: bool) -> None:
    """A small JPEG may have up to the limit of scans; one more is refused unread."""
    data = progressive(scans, height=24, width=40)

    if is_accepted:
        assert read_header(data).width == 40
    else:
        with pytest.raises(ImageTooLargeError, match="JPEG has 101 scans; the limit is 100"):
            read_header(data)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(("scans", "is_accepted"), [(100, True), (101, False)])
def test_scans_of_a_larger_jpeg_are_bounded(shift: int, scans: int, is_accepted: bool) -> None:
    """They are found at even and at odd places."""
    data = progressive(scans, height=200, width=300)
    comment = b"\xff\xfe" + (2 + shift).to_bytes(2, "big") + b"." * shift
    data = data[:2] + comment + data[2:]
    assert len(data) > 2**14

    if is_accepted:
        assert read_header(data).width == 300
    else:
        with pytest.raises(ImageTooLargeError, match="JPEG has 101 scans; the limit is 100"):
            read_header(data)


def test_scans_times_pixels_are_bounded() -> None:
    """An image of the largest size may have a usual number of scans, but not the limit of them."""
    usual = progressive(12, height=100, width=100)
    hostile = progressive(13, height=100, width=100)

    assert read_header(usual, max_pixels=10_000).pixels == 10_000
    with pytest.raises(ImageTooLargeError, match=r"13 scans of 0\.0 MP; the limit is 0 MP in all"):
        read_header(hostile, max_pixels=10_000)


def test_what_follows_the_image_is_no_scan() -> None:
    """Cameras append previews and films: what lies behind the end, or in a segment, counts not."""
    data = encode(picture(100, 100), "JPEG", progressive=True)
    trailer = b"\xff\xda" * 1000
    comment = b"\xff\xfe" + (2 + len(trailer)).to_bytes(2, "big") + trailer

    assert read_header(data + trailer, max_pixels=10_000).width == 100
    assert read_header(data[:2] + comment + data[2:], max_pixels=10_000).width == 100
