"""Finds mistakes in the keys and files that a user changes prompts with, before a model loads."""

from pathlib import Path

from pmd.config.schema import RunConfig
from pmd.config.values import shown
from pmd.tasks.prompts.chat import OWN_ARGUMENTS, PROMPT_ROLES
from pmd.tasks.prompts.texts import describe_text_problems


def describe_prompt_problems(run: RunConfig) -> list[str]:
    """Return what is wrong with the chat template's file and arguments and with edited texts; loads no model."""
    model, problems = run.model, describe_text_problems(run.prompts.folder)
    given = {
        "model.chat_template": model.chat_template is not None,
        "model.chat_template_kwargs": bool(model.chat_template_kwargs),
        "prompts.folder": run.prompts.folder is not None,
    }
    problems += [
        f"{key} with model.prompts={model.prompts}: the tiny worlds have their own languages; remove it, or use chat."
        for key, is_set in given.items()
        if is_set and model.prompts != "chat"
    ]
    if model.chat_template is not None and not Path(model.chat_template).is_file():
        problems.append(f"model.chat_template={model.chat_template} is not a file; give one with a Jinja template.")
    for_role = {role: model.chat_template_kwargs.get(role, {}) for role in PROMPT_ROLES}
    for role, kwargs in ({"": model.chat_template_kwargs} | for_role).items():
        key = f"model.chat_template_kwargs{'.' if role else ''}{role}"
        if not isinstance(kwargs, dict):
            problems.append(f"{key}={shown(kwargs)} must be a mapping, such as {{enable_thinking: true}}.")
        elif taken := sorted(OWN_ARGUMENTS & kwargs.keys()):
            problems.append(f"{key}.{taken[0]} is set by pmd itself, not by the template's arguments; remove it.")
    return problems
