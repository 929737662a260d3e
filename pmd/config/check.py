"""Checks beyond single keys: combinations that cannot run, and missing packages, devices and files.

All problems are raised as one `ConfigError` before any weights load, and nothing here imports torch.
"""

import os
import re
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from pmd.config.load import LoadedConfig
from pmd.config.schema import (
    MIN_TEMPERATURE,
    BehaviourWriterConfig,
    DataConfig,
    ModelConfig,
    RunConfig,
    TinyWorldConfig,
)
from pmd.config.trainer import cuda_is_available, trainer_problems
from pmd.errors import ConfigError
from pmd.tiny import SHIPPED_MODELS

#: NAME or OWNER/NAME, as the Hub writes them.
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
MAX_VLLM_RANK = 512
#: The tiny worlds, which are also the names of their models, and the prompt format of each.
TINY_LANGUAGES = {"tiny": "words", "tiny_hard": "hard_words"}
#: AdamW changes a weight by about the learning rate a step; smaller changes are lost in bfloat16 weights of usual size.
MIN_BFLOAT16_LR = 1e-4
#: The oldest torch that a supported vLLM comes with. FSDP2 and its checkpoints are young, and untried with older ones.
SHARDING_TORCH = (2, 11)
#: The module and package from which transformers loads each flash attention.
FLASH_PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
}


MAX_ROLLOUTS = 1 << 20  # of one step, with their texts and log-probs
MAX_DRAWS = 1 << 28  # 2 GB of float64


def check_config(loaded: LoadedConfig, found: Sequence[str] = ()) -> None:
    """Raise one ConfigError with all problems of the configuration and the `found` ones, if there are any.

    Raises:
        ConfigError: the configuration cannot be run.
    """
    run = loaded.run
    problems = [
        *loaded.problems,
        *found,
        *trainer_problems(loaded.trainer),
        *(_sharding_problems(run) if loaded.trainer.get("strategy") == "fsdp2" else []),
        *_model_problems(run),
        *_method_problems(run),
        *_engine_problems(run),
        *_memory_problems(run),
        *_data_problems(run.data),
        *_logging_problems(run),
    ]
    if problems:
        raise ConfigError([loaded.without_secrets(problem) for problem in problems])


def _sharding_problems(run: RunConfig) -> Iterator[str]:
    """Refuse what needs whole weights, or lets one rank generate when the others do not."""
    key = "with trainer.strategy=fsdp2"
    if tuple(map(int, version("torch").split(".")[:2])) < SHARDING_TORCH:
        needed = ".".join(map(str, SHARDING_TORCH))
        yield f"trainer.strategy=fsdp2 needs torch {needed} or newer; upgrade it, or use ddp."
    if run.model.finetune == "qlora":
        yield f"model.finetune=qlora {key}: 4-bit weights are not divided among ranks; use lora, or strategy=ddp."
    if run.model.finetune == "full" and run.optimizer.kind != "adamw":
        yield f"optimizer.kind={run.optimizer.kind} {key}: bitsandbytes steps whole weights only; use adamw."
    if run.model.offload_activations:
        yield (
            f"model.offload_activations=true {key}: gathered weights would be moved to main memory as well; use "
            "false, and smaller rollouts.micro_batch_tokens."
        )
    if run.rollouts.engine == "vllm" and run.rollouts.vllm.share_weights is True:
        yield (
            f"rollouts.vllm.share_weights=true {key}: vLLM needs the whole base, and each rank's trainer has a part of "
            "it; use auto or false."
        )
    if run.rollouts.engine == "hf" and run.rollouts.uniform_groups == "resample":
        yield (
            f"rollouts.uniform_groups=resample {key} and rollouts.engine=hf: ranks would generate different numbers "
            "of times; use keep or drop, or vllm_server."
        )


