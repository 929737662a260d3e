"""Parses one expression, LaTeX or plain, into a tree. What it does not know it refuses; it never guesses.

Rules: an integer before a proper fraction of integers is a mixed number (`1 1/2`, `33\\frac{1}{3}`); `1.5e3` is a
number in scientific notation if nothing separates its parts; two numbers side by side are no product; a factor after
a slash is not part of the denominator (`1/2x` is x/2); letters keep their case; `f(...)`, `g(...)` and `h(...)` are
unknown functions, any other letter before a parenthesis is a factor.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from pmd.verifiers.mathematics.normalize import FUNCTIONS

MAX_DEPTH = 60
MAX_EXPONENT_DIGITS = 4  # of scientific notation; 10^n has no such limit
#: Words that are not a product of letters, though they are short.
_SHORT_WORDS = (
    "no not yes the or and is are be all any both one two six ten odd even to of on if in at by it as an nor "
    "iff per inf nan"
)
SHORT_WORDS = frozenset(_SHORT_WORDS.split())
_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi "
    "psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell hbar"
)
GREEK = frozenset(_GREEK.split())
_COMMANDS = (
    "frac sqrt binom times cdot over pm mp le ge ne in cup cap setminus lbrace rbrace langle rangle lfloor "
    "rfloor lceil rceil text money degree infty choose emptyset bmod mod approx overline"
)
COMMANDS = frozenset(_COMMANDS.split())
TOKEN = re.compile(
    r"\s*(?:(?P<repeating>\d*\.\d*\\overline\s*\{\d+\})|(?P<number>\d+(?:\.\d*)?|\.\d+)|(?P<text>\\text\{[^{}]*\})"
    r"|(?P<command>\\[A-Za-z]+)|(?P<word>[A-Za-z]+)|(?P<mark>\S))"
)
SCIENTIFIC = re.compile(rf"[eE]([+-]?\d{{1,{MAX_EXPONENT_DIGITS}}})(?![\w.])")
UNKNOWN_FUNCTIONS = frozenset("fgh")


class UnreadableError(ValueError):
    """The text is not an expression that this parser knows."""


@dataclass(frozen=True, slots=True)
class Number:
    """An exact number."""

    value: Fraction


@dataclass(frozen=True, slots=True)
class Symbol:
    """A variable, with its subscript; `\\infty` too."""

    name: str


@dataclass(frozen=True, slots=True)
class Apply:
    """An operation or function on its arguments."""

    name: str  # + * neg inv ^ root ! abs floor ceil binom degree log mod, or a function's own
    arguments: tuple["Expression", ...]


Expression = Number | Symbol | Apply


@dataclass(frozen=True, slots=True)
class Token:
    """One piece of text; `kind` is number, name, text or mark."""

    kind: str
    text: str
    value: Fraction = Fraction(0)
    spaced: bool = False  # white space before it


def parse_expression(text: str) -> Expression:
    """Return the tree of normalized text.

    Raises:
        UnreadableError: if the text, or any part of it, is not an expression.
    """
    parser = _Parser(_tokens(text))
    tree = parser.sum()
    if parser.peek():
        raise UnreadableError(text)
    return tree


def is_broken(text: str) -> bool:
    """Return whether unreadable text is a mistake, and not words or a notation that is compared as it is written."""
    if sum(map(text.count, "([{")) != sum(map(text.count, ")]}")):
        return True
    if re.fullmatch(r"[\d.]+( ?: ?[\d.]+)+", text) or re.search(r"[A-Za-z]'|\\text\{[^{}]*[A-Za-z]", text):
        return False  # a ratio, a time, x', or something with words in it
    if set(re.findall(r"\\([A-Za-z]+)", text)) - COMMANDS - GREEK - set(FUNCTIONS):
        return False
    words = re.findall(r"(?<!\\)[^\W\d_]{2,}", re.sub(r"\\text\{([^{}]*)\}|\\[A-Za-z]+", r" \1 ", text))
    return not any(word not in FUNCTIONS for word in words)


def _tokens(text: str) -> list[Token]:
    tokens: list[Token] = []
    at = 0
    while at < len(text):
        found = TOKEN.match(text, at)
        if not found:
            break  # only white space is left
        spaced, at = found[0][0].isspace(), found.end()
        if found["repeating"]:
            tokens.append(Token("number", found["repeating"], _repeating(found["repeating"]), spaced))
        elif found["number"]:
            value = Fraction(found["number"])
            if exponent := SCIENTIFIC.match(text, at):
                value *= Fraction(10) ** int(exponent[1])
                at = exponent.end()
            tokens.append(Token("number", found["number"], value, spaced))
        elif found["text"]:
            tokens += _text_tokens(found["text"][6:-1])
        elif found["command"]:
            tokens.append(Token("name", found["command"], spaced=spaced))
        elif found["word"]:
            tokens += _word_tokens(found["word"], spaced)
        else:
            tokens.append(Token("mark", found["mark"], spaced=spaced))
    return tokens


def _repeating(text: str) -> Fraction:
    whole, decimals = text.rstrip("}").split(".")
    first, repeated = re.split(r"\\overline\s*\{", decimals)
    numerator = int(whole + first + repeated) - int((whole + first) or 0)
    return Fraction(numerator, 10 ** len(first) * (10 ** len(repeated) - 1))


def _text_tokens(words: str) -> list[Token]:
    words = words.strip()
    if not words:
        return []
    if len(words) > 1:
        raise UnreadableError(words)
    return [Token("name", words)]


def _word_tokens(word: str, spaced: bool) -> list[Token]:
    """Split a run of letters: `sin`, `sinx`, `pi`, `xy`. Anything that looks like a word is refused."""
    if word in ("pi", "infinity", "infty") or word in GREEK:
        return [Token("name", "\\infty" if word.startswith("inf") else f"\\{word}", spaced=spaced)]
    function = next((name for name in FUNCTIONS if word.startswith(name)), "")
    rest = word[len(function) :]
    if rest in SHORT_WORDS or len(rest) > (3 if not function else 1):
        raise UnreadableError(word)
    names = ([f"\\{function}"] if function else []) + list(rest)
    return [Token("name", name, spaced=spaced and number == 0) for number, name in enumerate(names)]


class _Parser:
    def __init__(self, tokens: list[Token]):
        self.tokens, self.at, self.depth = tokens, 0, 0
        self.num_bars = 0  # open |

    def peek(self, offset: int = 0) -> Token | None:
        return self.tokens[self.at + offset] if self.at + offset < len(self.tokens) else None

    def is_at(self, *texts: str, offset: int = 0) -> bool:
        token = self.peek(offset)
        return token is not None and token.kind != "number" and token.text in texts

    def take(self, *texts: str) -> bool:
        if self.is_at(*texts):
            self.at += 1
            return True
        return False

    def need(self, text: str) -> None:
        if not self.take(text):
            raise UnreadableError(f"{text} is missing")

    def sum(self) -> Expression:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise UnreadableError("nested too deeply")
        terms = [self._signed_term()]
        while self.is_at("+", "-"):
            terms.append(self._signed_term())
        self.depth -= 1
        return terms[0] if len(terms) == 1 else Apply("+", tuple(terms))

    def _signed_term(self) -> Expression:
        negative = False
        while self.is_at("+", "-"):
            negative ^= self.take("-") or not self.take("+")
        term = self._term()
        return Apply("neg", (term,)) if negative else term

    def _term(self) -> Expression:
        factors = [self._mixed() or self._power()]
        while token := self.peek():
            if self.take("*", "\\times", "\\cdot"):
                factors.append(self._signed_factor())
            elif self.take("/"):
                factors.append(Apply("inv", (self._signed_factor(),)))
            elif self.take("\\choose"):
                return Apply("binom", (_product(factors), self._term()))
            elif self.take("\\over"):
                return Apply("*", (*factors, Apply("inv", (self._term(),))))
            elif self.take("\\bmod", "\\mod"):
                return Apply("mod", (_product(factors), self._term()))
            elif self._starts_factor(token):
                if token.kind == "number":
                    raise UnreadableError("a number after a factor")
                factors.append(self._power())
            else:
                break
        return _product(factors)

    def _signed_factor(self) -> Expression:
        if self.take("-"):
            return Apply("neg", (self._signed_factor(),))
        self.take("+")
        return self._mixed() or self._power()

    def _starts_factor(self, token: Token) -> bool:
        if token.kind == "mark":
            return token.text in "({" or (token.text == "|" and not self.num_bars)
        stops = (
            "\\times",
            "\\cdot",
            "\\rfloor",
            "\\rceil",
            "\\over",
            "\\choose",
            "\\pm",
            "\\mp",
            "\\rbrace",
            "\\rangle",
        )
        return token.text not in stops

    def _mixed(self) -> Expression | None:
        """Read `1 1/2` or `1\\frac{1}{2}`; return None, having read nothing, if there is something else."""
        whole, start = self.peek(), self.at
        if whole is None or whole.kind != "number" or not whole.text.isdigit():
            return None
        self.at += 1
        part = self._fraction_of_integers()
        if part is None or part >= 1 or self.is_at("^", "!"):
            self.at = start
            return None
        return self._postfix(Number(whole.value + part))

    def _fraction_of_integers(self) -> Fraction | None:
        if self.take("\\frac"):
            top, bottom = self._integer_argument(), self._integer_argument()
        else:
            token, slash, following = self.peek(), self.peek(1), self.peek(2)
            if not (token and token.spaced and slash and slash.text == "/" and following):
                return None
            if not (token.kind == following.kind == "number" and token.text.isdigit() and following.text.isdigit()):
                return None
            self.at += 3
            top, bottom = int(token.text), int(following.text)
        return Fraction(top, bottom) if top is not None and bottom else None

    def _integer_argument(self) -> int | None:
        braced = self.take("{")
        token = self.peek()
        if token is None or token.kind != "number" or not token.text.isdigit():
            return None
        if not braced:
            return int(self._digit())
        self.at += 1
        return int(token.text) if self.take("}") else None

    def _digit(self) -> str:
        """Take one digit of a number: \\frac12 is one half."""
        text = self.tokens[self.at].text
        if len(text) > 1:
            parts = [Token("number", part, Fraction(part)) for part in (text[0], text[1:])]
            self.tokens[self.at : self.at + 1] = parts
        self.at += 1
        return text[0]

    def _power(self) -> Expression:
        return self._postfix(self._atom())

    def _postfix(self, base: Expression) -> Expression:
        num_marks = 0
        while True:
            if self.take("^"):
                base = Apply("^", (base, self._exponent()))
            elif self.take("%"):
                base = Apply("*", (base, Number(Fraction(1, 100))))
            elif self.take("\\degree"):
                base = Apply("degree", (base,))
            elif self.take("!"):
                if self.is_at("!"):
                    raise UnreadableError("a double factorial")
                base = Apply("!", (base,))
            else:
                return base
            num_marks += 1
            if num_marks > 20:
                raise UnreadableError("too many marks")

    def _exponent(self) -> Expression:
        if self.is_at("{"):
            return self._group()
        if self.take("-"):
            return Apply("neg", (self._exponent(),))
        base = self._atom()
        return Apply("^", (base, self._exponent())) if self.take("^") else base

    def _group(self) -> Expression:
        self.need("{")
        inside = self.sum()
        self.need("}")
        return inside

    def _argument(self) -> Expression:
        """Read the argument of a LaTeX command: a group, one digit or one letter."""
        token = self.peek()
        if self.is_at("{"):
            return self._group()
        if token and token.kind == "number" and token.text.isdigit():
            return Number(Fraction(int(self._digit())))
        return self._atom()

    def _atom(self) -> Expression:
        token = self.peek()
        if token is None:
            raise UnreadableError("something is missing")
        self.at += 1
        if token.kind == "number":
            return Number(token.value)
        pairs = {"(": ")", "[": "]", "{": "}"}
        if token.text in pairs:
            inside = self.sum()
            self.need(pairs[token.text])
            return inside
        around = {"|": ("|", "abs"), "\\lfloor": ("\\rfloor", "floor"), "\\lceil": ("\\rceil", "ceil")}
        if token.text in around:
            end, name = around[token.text]
            self.num_bars += token.text == "|"
            inside = self.sum()
            self.need(end)
            self.num_bars -= token.text == "|"
            return Apply(name, (inside,))
        if token.kind == "name":
            return self._named(token.text)
        raise UnreadableError(token.text)

    def _named(self, name: str) -> Expression:
        if name == "\\frac":
            top = self._argument()
            return Apply("*", (top, Apply("inv", (self._argument(),))))
        if name == "\\binom":
            return Apply("binom", (self._argument(), self._argument()))
        if name == "\\sqrt":
            return self._root()
        if name.removeprefix("\\") in FUNCTIONS and len(name) > 2:
            return self._function(name.removeprefix("\\"))
        if name in UNKNOWN_FUNCTIONS and self.is_at("("):
            return Apply(f"call {name}", self._arguments())
        if name in ("\\pi", "\\infty") or len(name) == 1 or name.removeprefix("\\") in GREEK:
            return Symbol(name + self._subscript())
        raise UnreadableError(name)

    def _subscript(self) -> str:
        """Read the subscript of a letter as it is written; `_{12}` and `_12` are one."""
        if not self.take("_"):
            return ""
        if not self.take("{"):
            token = self.peek()
            if token is None or token.kind == "mark":
                raise UnreadableError("a subscript")
            self.at += 1
            return f"_{token.text}"
        parts = []
        while not self.take("}"):
            token = self.peek()
            if token is None or token.text in "{^":
                raise UnreadableError("a subscript")
            parts.append(token.text)
            self.at += 1
        return f"_{''.join(parts)}"

    def _root(self) -> Expression:
        degree: Expression = Number(Fraction(2))
        if self.take("["):
            degree = self.sum()
            self.need("]")
        return Apply("root", (self._group() if self.is_at("{") else self._atom(), degree))

    def _function(self, name: str) -> Expression:
        base: Expression | None = None
        exponent: Expression | None = None
        while self.is_at("_", "^"):
            if self.take("_"):
                base = self._group() if self.is_at("{") else self._atom()
            elif self.take("^"):
                exponent = self._exponent()
        if name in ("gcd", "lcm", "max", "min"):
            applied = Apply(name, self._arguments())
        else:
            if exponent == Apply("neg", (Number(Fraction(1)),)):
                name, exponent = f"arc{name}", None
            applied = Apply(name, (self._function_argument(),) if base is None else (self._function_argument(), base))
        if base is not None and name not in ("log", "lg"):
            raise UnreadableError("a subscript of a function")
        return applied if exponent is None else Apply("^", (applied, exponent))

    def _arguments(self) -> tuple[Expression, ...]:
        opening = "\\lbrace" if self.is_at("\\lbrace") else "("
        self.need(opening)
        found = [self.sum()]
        while self.take(","):
            found.append(self.sum())
        self.need("\\rbrace" if opening == "\\lbrace" else ")")
        return tuple(found)

    def _function_argument(self) -> Expression:
        """Read what stands in parentheses, or else a product without sign, slash and further functions: sin 2x."""
        if self.is_at("(", "[", "{", "|"):
            return self._atom()
        if self.take("-"):
            return Apply("neg", (self._function_argument(),))
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise UnreadableError("nested too deeply")
        factors = [self._power()]
        while token := self.peek():
            is_function = token.text.removeprefix("\\") in FUNCTIONS and token.text != "\\sqrt"
            if not self._starts_factor(token) or is_function or token.kind == "number" or self.is_at("("):
                break
            factors.append(self._power())
        self.depth -= 1
        return _product(factors)


def _product(factors: list[Expression]) -> Expression:
    return factors[0] if len(factors) == 1 else Apply("*", tuple(factors))
