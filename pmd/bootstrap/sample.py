"""One training sequence: token ids, which of them are learned, and their labels. No torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Sample:
    """A sequence under construction; `encode` turns text into ids."""

    encode: Callable[[str], list[int]]
    ids: list[int] = field(default_factory=list)
    weights: dict[int, float] = field(default_factory=dict)  # position of a learned token -> its weight
    #: Position -> the ids over which the label is uniform, for tokens that the prompt does not determine.
    uniform_over: dict[int, tuple[int, ...]] = field(default_factory=dict)
    #: Position -> id -> its share of the label, for tokens that the prompt determines in part.
    shares: dict[int, dict[int, float]] = field(default_factory=dict)

    def show(self, text: str) -> "Sample":
        """Append text that the model only reads."""
        self.ids += self.encode(text)
        return self

    def learn(self, text: str, weight: float = 1.0) -> "Sample":
        """Append text that the model learns to write."""
        for token in self.encode(text):
            self.weights[len(self.ids)] = weight
            self.ids.append(token)
        return self

    def learn_choice(self, chosen: str, among: Sequence[str], weight: float) -> "Sample":
        """Append the token `chosen`, with a label that is uniform over `among`."""
        self.uniform_over[len(self.ids)] = tuple(token for word in among for token in self.encode(word))
        return self.learn(chosen, weight)

    def learn_shares(self, chosen: str, shares: Mapping[str, float], weight: float) -> "Sample":
        """Append the token `chosen`, with a label that gives each token its share."""
        self.shares[len(self.ids)] = {token: share for word, share in shares.items() for token in self.encode(word)}
        return self.learn(chosen, weight)

    def corrupt(self, position: int, token: int) -> None:
        """Replace a learned token with a wrong one, which is not learned itself; the tokens after it still are."""
        self.ids[position] = token
        del self.weights[position]
