"""Pairs of a task's answer and a completion whose truth is known by construction, and written ones beside them.

Each template draws numbers and writes one value in two ways (right), or two values that differ (wrong). The truth comes
from the template, never from a verifier. `math_pairs.jsonl` holds the pairs that people wrote.
"""

import json
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import NamedTuple


class Pair(NamedTuple):
    """One comparison."""

    kind: str
    gold: str
    completion: str
    correct: bool


Drawn = Iterator[tuple[str, str, bool]]  # gold, answer, correct
PER_TEMPLATE = 12
SENTENCE = "sentence: "  # marks an answer that is the whole completion
WRAPPERS = (
    "Hence \\boxed{%s}.",
    "So we get $\\boxed{%s}$",
    "\\[\\boxed{%s}\\]",
    "<answer>%s</answer>",
    "\\boxed{ %s }",
)


def all_pairs() -> list[Pair]:
    """Return every pair, the same ones each time."""
    return [*written_pairs(), *generated_pairs()]


def written_pairs() -> list[Pair]:
    """Return the pairs that people wrote."""
    lines = (Path(__file__).parent / "math_pairs.jsonl").read_text(encoding="utf-8").splitlines()
    return [Pair(row["kind"], row["gold"], row["completion"], row["correct"]) for row in map(json.loads, lines)]


def generated_pairs() -> list[Pair]:
    """Return the pairs of all templates."""
    pairs = []
    for kind, templates in TEMPLATES.items():
        for template in templates:
            for number in range(PER_TEMPLATE):
                random = Random(f"{template.__name__} {number}")
                for gold, answer, correct in template(random):
                    completion = _wrapped(answer, random)
                    pairs.append(Pair(kind, gold, completion, correct))
    return pairs


def _wrapped(answer: str, random: Random) -> str:
    """Put the answer into a box or tag, unless the template has written a whole sentence."""
    sentence = answer.removeprefix(SENTENCE)
    return sentence if sentence != answer else random.choice(WRAPPERS).replace("%s", answer)


def latex(number: Fraction) -> str:
    """Write a fraction in LaTeX."""
    if number.denominator == 1:
        return str(number)
    sign = "-" if number < 0 else ""
    return f"{sign}\\frac{{{abs(number.numerator)}}}{{{number.denominator}}}"


def decimal(number: Fraction) -> str:
    """Write a fraction whose denominator has no prime factors but 2 and 5."""
    digits = 0
    while (number * 10**digits).denominator != 1:
        digits += 1
    scaled = abs(int(number * 10**digits))
    text = str(scaled).rjust(digits + 1, "0")
    text = f"{text[:-digits]}.{text[-digits:]}" if digits else text
    return f"-{text}" if number < 0 else text


def proper(random: Random, most: int = 19) -> Fraction:
    """Draw a fraction between 0 and 1 that is no integer."""
    bottom = random.randint(2, most)
    top = random.choice([n for n in range(1, bottom) if Fraction(n, bottom).denominator == bottom])
    return Fraction(top, bottom)


def fractions(random: Random) -> Drawn:
    value = proper(random) * random.choice([-1, 1]) + random.randint(-9, 9)
    top, bottom, times = value.numerator, value.denominator, random.randint(2, 9)
    yield latex(value), f"{top}/{bottom}", True
    yield latex(value), f"\\dfrac{{{top * times}}}{{{bottom * times}}}", True
    yield f"{top}/{bottom}", f"\\frac{{{-top}}}{{{-bottom}}}", True
    yield latex(value), latex(value + Fraction(1, bottom)), False
    yield latex(value), latex(-value), False
    yield latex(value), f"\\frac{{{bottom}}}{{{top or 7}}}" if abs(top) != bottom else "0", False


