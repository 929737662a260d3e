"""Prompt formats: the languages of the two tiny worlds, and chat templates for real models."""

from typing import TYPE_CHECKING

from pmd.config.schema import RunConfig
from pmd.tasks.prompts.base import PromptFormat

__all__ = ["PromptFormat", "make_prompts"]

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_prompts(run: RunConfig, tokenizer: "PreTrainedTokenizerBase") -> PromptFormat:
    """Return the prompt format that `model.prompts` names, with the run's texts and template arguments."""
    if run.model.prompts == "words":
        from pmd.tasks.prompts.words import WordPrompts

        return WordPrompts(tokenizer)
    if run.model.prompts == "hard_words":
        from pmd.tasks.prompts.hard_words import HardWordPrompts

        return HardWordPrompts(tokenizer)
    from pmd.tasks.prompts.chat import ChatPrompts

    return ChatPrompts(tokenizer, run.model.chat_template_kwargs, run.prompts.folder)
