"""Reading one image, against what was drawn: every mode that Pillow opens."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image, features
from PIL import __version__ as pillow_version

from metamask_solo.data.reading import ReadingRule, _to_rgb, read_image, reading_rule
from metamask_solo.errors import UserError

GREY = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)
COLOURS = np.stack([GREY, GREY.T, 255 - GREY], axis=-1)


def over(colours: np.ndarray[Any, Any], alpha: np.ndarray[Any, Any], background: int) -> Any:
    """Porter and Duff's `over`, in floating point."""
    part = alpha[..., None] / 255
    return colours * part + background * (1 - part)


def read(image: Image.Image, path: Path, **options: Any) -> Any:
    image.save(path, **options)
    return rgb(path)


def rgb(path: Path) -> Any:
    found = read_image(path)
    assert found.mode == "RGB"
    return np.asarray(found).astype(int)


@pytest.mark.parametrize("ending", ["png", "webp", "tiff", "tga", "ico", "gif"])
def test_a_glyph_in_the_alpha_channel_is_black_on_white(ending: str, tmp_path: Path) -> None:
    if not features.check("webp") and ending == "webp":
        pytest.skip("this Pillow has no WebP")
    glyph = np.zeros((16, 16, 4), np.uint8)
    glyph[4:12, 6:10, 3] = 255
    options = {"lossless": True} if ending == "webp" else {}
    found = read(Image.fromarray(glyph), tmp_path / f"a.{ending}", **options)
    assert np.array_equal(found, np.repeat(255 - glyph[..., 3:].astype(int), 3, axis=2))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
@pytest.mark.parametrize(("background", "level"), [("white", 255), ("#000", 0), ([9, 9, 9], 9)])
def test_alpha_goes_onto_the_colour_that_is_asked_for(
    mode: str, background: Any, level: int
) -> None:
    alpha = np.tile(np.array([0, 64, 128, 255], np.uint8), (8, 2))
    colours = COLOURS if mode[0] == "R" else np.repeat(GREY[..., None], 3, axis=2)
    image = Image.fromarray(colours).convert("RGBA" if mode[0] == "R" else "LA")
    image.putalpha(Image.fromarray(alpha))
    if mode == "PA":  # Pillow's conversion of LA forgets the alpha
        image = Image.fromarray(GREY).convert("P").convert("PA")
        image.putalpha(Image.fromarray(alpha))
    rule = reading_rule(OmegaConf.create({"data": {"background": background}}))
    found = np.asarray(_to_rgb(image.convert(mode), rule.background, False, {})).astype(int)
    # of premultiplied colours only 8 bits are left, fewer where alpha is small
    assert np.abs(found - over(colours, alpha, level)).max() <= (2 if mode[-1] == "a" else 1)


def test_a_palette_with_alpha_goes_onto_white(tmp_path: Path) -> None:
    image = Image.fromarray(GREY).convert("P")
    alphas = bytes(range(256))
    found = read(image, tmp_path / "a.png", transparency=alphas)
    indices = np.asarray(image)
    expected = over(np.asarray(image.convert("RGB")), indices, 255)
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "1"])
def test_a_transparent_colour_goes_onto_white(mode: str, tmp_path: Path) -> None:
    image = Image.fromarray(COLOURS if mode == "RGB" else GREY)
    image = (
        image.convert("P", palette=Image.Palette.ADAPTIVE) if mode == "P" else image.convert(mode)
    )
    key: Any = (0, 0, 255) if mode == "RGB" else image.getpixel((0, 0))
    found = read(image, tmp_path / "a.png", transparency=key)
    expected = np.asarray(image.convert("RGB")).astype(int)
    first = (expected == expected[0, 0]).all(axis=-1)
    expected[first] = 255
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("ending", ["png", "tiff", "pgm"])
def test_16_bits_are_scaled_and_not_clipped(ending: str, tmp_path: Path) -> None:
    deep = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    path = tmp_path / f"a.{ending}"
    if ending == "pgm":  # not every Pillow writes it
        path.write_bytes(b"P5 8 8 65535 " + deep.astype(">u2").tobytes())
    else:
        Image.fromarray(deep).save(path)
    found = rgb(path)
    assert np.array_equal(found[..., 0], np.rint(deep / 257).astype(int))
    assert found[0, 0, 0] == 0 and found[-1, -1, 0] == 255


def test_a_transparent_grey_of_16_bits_goes_onto_white(tmp_path: Path) -> None:
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    found = read(Image.fromarray(deep), tmp_path / "a.png", transparency=3000)
    expected = np.rint(deep / 257).astype(int)
    expected[0, 3] = 255
    assert np.array_equal(found[..., 1], expected)


@pytest.mark.parametrize(("most", "range_"), [(65535, 65535), (2**31 - 1, 2**31 - 1)])
def test_32_bit_integers_are_scaled(most: int, range_: int, tmp_path: Path) -> None:
    deep = np.linspace(0, most, 64).astype(np.int32).reshape(8, 8)
    found = read(Image.fromarray(deep), tmp_path / "a.tiff")
    assert np.abs(found[..., 2] - deep / range_ * 255).max() <= 0.51


@pytest.mark.parametrize("most", [1.0, 255.0])
def test_floats_are_scaled_by_their_range(most: float, tmp_path: Path) -> None:
    values = np.linspace(0, most, 64, dtype=np.float32).reshape(8, 8)
    found = read(Image.fromarray(values), tmp_path / "a.tiff")
    assert np.abs(found[..., 0] - values / most * 255).max() <= 0.5


