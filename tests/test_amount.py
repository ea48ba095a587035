"""Byte counts read well at every size."""

from __future__ import annotations

import pytest

from mlxvlm.amount import amount


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (7, "7 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (1500, "1.5 kB"),
        (999_400, "999 kB"),
        (999_600, "1 MB"),
        (2_500_000, "2.5 MB"),
        (123_456_789, "123 MB"),
        (16_060_000_000, "16.1 GB"),
        (505e9, "505 GB"),
        (5.9e12, "5.9 TB"),
        (12_345e12, "12345 TB"),
    ],
)
def test_three_digits(count, text):
    assert amount(count) == text
