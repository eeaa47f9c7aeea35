"""Bytes as people read them."""

import pytest

from cobre_shm.units import bytes_text


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(None, "unknown"), (0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2.0**41, "2 TiB")],
)
def test_bytes_have_the_unit_that_fits(nbytes, text):
    assert bytes_text(nbytes) == text