def describe_rounding(run: RunConfig) -> list[str]:
    """Return a warning if most optimizer steps are too small to change bfloat16 weights."""
    model, lr = run.model, run.optimizer.lr
    if model.finetune != "full" or model.dtype != "bfloat16" or lr >= MIN_BFLOAT16_LR:
        return []
    return [
        f"optimizer.lr={lr} with model.finetune=full and model.dtype=bfloat16: most updates are lost in rounding "
        "(a weight of 0.02 changes by 0.0001 or not at all). Use model.dtype=float32 with "
        "trainer.precision=bf16-mixed, or train an adapter."
    ]


def _attention_problems(model: ModelConfig) -> list[str]:
    """Check flash attention's needs: a CUDA device, bfloat16, and a package compiled for the device."""
    if not model.attention.startswith("flash"):
        return []
    key, problems = f"model.attention={model.attention}", []
    module, package = FLASH_PACKAGES[model.attention]
    if not cuda_is_available():
        problems.append(f"{key} needs a CUDA device and none was found; use sdpa.")
    if find_spec(module) is None and find_spec("kernels") is None:
        problems.append(f"{key} needs {package} or kernels; pip install {package}, or use sdpa.")
    if model.dtype != "bfloat16":
        problems.append(f"{key} needs model.dtype=bfloat16, not {model.dtype}.")
    return problems


def _model_problems(run: RunConfig) -> list[str]:
    model, problems = run.model, []
    if model.finetune == "qlora" and not cuda_is_available():
        problems.append("model.finetune=qlora needs a CUDA device and none was found; use lora or full.")
    if model.finetune == "qlora" and find_spec("bitsandbytes") is None:
        problems.append("model.finetune=qlora needs bitsandbytes; pip install 'pmd[gpu]'.")
    problems += _attention_problems(model)
    if model.layer_kernels == "liger":
        if not cuda_is_available():
            problems.append("model.layer_kernels=liger needs a CUDA device and none was found; use plain.")
        if find_spec("liger_kernel") is None:
            problems.append("model.layer_kernels=liger needs liger-kernel; pip install 'pmd[gpu]', or use plain.")
    if run.optimizer.kind == "adamw_8bit_paged":
        if not cuda_is_available():
            problems.append("optimizer.kind=adamw_8bit_paged needs a CUDA device and none was found; use adamw.")
        if find_spec("bitsandbytes") is None:
            problems.append("optimizer.kind=adamw_8bit_paged needs bitsandbytes; pip install 'pmd[gpu]'.")
    looks_like_path = model.path.startswith((".", "/", "~")) or model.path.count("/") > 1
    if looks_like_path and not (Path(model.path) / "config.json").is_file():
        problems.append(f"model.path={model.path} holds no config.json; give a Hugging Face model directory or id.")
    elif not looks_like_path and model.path not in SHIPPED_MODELS and not HUB_ID.fullmatch(model.path):
        problems.append(f"model.path={model.path} is not a Hugging Face id (OWNER/NAME); give an id or a directory.")
    is_copy = (Path(model.path) / "config.json").is_file()
    language = TINY_LANGUAGES.get(run.data.task, "chat")
    own_world = model.path if model.path in TINY_LANGUAGES else None
    needed = run.data.task if run.data.task in TINY_LANGUAGES else None
    if own_world != needed and not (needed and is_copy):
        problems.append(
            f"model.path={model.path} with data.task={run.data.task}: the models `tiny` and `tiny_hard` know only the "
            "words of their worlds; set both to the same name, or use another model with other tasks "
            "(`tiny_exam` reads any text)."
        )
    if model.prompts != language:
        problems.append(f"model.prompts={model.prompts} with data.task={run.data.task}; use {language}.")
    return problems


