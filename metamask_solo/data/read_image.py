"""One way to read an image, whatever lies in its file: always 8-bit RGB.

- JPEG, PNG, WebP, BMP, TIFF and GIF are read, of several frames the first;
- transparency of any kind goes onto one colour, white by default;
- integers of more than 8 bits are scaled by the range of the file, never clipped; signed ones,
  which only TIFF has, are refused;
- where a TIFF says that 0 is white, it is;
- floating-point values in 0..1 are scaled, others in 0..255 are taken as they are, all else is
  refused.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from omegaconf import DictConfig, OmegaConf
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from metamask_solo.errors import UserError
from metamask_solo.paths import as_text

KINDS = "JPEG, PNG, WebP, BMP, TIFF or GIF"
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
JPEG_ENDINGS, PNG_ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif"), (".png", ".apng")
ENDINGS = (*JPEG_ENDINGS, *PNG_ENDINGS, ".webp", ".bmp", ".tif", ".tiff", ".gif")
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
WHITE_IS_ZERO, SIGNED = 0, 2
# largest grey of a PNG of 1, 2 or 4 bits, by Pillow's names; Pillow scales the pixels to 8 bits
LARGEST_GREY = {"1": 1, "L;2": 3, "L;4": 15}


class ReadingRule(NamedTuple):
    """What a user may choose about reading."""

    background: tuple[int, int, int] = (255, 255, 255)  # shows through transparent pixels
    exif_orientation: bool = False  # turn an image as its EXIF data say; torchvision does not


DEFAULT_RULE = ReadingRule()


def reading_rule(cfg: DictConfig) -> ReadingRule:
    """The rule of a config: ``data.background`` and ``data.exif_orientation``.

    Raises:
        UserError: the background is no colour.
    """
    orientation = bool(OmegaConf.select(cfg, "data.exif_orientation", default=False))
    colour: Any = OmegaConf.select(cfg, "data.background") or "white"
    try:
        parts = ImageColor.getrgb(colour)[:3] if isinstance(colour, str) else list(colour)
        red, green, blue = bytes(parts)  # whole numbers from 0 to 255
    except (TypeError, ValueError) as error:
        raise UserError(
            f"data.background={colour}: must be a colour such as white, '#ff8000' or [255, 128, 0]"
        ) from error
    return ReadingRule((red, green, blue), orientation)


def read_image(path: str | Path, rule: ReadingRule = DEFAULT_RULE) -> Image.Image:
    """Reads one image as 8-bit RGB.

    Raises:
        UserError: names the file, which is missing, damaged, too large, or of another kind.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            raw = image.tile[0][3] if image.format == "PNG" and image.tile else None
            image.load()
            key = image.info.get("transparency")
            if isinstance(key, int) and (largest := LARGEST_GREY.get(str(raw))):
                image.info["transparency"] = (key & largest) * 255 // largest
            tags = dict(getattr(image, "tag_v2", {}))  # a turned image has none any more
            if rule.exif_orientation:
                image = ImageOps.exif_transpose(image)  # type: ignore[assignment]
            return _to_rgb(image, rule.background, tags)
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        reason = f"has more than the {most} million pixels allowed, a limit against files made "
        reason += "to fill the memory; save a smaller copy, or cut it into tiles"
        raise UserError(f"{as_text(path)}: {reason}") from error
    except Exception as error:  # Pillow raises almost anything for a damaged file
        # its messages repeat the path
        reason = str(error).strip().replace(repr(str(path)), "the file") or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = f"empty, or no {KINDS}"
        raise UserError(f"{as_text(path)}: cannot be read ({reason})") from error


def _to_rgb(
    image: Image.Image, background: tuple[int, int, int], tags: dict[int, Any]
) -> Image.Image:
    if SIGNED in tags.get(SAMPLE_FORMAT, ()):
        raise ValueError("signed integers: no rule says what is black")
    if image.mode == "F" or image.mode.startswith("I"):
        image = _from_deep(image, tags)
    if not image.has_transparency_data:
        return image.convert("RGB")
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:  # of 16 bits, where Pillow's pixels have 8
        image.info["transparency"] = tuple(part >> 8 for part in key)
    flat = Image.new("RGBA", image.size, (*background, 255))
    flat.alpha_composite(image.convert("RGBA"))
    return flat.convert("RGB")


def _from_deep(image: Image.Image, tags: dict[int, Any]) -> Image.Image:
    """8-bit grey from integers of more than 8 bits or floating-point values, with alpha if any."""
    values = np.asarray(image)
    if image.mode == "F":
        least, most = float(values.min()), float(values.max())
        if not 0 <= least <= most <= 255:  # nor NaN
            raise ValueError(
                f"floating-point values from {least:g} to {most:g}; they must be in 0..1, or in "
                "0..255"
            )
        grey = np.rint(values * 255.0 if most <= 1 else values).astype(np.uint8)
    else:
        values = values.astype(np.int64) & (2**32 - 1)  # Pillow gives unsigned ones as signed
        bits = min(int(tags.get(BITS_PER_SAMPLE, (16,))[0]), 16)
        # most files of 32 bits hold 16-bit values that a program has only widened
        largest = 2**bits - 1 if values.max() < 2**16 else 2**32 - 1
        grey = ((values * 255 + largest // 2) // largest).astype(np.uint8)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # Pillow turns those of 8 bits, and no others
        grey = 255 - grey
    key = image.info.get("transparency")
    image = Image.fromarray(grey)
    if isinstance(key, int):
        image.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return image
