"""Numbers as people read them."""

from __future__ import annotations

import math

DIGITS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
NAMES = ((1e9, "billion"), (1e6, "million"))


def spoken(value: float, digits: int = 2) -> str:
    """A number for a sentence: 0.034, 250, 2.7 million, 3.1e-8 with the power set above.

    digits: significant ones.
    """
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("infinity" if value > 0 else "-infinity")
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits}g}")
    if not math.isfinite(rounded):  # the largest numbers round up to infinity
        rounded = value
    size = abs(rounded)
    if 1e-3 <= size < 1e6:
        return f"{rounded:,.{max(0, digits - 1 - math.floor(math.log10(size)))}f}"
    for limit, name in NAMES:
        if limit <= size < 1000 * limit:
            return f"{rounded / limit:g} {name}"
    mantissa, exponent = f"{rounded:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}\N{MULTIPLICATION SIGN}10{str(int(exponent)).translate(DIGITS)}"


def kept(value: float) -> float | str:
    """A number as evidence: three digits; its name when it is not finite."""
    return float(f"{value:.3g}") if math.isfinite(value) else spoken(value)


def listed(names: tuple[str, ...]) -> str:
    """The first name, and how many more there are."""
    if not names:
        return "no layer"
    others = len(names) - 1
    return names[0] + (f" and {others} more layer{'s' * (others > 1)}" if others else "")


def duration(seconds: float) -> str:
    """A time for a sentence, in the unit that suits it: 0.25 s, 40 s, 12 minutes, 3.5 hours."""
    if not math.isfinite(seconds) or seconds < 120:
        return f"{spoken(seconds)} s"
    if seconds < 7200:
        return f"{spoken(seconds / 60)} minutes"
    return f"{spoken(seconds / 3600)} hours"
