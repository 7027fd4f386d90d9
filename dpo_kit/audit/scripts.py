"""Which script a text is written in, and a guess at its language: no model, no dependency.

Scripts come from the names of the characters in Unicode. Languages in Latin letters are guessed from their
commonest words, others from their script: a guess, for shares over many texts, not to be relied on for one.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache

import numpy as np

# First words of character names, and what the script is called where that is another word.
_SCRIPTS = {
    "CJK": "Han",
    "HIRAGANA": "Kana",
    "KATAKANA": "Kana",
    "KATAKANA-HIRAGANA": "Kana",
    "HALFWIDTH": "Kana",
    **{
        name: name.capitalize()
        for name in (
            *("LATIN", "CYRILLIC", "GREEK", "ARABIC", "HEBREW", "HANGUL", "DEVANAGARI", "BENGALI", "TAMIL"),
            *("TELUGU", "KANNADA", "MALAYALAM", "GUJARATI", "GURMUKHI", "SINHALA", "THAI", "LAO", "KHMER"),
            *("MYANMAR", "GEORGIAN", "ARMENIAN", "ETHIOPIC", "TIBETAN", "MONGOLIAN", "ORIYA", "BOPOMOFO"),
        )
    },
}
OTHER_SCRIPT = "other"

# Languages that (nearly) alone are written in a script.
_OF_SCRIPT = {
    "Han": "Chinese",
    "Kana": "Japanese",
    "Hangul": "Korean",
    "Greek": "Greek",
    "Hebrew": "Hebrew",
    "Thai": "Thai",
    "Bengali": "Bengali",
    "Tamil": "Tamil",
    "Telugu": "Telugu",
    "Georgian": "Georgian",
    "Armenian": "Armenian",
}

# Common short words; those of several languages tell nothing, and stand here to be left out.
_COMMON = {
    "English": "the of and to is that it you for are with this be have on not what can your from they was or "
    "would about which there will how they she his their but if when who why some any has been "
    "get make does did don't i'm what's",
    "German": "der die das und ist nicht ein eine zu den mit sich auf für von dem wie ich sie auch werden "
    "wird kann sind oder bei aus nach wenn über einen",
    "French": "le la les des et est une un pour dans que qui vous pas sur avec ce il au du sont plus cette "
    "être ou votre nous je à par mais",
    "Spanish": "el la los las de y es una un para en que no con por su como más se del al lo pero está son "
    "este esta o puede también",
    "Portuguese": "o os as de e é uma um para em que não com por sua como mais se do da na no você são ou "
    "mas isso também pode ao dos das",
    "Italian": "il la gli le di e è una un per in che non con del della sono come più si anche dei alla o "
    "nel questo questa essere può ma",
    "Dutch": "de het een en is niet van te dat voor met op zijn in je wat kan ook aan om er maar of als dit "
    "deze bij worden heeft naar",
    "Swedish": "och att det är en ett som på för med av inte jag den till har du kan om vad från eller men "
    "också detta vara hur",
    "Polish": "i w nie na się jest to że z do jak co o ale może być dla po jego czy są lub przez oraz które "
    "od tym tego jako",
    "Turkish": "ve bir bu için ile da de ne olarak çok daha gibi olan var değil ama en mi kadar sonra nasıl "
    "veya olduğu şey ben sen",
    "Indonesian": "dan yang di ini itu untuk dengan dari tidak adalah pada ke saya anda dalam akan bisa atau "
    "juga seperti oleh sebagai karena ada",
    "Vietnamese": "là và của có không một cho các được với những trong người để này tôi bạn như khi đã "
    "thể nó về từ đó cũng",
}
_LISTS = [(language, set(words.split())) for language, words in _COMMON.items()]
_LANGUAGE_OF = {
    word: language
    for language, words in _LISTS
    for word in words
    if sum(word in others for _, others in _LISTS) == 1
}

_AROUND_WORDS = '.,;:?!"()[]*¿¡«»“”„…'
_FEW_WORDS = 150  # characters of a text, up to which none of its words must be lost

_LOOKED_AT = 400  # characters of a text, for its language
_LEAST_LETTERS = 12
_LEAST_WORDS = 3  # different ones of a language
_LEAD = 2  # of the likeliest language over the next
_FULL = 0.7  # share of the letters that makes a text one of a script
_KANA = 0.1  # share from which on Han characters are Japanese

_NOT_LETTERS = bytes(sorted({*range(128)} - {*b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"}))
_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_NAMES = (None, "Latin", OTHER_SCRIPT, *sorted({*_SCRIPTS.values()} - {"Latin"}))


def script_of(char: str) -> str | None:
    """A letter's script; None for what is no letter."""
    if not char.isalpha():
        return None
    name = unicodedata.name(char, "")
    first, _, rest = name.partition(" ")
    if first == "FULLWIDTH" or (first == "HALFWIDTH" and rest.startswith("HANGUL")):
        first = rest.partition(" ")[0]
    return _SCRIPTS.get(first, OTHER_SCRIPT)


