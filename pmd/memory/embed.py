"""Embeds texts as unit vectors. A store records the embedder that it was built with and refuses any other.

`HashEmbedder` needs no model. It weights words by their rarity among the training tasks, because rare words are what
distinguishes tasks: in the tiny world, an unweighted bag of words finds the right family a third of the time, the
weighted one always. `SentenceEmbedder` wraps a sentence-transformers model (extra `embed`). If the model has an
instruction for queries, as Qwen3-Embedding has, a task that is looked up gets it, and what is stored does not.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pmd.errors import ConfigError, MemoryStoreError
from pmd.hub import prepare_hub

Vectors = np.ndarray  # float32 [n, D], rows of length 1
DEFAULT_DIMENSION = 512
SMOOTHING = 0.01  # weight of a word that every training task contains, so that no text becomes the zero vector
BATCH_TEXTS = 8  # embedded at once by a sentence model
MAX_TOKENS = 2048  # of one text for a sentence model; the rest of a longer text is ignored
HASHES_PER_WORD = 4  # for words without a slot of their own
_EDGES = ".,;:!?\"'`()[]{}"


class Embedder(Protocol):
    """Turns texts into unit vectors."""

    @property
    def name(self) -> str:
        """Identity of the embedder and everything it was fitted to; two stores with equal names are comparable."""
        ...

    @property
    def dimension(self) -> int:
        """Length of the vectors, D."""
        ...

    @property
    def costly(self) -> bool:
        """Whether embedding is so slow that insight vectors are stored instead of recomputed."""
        ...

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Return one unit vector per text, float32 [n, D]."""
        ...

    def embed_queries(self, texts: Sequence[str]) -> Vectors:
        """Return one unit vector per text that is looked up among embedded ones, float32 [n, D]."""
        ...

    def fitted_to(self, texts: Sequence[str]) -> "Embedder":
        """Return an embedder for comparing these texts with each other; itself if nothing is fitted."""
        ...

    def state(self) -> dict[str, Any]:
        """Return everything that `load_embedder` needs, as JSON values."""
        ...


def words_of(text: str) -> list[str]:
    """Split at white space, drop punctuation at the edges, fold case."""
    return [word for piece in text.split() if (word := piece.strip(_EDGES).casefold())]


