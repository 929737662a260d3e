"""Units and counted nouns behind a number: `60 km/h`, `5\\text{ apples}`, `cm^2`, `\\$12`, `3 million dollars`.

The rule: a unit on one side only is ignored; units on both sides must be the same, in any usual spelling. They are not
converted: 5 m is not 500 cm. Words such as million are part of the number.
"""

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

from pmd.verifiers.mathematics.expressions import UnreadableError
from pmd.verifiers.mathematics.normalize import FUNCTIONS

#: Every spelling -> one name. Plurals in -s are added below; case counts only for one or two letters.
SPELLINGS = {
    "m": "meter metre", "cm": "centimeter centimetre", "mm": "millimeter millimetre", "km": "kilometer kilometre",
    "dm": "decimeter decimetre", "nm": "nanometer nanometre", "in": "inch inches", "ft": "foot feet", "yd": "yard",
    "mi": "mile", "g": "gram gm", "kg": "kilogram kgs", "mg": "milligram", "lb": "pound lbs", "oz": "ounce",
    "t": "ton tonne", "s": "second sec secs", "ms": "millisecond", "min": "minute mins", "h": "hour hr hrs",
    "day": "", "week": "wk", "month": "", "year": "yr yrs", "L": "l liter litre", "mL": "ml milliliter millilitre",
    "gal": "gallon", "degree": "deg degrees", "radian": "rad", "$": "dollar usd buck", "€": "euro eur", "£": "gbp",
    "¥": "yen", "₹": "rupee", "cent": "¢", "N": "newton", "J": "joule", "kJ": "kilojoule", "W": "watt",
    "kW": "kilowatt", "V": "volt", "A": "ampere amp", "C": "coulomb", "Pa": "pascal", "kPa": "kilopascal",
    "Hz": "hertz", "kHz": "kilohertz", "K": "kelvin", "mol": "mole", "ohm": "\\Omega", "°C": "celsius",
    "°F": "fahrenheit", "°K": "", "rpm": "", "bit": "", "byte": "", "eV": "", "atm": "", "cal": "", "acre": "",
    "hectare": "ha", "person": "people persons",
}  # fmt: skip
NAMES = {
    spelling: name
    for name, others in SPELLINGS.items()
    for one in (name, *others.split())
    for spelling in (one, one + "s")
}
NAMES |= {"kph": "km/h", "kmph": "km/h", "kmh": "km/h", "mps": "m/s", "mph": "mi/h", "cc": "cm^3"}
#: Bare letters that are a unit without \\text: everything else of up to three letters is a product of variables.
BARE = frozenset(name for name in NAMES if len(name) > 1 and name.isalpha()) - {
    "in",
    "mi",
    "as",
    "ha",
    "hs",
    "ls",
    "ins",
}
#: Words behind a number that make it another number.
FACTORS = {
    "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
}  # fmt: skip
#: Words that no unit contains: they change what is said, so the text is words and no quantity.
_NO_UNIT = (
    "not no nor or and but if is are was be than more less least most fewer greater smaller larger above below "
    "over under about around approximately roughly nearly almost exactly only except without to from until "
    "before after between times plus minus divided into negative positive percent percentage point points "
    "either neither both all none any where when for with base modulo mod factorial squared cubed half quarter "
    "third thirds wrong incorrect false true solution solutions answer then so therefore because since which "
    "either remainder am pm noon too"
)
NO_UNIT = frozenset(_NO_UNIT.split())
MAX_WORDS = 7
_BARE = "|".join(sorted(BARE, key=len, reverse=True))
TAIL = re.compile(
    rf"\\text\{{|\\degree|\\money\{{|(?<![A-Za-z\\])(?:{_BARE})(?![A-Za-z])|(?<![A-Za-z\\])[A-Za-z]{{4,}}"
)
ANGLE_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])[^()]*$")
PIECE = re.compile(
    r"\\text\{(?P<text>[^{}]*)\}|\\money\{(?P<money>[^{}]*)\}|(?P<degree>\\degree ?[CF]?(?![A-Za-z]))"
    r"|(?P<word>[A-Za-z]+)|(?P<times>\\cdot|\*)|(?P<over>/)|\^ ?\{? ?(?P<power>-?\d+) ?\}?|(?P<omega>\\Omega)"
)


@dataclass(frozen=True, slots=True)
class Unit:
    """A product of powers of named units, and the number that words such as million stand for."""

    parts: tuple[tuple[str, int], ...] = ()
    factor: Fraction = Fraction(1)

    def __str__(self) -> str:
        return " ".join(name if power == 1 else f"{name}^{power}" for name, power in self.parts)


def split_unit(text: str) -> tuple[str, Unit]:
    """Return the text before the unit, and the unit (empty if there is none).

    Raises:
        UnreadableError: if what follows the number is no unit.
    """
    if money := re.match(r"([+-]? ?)\\money\{([^{}]*)\} ?", text):
        rest, unit = split_unit(money[1] + text[money.end() :])
        if unit.parts not in ((), ((_name(money[2]), 1),)):
            raise UnreadableError(text)
        return rest, Unit(((_name(money[2]), 1),), unit.factor)
    for found in TAIL.finditer(text):
        start = found.start()
        if _is_function(text, found) or not _is_open(text[:start]) or _is_angle(text, found):
            continue
        if start == 0 or text[:start].rstrip()[-1:] in "+-*/^=<>,_":
            raise UnreadableError(text)
        return text[:start].strip(), read_unit(text[start:])
    return text, Unit()


