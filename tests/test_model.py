"""Pictures into their places: what does not fit exactly is an error, never a shift."""

import numpy as np
import pytest
from tiny_vlm import IMAGE, picture, tiny_vlm

from mlxvlm.errors import PromptError
from mlxvlm.images.picture import Features


def row(*runs: int) -> np.ndarray:
    """[1, L]: runs of image tokens, three words before each."""
    return np.array([[token for n in runs for token in (65, 66, 67, *[IMAGE] * n)]], np.int32)


def test_adjacent_and_separate_pictures_fit():
    vlm = tiny_vlm()
    pictures = vlm.look([picture(0), picture(1)])
    assert vlm(row(32), pictures).shape[1] == 35
    assert vlm(row(16, 16), pictures).shape[1] == 38
    both = np.concatenate([row(16), row(16)])
    assert vlm(both, pictures).shape[:2] == (2, 19)


@pytest.mark.parametrize("runs", [(12, 20), (17, 15), (31,), (33,), (16, 15, 1), (16,), ()])
def test_places_that_pictures_do_not_fill_are_refused(runs):
    vlm = tiny_vlm()
    with pytest.raises(PromptError):
        vlm(row(*runs), vlm.look([picture(0), picture(1)]))


def test_features_with_another_number_of_tokens_are_refused():
    vlm = tiny_vlm()
    features = vlm.features([picture(0)])[0]
    cut = Features([features.views[0][:9]], features.grid, features.size, features.sha256)
    with pytest.raises(PromptError, match="9 visual tokens instead of 16"):
        vlm(row(16), [cut])