def _method_problems(run: RunConfig) -> list[str]:
    objective, rollouts, teacher, problems = run.objective, run.rollouts, run.teacher, []
    if objective.policy_gradient == 0 and objective.distillation == 0 and objective.update_policy:
        problems.append(
            "objective.policy_gradient=0 with objective.distillation=0 trains nothing; give one a weight, or set "
            "objective.update_policy=false."
        )
    if objective.policy_gradient > 0 and rollouts.group_size < 2:
        problems.append(
            f"rollouts.group_size={rollouts.group_size} with objective.policy_gradient={objective.policy_gradient}: "
            "an advantage compares rollouts of one group; use at least 2."
        )
    if teacher.context == "none" and objective.distillation > 0:
        problems.append(
            f"teacher.context=none with objective.distillation={objective.distillation}: such a teacher knows no "
            "more than the student; use sibling, memory or both, or set objective.distillation=0."
        )
    if teacher.context == "sibling" and rollouts.group_size < 2 and not teacher.feedback:
        problems.append("teacher.context=sibling with rollouts.group_size=1 shows the teacher nothing; use at least 2.")
    if rollouts.uniform_groups != "keep" and run.memory.enabled:
        problems.append(
            f"rollouts.uniform_groups={rollouts.uniform_groups} with memory.enabled=true: what is left out never "
            "reaches memory, and a group of failures has lessons; use keep."
        )
    if rollouts.updates_per_batch > rollouts.tasks_per_step:
        problems.append(
            f"rollouts.updates_per_batch={rollouts.updates_per_batch} exceeds "
            f"rollouts.tasks_per_step={rollouts.tasks_per_step}; each update needs a task."
        )
    if rollouts.temperature != 1.0:
        problems.append(
            f"rollouts.temperature={rollouts.temperature}: importance weights compare untempered log-probs; use 1.0."
        )
    if teacher.refresh_epochs is not None and teacher.kind != "frozen":
        problems.append(
            f"teacher.refresh_epochs={teacher.refresh_epochs} needs teacher.kind=frozen, not {teacher.kind}."
        )
    if 0 < run.reflection.temperature < MIN_TEMPERATURE:
        problems.append(
            f"reflection.temperature={run.reflection.temperature} must be 0 (greedy) or at least {MIN_TEMPERATURE}."
        )
    num_rollouts = rollouts.tasks_per_step * rollouts.group_size
    if num_rollouts > MAX_ROLLOUTS:
        problems.append(
            f"rollouts.tasks_per_step={rollouts.tasks_per_step} with rollouts.group_size={rollouts.group_size} makes "
            f"{num_rollouts} rollouts a step; at most {MAX_ROLLOUTS} are kept in memory: lower one of them."
        )
    if rollouts.engine == "hf" and rollouts.engine_batch * rollouts.max_new_tokens > MAX_DRAWS:
        problems.append(
            f"rollouts.engine_batch={rollouts.engine_batch} with rollouts.max_new_tokens={rollouts.max_new_tokens} "
            f"draws more than {MAX_DRAWS} random numbers at once; lower one of them."
        )
    verification = run.verification
    largest = max(verification.pass_at, default=1)
    if min(verification.pass_at, default=0) < 1:
        problems.append(f"verification.pass_at={verification.pass_at} must be whole numbers of at least 1.")
    if largest > verification.final_samples:
        problems.append(
            f"verification.pass_at={verification.pass_at} needs verification.final_samples of at least {largest}, "
            f"not {verification.final_samples}."
        )
    return problems