def decimals(random: Random) -> Drawn:
    value = Fraction(random.randint(-9999, 9999) * 10 + random.randint(1, 9), 10 ** random.randint(1, 5))
    yield decimal(value), latex(value), True
    yield latex(value), decimal(value) + "0" * random.randint(1, 3) * (value.denominator != 1), True
    yield decimal(value), decimal(value + Fraction(1, 10**6)), False
    yield decimal(value), decimal(value * 10), False
    yield decimal(value), decimal(-value), False


def rounded_fractions(random: Random) -> Drawn:
    value = Fraction(random.choice([1, 2, 4, 5, 7, 8]), random.choice([3, 7, 9, 11, 13]))
    if value.denominator in (1, 2, 4, 5, 8):
        value += Fraction(1, 3)
    digits = random.randint(3, 12)
    yield latex(value), decimal(Fraction(int(value * 10**digits), 10**digits)), False


def repeating(random: Random) -> Drawn:
    first, block = str(random.randint(0, 99)), str(random.randint(1, 98)).rjust(2, "0")
    whole = random.randint(0, 20)
    value = Fraction(int(f"{whole}{first}{block}") - int(f"{whole}{first}"), 10 ** len(first) * 99)
    text = f"{whole}.{first}\\overline{{{block}}}"
    yield latex(value), text, True
    yield text, latex(value), True
    yield text, f"{whole}.{first}{block}", False
    yield text, latex(value + Fraction(1, 99)), False


def tiny_numbers(random: Random) -> Drawn:
    power, first = random.randint(5, 300), random.randint(1, 9)
    yield f"{first} \\times 10^{{-{power}}}", f"{first}e-{power}", True
    yield f"{first} \\times 10^{{-{power}}}", f"\\frac{{{first}}}{{10^{{{power}}}}}", True
    yield f"10^{{-{power}}}", f"10^{{-{power + 1}}}", False
    yield f"{first} \\times 10^{{-{power}}}", "0", False
    yield "0", f"{first} \\times 10^{{-{power}}}", False
    base = random.randint(2, 12)
    yield (
        f"\\left(\\frac{{1}}{{{base}}}\\right)^{{{power}}}",
        f"\\left(\\frac{{1}}{{{base}}}\\right)^{{{power + 1}}}",
        False,
    )
    yield f"\\frac{{1}}{{{power}!}}", f"\\frac{{1}}{{{power + 1}!}}", False


def close_numbers(random: Random) -> Drawn:
    power, base = random.randint(60, 500), random.randint(2, 9)
    near, far = f"{base}^{{{power}}}", f"{base}^{{{power + 1}}}"
    yield f"\\frac{{{near}+1}}{{{far}}}", f"\\frac{{1}}{{{base}}} + {base}^{{-{power + 1}}}", True
    yield f"\\frac{{{near}+1}}{{{far}}}", f"\\frac{{1}}{{{base}}}", False
    yield f"\\frac{{{near}-1}}{{{near}}}", "1", False
    yield "1", f"1 + 10^{{-{power}}}", False
    yield f"\\sqrt{{{base}}}", f"\\sqrt{{{base}}} + 10^{{-{power}}}", False
    yield f"\\sqrt{{{near}+1}}", f"\\sqrt{{{near}+2}}", False
    yield f"1 - e^{{-{power}}}", "1", False


def huge_numbers(random: Random) -> Drawn:
    power = random.randint(20, 400)
    number = random.randint(10 ** (power - 1), 10**power)
    yield str(number), str(number), True
    yield str(number), str(number + 1), False
    yield str(number), str(number - random.randint(1, 10**6)), False
    yield f"2^{{{power}}}", str(2**power), True
    yield f"2^{{{power}}}", str(2**power + 1), False
    yield f"10^{{{power}}}", f"10^{{{power}}} + 1", False
    yield f"{power}!", f"({power}-1)! \\cdot {power}", True
    yield f"{power}!", f"{power}! + 1", False


