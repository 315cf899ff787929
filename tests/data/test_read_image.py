"""Reading one image, against what was drawn."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from metamask_solo.data.read_image import DEFAULT_RULE, ReadingRule, read_image, reading_rule
from metamask_solo.errors import UserError

GREY = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)
COLOURS = np.stack([GREY, GREY.T, 255 - GREY], axis=-1)
PHOTOMETRIC, ORIENTATION, SAMPLE_FORMAT = 262, 274, 339  # tags of TIFF
ALPHA = np.tile(np.array([0, 64, 128, 255], np.uint8), (8, 2))


def read(path: Path, rule: ReadingRule = DEFAULT_RULE) -> Any:
    image = read_image(path, rule)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize(
    ("kind", "background", "level"), [("png", None, 255), ("webp", "#000", 0), ("tiff", [9] * 3, 9)]
)
def test_alpha_goes_onto_the_colour_that_is_asked_for(
    kind: str, background: Any, level: int, tmp_path: Path
) -> None:
    image = Image.fromarray(COLOURS)
    image.putalpha(Image.fromarray(ALPHA))
    options = {"lossless": True, "exact": True} if kind == "webp" else {}
    image.save(tmp_path / f"a.{kind}", **options)
    rule = reading_rule(OmegaConf.create({"data": {"background": background}}))
    part = ALPHA[..., None] / 255
    expected = COLOURS * part + level * (1 - part)  # Porter and Duff's `over`
    assert np.abs(read(tmp_path / f"a.{kind}", rule) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "1"])
def test_a_transparent_colour_goes_onto_white(mode: str, tmp_path: Path) -> None:
    image = Image.fromarray(COLOURS if mode == "RGB" else GREY).convert(mode)
    key: Any = (0, 0, 255) if mode == "RGB" else image.getpixel((0, 0))
    image.save(tmp_path / "a.png", transparency=key)
    expected = np.asarray(image.convert("RGB")).astype(int)
    expected[(expected == expected[0, 0]).all(axis=-1)] = 255
    assert np.array_equal(read(tmp_path / "a.png"), expected)


def test_16_bits_are_scaled_and_a_transparent_grey_goes_onto_white(tmp_path: Path) -> None:
    deep = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    expected = np.rint(deep / 257).astype(int)
    Image.fromarray(deep).save(tmp_path / "a.png")
    assert np.array_equal(read(tmp_path / "a.png")[..., 0], expected)
    Image.fromarray(deep).save(tmp_path / "a.png", transparency=int(deep[0, 3]))
    expected[0, 3] = 255
    assert np.array_equal(read(tmp_path / "a.png")[..., 1], expected)


@pytest.mark.parametrize("bits", [2, 4])
def test_a_transparent_grey_of_few_bits(bits: int, tmp_path: Path) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    # black, the transparent white and the grey just below it; as the specification says
    white = 2**bits - 1
    row = sum(value << (32 - bits * (i + 1)) for i, value in enumerate((0, white, white - 1)))
    content = chunk(b"IHDR", struct.pack(">IIBBBBB", 3, 1, bits, 0, 0, 0, 0))
    content += chunk(b"tRNS", struct.pack(">H", white))
    content += chunk(b"IDAT", zlib.compress(b"\0" + row.to_bytes(4, "big")[: -(-3 * bits // 8)]))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content + chunk(b"IEND", b""))
    expected = [0, 9, (white - 1) * 255 // white]
    assert read(tmp_path / "a.png", ReadingRule((9, 9, 9)))[0, :, 0].tolist() == expected


def test_exif_data_turn_an_image_where_that_is_asked_for(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # a camera held upright
    Image.fromarray(COLOURS[:4]).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read(tmp_path / "a.png"), COLOURS[:4])
    turned = read(tmp_path / "a.png", ReadingRule(exif_orientation=True))
    assert np.array_equal(turned, np.rot90(COLOURS[:4], k=-1))


@pytest.mark.parametrize(
    ("kind", "most", "zero_is_black"),
    [
        *[("uint16", 65535, 0), ("uint16", 65535, 1), ("uint32", 2**32 - 1, 1)],
        *[("float32", 1.0, 0), ("float32", 255.0, 1)],
    ],
)
def test_a_tiff_has_the_range_and_the_black_that_it_declares(
    kind: str, most: float, zero_is_black: int, tmp_path: Path
) -> None:
    values = (np.linspace(0, 1, 64).reshape(8, 8) * most).astype(kind)
    image = Image.fromarray(values.view("int32") if kind == "uint32" else values)
    path = tmp_path / "a.tif"
    image.save(path, tiffinfo={PHOTOMETRIC: zero_is_black, ORIENTATION: 6})
    if kind == "uint32":  # Pillow declares them as signed
        signed, unsigned = (struct.pack("<HHII", SAMPLE_FORMAT, 3, 1, n) for n in (2, 1))
        path.write_bytes(path.read_bytes().replace(signed, unsigned))
    expected = np.rot90(GREY if zero_is_black else 255 - GREY, -1).astype(int)
    read_values = read(path, ReadingRule(exif_orientation=True))[..., 0]
    assert np.abs(read_values - expected).max() <= 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (np.array([[-5, 7]], np.int32), "signed integers"),
        (np.array([[-0.1, 1.0]], np.float32), "floating-point values from -0.1 to 1"),
        (np.array([[0, np.nan]], np.float32), "floating-point values from nan"),
        (b"", "empty, or no JPEG"),
        (b"P5 1 1 255 a", "empty, or no JPEG"),
        (b"\x89PNG\r\n\x1a\nshort", ""),
    ],
)
def test_a_file_that_cannot_be_read_is_named(content: Any, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.tif"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        Image.fromarray(content).save(path)
    with pytest.raises(UserError, match=f"^{path}: cannot be read .{reason}") as caught:
        read_image(path)
    assert str(caught.value).count(str(path)) == 1


def test_a_background_that_is_no_colour_is_refused() -> None:
    for value in ("no-colour", [1, 2], [1, 2, 300], 7, [0.5, 0.5, 0.5]):
        with pytest.raises(UserError, match=r"data\.background="):
            reading_rule(OmegaConf.create({"data": {"background": value}}))
