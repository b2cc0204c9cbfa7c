"""Images to pixels: what a viewer shows of a file, resized and centered as the base expects it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor

from afina.errors import BaseError, DataError
from afina.models.loading import silence_transformers

IMAGE_CONFIG = "preprocessor_config.json"


@dataclass
class ImagePreprocessor:
    """How images become pixels, as the processor of the base does it.

    Attributes:
        size: Height and width that the model reads.
        mean: Mean of each channel, by which pixels are centered.
        std: Standard deviation of each channel.
        resample: Filter of the resizing, a number of PIL's (3 is bicubic).
        crop_from: Size to which the image is resized before the middle of `size` is cut out: height
            and width, or the length of the shorter side; None where it is resized to `size`.
        scale: Factor of the 8-bit values.
        resizes: Whether images of another size are resized; if not, they are an error.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int = 3
    crop_from: tuple[int, int] | int | None = None
    scale: float = 1 / 255
    resizes: bool = True

    @classmethod
    def of(cls, folder: Path, config: Any) -> "ImagePreprocessor":
        """Return the preprocessor of a model's folder; without one, from its configuration.

        Raises:
            BaseError: the processor of the base does what is not done here.
        """
        channels = getattr(config, "num_channels", 3)
        recorded = _processor_settings(folder)
        size = _height_and_width(recorded.get("size") or getattr(config, "image_size", 224))
        crop, crop_from = recorded.get("crop_size"), None
        if recorded.get("do_center_crop") and crop:
            edge = (recorded.get("size") or {}).get("shortest_edge")
            crop_from, size = edge or size, _height_and_width(crop)
        elif recorded.get("crop_pct") and size[0] < 384:  # ConvNeXt and ResNet
            crop_from = int(size[0] / recorded["crop_pct"])
        if recorded.get("do_flip_channel_order"):
            what = "the image processor of this base reverses the channels, which is not supported"
            raise BaseError(what, where=str(folder / IMAGE_CONFIG))
        mean, std = (recorded.get(name) or [0.5] * channels for name in ("image_mean", "image_std"))
        if recorded.get("do_normalize") is False:
            mean, std = [0.0] * channels, [1.0] * channels
        factor = recorded.get("rescale_factor") or 1 / 255
        return cls(
            size,
            tuple(mean),
            tuple(std),
            int(recorded.get("resample") or (2 if recorded else 3)),
            crop_from,
            1.0 if recorded.get("do_rescale") is False else factor,
            recorded.get("do_resize") is not False,
        )

    def resize(self, image: Any, where: str = "the picture") -> Tensor:
        """Return an image as `(channels, height, width)`, uint8: a quarter of float32's memory.

        Raises:
            DataError: its mode is not known, or the base does not resize and it has another size.
        """
        import numpy as np

        image, (height, width) = to_8bit(image, len(self.mean), where), self.size
        if not self.resizes and image.size != (width, height):
            what = f"a picture of {image.width} x {image.height} pixels, and the base reads"
            why = "its image processor does not resize"
            raise DataError(f"{what} {width} x {height}", where=where, why=why, hint="resize it")
        sides = self._sides_before_crop(image.size)
        left, top = ((side - own) // 2 for side, own in zip(sides, (width, height), strict=True))
        image = image.resize(sides, self.resample)
        image = image.crop((left, top, left + width, top + height))
        array = np.array(image)
        return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())

    def _sides_before_crop(self, sides: tuple[int, int]) -> tuple[int, int]:
        """Return width and height to which an image with these sides is resized."""
        if isinstance(self.crop_from, int):
            width, height = (int(self.crop_from * side / min(sides)) for side in sides)
        else:
            height, width = self.crop_from or self.size
        return width, height

    def pixels(self, images: Tensor) -> Tensor:
        """Return float32 pixels of resized images `(..., channels, height, width)`."""
        mean, std = (
            torch.tensor(values, device=images.device)[:, None, None]
            for values in (self.mean, self.std)
        )
        return (images.float() * self.scale - mean) / std


def _height_and_width(size: Any) -> tuple[int, int]:
    if isinstance(size, dict):
        edge = size.get("shortest_edge")
        return size.get("height", edge), size.get("width", edge)  # type: ignore[return-value]
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _processor_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of a base's image processor, with transformers' defaults."""
    file = folder / IMAGE_CONFIG
    if not file.is_file():
        return {}
    recorded = json.loads(file.read_text())
    try:
        with silence_transformers():
            processor: Any = AutoImageProcessor.from_pretrained(folder, use_fast=False)
    except (ValueError, OSError, KeyError, ImportError, AttributeError):  # no class of that name
        return recorded
    names = (
        *("do_resize", "size", "resample", "do_center_crop", "crop_size", "crop_pct"),
        *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
    )
    own = {name: getattr(processor, name, None) for name in names}
    sizes = {name: _plain_size(own[name]) for name in ("size", "crop_size")}
    return recorded | {name: v for name, v in (own | sizes).items() if v is not None}


def _plain_size(size: Any) -> Any:
    """Return a size of transformers as a dict without empty entries."""
    entries = dict(size) if isinstance(size, Mapping) else getattr(size, "__dict__", None)
    return {k: v for k, v in entries.items() if v is not None} if entries else size


def to_8bit(image: Any, num_channels: int, where: str = "the picture") -> Any:
    """Return an image as a viewer shows it: upright, 8 bits, in grey or RGB, on white.

    Integers of 16 bits and fractions are scaled by the range that they are written for; what
    is transparent shows a white background.

    Args:
        image: A PIL image of any mode.
        num_channels: 1 for grey, 3 for RGB.
        where: The row, for errors.

    Raises:
        DataError: the mode has no range or colors that are known; names it.
    """
    import numpy as np
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_scale_to_8bit(np.asarray(image), image.mode, where))
    try:
        if image.has_transparency_data:
            image = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode))
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image).convert("RGB")
        return image.convert("L" if num_channels == 1 else "RGB")
    except ValueError as error:
        raise _unknown_mode(image.mode, where, str(error)) from None


def _scale_to_8bit(values: Any, mode: str, where: str) -> Any:
    """Return integers of 16 bits (0 to 65,535) or fractions (0 to 1) as values of 8 bits."""
    import numpy as np

    low, high = float(values.min()), float(values.max())
    if mode.startswith("I;16") and values.dtype.itemsize == 2:
        scaled = values.astype(np.float64) / 257
    elif mode == "F" and low >= 0 and high <= 1:
        scaled = values.astype(np.float64) * 255
    elif mode == "I" and low >= 0 and 255 < high <= 65535:
        scaled = values.astype(np.float64) / 257
    elif low >= 0 and high <= 255:
        scaled = values
    else:
        raise _unknown_mode(mode, where, f"its values are {low:g} to {high:g}")
    return np.rint(scaled).astype(np.uint8)


def _unknown_mode(mode: str, where: str, why: str) -> DataError:
    hint = "save it with 8 or 16 bits a channel, in grey, RGB or RGBA"
    return DataError(
        f"a picture of mode {mode} has no known range", where=where, why=why, hint=hint
    )
