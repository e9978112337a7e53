"""How an error is told in a line."""

from __future__ import annotations

import pytest

from driftlens.errors import first_line


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("\nfirst\nsecond"), "first"),
        (ValueError(), "ValueError"),
        (OSError(" "), "OSError"),
    ],
)
def test_an_error_is_told_in_a_line(error: Exception, told: str):
    assert first_line(error) == told
