"""Draws the example pictures: some that a CIFAR-10 classifier knows, some that it cannot.

    python docs/examples/draw.py FOLDER

Every picture is drawn at eight times its size, scaled down to 32 x 32 and stored as a JPEG of
quality 75, like the images the bundled model was trained on.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIDE: Final = 32
LARGE: Final = 256


def main() -> None:
    """Draw every picture into the folder named on the command line."""
    folder = Path(sys.argv[1])
    for name, draw in PICTURES.items():
        draw().save(folder / f"{name}.jpg", quality=75)


def ship() -> Image.Image:
    """A freighter on the sea under a bright sky."""
    picture = _gradient((150, 190, 225), (225, 232, 238))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, 165, LARGE, LARGE), fill=(48, 84, 112))
    pen.polygon([(20, 140), (240, 140), (218, 190), (44, 190)], fill=(140, 36, 32))
    pen.rectangle((24, 134, 238, 146), fill=(30, 32, 40))
    pen.rectangle((44, 88, 92, 136), fill=(235, 235, 230))
    pen.rectangle((54, 66, 84, 90), fill=(215, 215, 212))
    pen.rectangle((62, 44, 76, 68), fill=(190, 60, 40))
    for left in range(104, 220, 28):
        pen.rectangle((left, 108, left + 24, 134), fill=(170 + left // 8, 120, 60))
    pen.line((150, 50, 150, 110), fill=(60, 60, 60), width=5)
    return _finished(picture, noise=6, seed=1)


def truck() -> Image.Image:
    """A lorry on a road."""
    picture = _gradient((198, 214, 226), (222, 224, 220))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, 130, LARGE, 200), fill=(96, 122, 78))
    pen.rectangle((0, 184, LARGE, LARGE), fill=(104, 104, 106))
    pen.rectangle((16, 62, 172, 190), fill=(238, 238, 236))
    pen.rectangle((16, 150, 172, 166), fill=(190, 40, 44))
    pen.polygon([(178, 94), (220, 94), (244, 142), (244, 192), (178, 192)], fill=(176, 30, 36))
    pen.polygon([(192, 104), (216, 104), (232, 140), (192, 140)], fill=(48, 60, 76))
    pen.rectangle((14, 188, 244, 200), fill=(40, 40, 44))
    for centre in (50, 96, 208):
        pen.ellipse((centre - 22, 178, centre + 22, 222), fill=(24, 24, 26))
        pen.ellipse((centre - 9, 191, centre + 9, 209), fill=(150, 150, 150))
    return _finished(picture, noise=6, seed=3)


def automobile() -> Image.Image:
    """A car on a road, seen from its side."""
    picture = _gradient((200, 214, 226), (226, 226, 222))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, 110, LARGE, 180), fill=(92, 116, 76))
    pen.rectangle((0, 166, LARGE, LARGE), fill=(112, 112, 114))
    pen.polygon([(66, 122), (98, 78), (166, 78), (206, 122)], fill=(150, 26, 30))
    pen.polygon([(82, 120), (104, 86), (130, 86), (130, 120)], fill=(60, 74, 90))
    pen.polygon([(138, 120), (138, 86), (162, 86), (190, 120)], fill=(60, 74, 90))
    pen.rounded_rectangle((14, 118, 244, 178), radius=20, fill=(190, 32, 36))
    pen.rectangle((18, 162, 240, 178), fill=(110, 20, 24))
    pen.ellipse((228, 128, 246, 144), fill=(250, 240, 200))
    for centre in (66, 196):
        pen.ellipse((centre - 28, 150, centre + 28, 206), fill=(22, 22, 24))
        pen.ellipse((centre - 14, 164, centre + 14, 192), fill=(170, 170, 174))
    return _finished(picture, noise=6, seed=6)


def noise() -> Image.Image:
    """Colour noise: every pixel on its own."""
    values = np.random.default_rng(4).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    return Image.fromarray(values)


def text() -> Image.Image:
    """A page of text, too small to read."""
    picture = Image.new("RGB", (LARGE, LARGE), (250, 249, 245))
    pen, chance = ImageDraw.Draw(picture), np.random.default_rng(5)
    for top in range(16, LARGE - 16, 22):
        left = 14
        while left < LARGE - 40:
            right = left + int(chance.integers(12, 44))
            pen.rectangle((left, top, min(right, LARGE - 14), top + 9), fill=(40, 40, 44))
            left = right + 9
    return _finished(picture, noise=0, seed=5)


def gradient() -> Image.Image:
    """Nothing but one colour that turns into another."""
    return _finished(_gradient((232, 150, 60), (90, 40, 130)), noise=0, seed=10)


PICTURES: Final[Mapping[str, Callable[[], Image.Image]]] = {
    draw.__name__: draw for draw in (ship, truck, automobile, noise, text, gradient)
}


def _gradient(top: tuple[int, int, int], bottom: tuple[int, int, int]) -> Image.Image:
    share = np.linspace(0, 1, LARGE)[:, None, None]
    colours = (1 - share) * np.array(top) + share * np.array(bottom)
    return Image.fromarray(np.broadcast_to(colours, (LARGE, LARGE, 3)).astype(np.uint8))


def _finished(picture: Image.Image, *, noise: float, seed: int) -> Image.Image:
    """Softened, scaled down, with the grain of a photograph."""
    soft = picture.filter(ImageFilter.GaussianBlur(3))
    small = np.asarray(soft.resize((SIDE, SIDE), Image.Resampling.LANCZOS)).astype(np.float64)
    grain = np.random.default_rng(seed).normal(0, noise, small.shape) if noise else 0.0
    return Image.fromarray((small + grain).clip(0, 255).astype(np.uint8))


if __name__ == "__main__":
    main()
