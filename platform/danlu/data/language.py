"""The language of a text, from its script and, for Latin letters, its commonest words: no model, and `und` where it cannot tell."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

SAMPLE = 2000
"""Characters that are looked at."""

SCRIPTS = {
    "CJK": "han", "HIRAGANA": "kana", "KATAKANA": "kana", "HANGUL": "ko", "CYRILLIC": "cyrillic", "ARABIC": "ar", "HEBREW": "he",
    "GREEK": "el",
    "THAI": "th", "DEVANAGARI": "hi", "BENGALI": "bn", "TAMIL": "ta", "LATIN": "latin", "HALFWIDTH": "kana", "FULLWIDTH": "latin",
}  # fmt: skip
"""First word of a letter's Unicode name -> script, or the one language that is commonly written in it."""

COMMON = {
    "en": "the of and to in is that for it was on with as be at by this from are have not or an you which but all were when we there",
    "de": "der die und das ist nicht von mit den auf für ein eine dem des sich auch es an werden aus er hat dass sie wird bei im zu",
    "fr": "le la les des et est une du dans qui que pour pas sur au plus par avec ce il son sont elle ne en un nous vous mais ou",
    "es": "el la de los las que y en un una es por con para del se no su al lo como más pero sus este está fue son muy sin sobre",
    "it": "il di che la e un una per non sono con del della le si da come anche più gli nel ma è alla dei questo ha lo al delle",
    "pt": "o a de que e do da em um para com não uma os no se na por mais as dos como mas ao ele das à seu sua ou quando muito",
    "nl": "de het een van en in is dat op te zijn met voor niet aan er om ook als dan maar bij nog uit naar door over ze hij werd",
}
_WORDS = {language: frozenset(words.split()) for language, words in COMMON.items()}
LANGUAGES = ("zh", "ja", "ko", *COMMON, "ru", "ar", "he", "el", "th", "hi", "bn", "ta", "und")


def language(text: str) -> str:
    """One of `LANGUAGES`. Cyrillic counts as `ru`; Latin letters without common words as `en` where they are plain, else `und`."""
    scripts: Counter[str] = Counter(script for character in text[:SAMPLE] if (script := _script(character)))
    if not scripts:
        return "und"
    east_asian = scripts["han"] + scripts["kana"]
    # A Chinese character says as much as several letters: a Chinese text with some English names in it is Chinese.
    if east_asian and 3 * east_asian >= scripts.total() - east_asian:
        return "ja" if scripts["kana"] * 10 >= east_asian else "zh"
    script = scripts.most_common(1)[0][0]
    if script == "cyrillic":
        return "ru"
    return _latin(text[:SAMPLE]) if script == "latin" else "zh" if script == "han" else "ja" if script == "kana" else script


def _script(character: str) -> str | None:
    if character.isascii():
        return "latin" if character.isalpha() else None
    if "\u4e00" <= character <= "\u9fff":
        return "han"
    if not character.isalpha():
        return None
    return SCRIPTS.get(unicodedata.name(character, "").split(" ")[0].split("-")[0])


def _latin(text: str) -> str:
    words = re.findall(r"[^\W\d_]+", text.lower())
    hits = {language: sum(word in common for word in words) for language, common in _WORDS.items()}
    best = max(hits, key=lambda language: hits[language])
    if hits[best] and (hits[best] > 1 or len(words) < 8):
        return best
    return "en" if text.isascii() and len(words) < 8 else "und"