def roots(random: Random) -> Drawn:
    radicand, factor = random.choice([2, 3, 5, 6, 7, 10, 11]), random.randint(2, 12)
    yield f"{factor}\\sqrt{{{radicand}}}", f"\\sqrt{{{factor * factor * radicand}}}", True
    yield f"{factor}\\sqrt{{{radicand}}}", f"{factor}√{radicand}", True
    yield f"\\frac{{1}}{{\\sqrt{{{radicand}}}}}", f"\\frac{{\\sqrt{{{radicand}}}}}{{{radicand}}}", True
    yield f"{factor}+\\sqrt{{{radicand}}}", f"\\sqrt{{{radicand}}} + {factor}", True
    yield f"\\sqrt[3]{{-{factor**3}}}", str(-factor), True
    yield f"{factor}\\sqrt{{{radicand}}}", f"{factor + 1}\\sqrt{{{radicand}}}", False
    yield f"{factor}\\sqrt{{{radicand}}}", str(factor), False
    yield f"{factor}+\\sqrt{{{radicand}}}", f"{factor}-\\sqrt{{{radicand}}}", False
    yield f"\\sqrt{{{radicand}}}", f"{radicand**0.5:.6f}", False


def constants(random: Random) -> Drawn:
    number, other = random.randint(2, 40), random.randint(2, 9)
    yield f"\\frac{{{number}\\pi}}{{{other}}}", f"{number}π/{other}", True
    yield f"\\ln {number * other}", f"\\ln {number} + \\ln {other}", True
    yield f"\\log_{{{other}}} {other**3}", "3", True
    yield "\\sin\\frac{\\pi}{6}", "\\frac12", True
    yield f"e^{{{number}}}", f"\\exp({number})", True
    yield f"{number}+{other}i", f"{other}i + {number}", True
    yield f"{number}+{other}i", f"{number}-{other}i", False
    yield f"{number}\\pi", f"{number + 1}\\pi", False
    yield f"{number}\\pi", f"{number * 3.14159:.4f}", False
    yield f"\\ln {number}", f"\\log_{{10}} {number}", False
    yield f"e^{{{number}}}", f"e^{{{number + 1}}}", False


def mixed_numbers(random: Random) -> Drawn:
    whole, part = random.randint(1, 40), proper(random, 9)
    value, top, bottom = whole + part, part.numerator, part.denominator
    yield latex(value), f"{whole} {top}/{bottom}", True
    yield latex(value), f"{whole}\\frac{{{top}}}{{{bottom}}}", True
    yield f"{whole} {top}/{bottom}", latex(value), True
    yield f"({latex(value)}, {whole})", f"({whole} {top}/{bottom}, {whole})", True
    yield latex(-value), f"-{whole}\\frac{{{top}}}{{{bottom}}}", True
    yield f"{whole} {top}/{bottom}", str(whole), False
    yield str(whole), f"{whole} {top}/{bottom}", False
    yield f"{whole} {top}/{bottom}", latex(Fraction(whole) * part), False
    yield latex(value), f"{whole} - {top}/{bottom}", False


def scientific(random: Random) -> Drawn:
    first, digits, power = random.randint(1, 9), random.randint(1, 999), random.randint(2, 25)
    mantissa = f"{first}.{digits}"
    yield f"{mantissa} \\times 10^{{{power}}}", f"{mantissa}e{power}", True
    yield f"{mantissa} \\times 10^{{-{power}}}", f"{mantissa}E-{power}", True
    yield f"{mantissa} \\times 10^{{{power}}}", f"{mantissa} \\cdot 10^{{{power}}}", True
    yield f"({mantissa}e{power}, 1)", f"({mantissa} \\times 10^{power}, 1)", True
    yield f"{mantissa}e{power}", f"{mantissa}e-{power}", False
    yield f"{mantissa}e{power}", mantissa, False
    yield mantissa, f"{mantissa}e{power}", False
    yield f"{mantissa}e{power}", f"{mantissa}e{power + 1}", False