@cache
def _script_numbers() -> np.ndarray:
    """For each character of Unicode the place of its script in `_NAMES` [characters], uint8.

    Of those beyond 16 bits only Han is told from what is no letter.
    """
    numbers = np.zeros(0x110000, np.uint8)
    numbers[:0x10000] = [_NAMES.index(script_of(chr(code))) for code in range(0x10000)]
    numbers[0x20000:0x32000] = _NAMES.index("Han")
    return numbers


def letters_by_script(text: str) -> dict[str, int]:
    """How many letters of each script the text has, blocks of code left out."""
    if "```" in text:
        text = _CODE.sub("", text)
    if text.isascii():
        latin = len(text.encode().translate(None, _NOT_LETTERS))
        return {"Latin": latin} if latin else {}
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    counts = np.bincount(_script_numbers()[codes]).tolist()
    return {name: count for name, count in zip(_NAMES, counts, strict=False) if count and name is not None}


def script_of_text(letters: dict[str, int]) -> str | None:
    """The script that most letters of a text are of; None where there are few, or it is mixed.

    A Han character or a syllable counts as three letters, since it says as much. Han characters among kana
    are Japanese, and called Kana.
    """
    if len(letters) == 1 and letters.get("Latin", 0) >= _LEAST_LETTERS:
        return "Latin"
    weighted = {
        name: count * (3 if name in ("Han", "Kana", "Hangul") else 1) for name, count in letters.items()
    }
    if weighted.get("Kana", 0) > _KANA * weighted.get("Han", 0):
        weighted["Kana"] = weighted.get("Kana", 0) + weighted.pop("Han", 0)
    total = sum(weighted.values())
    if total < _LEAST_LETTERS:
        return None
    best = max(weighted, key=weighted.__getitem__)
    return best if weighted[best] >= _FULL * total and best != OTHER_SCRIPT else None


def language_of(text: str, script: str | None) -> str | None:
    """A guess at the language of a text in this script; None where there is too little to go by."""
    if script != "Latin":
        return _OF_SCRIPT.get(script or "")
    votes: dict[str, int] = {}
    for word in _LANGUAGE_OF.keys() & _words(text[:_LOOKED_AT].lower()):
        language = _LANGUAGE_OF[word]
        votes[language] = votes.get(language, 0) + 1
    if not votes:
        return None
    best, *others = sorted(votes, key=votes.__getitem__, reverse=True)
    enough = votes[best] >= _LEAST_WORDS and (not others or votes[best] >= _LEAD * votes[others[0]])
    return best if enough else None


def _words(text: str) -> list[str]:
    """The words of a text; of a short one those beside punctuation too."""
    words = text.split()
    if len(text) > _FEW_WORDS:
        return words
    return [word.strip(_AROUND_WORDS).replace("’", "'") for word in words]