class HashEmbedder:
    """Signed feature hashing of words with IDF weights, fitted once.

    If the fitted words fill at most half of the dimensions, each has its own slot, and vectors of fitted words are
    exact weighted bags of words. Each other word is then hashed to four of the remaining slots, so it never collides
    with a fitted word. With a larger vocabulary, all words are hashed to all slots.
    """

    costly = False

    def __init__(
        self,
        dimension: int = DEFAULT_DIMENSION,
        seed: int = 0,
        document_frequencies: Mapping[str, int] | None = None,
        num_documents: int = 0,
    ):
        self._dimension = dimension
        self.seed = seed
        self.num_documents = num_documents
        self.document_frequencies = dict(sorted((document_frequencies or {}).items()))
        table = repr((dimension, seed, num_documents, sorted(self.document_frequencies.items())))
        self._name = f"hash-{dimension}-{hashlib.sha256(table.encode()).hexdigest()[:12]}"
        exact = 2 * len(self.document_frequencies) <= dimension
        self._own_slots = self._assign_slots() if exact else {}
        self._shared_slots = sorted(set(range(dimension)) - set(self._own_slots.values()))
        self._features: dict[str, tuple[list[int], list[float]]] = {}

    @classmethod
    def fit(cls, texts: Sequence[str], *, dimension: int = DEFAULT_DIMENSION, seed: int = 0) -> "HashEmbedder":
        """Count in how many of the texts each word occurs."""
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(set(words_of(text)))
        return cls(dimension, seed, counts, len(texts))

    @property
    def name(self) -> str:
        """`hash-D-` and a fingerprint of seed and word table."""
        return self._name

    @property
    def dimension(self) -> int:
        """Length of the vectors."""
        return self._dimension

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Return one unit vector per text; a text without words gets the vector of the empty word."""
        rows: list[int] = []
        slots: list[int] = []
        values: list[float] = []
        for row, text in enumerate(texts):
            for word, count in Counter(words_of(text) or [""]).items():
                word_slots, word_values = self._features.get(word) or self._featurise(word)
                scale = 1.0 + math.log(count)
                rows.extend([row] * len(word_slots))
                slots.extend(word_slots)
                values.extend([value * scale for value in word_values])
        vectors = np.zeros((len(texts), self._dimension))
        np.add.at(vectors, (rows, slots), values)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        cancelled = lengths[:, 0] < 1e-9  # opposite signs cancelled; with a fixed vector the text still finds itself
        vectors[cancelled, 0] = lengths[cancelled] = 1.0
        return (vectors / lengths).astype(np.float32)

    def embed_queries(self, texts: Sequence[str]) -> Vectors:
        """Return what `embed` returns."""
        return self.embed(texts)

    def fitted_to(self, texts: Sequence[str]) -> "HashEmbedder":
        """Return the same hashing with the word rarities of these texts."""
        return HashEmbedder.fit(texts, dimension=self._dimension, seed=self.seed)

    def state(self) -> dict[str, Any]:
        """Return dimension, seed and word table."""
        return {
            "kind": "hash",
            "dimension": self._dimension,
            "seed": self.seed,
            "num_documents": self.num_documents,
            "document_frequencies": self.document_frequencies,
        }

    def weight(self, word: str) -> float:
        """Return the word's IDF weight; unseen words have the largest."""
        return math.log((1 + self.num_documents) / (1 + self.document_frequencies.get(word, 0))) + SMOOTHING

    def _featurise(self, word: str) -> tuple[list[int], list[float]]:
        weight = self.weight(word)
        if word in self._own_slots:
            feature = [self._own_slots[word]], [weight]
        else:
            slots: list[int] = []
            values: list[float] = []
            for part in range(HASHES_PER_WORD):
                code = self._hash(f"{part}:{word}")
                slots.append(self._shared_slots[(code >> 1) % len(self._shared_slots)])
                values.append((weight if code & 1 else -weight) / math.sqrt(HASHES_PER_WORD))
            feature = slots, values
        if len(self._features) < 200_000:
            self._features[word] = feature
        return feature

    def _assign_slots(self) -> dict[str, int]:
        taken: set[int] = set()
        slots: dict[str, int] = {}
        for word in self.document_frequencies:
            slot = self._hash(word) % self._dimension
            while slot in taken:
                slot = (slot + 1) % self._dimension
            taken.add(slot)
            slots[word] = slot
        return slots

    def _hash(self, text: str) -> int:
        digest = hashlib.blake2b(f"{self.seed}:{text}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")