def _engine_problems(run: RunConfig) -> list[str]:
    vllm, finetune, problems = run.rollouts.vllm, run.model.finetune, []
    if run.rollouts.prefetch and run.rollouts.engine != "vllm_server":
        problems.append(
            f"rollouts.prefetch=true with rollouts.engine={run.rollouts.engine}: it would generate on the device "
            "that trains; use vllm_server, or prefetch=false."
        )
    if run.rollouts.prefetch and run.verification.every_steps is not None:
        problems.append(
            f"verification.every_steps={run.verification.every_steps} with rollouts.prefetch=true: the servers would "
            "evaluate while they generate the next batch; use every_epochs alone, or prefetch=false."
        )
    if run.rollouts.engine == "vllm_server":
        return problems + _server_problems(run)
    if run.rollouts.engine != "vllm":
        return problems
    package = find_spec("vllm")
    if package is None or package.origin is None:
        problems.append("rollouts.engine=vllm needs vLLM; pip install 'pmd[gpu]' (README, \"vLLM\"), or use hf.")
    if vllm.kv_cache_memory_bytes is None and not cuda_is_available():
        problems.append(
            "rollouts.vllm.kv_cache_memory_bytes=null needs a CUDA device and none was found; on a CPU, set "
            "the size of the KV cache, e.g. 67108864."
        )
    if vllm.max_model_len is not None and vllm.max_model_len < run.longest_sequence:
        problems.append(
            f"rollouts.vllm.max_model_len={vllm.max_model_len} is below {run.longest_sequence}, the longest prompt "
            "with its completion that the sections rollouts, teacher and reflection allow; raise it, or lower their "
            "max_prompt_tokens or max_new_tokens."
        )
    problems += _rank_problems(run)
    if vllm.quantization == "bitsandbytes" and find_spec("vllm_bnb_plugin") is None and not _includes_bnb(package):
        problems.append(
            "rollouts.vllm.quantization=bitsandbytes needs vllm-bnb-plugin, which vLLM no longer includes; "
            "pip install 'pmd[gpu]', or use fp8 or none."
        )
    if vllm.quantization != "none" and not cuda_is_available():
        problems.append(f"rollouts.vllm.quantization={vllm.quantization} needs a CUDA device; use none.")
    if vllm.quantization != "none" and finetune == "full":
        problems.append(
            f"rollouts.vllm.quantization={vllm.quantization} with model.finetune=full: trained weights are loaded "
            "unquantized; use none, or train an adapter."
        )
    if finetune == "qlora" and run.model.dtype != "bfloat16":
        problems.append(
            f"model.dtype={run.model.dtype} with model.finetune=qlora: vLLM serves the base in bfloat16, or in its own "
            "rollouts.vllm.quantization; use bfloat16."
        )
    return problems


def _includes_bnb(package: ModuleSpec | None) -> bool:
    """Whether vLLM itself can quantise with bitsandbytes, as early versions can."""
    quantization = Path(package.origin or "").parent / "model_executor" / "layers" / "quantization" if package else None
    return quantization is not None and (quantization / "bitsandbytes.py").is_file()


def _rank_problems(run: RunConfig) -> list[str]:
    if run.model.finetune == "full" or run.model.lora_rank <= MAX_VLLM_RANK:
        return []
    return [
        f"model.lora_rank={run.model.lora_rank} with rollouts.engine={run.rollouts.engine}: vLLM serves ranks up to "
        f"{MAX_VLLM_RANK}; lower it, or use rollouts.engine=hf."
    ]


def _server_problems(run: RunConfig) -> list[str]:
    server, problems = run.rollouts.server, _rank_problems(run)
    if run.model.finetune == "full":
        problems.append(
            "rollouts.engine=vllm_server with model.finetune=full: servers accept adapters only; use lora, or "
            "rollouts.engine=vllm."
        )
    if not server.urls:
        problems.append(
            "rollouts.server.urls=[] names no server; give the address of one that python -m pmd serve started."
        )
    for url in server.urls:
        if not url.startswith(("http://", "https://")):
            problems.append(f"rollouts.server.urls: {url} must begin with http:// or https://.")
        elif not _names_a_server(url):
            problems.append(f"rollouts.server.urls: {url} names no host and port; write http://HOST:PORT.")
    if server.adapter_dir is not None and not Path(server.adapter_dir).is_dir():
        problems.append(f"rollouts.server.adapter_dir={server.adapter_dir} is not a folder; make it first.")
    return problems


