"""Folders of small random pictures of two classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def pictures(folder: Path, **counts: int) -> Path:
    """Write random pictures of two classes; the last test picture of a class is also a training picture."""
    for label, brightest in (("dark", 120), ("light", 255)):
        draw = np.random.default_rng(brightest)
        for split, count in counts.items():
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(brightest - 120, brightest, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{i}.png")
        Image.fromarray(pixels).save(folder / "train" / label / "again.bmp")
    return folder
