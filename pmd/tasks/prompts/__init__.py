"""Prompt formats: the languages of the two tiny worlds, and chat templates for real models."""

from typing import TYPE_CHECKING, Literal

from pmd.tasks.prompts.base import PromptFormat

__all__ = ["PromptFormat", "make_prompts"]

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_prompts(name: Literal["words", "hard_words", "chat"], tokenizer: "PreTrainedTokenizerBase") -> PromptFormat:
    """Return the prompt format that `model.prompts` names."""
    if name == "words":
        from pmd.tasks.prompts.words import WordPrompts

        return WordPrompts(tokenizer)
    if name == "hard_words":
        from pmd.tasks.prompts.hard_words import HardWordPrompts

        return HardWordPrompts(tokenizer)
    from pmd.tasks.prompts.chat import ChatPrompts

    return ChatPrompts(tokenizer)
