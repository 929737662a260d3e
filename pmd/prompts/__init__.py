"""Prompt formats: the tiny world's words, and chat templates."""

from typing import Literal

from transformers import PreTrainedTokenizerBase

from pmd.prompts.format import PromptFormat


def make_prompts(name: Literal["words", "chat"], tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
    """Return the prompt format that `model.prompts` names."""
    if name == "words":
        from pmd.prompts.words import WordPrompts

        return WordPrompts(tokenizer)
    from pmd.prompts.chat import ChatPrompts

    return ChatPrompts(tokenizer)
