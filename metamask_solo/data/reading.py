"""One way to read an image, whatever Pillow makes of its file: always 8-bit RGB.

The rule, which docs/data.md repeats for users:

- transparency of any kind goes onto one colour, white if nothing else is said;
- integers of more than 8 bits are scaled by the range that the file declares, never clipped, and
  negative ones are refused;
- where a TIFF says that 0 is white, it is;
- floating-point images whose values lie in 0..1 are scaled by that range, those in 0..255 are taken
  as they are, and others are refused;
- of several frames the first is taken;
- a mode that has no rule is refused by its name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from metamask_solo.errors import UserError

DIRECT_MODES = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
WHITE_IS_ZERO = 0
UNSIGNED, SIGNED = 1, 2
Tags = Mapping[int, Any]


@dataclass(frozen=True)
class ReadingRule:
    """What a user may choose about reading.

    Attributes:
        background: colour that shows through transparent pixels.
        exif_orientation: turn an image as its EXIF data say; torchvision does not.
    """

    background: tuple[int, int, int] = (255, 255, 255)
    exif_orientation: bool = False


def reading_rule(cfg: DictConfig | None) -> ReadingRule:
    """The rule of a config: ``data.background`` and ``data.exif_orientation``.

    Raises:
        UserError: a value is not allowed.
    """
    if cfg is None:
        return ReadingRule()
    orientation = OmegaConf.select(cfg, "data.exif_orientation", default=None)
    if orientation not in (None, True, False):
        raise UserError(f"data.exif_orientation={orientation}: must be true or false")
    colour = _colour(OmegaConf.select(cfg, "data.background", default=None))
    return ReadingRule(colour, bool(orientation))


def _colour(value: Any) -> tuple[int, int, int]:
    if value is None:
        return ReadingRule.background
    listed: Any = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    try:
        if isinstance(listed, str):
            red, green, blue = ImageColor.getrgb(listed)[:3]
            return red, green, blue
        red, green, blue = listed
        if all(type(part) is int and 0 <= part <= 255 for part in (red, green, blue)):
            return red, green, blue
    except (TypeError, ValueError):
        pass
    raise UserError(
        f"data.background={value}: must be a colour such as white, '#ff8000' or [255, 128, 0]"
    )


def read_image(
    file: str | Path | IO[bytes], rule: ReadingRule = ReadingRule(), name: str | None = None
) -> Image.Image:
    """Reads one image as 8-bit RGB.

    Args:
        file: path or binary stream.
        rule: what shows through transparent pixels, and whether EXIF data turn the image.
        name: what to call it in an error; the path if None.

    Raises:
        UserError: the file is missing or damaged, or its mode has no rule.
    """
    try:
        with Image.open(file) as image:
            # PNG's transparent colour has 16 bits where its samples have, but Pillow's has 8
            deep = image.mode == "RGB" and any("RGB;16" in str(t[-1]) for t in image.tile)
            image.load()
            # a turned image has no tags any more
            tags: Tags = dict(getattr(image, "tag_v2", {}))
            _refuse_signed(image, tags)
            if rule.exif_orientation:
                image = ImageOps.exif_transpose(image)  # type: ignore[assignment]
            return _to_rgb(image, rule.background, deep, tags)
    except UserError as error:
        raise UserError(f"{shown(name or file)}: {error}") from error
    except Exception as error:  # Pillow raises almost anything for a damaged file
        reason = str(error).strip() or type(error).__name__
        # its own messages repeat the path
        reason = reason.replace(repr(str(file)), "the file")
        if isinstance(error, UnidentifiedImageError):
            reason = "empty, or of a kind that Pillow does not know"
        raise UserError(f"{shown(name or file)}: cannot be read ({reason})") from error


def shown(name: Any) -> str:
    """A name for people: bytes of a file's name that are no text become question marks."""
    return str(name).encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _refuse_signed(image: Image.Image, tags: Tags) -> None:
    """Signed integers whose negative ones Pillow gives as large positive ones."""
    if image.mode == "L" and SIGNED in tags.get(SAMPLE_FORMAT, ()):
        raise UserError("its 8-bit integers are signed; no rule says what is black")
    if image.format == "FITS" and image.mode.startswith("I"):
        raise UserError(
            "a FITS image of signed integers, whose offset Pillow does not read; save it as PNG"
        )


def _to_rgb(
    image: Image.Image, background: tuple[int, int, int], deep: bool, tags: Tags
) -> Image.Image:
    mode = image.mode
    if mode.startswith("I") or mode == "F":
        return _scaled(image, background, tags)
    palette = image.palette.mode if mode == "P" and image.palette is not None else ""
    if mode in ALPHA_MODES or (mode in DIRECT_MODES and "transparency" in image.info):
        return _over(_to_rgba(image, deep), background)
    if palette.endswith("A"):
        return _over(image.convert("RGBA"), background)
    if mode not in DIRECT_MODES:
        raise UserError(f"Pillow's mode {mode} has no rule; save it as RGB, or with 8 or 16 bits")
    return image.convert("RGB")


def _to_rgba(image: Image.Image, deep: bool) -> Image.Image:
    if image.mode == "La":  # Pillow goes from here to LA alone
        image = image.convert("LA")
    if deep:
        image.info["transparency"] = tuple(part >> 8 for part in image.info["transparency"])
    if image.mode in ALPHA_MODES or image.mode in ("1", "L", "P", "RGB"):
        return image.convert("RGBA")
    return image.convert("RGB").convert("RGBA")  # a colour key that this mode cannot have


def _over(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    flat = Image.new("RGBA", image.size, (*background, 255))
    flat.alpha_composite(image)
    return flat.convert("RGB")


def _scaled(image: Image.Image, background: tuple[int, int, int], tags: Tags) -> Image.Image:
    """Integers of more than 8 bits, and floating-point values."""
    values = np.asarray(image)
    if image.mode == "F":
        grey = np.rint(_float_values(values)).astype(np.uint8)
    else:
        values, most = _integers(image, values, tags)
        grey = ((values * 255 + most // 2) // most).astype(np.uint8)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # Pillow turns those of 8 bits, and no others
        grey = 255 - grey
    flat = Image.fromarray(grey).convert("RGB")
    key = image.info.get("transparency")
    if isinstance(key, int) and image.mode != "F":
        alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
        flat.putalpha(alpha)
        return _over(flat, background)
    return flat


def _float_values(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    least, most = float(values.min()), float(values.max())
    if not np.isfinite(values).all() or least < 0 or most > 255:
        raise UserError(
            f"a floating-point image with values from {least:g} to {most:g}; they must be in 0..1, "
            "or in 0..255"
        )
    return values * 255.0 if most <= 1 else values


def _integers(
    image: Image.Image, values: np.ndarray[Any, Any], tags: Tags
) -> tuple[np.ndarray[Any, Any], int]:
    """Values and the largest that the file could hold."""
    bits, unsigned = 16, False
    if BITS_PER_SAMPLE in tags:
        bits = int(tags[BITS_PER_SAMPLE][0])
        unsigned = int(tags.get(SAMPLE_FORMAT, (UNSIGNED,))[0]) == UNSIGNED
    if bits == 32 and unsigned:
        values = values.astype(np.int32).view(np.uint32)
    values = values.astype(np.int64)
    if values.min() < 0:
        raise UserError("its integers are partly negative; no rule says what is black")
    if image.mode != "I":
        return values, 2 ** min(bits, 16) - 1
    # most files of mode I hold 16-bit values: PGM's, and those of programs that only widen them
    if values.max() < 2**16:
        return values, 2**16 - 1
    return values, 2**32 - 1 if unsigned else 2**31 - 1
