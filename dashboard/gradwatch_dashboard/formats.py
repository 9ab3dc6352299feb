"""Numbers, ages and long names as people read them."""

from __future__ import annotations

import math
import re

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
ABSENT = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"
MINUTE_S, HOUR_S, DAY_S = 60, 3600, 86400


def power_of_ten(exponent: int) -> str:
    """`10⁻⁶` for -6."""
    return "10" + str(exponent).translate(SUPERSCRIPTS)


def number(value: float | None, digits: int = 3) -> str:
    """A number with at most `digits` significant digits; powers of ten beyond 10⁻³ .. 10⁶."""
    if value is None:
        return ABSENT
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Inf" if value > 0 else "-Inf"
    if value == 0:
        return "0"
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e6):
        return f"{int(value):,}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    if -3 <= int(exponent) < 6:
        decimals = max(digits - 1 - int(exponent), 0)
        text = f"{value:,.{decimals}f}"
        return text.rstrip("0").rstrip(".") if decimals else text
    mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa} {TIMES} {power_of_ten(int(exponent))}"


def age(seconds: float) -> str:
    """How long ago, in its largest fitting unit."""
    whole = max(int(seconds), 0)
    if whole < 5:
        return "now"
    if whole < MINUTE_S:
        return f"{whole} s ago"
    if whole < HOUR_S:
        return f"{whole // MINUTE_S} min ago"
    if whole < 2 * DAY_S:
        return f"{whole // HOUR_S} h ago"
    return f"{whole // DAY_S} days ago"


def elide(text: str, width: int) -> str:
    """`text`, its middle replaced by an ellipsis when it is longer than `width` characters.

    The end of a layer's name tells more than its start, so it keeps the larger part.
    """
    if len(text) <= width:
        return text
    end = (width - 1) * 3 // 5
    return f"{text[: width - 1 - end]}…{text[-end:]}"


def count(amount: int, noun: str) -> str:
    """`1 layer`, `2 layers`, `1,200 layers`."""
    return f"{amount:,} {noun}" if amount == 1 else f"{amount:,} {noun}s"


def steps(first: int, last: int) -> str:
    """A range of steps in words."""
    return f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"


def literal(text: str) -> str:
    """`text` as Markdown that shows it as it is."""
    return re.sub(r"([\\`*_{}\[\]()#+\-.!:$~<>|])", r"\\\1", text)


def code(text: str) -> str:
    """`text` as inline Markdown code, in which no other markup works."""
    return f"`` {text.replace('`', chr(39))} ``"