def sentences(random: Random) -> Drawn:
    number, part = random.randint(2, 40), proper(random, 9)
    value = number + part
    top, bottom = part.numerator, part.denominator
    for sentence in ("The answer is %s.", "Therefore the final answer is $%s$.", "**Answer:** %s", "So it is %s."):
        for written in (f"{number} {top}/{bottom}", f"{value.numerator}/{value.denominator}"):
            yield latex(value), f"{SENTENCE}{sentence % written}", True
        yield str(number), f"{SENTENCE}{sentence % f'{number} {top}/{bottom}'}", False
        yield str(number), f"{SENTENCE}{sentence % f'{number}e-3'}", False
        yield f"{number}e-3", f"{SENTENCE}{sentence % f'{number}e-3'}", True


def digit_groups(random: Random) -> Drawn:
    groups = [str(random.randint(1, 999)), *(f"{random.randint(0, 999):03}" for _ in range(random.randint(1, 3)))]
    plain = "".join(groups)
    for separator in (",", "{,}", "\\,", " ", ",\\!", "\\ "):
        yield plain, separator.join(groups), True
        yield separator.join(groups), plain, True
        yield str(int(plain) + 1), separator.join(groups), False
    yield plain, ", ".join(groups), False
    yield "0", " ".join(groups), False
    yield str(int(groups[0])), ",".join(groups), False


def lists(random: Random) -> Drawn:
    numbers = random.sample(range(1, 999), random.randint(2, 4))
    shuffled = numbers[::-1]
    yield ", ".join(map(str, numbers)), ",".join(map(str, numbers)), True
    yield ", ".join(map(str, numbers)), ", ".join(map(str, shuffled)), True
    yield ", ".join(map(str, numbers)), " \\text{ and } ".join(map(str, numbers)), True
    yield "\\{" + ", ".join(map(str, numbers)) + "\\}", "\\{" + ",".join(map(str, shuffled)) + "\\}", True
    yield ", ".join(map(str, numbers)), ", ".join(map(str, numbers[1:])), False
    yield ", ".join(map(str, numbers)), ", ".join(map(str, [*numbers, 1000])), False
    yield ", ".join(map(str, numbers)), ", ".join(map(str, [numbers[0] + 1000, *numbers[1:]])), False
    yield ", ".join(map(str, numbers)), "".join(map(str, numbers)), False
    yield str(numbers[0]), ", ".join(map(str, numbers)), False


def tuples(random: Random) -> Drawn:
    a, b = random.sample(range(-20, 21), 2)
    yield f"({a}, {b})", f"\\left({a},{b}\\right)", True
    yield f"({a}, {b})", f"(\\frac{{{2 * a}}}{{2}}, {b}.0)", True
    yield f"({a}, {b})", f"({b}, {a})", False
    yield f"({a}, {b})", f"({a}, {b + 1})", False
    yield f"({a}, {b})", f"[{a}, {b}]", False
    yield f"({a}, {b})", f"({a}, {b}, 0)", False


def intervals(random: Random) -> Drawn:
    a = random.randint(-20, 20)
    b = a + random.randint(1, 20)
    yield f"[{a}, {b}]", f"{a} \\le x \\le {b}", True
    yield f"({a}, {b})", f"{a} < x < {b}", True
    yield f"[{a}, \\infty)", f"x \\ge {a}", True
    yield f"x < {a} \\text{{ or }} x > {b}", f"(-\\infty, {a}) \\cup ({b}, \\infty)", True
    yield f"x \\in [{a},{b}]", f"[{a}, {b}]", True
    yield f"(-\\infty, {a}) \\cup ({a}, \\infty)", f"x \\ne {a}", True
    yield f"[{a}, {b}]", f"[{a}, {b})", False
    yield f"[{a}, {b}]", f"[{a}, {b + 1}]", False
    yield f"[{a}, \\infty)", f"(-\\infty, {a}]", False
    yield f"{a} \\le x \\le {b}", f"{a} < x \\le {b}", False
    yield f"x < {a} \\text{{ or }} x > {b}", f"({a}, {b})", False
    yield f"x > {a}", f"y > {a}", False