@pytest.mark.parametrize(
    "values", [[-0.1, 1.0], [0.0, 300.0], [0.0, float("nan")], [0.0, float("inf")]]
)
def test_other_floats_are_refused_by_name(values: list[float], tmp_path: Path) -> None:
    path = tmp_path / "odd.tiff"
    Image.fromarray(np.array([values] * 2, np.float32)).save(path)
    with pytest.raises(UserError, match=f"{path}: a floating-point image"):
        read_image(path)


def test_negative_integers_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "odd.tiff"
    Image.fromarray(np.array([[-5, 7]] * 2, np.int16).astype(np.int32)).save(path)
    with pytest.raises(UserError, match=f"{path}: its integers are partly negative"):
        read_image(path)


@pytest.mark.parametrize(
    ("mode", "ending"), [("CMYK", "tiff"), ("YCbCr", "tiff"), ("LAB", "tiff"), ("1", "png")]
)
def test_other_modes_are_what_pillow_makes_of_them(mode: str, ending: str, tmp_path: Path) -> None:
    image = Image.fromarray(COLOURS)
    if mode == "LAB":
        from PIL import ImageCms

        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        converted: Any = ImageCms.profileToProfile(image, srgb, lab, outputMode="LAB")
    else:
        converted = image.convert(mode)
    path = tmp_path / f"a.{ending}"
    if mode == "YCbCr" and int(pillow_version.split(".")[0]) < 13:  # cannot read what it wrote
        with pytest.raises(UserError, match="a.tiff: cannot be read"):
            read(converted, path)
        return
    found = read(converted, path)
    assert np.array_equal(found, np.asarray(converted.convert("RGB")).astype(int))
    assert np.abs(found - COLOURS).mean() < (130 if mode == "1" else 6)


def test_an_ordinary_image_is_read_as_before(tmp_path: Path) -> None:
    Image.fromarray(COLOURS).resize((40, 30)).save(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as plain:
        expected = np.asarray(plain.convert("RGB"))
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.jpg")), expected)


@pytest.mark.parametrize("turn", [False, True])
def test_exif_data_turn_an_image_where_that_is_asked_for(turn: bool, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera held upright
    Image.fromarray(COLOURS[:4]).save(tmp_path / "a.png", exif=exif)
    found = np.asarray(read_image(tmp_path / "a.png", ReadingRule(exif_orientation=turn)))
    expected = np.rot90(COLOURS[:4], k=-1) if turn else COLOURS[:4]
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("value", ["no-colour", [1, 2], [1, 2, 300], 7, [0.5, 0.5, 0.5], True])
def test_a_background_that_is_no_colour_is_refused(value: Any) -> None:
    with pytest.raises(UserError, match=r"data\.background="):
        reading_rule(OmegaConf.create({"data": {"background": value}}))


@pytest.mark.parametrize("content", [b"", b"no image at all"])
def test_an_unknown_kind_is_said(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_image(path)
    reason = "cannot be read (empty, or of a kind that Pillow does not know)"
    assert str(caught.value) == f"{path}: {reason}"


def tiff(values: np.ndarray[Any, Any], path: Path, photometric: int, orientation: int = 1) -> Path:
    """A TIFF of one strip, as its specification says; Pillow itself writes no such tags."""
    height, width = values.shape
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    tags = {
        256: width,
        257: height,
        258: 8 * values.dtype.itemsize,
        259: 1,  # not compressed
        262: photometric,
        273: 8,  # where the pixels begin
        274: orientation,
        277: 1,
        278: height,
        279: values.nbytes,
        339: kind,
    }
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + values.nbytes) + values.tobytes() + directory)
    return path


@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
def test_where_zero_is_white_it_is(dtype: str, tmp_path: Path) -> None:
    most = {"u1": 255, "u2": 65535, "f4": 1.0}[dtype]
    values = (np.linspace(0, 1, 64).reshape(8, 8) * most).astype(f"<{dtype}")
    for zero, expected in ((1, GREY), (0, 255 - GREY.astype(int))):
        found = np.asarray(read_image(tiff(values, tmp_path / f"{zero}.tif", zero)))
        assert np.abs(found[..., 0] - expected.astype(int)).max() <= 1


@pytest.mark.parametrize(("dtype", "zero"), [("u2", 0), ("u4", 1)])
def test_a_turned_image_keeps_its_range(dtype: str, zero: int, tmp_path: Path) -> None:
    values = (GREY.astype(np.uint32) * (2**24 if dtype == "u4" else 257)).astype(f"<{dtype}")
    path = tiff(values, tmp_path / "a.tif", zero, orientation=6)
    turned = np.asarray(read_image(path, ReadingRule(exif_orientation=True)))[..., 0]
    expected = GREY if zero else 255 - GREY
    assert np.abs(turned - np.rot90(expected, -1).astype(int)).max() <= 1


def test_signed_integers_of_8_bits_are_refused(tmp_path: Path) -> None:
    values = np.arange(-32, 32, dtype=np.int8).reshape(8, 8)
    with pytest.raises(UserError, match="a.tif: its 8-bit integers are signed"):
        read_image(tiff(values, tmp_path / "a.tif", 1))


def test_a_fits_image_of_integers_is_refused(tmp_path: Path) -> None:
    cards = ["SIMPLE  =                    T", "BITPIX  =                   16"]
    cards += ["NAXIS   =                    2", "NAXIS1  =                    8"]
    cards += ["NAXIS2  =                    8", "BZERO   =                32768", "END"]
    header = "".join(card.ljust(80) for card in cards).ljust(2880).encode()
    values = (GREY.astype(np.int32) * 257 - 32768).astype(">i2")
    (tmp_path / "a.fits").write_bytes(header + values.tobytes().ljust(2880, b"\0"))
    with pytest.raises(UserError, match="a.fits: a FITS image of signed integers"):
        read_image(tmp_path / "a.fits")
