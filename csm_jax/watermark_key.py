"""The watermark's key: five bytes. Free of torch, so that `--help` and checks cost nothing."""

from __future__ import annotations

import argparse
import operator
from collections.abc import Iterable
from typing import Any

DEFAULT_KEY = (212, 211, 146, 56, 201)
"""Sesame's public key for CSM-1B (SesameAILabs/csm `watermarking.py`). Being public, it shows that
audio is synthetic but not who made it: use an own, secret key for that."""

KEY_BYTES = 5
"""Bytes in a key: 20 two-bit symbols and an end symbol make one period of silentcipher's message."""


def check_key(key: Any) -> tuple[int, ...]:
    """Returns `key` as a tuple of five ints.

    Raises:
        TypeError: It is not a sequence of integers.
        ValueError: It does not hold exactly five values in 0..255.
    """
    if isinstance(key, str) or not isinstance(key, Iterable):
        raise TypeError(f"a watermark key is {KEY_BYTES} integers in 0..255, got {key!r}")
    values = list(key)
    if any(isinstance(value, bool) or not hasattr(value, "__index__") for value in values):
        raise TypeError(f"a watermark key is {KEY_BYTES} integers in 0..255, got {values!r}")
    result = tuple(operator.index(value) for value in values)
    if len(result) != KEY_BYTES or not all(0 <= value <= 255 for value in result):
        raise ValueError(f"a watermark key is {KEY_BYTES} integers in 0..255, got {list(result)}")
    return result


def parse_key(text: str) -> tuple[int, ...]:
    """Returns the key written as five numbers between commas or spaces, as in "212,211,146,56,201".

    Raises:
        ValueError: It is written otherwise.
    """
    try:
        return check_key([int(part) for part in text.replace(",", " ").split()])
    except ValueError as error:
        raise ValueError(
            f"a watermark key is {KEY_BYTES} numbers in 0..255 such as "
            f"{','.join(map(str, DEFAULT_KEY))!r}, got {text!r}"
        ) from error


def key_argument(text: str) -> tuple[int, ...]:
    """Returns `parse_key(text)`, as the type of an argument of `argparse`.

    Raises:
        argparse.ArgumentTypeError: It is written otherwise.
    """
    try:
        return parse_key(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
