# ruff: noqa: RUF001
"""Brings the spellings of one notation together: Unicode, fonts, spacing and digit groups, before anything is parsed.

The result still is LaTeX. Nothing that can distinguish two answers is removed: words stay as `\\text{...}`, a currency
as `\\money{...}`, a degree sign as `\\degree`.
"""

import re
import unicodedata

#: Sign -> LaTeX, with spaces where a command must not run into a letter.
SIGNS = {
    "√": r"\sqrt ", "∛": r"\sqrt[3]", "∞": r"\infty ", "∈": r"\in ", "∪": r"\cup ", "∩": r"\cap ", "∖": r"\setminus ",
    "∅": r"\emptyset ", "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ",
    "×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "∙": r"\cdot ", "÷": "/", "⁄": "/", "∕": "/", "−": "-", "–": "-",
    "±": r"\pm ", "∓": r"\mp ", "°": r"\degree ", "º": r"\degree ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}",
    "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}", "′": "'", "“": '"', "”": '"', "’": "'", "∧": r"\land ",
    "∨": r"\lor ", "→": r"\to ", "∣": "|", "⟨": r"\langle ", "⟩": r"\rangle ", "⌊": r"\lfloor ", "⌋": r"\rfloor ",
    "⌈": r"\lceil ", "⌉": r"\rceil ", "€": r"\money{€}", "£": r"\money{£}", "¥": r"\money{¥}", "₹": r"\money{₹}",
    "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ", "ε": r"\epsilon ", "θ": r"\theta ",
    "λ": r"\lambda ", "μ": r"\mu ", "π": r"\pi ", "ρ": r"\rho ", "σ": r"\sigma ", "τ": r"\tau ", "φ": r"\phi ",
    "ω": r"\omega ", "Δ": r"\Delta ", "Ω": r"\Omega ", "µ": r"\mu ",
}  # fmt: skip
#: Command -> the one we keep.
COMMANDS = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "dbinom": "binom", "tbinom": "binom", "leq": "le", "geq": "ge",
    "leqslant": "le", "geqslant": "ge", "lt": "<", "gt": ">", "neq": "ne", "varnothing": "emptyset", "ast": "times",
    "div": "/", "deg": "degree", "lvert": "|", "rvert": "|", "vert": "|", "mid": "|", "varphi": "phi", "colon": ":",
    "varepsilon": "epsilon", "backslash": "setminus", "wedge": "land", "vee": "lor", "tg": "tan",
    "lbrack": "[", "rbrack": "]", "isin": "in", "Z": "mathbb{Z}", "R": "mathbb{R}",
    "N": "mathbb{N}", "Q": "mathbb{Q}", "C": "mathbb{C}", "reals": "mathbb{R}", "Reals": "mathbb{R}",
    "union": "cup", "bullet": "cdot", "percent": "%",
    "lgroup": "(", "rgroup": ")", "lparen": "(", "rparen": ")", "sim": "approx",
    "simeq": "approx", "cong": "approx", "euro": "money{€}", "pounds": "money{£}", "dollar": "money{usd}",
}  # fmt: skip
#: Names that LaTeX may write as text and that are functions all the same.
FUNCTIONS = (
    "arcsin", "arccos", "arctan", "arccot", "sinh", "cosh", "tanh", "sin", "cos", "tan", "cot", "sec", "csc", "ln",
    "log", "lg", "exp", "sqrt", "gcd", "lcm", "max", "min",
)  # fmt: skip
LAYOUT = re.compile(
    r"\\(?:left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|scriptstyle|limits|nolimits|phantom\{[^{}]*\})"
    r"(?![A-Za-z])\.?"
)
FONT = re.compile(
    r"\\(?:text(?:rm|bf|it|tt|sf|sc|normal|up|md)?|math(?:rm|bf|it|sf|tt|normal)|mbox|hbox|operatorname\*?|boldsymbol|bm"
    r"|emph|underline|bold|rm|bf)\s*\{((?:[^{}]|\\text\{[^{}]*\})*)\}"
)
#: Fonts of single letters that say nothing; upright letters may be units and stay text.
LETTER_FONT = re.compile(r"\\(?:math(?:bf|it|sf|tt|normal)|boldsymbol|bm|bold|bf|underline|emph)\s*\{")
SPACE = re.compile(r"\\(?:[,;:>! ]|quad(?![A-Za-z])|qquad(?![A-Za-z])|thinspace(?![A-Za-z])|enspace(?![A-Za-z]))|[~\s]")
SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
#: A separator that can only group digits: `{,}`, a space of LaTeX or Unicode, or a plain one.
GROUP_MARK = r"(?:\{,\}|\\!?,(?:\\!)?|,\\!|\\[:; ]|[\u00a0\u2009\u202f ])"
GROUPS = re.compile(rf"(?<![\d.,_^/])([1-9]\d{{0,2}})((?:{GROUP_MARK}\d{{3}})+)(?!\d|/\d|\s*\\frac)")
DECIMAL_GROUPS = re.compile(r"(\.\d{3})((?:\\,\d{3})*\\,\d{1,3})(?!\d)")
DECIMAL_COMMA = re.compile(r"(?<=\d)\{,\}(?=\d)")
PERCENT = re.compile(r"(?<=[\d})]) ?(?:\\text\{ ?(?:per ?cent|pct|%) ?\}|(?:per ?cent|pct)(?![A-Za-z]))")
TEMPERATURE = re.compile(
    r"\\degree ?\\text\{ ?([CFK]) ?\}|\\degree ?([CF])(?![A-Za-z])|\\text\{ ?\\degree ?([CFK]) ?\}"
)
TIMES_TEN = re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*\^)")