def letters(random: Random) -> Drawn:
    run = "".join(random.sample("ABCDEFGH", random.randint(3, 5)))
    other = run[1:] + run[0]
    big, small = random.choice([("R", "r"), ("A", "a"), ("X", "x"), ("N", "n"), ("M", "m")])
    yield run, f"\\text{{{run}}}", True
    yield run, f"\\mathrm{{{run}}}", True
    yield run, other, False
    yield run, run.lower(), False
    yield run, run[:-1], False
    yield ", ".join(run), ", ".join(other), False
    yield f"{big} - {small}", f"{big}-{small}", True
    yield f"{big} - {small}", f"{small} - {big}", False
    yield f"{big} - {small}", "0", False
    yield f"{big}^2 - {small}^2", f"({big}-{small})({big}+{small})", True
    yield big, small, False
    yield f"2{big}", f"2{small}", False


WORDS = (
    "east",
    "seat",
    "even",
    "odd",
    "increasing",
    "decreasing",
    "rectangle",
    "triangle",
    "listen",
    "silent",
    "night",
)


def words(random: Random) -> Drawn:
    one, other = random.sample(WORDS, 2)
    a, b = random.sample("ABCDE", 2)
    yield one, f"\\text{{{one}}}", True
    yield f"\\text{{{one}}}", f"\\text{{ {one.capitalize()} }}", True
    yield one, other, False
    yield one, "".join(sorted(one)) if "".join(sorted(one)) != one else one[::-1], False
    yield f"\\text{{both {a} and {b}}}", f"\\text{{both {a} and {b}}}", True
    yield f"\\text{{both {a} and {b}}}", f"\\text{{both {a} or {b}}}", False
    yield f"\\text{{both {a} and {b}}}", f"\\text{{neither {a} nor {b}}}", False
    yield f"\\text{{not {one}}}", f"\\text{{{one}}}", False
    number = random.randint(2, 99)
    yield f"\\text{{at least }} {number}", f"\\text{{at most }} {number}", False
    yield str(number), f"\\text{{at least }} {number}", False


UNITS = [
    ("m", "meters", "cm"), ("km", "kilometers", "m"), ("kg", "kilograms", "g"), ("cm^2", "square centimeters", "cm"),
    ("hours", "hrs", "minutes"), ("km/h", "kilometers per hour", "m/s"), ("apples", "apples", "oranges"),
    ("dollars", "USD", "cents"), ("\\text{m}^3", "cubic meters", "m^2"), ("s", "seconds", "h"),
]  # fmt: skip


def units(random: Random) -> Drawn:
    unit, other, wrong = random.choice(UNITS)
    number = random.randint(2, 999)
    wrapped = unit if "\\text" in unit else f"\\text{{ {unit}}}"
    yield f"{number}{wrapped}", f"{number}\\ \\text{{{other}}}", True
    yield str(number), f"{number}{wrapped}", True
    yield f"{number}{wrapped}", str(number), True
    yield f"{number}{wrapped}", f"{number}\\text{{ {wrong}}}", False
    yield f"{number}{wrapped}", f"{number + 1}{wrapped}", False
    yield str(number), f"{number + 1}{wrapped}", False
    yield str(number), f"{number}\\text{{ million}}", False
    yield f"\\${number}", f"{number} \\text{{ dollars}}", True
    yield f"\\${number}", f"{number} \\text{{ cents}}", False
    yield f"{number}^\\circ", f"{number}°", True
    yield f"{number}^\\circ", f"{number}\\text{{ degrees}}", True