def _is_angle(text: str, found: re.Match[str]) -> bool:
    """Return whether a degree sign belongs to what a function is applied to: `\\sin 30\\degree`."""
    return found[0] == "\\degree" and ANGLE_FUNCTION.search(text[: found.start()]) is not None


def _is_open(before: str) -> bool:
    """Return whether the place behind `before` lies outside all brackets."""
    return all(before.count(left) == before.count(right) for left, right in ("()", "{}", "[]"))


def _is_function(text: str, found: re.Match[str]) -> bool:
    word = found[0]
    if word == "\\text{":  # a single letter in another font may be a factor or a unit; units win behind a number
        return text[: found.start()].strip() == "" and text[found.end() + 1 : found.end() + 2] == "}"
    return word.isalpha() and (word.startswith(FUNCTIONS) or word in ("alpha", "beta", "gamma", "theta", "infinity"))


def read_unit(text: str) -> Unit:
    """Read a unit: words, powers, products and quotients.

    Raises:
        UnreadableError: if it is something else.
    """
    unit, at, num_words = _UnitInProgress(), 0, 0
    while at < len(text):
        if text[at] in " -":
            at += 1
            continue
        piece = PIECE.match(text, at)
        if piece is None:
            raise UnreadableError(text)
        at = piece.end()
        if piece["power"]:
            unit.raise_last_to(int(piece["power"]))
        elif piece["over"]:
            unit.sign = -1
        elif not piece["times"]:
            words = _words(piece)
            num_words += len(words)
            for word in words:
                unit.add(word)
    if num_words > MAX_WORDS:
        raise UnreadableError(text)
    return Unit(tuple(sorted((name, power) for name, power in unit.powers.items() if power)), unit.factor)


class _UnitInProgress:
    """What was read of a unit so far."""

    def __init__(self) -> None:
        self.powers: Counter[str] = Counter()
        self.factor = Fraction(1)
        self.sign = 1  # -1 behind a slash or `per`
        self.announced = 1  # the power that `square` and `cubic` announce
        self.last: list[tuple[str, int]] = []  # what a power would apply to; nothing behind `units`

    def add(self, word: str) -> None:
        lower = word.lower()
        if word == "/" or lower in ("per", "a", "an", "each", "every"):
            self.sign = -1
        elif lower in FACTORS:
            self.factor *= FACTORS[lower]
        elif lower in ("square", "sq", "sq.", "cubic", "cu", "cu."):
            self.announced = 2 if lower.startswith("s") else 3
        elif lower in ("unit", "units", "of", "the", "old", "long", "wide", "high", "tall"):
            self.last, self.announced = [], 1
        elif lower in NO_UNIT:
            raise UnreadableError(word)
        else:
            self.last = [(name, self.sign * power * self.announced) for name, power in _parts(word)]
            for name, power in self.last:
                self.powers[name] += power
            self.announced = 1

    def raise_last_to(self, power: int) -> None:
        if len(self.last) > 1:
            raise UnreadableError("a power of several units")
        for name, used in self.last:
            self.powers[name] += used * (power - 1)


def _words(piece: re.Match[str]) -> list[str]:
    if piece["money"]:
        return [piece["money"]]
    if piece["omega"]:
        return ["ohm"]
    if piece["degree"]:
        kind = piece["degree"][-1]
        return [f"°{kind}" if kind in "CF" else "degree"]
    if piece["word"]:
        return [piece["word"]]
    text = re.sub(r"\^\{?(-?\d)\}?", r"^\1", piece["text"]).replace("/", " / ").replace("-", " ").replace("'", "")
    if not re.fullmatch(r"(?:[A-Za-z$€£¥₹¢°]+\.?(?:\^-?\d)?|/|\s)*", text):
        raise UnreadableError(text)
    return text.split()


def _parts(word: str) -> list[tuple[str, int]]:
    word = word.rstrip(".")
    word, _, power = word.partition("^")
    name = _name(word)
    if name in ("km/h", "m/s", "mi/h"):
        left, right = name.split("/")
        return [(left, 1), (right, -1)]
    if name == "cm^3":
        return [("cm", 3)]
    return [(name, int(power or 1))]


def _name(word: str) -> str:
    """Return the one name of a unit; of any other noun its singular in lower case."""
    if word in NAMES:
        return NAMES[word]
    if len(word) <= 2:
        return word
    lower = word.lower()
    if lower in NAMES:
        return NAMES[lower]
    if len(lower) > 3 and lower.endswith("ies"):
        return f"{lower[:-3]}y"
    return lower[:-1] if len(lower) > 3 and lower.endswith("s") and not lower.endswith("ss") else lower
