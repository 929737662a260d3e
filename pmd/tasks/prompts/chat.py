"""Prompts for chat models: the tokenizer's own chat template around the text files in `templates/`.

Thinking is off unless `model.chat_template_kwargs` turns it on, and stripped from every attempt that is shown. The
wording (texts.py) is our choice; the paper's prompts are not public.

No text can open or close a turn: only the chat template writes control tokens (`ChatEncoder`). A control token is one
that the tokenizer marks as special or that the source of its chat template names. Where a message, an attempt, a memory
item or a verifier's feedback spells one, it is encoded as the plain text that it is. The same holds for tags such as
<think> or <answer> where they are control tokens, also in a task's own system prompt: task files are data. Added tokens
that are neither special nor in the template stay what they are. Any other text gets exactly the ids that the
tokenizer's `apply_chat_template` gives it.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from pmd.errors import ConfigError
from pmd.tasks.prompts.base import WHOLE, Extent
from pmd.tasks.prompts.parsing import Reply, parse_items, parse_line
from pmd.tasks.prompts.texts import FIELD, read_texts
from pmd.tasks.thinking import strip_thinking
from pmd.types import MemoryItem, Message, Rollout, Task

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

CUT = "\n[... left out ...]\n"
PromptRole = Literal["student", "teacher", "reflection"]
THINKING_OFF: Mapping[str, Any] = {"enable_thinking": False}
PROMPT_ROLES: tuple[PromptRole, ...] = ("student", "teacher", "reflection")
#: Of `apply_chat_template` itself.
OWN_ARGUMENTS = frozenset(
    {"add_generation_prompt", "chat_template", "continue_final_message", "conversation", "max_length", "messages",
     "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize", "tokenizer_kwargs",
     "truncation"}
)  # fmt: skip

#: Follows the first character of anything in a message that could become a control token; removed after rendering.
#: Random, so that no text can hold it.
MARK = f"\ue000{secrets.token_hex(8)}\ue001"


class ChatPrompts:
    """Prompt format of instruction-tuned models."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        template_kwargs: Mapping[str, Any] | None = None,
        folder: str | None = None,
    ):
        """Prepare the prompts.

        Args:
            template_kwargs: `model.chat_template_kwargs`.
            folder: `prompts.folder`.
        """
        self.tokenizer = tokenizer
        self.encoder = ChatEncoder(tokenizer)
        self.kwargs = {role: kwargs_of(role, template_kwargs or {}) for role in PROMPT_ROLES}
        self.text = read_texts(folder)

    def student(self, task: Task) -> list[int]:
        """Return the task's messages under the chat template."""
        return self.encoder.ids(task.messages, self.kwargs["student"])

    def teacher(
        self,
        task: Task,
        items: Sequence[str],
        success: str | None,
        failure: Rollout | None,
        show_attempt: bool = True,
    ) -> list[int]:
        """Return the task with the applicable sections in its last user message, or the bare task if there are none."""
        sections = ""
        if items:
            sections += self._fill("memory", items="\n".join(f"- {item}" for item in items))
        if success is not None:
            sections += self._fill("success", success=strip_thinking(success))
        if failure is not None and (feedback := failure.verdict.feedback.strip()):
            attempt = strip_thinking(failure.completion.text)
            sections += self._fill("failure" if show_attempt else "feedback", attempt=attempt, feedback=feedback)
        if not sections:
            return self.encoder.ids(task.messages, self.kwargs["teacher"])
        last = max(i for i, message in enumerate(task.messages) if message.role == "user")
        question = self._fill("teacher", question=task.messages[last].content, sections=sections).rstrip("\n")
        messages = [Message("user", question) if i == last else m for i, m in enumerate(task.messages)]
        return self.encoder.ids(messages, self.kwargs["teacher"])

    def memory_line(self, item: MemoryItem) -> str:
        """Return the item's text; what an attempt is, and how many succeeded where an insight was learned, is said."""
        if item.level == 0:
            return f"A verified correct attempt: {item.text}"
        if not item.num_attempts:
            return item.text
        return f"{item.text} (Learned when {item.num_successes} of {item.num_attempts} attempts were correct.)"

    def placebo(self, text: str) -> str:
        """Return neutral text with as many tokens as `text`."""
        wanted = len(self._tokens(text))
        words = self.text["placebo"].split()
        words *= 1 + wanted // len(words)
        first, last = 1, len(words)  # binary search: the token count grows with the word count
        while first < last:
            middle = (first + last) // 2
            first, last = (
                (first, middle) if len(self._tokens(" ".join(words[:middle]))) >= wanted else (middle + 1, last)
            )
        return " ".join(words[:first])

    def _tokens(self, text: str) -> list[int]:
        return cast(list[int], self.tokenizer.encode(text, add_special_tokens=False))

    def reflection(
        self, task: Task, rollouts: Sequence[Rollout], known: Sequence[str] = (), extent: Extent = WHOLE
    ) -> list[list[int]]:
        """Return one prompt per group, or none if every attempt failed and nothing is known of why."""
        right = [r for r in rollouts if r.verdict.correct]
        wrong = [r for r in rollouts if r.verdict.scored and not r.verdict.correct]
        if not right and not any(map(_remarks, wrong)):
            return []
        outcome = "mixed" if right and wrong else "correct" if right else "wrong"
        share = f"{len(right)} of {len(right) + len(wrong)} attempts are correct."
        shown = _distinct(right)[: extent.attempts] + _distinct(wrong)[: extent.attempts]
        attempts = "\n".join(
            self._fill(
                "attempt",
                number=str(number),
                verdict="correct" if rollout.verdict.correct else "wrong",
                text=_cut(strip_thinking(rollout.completion.text), extent.characters),
                feedback=_cut(_remarks(rollout), extent.characters),
            )
            for number, rollout in enumerate(shown, start=1)
        )
        if known:
            listed = "\n".join(f"[{number}] {text}" for number, text in enumerate(known, start=1))
            attempts += "\n" + self._fill("known", known=listed).rstrip("\n")
        values = {"question": task.question, "attempts": attempts, "outcome": outcome, "share": share}
        prompt = self._fill("reflection", **values).rstrip("\n")
        if known:
            prompt += self._fill("revision").rstrip("\n")
        return [self.encoder.ids([Message("user", prompt)], self.kwargs["reflection"])]

    def parse_reflection(self, text: str) -> Reply:
        """Return the well-formed items; a malformed one does not affect the others."""
        return parse_items(text)

    def abstraction_text(self, insights: Sequence[str]) -> str:
        """Return the message that asks about one cluster."""
        listed = "\n".join(f"- {insight}" for insight in insights)
        return self._fill("abstraction", insights=listed).rstrip("\n")

    def abstraction(self, insights: Sequence[str]) -> list[int]:
        """Return the prompt for one cluster."""
        return self.encoder.ids([Message("user", self.abstraction_text(insights))], self.kwargs["reflection"])

    def parse_abstraction(self, text: str) -> str | None:
        """Return the first well-formed item."""
        return parse_line(text)

    def _fill(self, name: str, **values: str) -> str:
        """Fill the {fields} of a template; braces inside the values are left as they are."""
        return FIELD.sub(lambda match: values[match[1]], self.text[name])


