"""Finds models and tokenizers that cannot serve a run, before any weights load and anything is generated.

Each check is a sentence with key, value and remedy; `check_pretrained` raises all of them at once.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from pmd.config.schema import ModelConfig, ReflectionConfig, RunConfig, TeacherConfig
from pmd.errors import ConfigError
from pmd.pretrained import resolve_model_path
from pmd.scoring import describe_logit_settings
from pmd.tasks.prompts.chat import ChatEncoder, kwargs_of
from pmd.types import Message, Task

#: What any tokenizer must give back after encoding and decoding, apart from spaces and capitals.
PROBE = "Answer: (a) 12 + 34 = 46, and 90 / 5 = 18. Is it 'so'? Yes; x_7 < y[8]!"
#: Endings of the names of architectures that do not predict the next token from the ones before it.
NOT_CAUSAL = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def check_pretrained(
    run: RunConfig, architecture: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, tasks: Iterable[Task]
) -> None:
    """Refuse a model or tokenizer that cannot serve the tasks.

    Raises:
        ConfigError: with everything found.
    """
    key = f"model.path={run.model.path}"
    problems = [*_architecture_problems(key, architecture), *describe_weight_problems(run.model)]
    problems += [*_end_problems(key, run, architecture, tokenizer), *_row_problems(key, architecture, tokenizer)]
    rows, top_k = architecture.get_text_config().vocab_size, run.objective.top_k
    if top_k is not None and top_k > rows:
        problems.append(f"objective.top_k={top_k} exceeds {rows}, the vocabulary of {key}; lower it, or use null.")
    if run.model.prompts == "chat":
        problems += _decoding_problems(key, tokenizer)
        student = kwargs_of("student", run.model.chat_template_kwargs)
        problems += _template_problems(key, architecture, tokenizer, tasks, student)
    if problems:
        raise ConfigError(problems)


def max_positions(architecture: PretrainedConfig) -> int | None:
    """Return how many tokens the model can hold, stretched rotary embeddings included; None if it has no limit."""
    text = architecture.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)  # an attribute also where the field has another name
    rope: dict[str, Any] = text.to_dict().get("rope_parameters") or {}
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    if isinstance(limit, int) and isinstance(original, int) and isinstance(factor, int | float):
        return max(limit, int(original * factor))
    return limit if isinstance(limit, int) and limit > 0 else None


def fit_to_positions(run: RunConfig, limit: int | None, longest_prompt: int) -> tuple[RunConfig, list[str]]:
    """Return the configuration with no prompt longer than the model can hold, and a line for each limit lowered.

    Limits that nobody set are lowered without a line.

    Raises:
        ConfigError: the longest task with its completion does not fit.
    """
    if limit is None:
        return run, []
    rollouts, teacher, reflection = run.rollouts, run.teacher, run.reflection
    if longest_prompt + rollouts.max_new_tokens > limit:
        raise ConfigError(
            f"rollouts.max_new_tokens={rollouts.max_new_tokens} after the longest prompt of {longest_prompt} tokens "
            f"exceeds {limit}, the positions of model.path={run.model.path}; lower it, leave long tasks out, or use "
            "another model."
        )
    room = limit - rollouts.max_new_tokens
    reflection_tokens = min(reflection.max_new_tokens, limit // 2)
    wanted = [
        ("teacher.max_prompt_tokens", teacher.max_prompt_tokens, TeacherConfig().max_prompt_tokens, room),
        ("reflection.max_new_tokens", reflection.max_new_tokens, ReflectionConfig().max_new_tokens, limit // 2),
        (
            "reflection.max_prompt_tokens",
            reflection.max_prompt_tokens,
            ReflectionConfig().max_prompt_tokens,
            limit - reflection_tokens,
        ),
    ]
    lines = [
        f"{key}={value} counts as {most}: the model has {limit} positions for a prompt and what is written after it."
        for key, value, default, most in wanted
        if value > most and value != default
    ]
    fitted = replace(
        run,
        rollouts=replace(rollouts, max_prompt_tokens=min(rollouts.max_prompt_tokens, room)),
        teacher=replace(teacher, max_prompt_tokens=min(teacher.max_prompt_tokens, room)),
        reflection=replace(
            reflection,
            max_new_tokens=reflection_tokens,
            max_prompt_tokens=min(reflection.max_prompt_tokens, limit - reflection_tokens),
        ),
    )
    return fitted, lines


def _architecture_problems(key: str, architecture: PretrainedConfig) -> list[str]:
    names = architecture.architectures or []
    problems = describe_logit_settings(architecture, names[0] if names else architecture.model_type)
    if architecture.is_encoder_decoder or (names and all(name.endswith(NOT_CAUSAL) for name in names)):
        problems.append(
            f"{key} is {names[0] if names else architecture.model_type}, which does not predict the next token; give a "
            "causal language model."
        )
    return problems


def describe_weight_problems(model: ModelConfig) -> list[str]:
    """Return what is wrong with the weight files of a local folder, judged by their names and headers alone."""
    key, folder = f"model.path={model.path}", Path(resolve_model_path(model.path))
    if not folder.is_dir():
        return []  # an id of the Hub
    files = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    if not files:
        return [f"{key} holds no weights (*.safetensors or pytorch_model*.bin); give a complete checkpoint."]
    problems, indices = [], [*folder.glob("*.safetensors.index.json"), *folder.glob("pytorch_model*.index.json")]
    for index in indices:
        try:
            named = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            problems.append(f"{key}: {index.name} cannot be read; copy or download it again.")
            continue
        if missing := sorted(name for name in named if not (folder / name).is_file()):
            problems.append(
                f"{key} lacks {len(missing)} of the files that {index.name} names ({missing[0]}); copy them there."
            )
    for file in (file for file in files if file.suffix == ".safetensors"):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            problems.append(f"{key}: {file.name} is damaged or incomplete ({error}); copy or download it again.")
    return problems


def _end_problems(
    key: str, run: RunConfig, architecture: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Check that completions can end, and that rows can be padded."""
    named: Any
    try:
        named = GenerationConfig.from_pretrained(resolve_model_path(run.model.path)).eos_token_id
    except Exception:  # there is no such file, or it cannot be read: transformers then uses the model's configuration
        named = architecture.get_text_config().eos_token_id
    rows = architecture.get_text_config().vocab_size
    listed = named if isinstance(named, list) else [named]
    theirs = [end for end in listed if isinstance(end, int) and 0 <= end < rows]
    ends, problems = [tokenizer.eos_token_id, *theirs], []
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    if theirs and not any(end in special for end in theirs):
        text = tokenizer.convert_ids_to_tokens(theirs[0])
        meaning = "has no such token" if text is None else f"knows it as the plain text {text!r}"
        problems.append(
            f"{key}: the model ends what it writes with token {theirs[0]}, but the tokenizer {meaning}; use the "
            "tokenizer that belongs to the model, or correct eos_token_id in its generation_config.json."
        )
    if not any(isinstance(end, int) and 0 <= end < rows for end in ends):
        problems.append(
            f"{key}: neither its tokenizer nor its generation_config.json names an end-of-sequence token that the "
            "model can write, so no completion would end; set eos_token in its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        problems.append(
            f"{key}: its tokenizer has neither a padding nor an end-of-sequence token, so rows of different lengths "
            "cannot be batched; set pad_token or eos_token in its tokenizer_config.json."
        )
    return problems


