"""Views equal those of transformers' processors, to 1e-6 after normalisation."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")

from PIL import Image  # noqa: E402

from mlxvlm.config import TilingConfig  # noqa: E402
from mlxvlm.images.tiling import tile  # noqa: E402

pytestmark = pytest.mark.parity

GOLDEN = Path(__file__).parents[1] / "golden" / "make_preprocess.py"
spec = importlib.util.spec_from_file_location("make_preprocess", GOLDEN)
assert spec is not None and spec.loader is not None
golden = importlib.util.module_from_spec(spec)
spec.loader.exec_module(golden)

RESIZE = {"siglip": "squash", "clip": "crop", "llava": "pad"}
SIZES = (*golden.SIZES, (335, 336), (2, 3), (1, 90), (511, 333), (1201, 800), (800, 1201))


@pytest.mark.parametrize("size", [384, 336, 77])
@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("kind", ["siglip", "clip", "llava"])
def test_views_equal_transformers(kind: str, resample: str, size: int) -> None:
    mean, std = (np.array(c, np.float32) for c in golden.MEAN_STD[kind])
    background = tuple(int(c * 255) for c in golden.MEAN_STD[kind][0])
    tiling = TilingConfig(
        image_size=size, resize=RESIZE[kind], resample=resample, background=background
    )
    for width, height in SIZES:
        pixels = golden.scene(width, height)
        (view,) = tile(Image.fromarray(pixels), tiling).views
        assert view.dtype == np.uint8
        normalised = (view.astype(np.float32) / 255 - mean) / std
        expected = golden.reference(kind, size, resample, pixels)
        np.testing.assert_allclose(
            normalised, expected, rtol=0, atol=1e-6, err_msg=f"{width}x{height}"
        )


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "1", "CMYK", "P"])
def test_modes_become_rgb_as_transformers_does(mode: str, tmp_path: Path) -> None:
    from mlxvlm.images.open import open_picture

    image = Image.fromarray(golden.scene(40, 30))
    image.putalpha(Image.fromarray(golden.scene(40, 30)[:, :, 0]))
    if mode != "RGBA":
        image = (image if mode == "LA" else image.convert("RGB")).convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    expected = golden.processor("siglip", 24, "bicubic")(
        Image.open(path), do_resize=False, do_normalize=False, do_rescale=False, return_tensors="np"
    )["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_array_equal(np.asarray(open_picture(path)[0]), expected)