def _names_a_server(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is not a number, or above 65535
        return False


def _memory_problems(run: RunConfig) -> list[str]:
    memory, problems = run.memory, []
    if memory.k > memory.capacity:
        problems.append(f"memory.k={memory.k} exceeds memory.capacity={memory.capacity}; lower k or raise capacity.")
    uses_memory = run.objective.distillation > 0 and run.teacher.context in ("memory", "both")
    if run.teacher.context == "memory" and run.objective.distillation > 0 and not memory.enabled:
        problems.append("teacher.context=memory with memory.enabled=false shows the teacher nothing; use sibling.")
    if uses_memory and memory.enabled and not memory.levels:
        problems.append("memory.levels=[] retrieves nothing; name levels, or set memory.enabled=false.")
    problems += _update_problems(run) if memory.enabled else []
    resuming = run.ckpt_path is not None  # the checkpoint holds what was imported
    if memory.import_path is not None and not resuming and not Path(memory.import_path).is_file():
        problems.append(f"memory.import_path={memory.import_path} is not a file; give what `pmd memory export` wrote.")
    quotas = (memory.max_behaviours, memory.max_strategies, memory.max_lessons or 0)
    if memory.enabled and memory.max_lessons is not None and sum(quotas) == 0 and 0 not in memory.levels:
        problems.append(
            "memory.max_behaviours=0, memory.max_strategies=0 and memory.max_lessons=0 retrieve nothing; raise one, or "
            "set memory.enabled=false."
        )
    elif memory.enabled and memory.max_lessons is not None and sum(quotas) < memory.k and 0 not in memory.levels:
        problems.append(
            f"memory.k={memory.k} exceeds {sum(quotas)}, the sum of memory.max_behaviours, max_strategies and "
            "max_lessons; lower k or raise a quota (max_lessons=null fills what is left)."
        )
    problems += _embedder_problems(memory.embedder) if memory.enabled else []
    if memory.embedder_device == "cuda" and not cuda_is_available():
        problems.append("memory.embedder_device=cuda needs a CUDA device and none was found; use cpu.")
    return problems + _writer_problems(run.reflection.behaviour_writer)


def _writer_problems(writer: BehaviourWriterConfig) -> list[str]:
    """Check the endpoint's address and key; no message holds what may be the key itself."""
    name, problems = "reflection.behaviour_writer", []
    if writer.base_url is None:
        if writer.model is not None or writer.api_key_env is not None:
            problems.append(f"{name}.base_url=null, so nothing asks its model; give the endpoint's address.")
        return problems
    if not writer.base_url.startswith(("http://", "https://")) or not _names_a_server(writer.base_url):
        problems.append(f"{name}.base_url must be http(s)://HOST[:PORT]/v1.")
    elif re.search(r"[@?#\s]", writer.base_url):
        problems.append(
            f"{name}.base_url must hold no user, password or query: it is saved with the run. Put the key into an "
            f"environment variable, and the variable's name into {name}.api_key_env."
        )
    if not writer.model:
        problems.append(f"{name}.model=null; name a model that the endpoint at {name}.base_url serves.")
    if writer.api_key_env is not None:
        key = os.environ.get(writer.api_key_env, "").strip() if re.fullmatch(r"\w+", writer.api_key_env) else ""
        if not key:
            problems.append(
                f"{name}.api_key_env must be the name of an environment variable that is set (not the key itself); "
                "export it first."
            )
        elif not (key.isascii() and key.isprintable()):
            problems.append(f"{name}.api_key_env names a variable whose value has characters that no key has.")
    return problems


def _update_problems(run: RunConfig) -> list[str]:
    memory, problems = run.memory, []
    if memory.transient and memory.update != "batch":
        problems.append(
            f"memory.transient=true with memory.update={memory.update}: what an epoch's end writes would be forgotten "
            "before any teacher reads it; use update=batch."
        )
    if memory.transient and memory.replay:
        problems.append(
            "memory.transient=true with memory.replay=true: a past success is kept across batches; use replay=false."
        )
    if memory.transient and memory.frozen:
        problems.append("memory.transient=true with memory.frozen=true: a frozen memory is kept; remove one of them.")
    if memory.update == "batch" and memory.audit_groups:
        problems.append(
            f"memory.audit_groups={memory.audit_groups} with memory.update=batch: audits judge what the teachers of a "
            "whole epoch were shown, from one memory; use update=epoch, or audit_groups=0."
        )
    if memory.update == "batch" and run.rollouts.prefetch:
        problems.append(
            "rollouts.prefetch=true with memory.update=batch: the engine would have to reflect on one batch while it "
            "generates the next; use prefetch=false, or update=epoch."
        )
    return problems


def _data_problems(data: DataConfig) -> list[str]:
    problems = _hard_world_problems(data.world) if data.task == "tiny_hard" else []
    if data.own_split and data.task != "sciknoweval":
        problems.append(f"data.own_split=true applies to SciKnowEval only, not to data.task={data.task}; remove it.")
    if data.task in TINY_LANGUAGES and data.path is not None:
        problems.append(
            f"data.path={data.path} with data.task={data.task}: the tiny world reads no file; set data.task=jsonl for "
            "a file of your own (or sciknoweval, livecodebench, tooluse), or leave data.path out."
        )
    if data.validation_path is not None and data.task != "jsonl":
        problems.append(
            f"data.validation_path={data.validation_path} applies to data.task=jsonl only, not to {data.task}; "
            "remove it."
        )
    if (data.taskset or data.test_taskset) and data.task != "verifiers":
        problems.append(
            f"data.taskset and data.test_taskset apply to data.task=verifiers only, not to {data.task}; remove them."
        )
    if data.task == "verifiers" and (data.path, data.verifier) != (None, None):
        problems.append(
            "data.path and data.verifier do not apply to data.task=verifiers, whose tasks and rewards are the "
            "environment's; remove them."
        )
    if not data.domains:
        problems.append("data.domains=[] names no domain; name at least one.")
    if data.test_domains is not None and data.task != "sciknoweval":
        problems.append(
            f"data.test_domains={data.test_domains} applies to SciKnowEval only, not to {data.task}; remove it."
        )
    if data.test_domains == []:
        problems.append("data.test_domains=[] names no domain; name at least one, or use null.")
    if data.scorer != "lcb" and data.task != "livecodebench":
        problems.append(
            f"data.scorer={data.scorer} applies to LiveCodeBench only, not to data.task={data.task}; remove it (a "
            "jsonl task names its own in `tests`)."
        )
    return problems


def _hard_world_problems(world: TinyWorldConfig) -> list[str]:
    problems = []
    if world.families % 2:
        problems.append(f"data.world.families={world.families} must be even: names come in pairs of look-alikes.")
    plans = world.train_per_family + world.validation_per_family + world.test_per_family
    if plans >= world.families:
        problems.append(
            f"data.world has {plans} tasks per family for {world.families} names; a name begins at most "
            f"{world.families - 1} plans, so lower them or raise families."
        )
    return problems


def _logging_problems(run: RunConfig) -> list[str]:
    if run.wandb.mode != "off" and find_spec("wandb") is None:
        return [f"wandb.mode={run.wandb.mode} needs wandb; pip install 'pmd[wandb]'."]
    return []


def _embedder_problems(embedder: str) -> list[str]:
    if embedder == "hash":
        return []
    problems = []
    if find_spec("sentence_transformers") is None:
        problems.append(f"memory.embedder={embedder} needs sentence-transformers; pip install 'pmd[embed]'.")
    if not Path(embedder).expanduser().is_dir() and not HUB_ID.fullmatch(embedder):
        problems.append(
            f"memory.embedder={embedder} is not a directory; give `hash`, the folder of a sentence-transformers model "
            "or its Hugging Face id."
        )
    return problems