def normalize(text: str) -> str:
    """Return the text in one spelling, without delimiters of mathematics and without a final full stop."""
    text = _rows(_unicode(text)).replace(r"\$", r"\money{usd}")
    text = re.sub(r"\$(?=\s*\d)(?![^$]*\$)", r"\\money{usd}", text)  # a single $ before a number is a currency
    text = re.sub(r"\\[()\[\]]|\$", " ", text)
    text = re.sub(r"^\s*\*\*(.*)\*\*\s*$", r"\1", text, flags=re.DOTALL)  # bold in Markdown
    text = LAYOUT.sub("", text)
    text = re.sub(r"\\([A-Za-z]+)", _command, text)
    text = GROUPS.sub(lambda found: found[1] + re.sub(r"\D", "", found[2]), text)
    text = DECIMAL_GROUPS.sub(lambda found: found[1] + re.sub(r"\D", "", found[2]), text)
    text = re.sub(r"(?<=[\d.])\\dot ?(?:\{(\d)\}|(\d))(?!\d|\\dot)", r"\\overline{\1\2}", text)
    text = DECIMAL_COMMA.sub(".", text)
    text = SPACE.sub(" ", text).replace(r"\{", r"\lbrace ").replace(r"\}", r"\rbrace ")
    text = text.replace(r"\|", "|").replace("**", "^").replace("<=", r"\le ").replace(">=", r"\ge ")
    text = text.replace("!=", r"\ne ").replace(r"\%", "%").replace(r"\&", "&").replace(r"\_", "_")
    text = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))", r"\\degree ", text)
    text = PERCENT.sub("%", _fonts(TIMES_TEN.sub(r"\\times ", text)))
    return strip_ends(TEMPERATURE.sub(r"\\text{°\1\2\3}", text))


def strip_ends(text: str) -> str:
    """Remove white space, final punctuation and one pair of braces or quotes around everything."""
    before = None
    while before != text:
        before = text
        text = re.sub(r"(?:\s|(?<!\\)[.,;:]|\\text\{\s*[.,;:]?\s*\})+$", "", text.strip())
        if text[:1] == "{" and _closing(text) == len(text) - 1:
            text = text[1:-1]
    return " ".join(text.split())


def _closing(text: str) -> int:
    """Return the place of the brace that closes the first one, or -1."""
    depth = 0
    for at, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return at
    return -1


def _rows(text: str) -> str:
    """Mark the ends of matrix rows; elsewhere a doubled backslash is an escaped one, or a line break."""
    if r"\begin" in text:
        return text.replace(r"\\", r" \newrow ")
    return re.sub(r"\\\\(?![A-Za-z])", " ", text).replace(r"\\", "\\")


def _unicode(text: str) -> str:
    text = re.sub(f"[{''.join(SUPERSCRIPTS)}]+", lambda found: f"^{{{_mapped(found[0], SUPERSCRIPTS)}}}", text)
    text = re.sub(f"[{''.join(SUBSCRIPTS)}]+", lambda found: f"_{{{_mapped(found[0], SUBSCRIPTS)}}}", text)
    parts = []
    for character in text:
        if ord(character) < 128:
            parts.append(character)
        elif character in SIGNS:
            parts.append(SIGNS[character])
        elif (meaning := unicodedata.decomposition(character)).startswith("<fraction> "):
            top, bottom = "".join(chr(int(code, 16)) for code in meaning.split()[1:]).split("⁄")
            parts.append(rf"\frac{{{top}}}{{{bottom}}}")
        elif character in "\u00a0\u2009\u202f":
            parts.append(character)
        else:
            plain = unicodedata.normalize("NFKC", character)
            parts.append(SIGNS.get(plain, plain))
    return "".join(parts)


def _mapped(text: str, table: dict[str, str]) -> str:
    return "".join(table[character] for character in text)


def _command(found: re.Match[str]) -> str:
    name = COMMANDS.get(found[1], found[1])
    return f"\\{name}" if name[0].isalpha() else f"{name} " if name != "%" else r"\%"


def _fonts(text: str) -> str:
    """Reduce fonts to `\\text{words}`; functions, single letters and numbers in another font lose it."""
    for _ in range(4):  # nested fonts
        reduced = FONT.sub(_unfonted, text)
        if reduced == text:
            break
        text = reduced
    return text


def _unfonted(found: re.Match[str]) -> str:
    inside = re.sub(r"\\text\{([^{}]*)\}", r"\1", found[1])
    bare = inside.strip()
    if bare in FUNCTIONS and (bare not in ("min", "max", "sec") or "operatorname" in found[0]):
        return f"\\{bare} "  # `5\\text{ min}` and `5\\text{ sec}` are times
    if re.fullmatch(r"\([A-Z]\)\.?", bare):  # an option
        return f" {bare} "
    is_letter = len(bare) == 1 and (bare in "eid" or LETTER_FONT.match(found[0]))
    if is_letter or not re.search("[A-Za-z]", bare):
        return f" {bare} "
    return f"\\text{{{inside}}}"
