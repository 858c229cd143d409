"""Numbers as a person reads them. Oracle: the expected text, written out."""

from __future__ import annotations

import math

import pytest

from jax_dpo.report import format as fmt

NONE = fmt.NONE


@pytest.mark.parametrize(
    ("function", "value", "expected"),
    [
        (fmt.number, 0.69314718, "0.6931"),
        (fmt.number, 0, "0.0000"),
        (fmt.number, 123.456, "123.5"),
        (fmt.number, 12345.6, "12,346"),
        (fmt.number, 3.2e9, "3.2e9"),
        (fmt.number, -3e-7, "-3e-7"),
        (fmt.number, None, NONE),
        (fmt.number, math.nan, NONE),
        (fmt.number, math.inf, NONE),
        (fmt.number, "0.5", NONE),
        (fmt.signed, 0.354, "+0.3540"),
        (fmt.signed, -0.354, "-0.3540"),
        (fmt.signed, 0.0, "0.0000"),
        (fmt.power, 5e-6, "5e-6"),
        (fmt.power, 2.5e-10, "2.5e-10"),
        (fmt.power, 0.1, "0.1"),
        (fmt.power, 1e12, "1e12"),
        (fmt.percent, 0.9166, "91.7 %"),
        (fmt.percent, None, NONE),
        (fmt.amount, 134_515_008, "134.5 M"),
        (fmt.amount, 7_241_732_096, "7.24 B"),
        (fmt.amount, 512, "512"),
        (fmt.duration, 4.21, "4.2 s"),
        (fmt.duration, 252, "4 min 12 s"),
        (fmt.duration, 4021, "1 h 07 min"),
        (fmt.duration, 200_000, "2 d 7 h"),
        (fmt.about, 12.4, "about 12 s"),
        (fmt.about, 43, "about 45 s"),
        (fmt.about, 300, "about 5 min"),
        (fmt.about, 9000, "about 2.5 h"),
        (fmt.about, 259_200, "about 3.0 days"),
        (fmt.clock, 252, "4:12"),
        (fmt.clock, 3852, "1:04:12"),
        (fmt.moment, 1_767_225_600, "2026-01-01 00:00 UTC"),
        (fmt.option, [True, None, 1e-7, "x", 2], "[true, null, 1e-7, x, 2]"),
        (fmt.option, {"a": 0.05}, "{a: 0.05}"),
        (fmt.plain, "a\r\nb\x1b[31m\u202ec\tü", "a\nb\ufffd[31m\ufffdc\tü"),
    ],
)
def test_spelling(function, value, expected) -> None:
    assert function(value) == expected


def test_shares() -> None:
    assert fmt.share(1_200_000, 134_500_000) == "0.89 %"
    assert fmt.share(5, 5) == "100 %"
    assert fmt.share(1, None) == NONE