def kwargs_of(role: PromptRole, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the chat template is given for a role's prompts; thinking is off unless it is turned on."""
    for_all = {name: value for name, value in given.items() if name not in PROMPT_ROLES}
    return {**THINKING_OFF, **for_all, **given.get(role, {})}


def _remarks(rollout: Rollout) -> str:
    """Return what is known of an attempt besides its verdict: the verifier's feedback, and whether it was cut off."""
    feedback = [rollout.verdict.feedback.strip()]
    if rollout.completion.finish_reason == "length":
        feedback.append("It reached the length limit and was cut off.")
    return "\n".join(filter(None, feedback))


def _cut(text: str, characters: int | None) -> str:
    """Leave out the middle of a text that is longer: an attempt begins with its plan and ends with its answer."""
    if characters is None or len(text) <= characters:
        return text
    half = characters // 2
    return text[:half] + CUT + text[len(text) - half :]


def _distinct(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Keep the first rollout of each text."""
    return list({rollout.completion.text: rollout for rollout in reversed(rollouts)}.values())[::-1]


class PlainTokenizer(NamedTuple):
    """A copy of the tokenizer whose control tokens have other, random names, so that no text spells them."""

    backend: "Tokenizer"
    names: dict[str, str]  # control token: its name in the copy
    ids: dict[int, int]  # id of an added token in the copy: its id in the tokenizer


class ChatEncoder:
    """Turns messages into token ids under a tokenizer's chat template."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.tokenizer = tokenizer
        self.controls = control_tokens(tokenizer)
        self.control_ids = frozenset(self.controls.values())
        self._spelled = re.compile("|".join(map(re.escape, sorted(self.controls, key=len, reverse=True))) or r"(?!)")
        self._marks = {ord(token[0]): token[0] + MARK for token in self.controls}

    def ids(self, messages: Sequence[Message], template_kwargs: Mapping[str, Any] = THINKING_OFF) -> list[int]:
        """Return the prompt's token ids, ending with the template's generation prompt."""
        text = self.render(messages, template_kwargs)
        usual = self._encode(text)
        marked = [Message(message.role, message.content.translate(self._marks)) for message in messages]
        if marked != list(messages):
            text = self.render(marked, template_kwargs)
        written = [self.controls[token] for token in self._spelled.findall(text)]  # by the template alone
        if [token_id for token_id in usual if token_id in self.control_ids] == written:
            return usual
        return self._encode_marked(text)

    def render(self, messages: Sequence[Message], template_kwargs: Mapping[str, Any] = THINKING_OFF) -> str:
        """Return the prompt's text.

        Raises:
            ConfigError: the template refuses the messages.
        """
        chat = [{"role": message.role, "content": message.content} for message in messages]
        try:
            rendered = self.tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, tokenize=False, **template_kwargs
            )
        except Exception as error:  # a template is a program, and may raise anything
            roles = ", ".join(message.role for message in messages)
            remedy = "leave the system prompt out of the tasks" if "system" in roles else "write the tasks otherwise"
            raise ConfigError(
                f"model.path={self.tokenizer.name_or_path}: its chat template refuses messages of {roles} "
                f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); {remedy}, or use another model."
            ) from error
        return cast(str, rendered)

    def _encode(self, text: str) -> list[int]:
        ids = cast(list[int], self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return [int(token_id) for token_id in ids]

    def _encode_marked(self, text: str) -> list[int]:
        """Encode a prompt in which the only unmarked control tokens are the template's."""
        encode = self._encode_by_copy if self._copy is not None else self._encode_by_parts
        ids, is_clean = encode(text, "")
        if not is_clean:  # the model's own vocabulary holds control tokens as pieces of text
            ids, _ = encode(text, " ")
        return ids

    def _encode_by_copy(self, text: str, gap: str) -> tuple[list[int], bool]:
        """Return the ids, without any control token in what is not the template's, and whether there was none.

        `gap` is put after the first character of whatever spells a control token.
        """
        assert self._copy is not None
        copy = self._copy
        renamed = self._spelled.sub(lambda match: copy.names[match[0]], text)
        found = copy.backend.encode(self._without_marks(renamed, gap), add_special_tokens=False).ids
        stray = self.control_ids - copy.ids.keys()
        kept = [copy.ids.get(token_id, token_id) for token_id in found if token_id not in stray]
        return kept, len(kept) == len(found)

    def _encode_by_parts(self, text: str, gap: str) -> tuple[list[int], bool]:
        """As `_encode_by_copy`, for tokenizers written in Python: the parts between control tokens, one by one."""
        ids, is_clean, start = list[int](), True, 0
        for match in [*self._spelled.finditer(text), None]:
            part = self._without_marks(text[start : match.start() if match else len(text)], gap)
            found = cast(list[int], self.tokenizer.encode(part, add_special_tokens=False, split_special_tokens=True))
            kept = [int(token_id) for token_id in found if token_id not in self.control_ids]
            ids, is_clean = ids + kept, is_clean and len(kept) == len(found)
            if match:
                ids, start = [*ids, self.controls[match[0]]], match.end()
        return ids, is_clean

    def _without_marks(self, text: str, gap: str) -> str:
        if not gap:
            return text.replace(MARK, "")
        spelled = "|".join(re.escape(token[0] + MARK) + _marked(token[1:], self._marks) for token in self.controls)
        return re.sub(spelled, lambda match: match[0].replace(MARK, gap, 1), text).replace(MARK, "")

    @cached_property
    def _copy(self) -> PlainTokenizer | None:
        return _plain_copy(self.tokenizer, self.controls)


def control_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """Return the text and id of every control token.

    The token for unknown words is none unless it has another role: it may come from any text.
    """
    template = tokenizer.chat_template or ""
    source = template if isinstance(template, str) else "".join(template.values())
    added = cast("dict[int, object]", tokenizer.added_tokens_decoder)
    found = {
        str(token): token_id
        for token_id, token in added.items()
        if getattr(token, "special", False) or str(token) in source
    }
    for token in tokenizer.all_special_tokens:
        found[token] = cast(int, tokenizer.convert_tokens_to_ids(token))
    roles = [tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token]
    unknown = tokenizer.unk_token
    return {token: number for token, number in found.items() if token and (token != unknown or token in roles)}


def _marked(text: str, marks: dict[int, str]) -> str:
    """Return a pattern of `text` as it looks in a marked message."""
    return "".join(re.escape(marks.get(ord(character), character)) for character in text)


def _plain_copy(tokenizer: "PreTrainedTokenizerBase", controls: dict[str, int]) -> PlainTokenizer | None:
    """Return a copy with renamed control tokens; None if the tokenizer is written in Python or cannot be copied."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    from tokenizers import Tokenizer

    try:
        spec = json.loads(backend.to_str())
    except Exception:  # the library raises bare exceptions for parts that are written in Python
        return None
    names = {token: f"\ue002{secrets.token_hex(8)}\ue003" for token in controls}
    original = {}  # name in the copy: id in the tokenizer
    for token in spec["added_tokens"]:
        if token["content"] in controls:
            token |= {"content": names[token["content"]], "normalized": False, "special": True}
        original[token["content"]] = token["id"]
    spec |= {"post_processor": None, "truncation": None, "padding": None}
    copy = Tokenizer.from_str(json.dumps(spec))
    ids = {cast(int, copy.token_to_id(name)): token_id for name, token_id in original.items()}
    if not names.keys() <= {token["content"] for token in json.loads(backend.to_str())["added_tokens"]}:
        return None  # a control token that the backend does not know as an added one
    is_whole = len(ids) == len(original) and all(copy.id_to_token(new) in original for new in ids)
    return PlainTokenizer(copy, names, ids) if is_whole else None