def bases(random: Random) -> Drawn:
    base = random.randint(3, 9)
    digits = "".join(str(random.randint(1, base - 1)) for _ in range(random.randint(2, 5)))
    yield f"{digits}_{base}", f"{digits}_{{{base}}}", True
    yield f"{digits}_{base}", f"({digits})_{{{base}}}", True
    yield f"{digits}_{base}", f"{digits}_{{{base + 1}}}", False
    yield f"{digits}_{base}", f"1{digits}_{{{base}}}", False
    yield f"{digits}_{base}", digits, False
    yield str(int(digits, base)), digits, False


def percents(random: Random) -> Drawn:
    number = random.randint(2, 99)
    part = proper(random, 9)
    yield f"{number}\\%", f"{number} \\%", True
    yield f"{number}\\%", f"{number}\\text{{ percent}}", True
    yield f"{number}\\%", decimal(Fraction(number, 100)), True
    yield f"{latex(number + part)}\\%", f"{number}\\frac{{{part.numerator}}}{{{part.denominator}}}\\%", True
    yield f"{number}\\%", str(number), False
    yield str(number), f"{number}\\%", False
    yield f"{number}\\%", f"{number + 1}\\%", False
    yield f"{number}\\%", f"0.00{number}", False


def polynomials(random: Random) -> Drawn:
    a, b = random.sample(range(1, 12), 2)
    yield f"x^2 + {a + b}x + {a * b}", f"(x+{a})(x+{b})", True
    yield f"x^2 + {a + b}x + {a * b}", f"{a * b} + x^2 + {a + b}x", True
    yield f"\\frac{{{a}}}{{x}} + \\frac{{{b}}}{{x}}", f"\\frac{{{a + b}}}{{x}}", True
    yield f"{a}x^{{{b}}}y", f"y \\cdot {a} x^{{{b}}}", True
    yield f"\\sqrt{{x^2}} + {a}", f"|x| + {a}", True
    yield f"x^2 + {a + b}x + {a * b}", f"x^2 + {a + b}x - {a * b}", False
    yield f"x^2 + {a + b}x + {a * b}", f"(x-{a})(x-{b})", False
    yield f"x + {a}", f"y + {a}", False
    yield f"\\sqrt{{x^2}} + {a}", f"x + {a}", False
    yield f"{a}x^{{{b}}}", f"{a}x^{{{b + 1}}}", False
    yield f"|x - {a}|", f"x - {a}", False


def equations(random: Random) -> Drawn:
    a, b = random.sample(range(2, 12), 2)
    yield f"x = {a}", str(a), True
    yield str(a), f"x = {a}", True
    yield f"y = {a}x + {b}", f"y = {b} + {a}x", True
    yield f"y = {a}x + {b}", f"{a}x - y + {b} = 0", True
    yield f"x = {a}, y = {b}", f"({a}, {b})", True
    yield f"x = {a} \\text{{ or }} x = {b}", f"x = {b}, x = {a}", True
    yield f"\\pm {a}", f"{a}, -{a}", True
    yield f"x = {a}", f"y = {a}", False
    yield f"y = {a}x + {b}", f"y = {a}x - {b}", False
    yield f"x = {a}, y = {b}", f"({b}, {a})", False
    yield f"x = {a} \\text{{ or }} x = {b}", f"x = {a}", False
    yield f"\\pm {a}", str(a), False
    yield f"{a}x + {b}y = 1", f"{a}x + {b}y < 1", False


TEMPLATES: dict[str, list[Callable[[Random], Drawn]]] = {
    "fractions, decimals": [fractions, decimals, rounded_fractions, repeating],
    "tiny, close, huge": [tiny_numbers, close_numbers, huge_numbers],
    "roots, constants": [roots, constants],
    "mixed, scientific": [mixed_numbers, scientific, sentences],
    "digit groups, lists": [digit_groups, lists, tuples],
    "intervals": [intervals],
    "letters, words": [letters, words],
    "units, bases, percent": [units, bases, percents],
    "formulas, equations": [polynomials, equations],
}
