"""Suspected personal data in a text: addresses, phone numbers, identity and bank card numbers. Suspected: a person has to look."""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Callable, Iterator

MAIL = re.compile(r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}(?![\w-])", re.ASCII)
CHINESE_MOBILE = re.compile(r"(?<![\dA-Za-z])(?:\+?86[ -]?)?1[3-9]\d([ -]?)\d{4}\1\d{4}(?!\d)", re.ASCII)
PHONE = re.compile(r"(?<![\w+])\+[1-9]\d{0,2}[ -]?(?:\(\d{1,4}\)[ -]?)?\d{2,4}(?:[ -]?\d{2,4}){1,4}(?!\d)", re.ASCII)
CHINESE_ID = re.compile(r"(?<![\dA-Za-z])[1-9]\d{16}[\dXx](?![\dA-Za-z])", re.ASCII)
CARD = re.compile(r"(?<![\dA-Za-z.])(?:\d{4}([ -]?)\d{4}\1\d{4}\1\d{1,7}|3[47]\d{2}([ -]?)\d{6}\2\d{5})(?![\dA-Za-z])", re.ASCII)
IPV4 = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.]*\d)", re.ASCII)
IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:.])", re.ASCII)

ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
"""GB 11643-1999: the last sign is ISO 7064's MOD 11-2 of the seventeen before it."""


def is_chinese_id(number: str) -> bool:
    """True if the check sign holds and the date of birth is a day."""
    if len(number) != 18 or not number[:17].isdecimal():
        return False
    try:
        born = datetime.date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
    except ValueError:
        return False
    total = sum(weight * int(digit) for weight, digit in zip(ID_WEIGHTS, number, strict=False))
    return "10X98765432"[total % 11] == number[17].upper() and datetime.date(1850, 1, 1) < born < datetime.date(2100, 1, 1)


def is_card(number: str) -> bool:
    """True if Luhn's sum holds, of 13 to 19 digits that a card can begin with."""
    digits = [int(digit) for digit in re.sub(r"[ -]", "", number)]
    if not 13 <= len(digits) <= 19 or digits[0] not in (2, 3, 4, 5, 6) or len(set(digits)) < 2:
        return False
    doubled = [digit if i % 2 == 0 else 2 * digit - 9 * (digit > 4) for i, digit in enumerate(reversed(digits))]
    return sum(doubled) % 10 == 0


def _is_address(number: str) -> bool:
    if ":" in number and sum(map(bool, number.split(":"))) < 3:
        return False  # a::b, 12:30
    try:
        address = ipaddress.ip_address(number)
    except ValueError:
        return False
    # 1.2.3.4 is more often a version; loopback and 0.0.0.0 are nobody's.
    return not (address.is_loopback or address.is_unspecified) and number not in ("1.2.3.4", "::")


def _any(_: str) -> bool:
    return True


KINDS: dict[str, tuple[tuple[re.Pattern[str], Callable[[str], bool]], ...]] = {
    "mail": ((MAIL, _any),),
    "chinese id": ((CHINESE_ID, is_chinese_id),),
    "bank card": ((CARD, is_card),),
    "phone": ((CHINESE_MOBILE, _any), (PHONE, lambda number: 8 <= sum(map(str.isdecimal, number)) <= 15)),
    "ip address": ((IPV4, _is_address), (IPV6, _is_address)),
}
"""Kind -> patterns, each with the test its hits have to pass. What one kind has taken is no other's."""


def personal(text: str) -> Iterator[tuple[str, str]]:
    """(kind, what was found) of everything in a text that looks like personal data."""
    if not any(sign in text for sign in "@:") and sum(map(str.isdigit, text)) < 4:
        return
    taken: list[tuple[int, int]] = []
    for kind, tests in KINDS.items():
        for pattern, holds in tests:
            for found in pattern.finditer(text):
                if any(found.start() < end and start < found.end() for start, end in taken) or not holds(found[0]):
                    continue
                taken.append(found.span())
                yield kind, found[0]


def masked(found: str) -> str:
    """Enough to find it again, not enough to use it: a report is passed on."""
    keep = min(3, len(found) // 4)
    return found[:keep] + "*" * (len(found) - 2 * keep) + found[len(found) - keep :]
