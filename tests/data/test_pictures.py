"""Picture files: every mode a person may have, every way a file may be broken, and the sheets."""

import numpy as np
import pytest
import torch
from PIL import Image

from jdm.data.pictures import UnreadableError, grid, load_picture, save_pictures
from jdm.errors import RunError, UsageError


def ramp(height: int = 16, width: int = 16) -> np.ndarray:
    """Smooth colours [height, width, 3], uint8."""
    y, x = np.mgrid[:height, :width]
    colours = [255 * x // (width - 1), 255 * y // (height - 1), np.full_like(x, 90)]
    return np.stack(colours, -1).astype(np.uint8)


def saved(image: Image.Image, path, **options):
    image.save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp", "ppm"])
def test_a_lossless_picture_loads_byte_for_byte(suffix, tmp_path):
    options = {"lossless": True} if suffix == "webp" else {}
    path = saved(Image.fromarray(ramp()), tmp_path / f"a.{suffix}", **options)
    got = load_picture(path, 16)
    assert got.dtype == torch.uint8
    assert np.array_equal(got.permute(1, 2, 0).numpy(), ramp())
    assert torch.equal(load_picture(str(path), 16), got)


def test_a_jpeg_loads_within_its_loss(tmp_path):
    got = load_picture(saved(Image.fromarray(ramp(64, 64)), tmp_path / "a.jpg", quality=95), 64)
    assert np.abs(got.permute(1, 2, 0).numpy().astype(int) - ramp(64, 64)).mean() < 4


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK"])
def test_every_common_mode_becomes_rgb(mode, tmp_path):
    image = Image.fromarray(ramp()).convert(mode)
    path = saved(image, tmp_path / ("a.tiff" if mode == "CMYK" else "a.png"))
    expected = np.array(image.convert("RGB"))
    assert np.array_equal(load_picture(path, 16).permute(1, 2, 0).numpy(), expected)


def test_a_cmyk_jpeg_is_not_inverted(tmp_path):
    path = saved(Image.new("RGB", (16, 16), (250, 250, 250)).convert("CMYK"), tmp_path / "a.jpg")
    assert load_picture(path, 16).min() > 240


def test_transparent_pictures_are_shown_on_black(tmp_path):
    pixels = np.full((16, 16, 4), 200, np.uint8)
    pixels[:8, :, 3], pixels[8:, :, 3] = 0, 128
    got = load_picture(saved(Image.fromarray(pixels), tmp_path / "a.png"), 16)
    assert (got[:, :8] == 0).all()
    assert (got[:, 8:].int() - 100).abs().max() <= 1


def test_a_transparent_palette_colour_is_black(tmp_path):
    image = Image.fromarray(np.full((16, 16, 3), 200, np.uint8)).convert("P", palette=Image.Palette.ADAPTIVE)
    index = image.getpixel((0, 0))
    assert (load_picture(saved(image, tmp_path / "a.png", transparency=index), 16) == 0).all()


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.pgm"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(name, tmp_path):
    grey = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    got = load_picture(saved(Image.fromarray(grey), tmp_path / name), 16)
    assert np.array_equal(got[0].flatten().numpy(), np.arange(256))
    assert torch.equal(got[0], got[2])


def test_float_grey_in_the_unit_range_is_scaled(tmp_path):
    grey = np.linspace(0, 1, 256).astype(np.float32).reshape(16, 16)
    got = load_picture(saved(Image.fromarray(grey), tmp_path / "a.tiff"), 16)
    assert np.array_equal(got[0].flatten().numpy(), np.arange(256))


@pytest.mark.parametrize("grey", [np.full((16, 16), 7.0, np.float32), np.full((16, 16), np.nan, np.float32),
                                  np.full((16, 16), 70_000, np.int32), np.full((16, 16), -1, np.int32)])
@pytest.mark.hostile("data")
def test_grey_beyond_its_range_is_refused(grey, tmp_path):
    with pytest.raises(UsageError, match=r"grey values must be in 0.*save it with 8 bits"):
        load_picture(saved(Image.fromarray(grey), tmp_path / "a.tiff"), 16)


@pytest.mark.parametrize(("orientation", "turned"), [
    (3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1)), (8, lambda a: np.rot90(a)),
    (2, lambda a: a[:, ::-1]),
])
def test_exif_orientation_is_obeyed(orientation, turned, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(Image.fromarray(ramp()), tmp_path / "a.png", exif=exif)
    assert np.array_equal(load_picture(path, 16).permute(1, 2, 0).numpy(), turned(ramp()))


def test_the_first_frame_of_an_animation_is_taken(tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    path = saved(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_picture(path, 16)[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("size", [20, (20, 30), (32, 16)])
@pytest.mark.parametrize(("height", "width"), [(40, 100), (100, 40), (65, 64), (9, 200)])
def test_any_shape_becomes_its_resized_centre(height, width, size, tmp_path):
    wanted = (size, size) if isinstance(size, int) else size
    image = Image.fromarray(ramp(height, width))
    scale = max(wanted[0] / height, wanted[1] / width)
    whole = np.array(image.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS))
    top, left = (whole.shape[0] - wanted[0]) // 2, (whole.shape[1] - wanted[1]) // 2
    got = load_picture(saved(image, tmp_path / "a.png"), size).permute(1, 2, 0).numpy()
    assert got.shape == (*wanted, 3)
    # Within the slope of the ramp: the box is centred to a fraction of a pixel, a crop to a whole one.
    assert np.abs(got.astype(int) - whole[top : top + wanted[0], left : left + wanted[1]]).max() <= 14


def test_shrinking_is_antialiased(tmp_path):
    checks = ((np.indices((64, 64)).sum(0) % 2) * 255).astype(np.uint8)
    got = load_picture(saved(Image.fromarray(checks), tmp_path / "a.png"), 8)
    assert (got.int() - 127).abs().max() < 12


def test_a_panorama_needs_no_large_picture_in_between(tmp_path):
    got = load_picture(saved(Image.new("L", (60_000, 8), 99), tmp_path / "a.png"), 512)
    assert (got == 99).all()


@pytest.mark.parametrize(("name", "content", "message"), [
    ("none.png", None, "there is no such file"),
    ("empty.png", b"", "not a picture that Pillow reads .0 bytes"),
    ("script.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n", "Pillow reads"),
    ("text.png", b"hello, I am text", "not a picture that Pillow reads .*save it as PNG, JPEG or WebP"),
    (".", None, "it is a folder"),
])
@pytest.mark.hostile("data")
def test_what_is_no_picture_is_refused(name, content, message, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        load_picture(path, 16)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
@pytest.mark.parametrize("part", [0.3, 0.7])
@pytest.mark.hostile("data")
def test_a_truncated_picture_is_refused(suffix, part, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(Image.fromarray(noise), tmp_path / f"a.{suffix}")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(UsageError, match=r"damaged or incomplete|not a picture"):
        load_picture(path, 16)


@pytest.mark.hostile("data")
def test_a_picture_with_corrupt_bytes_is_refused(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(Image.fromarray(noise), tmp_path / "a.png")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"damaged or incomplete .*copy or save it again"):
        load_picture(path, 16)


@pytest.mark.hostile("data")
def test_one_wrong_bit_of_a_png_is_noticed(tmp_path):
    path = saved(Image.fromarray(np.full((40, 40, 3), 90, np.uint8)), tmp_path / "a.png")
    whole, right = path.read_bytes(), load_picture(path, 16)
    for bit in range(8 * whole.index(b"IDAT"), 8 * whole.index(b"IEND")):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            read = load_picture(path, 16)
        except UnreadableError:
            continue
        assert torch.equal(read, right), bit


@pytest.mark.hostile("data")
def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch, recwarn):
    path = saved(Image.new("L", (50, 40)), tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_500)
    assert load_picture(path, 16).shape == (3, 16, 16)
    assert not recwarn.list
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)
    with pytest.raises(UsageError, match=r"more than 1,800 pixels.*shrink it first"):
        load_picture(path, 16)


@pytest.mark.hostile("data")
def test_a_side_below_eight_pixels_is_refused(tmp_path):
    assert load_picture(saved(Image.new("RGB", (8, 8)), tmp_path / "a.png"), 16).shape == (3, 16, 16)
    with pytest.raises(UsageError, match=r"at least 8 pixels, got 7 x 90; give a larger"):
        load_picture(saved(Image.new("RGB", (7, 90)), tmp_path / "b.png"), 16)


def test_saved_pictures_load_back_in_order(tmp_path):
    images = torch.randint(0, 256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
    paths = save_pictures(images, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["000.png", "001.png", "002.png"]
    for path, image in zip(paths, images, strict=True):
        assert torch.equal(load_picture(path, 16), image)
    assert save_pictures(images[:0], tmp_path) == []


def test_an_unwritable_folder_is_a_run_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match=r"file/000.png could not be written .*choose another"):
        save_pictures(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), tmp_path / "file")


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8),
                                    torch.zeros(1, 1, 8, 8, dtype=torch.uint8)])
def test_what_is_not_rgb_bytes_is_not_written(images, tmp_path):
    with pytest.raises(UsageError, match=r"must be uint8 .N, 3, H, W., got .*to_bytes"):
        save_pictures(images, tmp_path)
    with pytest.raises(UsageError, match=r"must be uint8"):
        grid(images, 2)


def test_a_sheet_places_and_enlarges_without_blending():
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 4, 6) * 50
    sheet = np.array(grid(images, columns=3, scale=2, pad=1))
    assert sheet.shape == (1 + 2 * 9, 1 + 3 * 13, 3)
    for index in range(5):
        row, column = divmod(index, 3)
        tile = sheet[1 + row * 9 :, 1 + column * 13 :][:8, :12]
        assert (tile == 50 * index).all()
    assert (sheet[0] == 255).all()
    assert (sheet[10:, 27:] == 255).all()
    assert grid(images[:2], columns=3, scale=1, pad=0).size == (12, 4)


@pytest.mark.parametrize("bad", [{"columns": 0}, {"columns": 1, "scale": 0}, {"columns": 1, "pad": -1}])
def test_a_sheet_without_a_meaning_is_refused(bad):
    with pytest.raises(UsageError, match=r"a sheet needs at least 1 picture"):
        grid(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), **bad)
