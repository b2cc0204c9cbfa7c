"""Images: every mode and orientation gives the pixels that a viewer shows, as the base expects them."""

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image

from afina.data.images import open_image
from afina.errors import DataError
from afina.models.image_preprocessor import ImagePreprocessor, to_8bit

GREY = Image.fromarray(np.tile(np.linspace(0, 255, 64).astype("uint8"), (48, 1)))
COLORS = Image.merge("RGB", [GREY, GREY.transpose(Image.Transpose.ROTATE_180), GREY])
SAME = ImagePreprocessor((48, 64), (0.5,) * 3, (0.5,) * 3)


def pixels_of(image: Image.Image) -> np.ndarray:
    return SAME.resize(image).permute(1, 2, 0).numpy().astype(int)


@pytest.mark.parametrize(
    "mode", ["L", "RGB", "RGBA", "CMYK", "RGBX", "RGBa", "LA", "La", "I", "F", "I;16", "F 0 to 1"]
)
def test_a_scene_has_the_same_pixels_in_every_mode(mode: str) -> None:
    scene = COLORS if mode.startswith(("R", "C")) else GREY
    if mode == "I;16":
        image = Image.fromarray(np.asarray(GREY).astype("uint16") * 257)
    elif mode == "F 0 to 1":
        image = Image.fromarray(np.asarray(GREY).astype("float32") / 255)
    else:
        image = GREY.convert("LA").convert("La") if mode == "La" else scene.convert(mode)
    expected = np.asarray(scene.convert("RGB")).astype(int)
    assert np.abs(pixels_of(image) - expected).max() <= 1


def test_palette_and_transparent_images_are_seen_on_white() -> None:
    palette = COLORS.quantize(16)
    assert np.array_equal(pixels_of(palette), np.asarray(palette.convert("RGB")))
    clear = COLORS.copy()
    clear.putalpha(Image.new("L", COLORS.size, 0))
    assert pixels_of(clear).min() == 255
    palette.info["transparency"] = 0
    hidden = np.asarray(palette) == 0
    assert hidden.any() and (pixels_of(palette)[hidden] == 255).all()


@pytest.mark.parametrize("values", [[-1.0, 300.0], [0.0, 70000.0], [float("nan")] * 2])
def test_a_range_that_is_not_known_is_refused_by_its_mode(values: list[float]) -> None:
    image = Image.fromarray(np.array([values], dtype="float32"))
    with pytest.raises(DataError, match="mode F has no known range") as caught:
        to_8bit(image, 3, "a.tif")
    assert caught.value.where == "a.tif"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_of_a_turned_camera_are_upright(orientation: int) -> None:
    flip = Image.Transpose
    turns = [None, flip.FLIP_LEFT_RIGHT, flip.ROTATE_180, flip.FLIP_TOP_BOTTOM]
    turns += [flip.TRANSPOSE, flip.ROTATE_270, flip.TRANSVERSE, flip.ROTATE_90]
    exif, stream = Image.Exif(), io.BytesIO()
    exif[0x112] = orientation
    COLORS.save(stream, "PNG", exif=exif)
    turn = turns[orientation - 1]
    upright = COLORS if turn is None else COLORS.transpose(turn)
    assert np.array_equal(to_8bit(open_image(stream.getvalue(), "a.png"), 3), upright)


@pytest.mark.parametrize(
    "config",
    [
        {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}},
        {
            "image_processor_type": "ViTImageProcessor",
            "size": {"height": 32, "width": 24},
            "resample": 3,
            "rescale_factor": 1 / 127.5,
            "do_normalize": False,
        },
        {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 40},
            "crop_size": 32,
        },
        {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32}},
        {
            "image_processor_type": "DeiTImageProcessor",
            "size": {"height": 40, "width": 36},
            "crop_size": {"height": 32, "width": 32},
        },
    ],
    ids=lambda config: config["image_processor_type"],
)
def test_pixels_are_those_of_the_bases_own_processor(
    config: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    noise = np.random.default_rng(0).integers(0, 255, (70, 90, 3)).astype("uint8")
    own = ImagePreprocessor.of(tmp_path, SimpleNamespace(num_channels=3))
    found = own.pixels(own.resize(Image.fromarray(noise)))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)
    expected = processor(Image.fromarray(noise), return_tensors="pt")["pixel_values"][0]
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-5


def test_a_base_that_does_not_resize_refuses_other_sizes(tmp_path: Path) -> None:
    config = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config | {"do_resize": False}))
    own = ImagePreprocessor.of(tmp_path, SimpleNamespace(num_channels=3))
    with pytest.raises(DataError, match="64 x 48 pixels, and the base reads 8 x 8"):
        own.resize(COLORS)
