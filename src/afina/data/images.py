"""Image files: their bytes, and the decoded image."""

import io
from pathlib import Path
from typing import Any

from afina.errors import DataError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


def read_image(file: Path) -> bytes:
    """Return the bytes of an image file; raises `DataError` where it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the picture: {error.strerror}", where=str(file)) from None


def open_image(content: bytes, where: str) -> Any:
    """Return the decoded PIL image.

    Raises:
        DataError: the bytes are no image, or it has more pixels than Pillow's limit for safe
            decoding.
    """
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        hint = "--skip-bad-rows leaves it out"
        raise DataError("not a picture, or a damaged one", where=where, hint=hint) from error
    return image
