"""Dynamic tiles beside transformers' GotOcr2ImageProcessor, which InternVL's checkpoints name."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")
got = pytest.importorskip("transformers.models.got_ocr2.image_processing_pil_got_ocr2")

from mlxvlm.config import TilingConfig  # noqa: E402
from mlxvlm.images.dynamic import choose_grid  # noqa: E402
from mlxvlm.images.tiling import tile  # noqa: E402

pytestmark = pytest.mark.parity


@pytest.mark.parametrize(("least", "most"), [(1, 1), (1, 4), (1, 6), (1, 12), (2, 3), (4, 24)])
def test_grids_agree(least, most):
    tiling = TilingConfig("dynamic", 448, min_tiles=least, max_tiles=most)
    rng = np.random.default_rng(most)
    sizes = [tuple(int(side) for side in pair) for pair in rng.integers(1, 2500, (1500, 2))]
    # Where candidates are equally near, and where the picture is half of one.
    sizes += [(5 * n, 4 * n) for n in range(1, 500)] + [(n, n) for n in range(1, 1500)]
    for width, height in sizes:
        wanted = got.get_optimal_tiled_canvas((height, width), (448, 448), least, most)
        assert choose_grid((width, height), tiling) == wanted, (width, height)


def test_pixels_agree():
    processor = got.GotOcr2ImageProcessorPil(
        size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=12
    )
    rng = np.random.default_rng(0)
    for size in ((80, 60), (60, 100), (32, 32), (300, 20)):
        image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
        wanted = processor(image, do_normalize=False, do_rescale=False, return_tensors="np")
        found = tile(image, TilingConfig("dynamic", 32))
        views = np.stack([view.transpose(2, 0, 1) for view in found.views])
        assert (views == wanted["pixel_values"]).all()