class SentenceEmbedder:
    """A sentence-transformers model: a directory or a Hugging Face id.

    The embedder of a store that is only read is not loaded before it is asked to embed: a stranger's store may name any
    model.
    """

    costly = True

    def __init__(self, path: str, recorded: tuple[str, int] | None = None, device: str = "cpu"):
        """Load the model, or take name and dimension as a store recorded them and load it when needed."""
        self.device = device
        self.path = str(Path(path).expanduser()) if Path(path).expanduser().exists() else path
        self._model: Any = None
        if recorded is None:
            self._name, self._dimension = "", 0
            self._load()
        else:
            self._name, self._dimension = recorded

    def _load(self) -> Any:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ConfigError(
                f"memory.embedder={self.path} needs the package sentence-transformers, which is not installed; "
                "pip install 'pmd[embed]', or set memory.embedder=hash."
            ) from error
        if re.match(r"[./~]", self.path) and not Path(self.path).exists():
            raise ConfigError(
                f"memory.embedder={self.path} is not an existing directory; give one, or a Hugging Face id."
            )
        prepare_hub(self.path)
        on_cpu = {"dtype": "float32"} if self.device == "cpu" else {}  # half precision is slow there
        try:
            self._model = SentenceTransformer(
                self.path, device=self.device, trust_remote_code=False, model_kwargs=on_cpu
            )
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"memory.embedder={self.path} cannot be loaded ({' '.join(str(error).split())[:200]}); give the folder "
                "or Hugging Face id of a sentence-transformers model, or hash."
            ) from error
        self._model.eval()
        self._model.max_seq_length = min(self._model.max_seq_length or MAX_TOKENS, MAX_TOKENS)
        weights = hashlib.sha256()
        for key, tensor in sorted(self._model.state_dict().items()):
            weights.update(key.encode())
            weights.update(tensor.detach().float().cpu().numpy().tobytes())
        self._dimension = len(self.embed(["dimension"])[0])
        name = f"sentence-{self._dimension}-{weights.hexdigest()[:12]}"
        if self._name not in ("", name):
            raise MemoryStoreError(
                f"memory.embedder={self.path} is {name}, the store was built with {self._name}; the model has changed."
            )
        self._name = name
        return self._model

    @property
    def name(self) -> str:
        """`sentence-D-` and a fingerprint of the weights, so a moved directory still counts as the same model."""
        return self._name

    @property
    def dimension(self) -> int:
        """Length of the vectors."""
        return self._dimension

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Return one unit vector per text."""
        return self._encode(texts, "encode_document")

    def embed_queries(self, texts: Sequence[str]) -> Vectors:
        """Return one unit vector per text, embedded with the model's instruction for queries, if it has one."""
        return self._encode(texts, "encode_query")

    def _encode(self, texts: Sequence[str], method: str) -> Vectors:
        if not texts:
            return np.zeros((0, self._dimension), dtype=np.float32)
        encode = getattr(self._model if self._model is not None else self._load(), method)
        found = encode(list(texts), batch_size=BATCH_TEXTS, convert_to_numpy=True, show_progress_bar=False)
        vectors = np.asarray(found, dtype=np.float32)  # a model in half precision normalizes to three digits only
        return np.ascontiguousarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))

    def fitted_to(self, texts: Sequence[str]) -> "SentenceEmbedder":
        """Return itself: the model does not depend on the texts."""
        return self

    def state(self) -> dict[str, Any]:
        """Return where the model came from."""
        return {"kind": "sentence", "path": self.path}


def make_embedder(choice: str, train_keys: Sequence[str], *, seed: int = 0, device: str = "cpu") -> Embedder:
    """Return the embedder that `memory.embedder` names; `hash` is fitted to the training tasks' memory keys."""
    return HashEmbedder.fit(train_keys, seed=seed) if choice == "hash" else SentenceEmbedder(choice, device=device)


def load_embedder(state: Mapping[str, Any], recorded: tuple[str, int] | None = None) -> Embedder:
    """Rebuild an embedder from its `state()`; with `recorded` name and dimension, a model is loaded when needed."""
    if state["kind"] == "hash":
        return HashEmbedder(
            state["dimension"], state["seed"], state["document_frequencies"], num_documents=state["num_documents"]
        )
    return SentenceEmbedder(state["path"], recorded)


def validated(vectors: Vectors, dimension: int) -> Vectors:
    """Return the vectors as float32 [n, D]; refuse NaN, a wrong width and lengths other than 1.

    Raises:
        MemoryStoreError: the embedder is broken; an index would accept such vectors silently.
    """
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if vectors.ndim != 2 or vectors.shape[1] != dimension:
        raise MemoryStoreError(f"embedding shape={vectors.shape} must be [n, {dimension}]; check memory.embedder.")
    lengths = np.linalg.norm(vectors, axis=1)
    wrong = ~(np.abs(lengths - 1.0) < 1e-3)  # also true for NaN
    if wrong.any():
        worst = float(lengths[wrong][0])
        raise MemoryStoreError(
            f"embedding length={worst} of {int(wrong.sum())} of {len(vectors)} texts must be 1; check memory.embedder."
        )
    return vectors