def _row_problems(key: str, architecture: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Check that the model has an embedding for every token that a prompt may hold.

    Special tokens without one are harmless if the chat template does not write them (Gemma 3 has such an image token):
    no text is encoded to them.
    """
    rows, controls = architecture.get_text_config().vocab_size, ChatEncoder(tokenizer).controls
    source = str(tokenizer.chat_template or "")
    used = (tokenizer.eos_token, tokenizer.pad_token)
    beyond = [
        (number, token)
        for token, number in tokenizer.get_vocab().items()
        if number >= rows and (token not in controls or token in used or token in source)
    ]
    if not beyond:
        return []
    number, token = max(beyond)
    return [
        f"{key}: its tokenizer has ids up to {number} ({token!r}), but the model has embeddings for {rows} only; "
        "resize them with model.resize_token_embeddings, or use the tokenizer that belongs to the model."
    ]


def _decoding_problems(key: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Check that text survives encoding and decoding."""
    ids = cast(list[int], tokenizer.encode(PROBE, add_special_tokens=False))
    found = cast(str, tokenizer.decode(ids, skip_special_tokens=True))
    if _letters(found) == _letters(PROBE):
        return []
    return [f"{key}: its tokenizer turns {PROBE!r} into {found[:100]!r}; use the tokenizer that belongs to the model."]


def _letters(text: str) -> str:
    return "".join(text.split()).casefold()


def _template_problems(
    key: str,
    architecture: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Iterable[Task],
    template_kwargs: Mapping[str, Any],
) -> list[str]:
    """Check that the chat template renders the messages of every kind of task, with nothing left out."""
    if not tokenizer.chat_template:
        return [
            f"{key}: its tokenizer has no chat template; use an instruction-tuned model, or add a chat_template.jinja."
        ]
    rows, encoder, problems = architecture.get_text_config().vocab_size, ChatEncoder(tokenizer), []
    examples = {tuple(message.role for message in task.messages): task for task in tasks}
    plain = Task("", (Message("user", ""),), "exact", "train")
    for roles, task in ({("user",): plain} | examples).items():
        named = f" (task {task.task_id})" if task.task_id else ""
        where = f"{key}, for messages of {', '.join(roles)}{named}"
        messages = [Message(m.role, f"probe {number} of pmd") for number, m in enumerate(task.messages)]
        try:
            text, ids = encoder.render(messages, template_kwargs), encoder.ids(messages, template_kwargs)
        except ConfigError as error:
            problems += [f"{problem}{named}" for problem in error.problems]
            continue
        lost = [message.role for message in messages if message.content not in text]
        if lost:
            problems.append(
                f"{where}: the chat template leaves out the {lost[0]} message; leave such messages out of the tasks, "
                "or use another model."
            )
        if max(ids, default=0) >= rows:
            problems.append(
                f"{where}: the chat template gives token {max(ids)}, but the model has embeddings for {rows} only; use "
                "the tokenizer that belongs to the model."
            )
    return problems
