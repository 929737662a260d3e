"""The configuration schema: one dataclass for each section of the YAML files.

Every field has a default, one sentence of help and, if it has any, bounds. `values.py` checks types and bounds,
`check.py` combinations, and `json_schema.py` describes the fields to editors.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from pmd.types import ItemKind

# Upper bounds. Beyond them a value is a slip of the keyboard: it would exhaust memory, never end, or break arithmetic.
MAX_TOKENS = 1 << 20  # the longest context of any published open model
MAX_SEQUENCES = 1 << 16  # generated or waited for at once
MAX_SAMPLES = 10_000  # of one task: pass@k is known to four digits
MAX_COUNT = 10_000_000  # tasks, items, epochs, steps: more than a store or a log of one run can hold
MAX_SHOWN = 1000  # memory items in one prompt
MAX_THREADS = 1024  # the cores of the largest machines
MAX_SEED = 2**32 - 1  # of NumPy's generators
MAX_SECONDS = 1_728_000.0  # twenty days; timers that count milliseconds in 32 bits overflow after 24
MAX_WEIGHT = 10_000.0  # of a term of the loss: beyond it the other terms are lost in float32
MAX_RATIO = 1e8  # of two probabilities: log-ratios are clamped to 20 (losses/), so none exceeds 5e8
MICRO_BATCH_TOKENS = 16384  # where rollouts.micro_batch_tokens=auto is not chosen by a GPU's memory
MIN_TEMPERATURE = 0.01  # below it, logits divided by the temperature overflow; greedy is 0 where it is allowed


def option(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
) -> Any:
    """Declare a config field: its default, one sentence of help, and its bounds (`above` and `below` are exclusive)."""
    bounds = {"minimum": minimum, "above": above, "maximum": maximum, "below": below}
    metadata = {"help": help, **{k: v for k, v in bounds.items() if v is not None}}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelConfig:
    """The policy: which weights, in which precision, and which of them are trained."""

    path: str = option(
        "tiny", "`tiny`, `tiny_hard` or `tiny_exam` (shipped with the package), a Hugging Face id, or a directory."
    )
    dtype: Literal["float32", "bfloat16"] = option("float32", "Precision of the base weights.")
    finetune: Literal["full", "lora", "qlora"] = option(
        "full", "Train all weights, an adapter, or an adapter on a 4-bit base."
    )
    lora_rank: int = option(16, "Rank of the adapter.", minimum=1, maximum=1024)
    lora_alpha: float = option(
        32.0, "Scale of the adapter: its output is multiplied by lora_alpha / lora_rank.", above=0, maximum=MAX_WEIGHT
    )
    lora_dropout: float = option(0.0, "Dropout inside the adapter.", minimum=0, maximum=0.9)
    gradient_checkpointing: Literal["auto", "selective"] | bool = option(
        "auto",
        "Recompute activations in the backward pass: slower, far less memory; `selective` in every second layer, "
        "`auto` as the GPU's memory asks for (never on a CPU).",
    )
    offload_activations: bool = option(
        False, "Keep what the backward pass needs in main memory, for the longest sequences; with checkpointing (CUDA)."
    )
    attention: Literal["auto", "varlen", "sdpa", "eager", "flash_attention_2", "flash_attention_3"] = option(
        "auto",
        "How attention is computed. `varlen` (CUDA) packs rows without padding, shared prompts included, and `auto` "
        "takes it where it can, else sdpa; flash attention, from its own package, packs rows but shares no prompts.",
    )
    layer_kernels: Literal["auto", "plain", "compiled", "liger"] = option(
        "auto",
        "Norms, rotary embedding and SwiGLU by torch, by torch.compile of each layer, or by liger-kernel (CUDA), which "
        "`auto` takes in bfloat16 on CUDA where it is installed.",
    )
    trust_remote_code: bool = option(
        False, "Run Python code that comes with the model; only for a model whose authors you trust as your own code."
    )
    prompts: Literal["words", "hard_words", "chat"] = option(
        "words",
        "`words` and `hard_words` are the tiny worlds' own languages; `chat` uses the tokenizer's chat template.",
    )
    chat_template: str | None = option(None, "File with a chat template to use instead of the tokenizer's own.")
    chat_template_kwargs: dict[str, Any] = option(
        {},
        "What the chat template is given, such as {enable_thinking: true}; by default, enable_thinking is false. Under "
        "`student`, `teacher` or `reflection`: for those prompts only.",
    )


@dataclass
class PromptsConfig:
    """The wording of the prompts of teacher, reflection and abstraction, with model.prompts `chat`."""

    folder: str | None = option(
        None, "Folder of edited prompt texts (`pmd prompts export DIR` writes the originals); null uses those."
    )


@dataclass
class OptimizerConfig:
    """AdamW with a linear warm-up; the default is SDPO's recipe, a constant rate after it."""

    kind: Literal["adamw", "adamw_8bit_paged"] = option(
        "adamw",
        "`adamw_8bit_paged` keeps AdamW's state in 8 bits and moves it to the CPU when memory is short (CUDA only).",
    )
    lr: float = option(1e-5, "Learning rate after the warm-up.", above=0, maximum=1)
    weight_decay: float = option(0.01, "Decoupled weight decay.", minimum=0, maximum=100)
    beta1: float = option(0.9, "AdamW's first decay rate.", minimum=0, below=1)
    beta2: float = option(0.999, "AdamW's second decay rate.", minimum=0, below=1)
    warmup_steps: int = option(
        0, "Optimizer steps over which the learning rate rises from 0.", minimum=0, maximum=MAX_COUNT
    )
    schedule: Literal["constant", "linear", "cosine"] = option(
        "constant", "The learning rate after warm-up; `linear` and `cosine` fall to 0 at the last step of the run."
    )
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm.", above=0, maximum=1e6)


@dataclass
class TeacherConfig:
    """The self-teacher: which weights score the rollouts, and what its prompt contains."""

    kind: Literal["frozen", "ema", "live", "trust_region"] = option(
        "frozen",
        "The reference policy, a moving average of the student, the student itself, or a mix of both logits.",
    )
    refresh_epochs: int | None = option(
        None, "With kind `frozen`: copy the student again every this many epochs.", minimum=1, maximum=MAX_COUNT
    )
    ema_rate: float = option(
        0.05,
        "With kind `ema`: weight of the student in the average, which moves once per rollout batch.",
        above=0,
        below=1,
    )
    trust_region_rate: float = option(
        0.05, "With kind `trust_region`: weight of the student's logits in the mix.", above=0, below=1
    )
    context: Literal["none", "sibling", "memory", "both"] = option(
        "both",
        "What the teacher sees besides the task: a verified success of the same group, retrieved memory, or both.",
    )
    feedback: bool = option(
        True,
        "Where no success can be shown, show the verifier's feedback on the rollout's own failure, if it gave any.",
    )
    failed_attempt: bool = option(
        False, "With feedback: also show the failed attempt itself; false shows the feedback alone (SDPO)."
    )
    max_prompt_tokens: int = option(
        2048, "Longest teacher prompt; whole memory items are dropped to fit.", minimum=8, maximum=MAX_TOKENS
    )

    @property
    def has_own_weights(self) -> bool:
        """Whether the teacher has weights of its own, which must be kept in memory and in checkpoints."""
        return self.kind == "ema" or (self.kind == "frozen" and self.refresh_epochs is not None)


@dataclass
class ObjectiveConfig:
    """The loss: policy_gradient x clipped policy gradient + distillation x divergence from the teacher."""

    policy_gradient: float = option(0.0, "Weight of the clipped policy gradient (GRPO).", minimum=0, maximum=MAX_WEIGHT)
    distillation: float = option(
        1.0,
        "Weight of the divergence between the student and its memory-conditioned teacher.",
        minimum=0,
        maximum=MAX_WEIGHT,
    )
    implementation: Literal["fused", "reference"] = option(
        "fused", "`reference` is the readable one (losses/distillation.py); `fused` gives the same numbers faster."
    )
    alpha: float | Literal["symmetric"] = option(
        0.5,
        "0: forward KL(T||S). 1: reverse KL(S||T). Between: Jensen-Shannon. `symmetric`: the mean of both KLs.",
        minimum=0,
        maximum=1,
    )
    top_k: int | None = option(
        None,
        "Compare only the student's k most likely tokens; null compares the whole vocabulary.",
        minimum=1,
        maximum=MAX_TOKENS,
    )
    tail: bool = option(True, "With top_k: compare the remaining probability as one more outcome, the tail.")
    reduction: Literal["token", "sequence"] = option(
        "token",
        "`token`: mean over all tokens of the step. `sequence`: mean over rollouts of their means over tokens (SDPO).",
    )
    no_context_weight: float = option(
        1.0,
        "Weight of rollouts whose teacher saw nothing that the student did not; 0 leaves them out (SDPO).",
        minimum=0,
        maximum=MAX_WEIGHT,
    )
    token_clip: float | None = option(
        None,
        "Distillation: upper bound on a token's divergence, in nats; tokens above it get no gradient; null: none.",
        above=0,
        maximum=MAX_WEIGHT,
    )
    importance_clip: float | None = option(
        2.0,
        "Distillation: upper bound on the ratio of the current to the sampling policy; null turns it off.",
        above=0,
        maximum=MAX_RATIO,
    )
    tis_cap: float | None = option(
        2.0,
        "Upper bound on the importance weight from engine to trainer log-probs; null turns the weight off.",
        above=0,
        maximum=MAX_RATIO,
    )
    clip_low: float = option(0.2, "Policy gradient: lower clip of the ratio, 1 - clip_low.", minimum=0, maximum=1)
    clip_high: float = option(
        0.28, "Policy gradient: upper clip of the ratio, 1 + clip_high.", minimum=0, maximum=MAX_RATIO
    )
    dual_clip: float | None = option(
        3.0,
        "Policy gradient: the loss of a negative advantage A is at most dual_clip |A|; null turns this off.",
        above=1,
        maximum=MAX_RATIO,
    )
    normalize_std: bool = option(False, "Divide advantages by the group's standard deviation.")
    kl_weight: float = option(0.0, "Weight of KL(student || reference policy).", minimum=0, maximum=MAX_WEIGHT)
    update_policy: bool = option(
        True, "false computes and logs everything but applies no update (the frozen-policy ablation)."
    )


@dataclass
class TinyWorldConfig:
    """The size of a tiny world; data.seed decides which name stands for which rule."""

    boxes: Literal[4, 6] = option(
        4, "Boxes in a task of the plain world: 4 give 12 rules, 6 give 30. The hard world has 6 boxes in any case."
    )
    families: int = option(
        32, "Names in use, each standing for one rule, or, in the hard world, for one box.", minimum=1, maximum=64
    )
    train_per_family: int = option(6, "Training tasks per family.", minimum=1, maximum=200)
    validation_per_family: int = option(2, "Validation tasks per family.", minimum=1, maximum=200)
    test_per_family: int = option(4, "Test tasks per family.", minimum=1, maximum=200)


@dataclass
class DataConfig:
    """Where the tasks come from, and how they are split."""

    task: Literal["tiny", "tiny_hard", "sciknoweval", "livecodebench", "tooluse", "jsonl", "verifiers"] = option(
        "tiny", "Source of the tasks."
    )
    path: str | None = option(
        None, "Folder or file of the data; null loads it from the Hugging Face Hub, if the source is there."
    )
    validation_path: str | None = option(None, "jsonl: file of the held-out tasks; null splits `path`.")
    columns: dict[str, str | list[str]] = option(
        {}, "jsonl: which column holds what, such as {prompt: question, answer: label}; see the page on own tasks."
    )
    verifier: str | list[Any] | None = option(
        None,
        "jsonl: the verifier, or reward function, of tasks that name none; or a list of several, each {name, weight, "
        "options}, whose weighted rewards are added.",
    )
    answer_after: str | None = option(None, "jsonl: the answer is what follows this text, such as GSM8K's `####`.")
    prompt_suffix: str | None = option(None, "jsonl: added to every prompt, such as the form of the answer.")
    subset: str | None = option(None, "jsonl: subset (configuration) of a data set.")
    train_split: str = option("train", "jsonl: the split of a data set (of the Hub, or in a folder) to train on.")
    test_split: str | None = option(None, "jsonl: its held-out split; null splits `train_split`.")
    taskset: dict[str, Any] = option(
        {},
        "verifiers: the taskset of an installed environment, such as {id: my-environment}, with its own arguments.",
    )
    test_taskset: dict[str, Any] = option(
        {}, "verifiers: arguments that differ for the held-out tasks; empty splits `taskset`."
    )
    allow_modules: list[str] = option(
        [],
        "jsonl: modules or packages whose verifiers the task files may name; they are imported and run. "
        "`--allow-module NAME` adds one.",
    )
    domains: list[Literal["biology", "chemistry", "material", "physics"]] = option(
        ["chemistry"], "SciKnowEval domains."
    )
    test_domains: list[Literal["biology", "chemistry", "material", "physics"]] | None = option(
        None,
        "SciKnowEval: domains of the test tasks, also those without training tasks, which are scored apart; null is "
        "`domains`.",
    )
    own_split: bool = option(
        False, "SciKnowEval: split 90/10 by `seed` with no question on both sides; false uses SDPO's split."
    )
    scorer: Literal["lcb", "sdpo"] = option(
        "lcb", "LiveCodeBench: the program is the last code block (`lcb`) or the longest (`sdpo`)."
    )
    first_day: str = option("2025-02-01", "LiveCodeBench: first contest day, as YYYY-MM-DD; the default begins v6.")
    end_day: str = option("2025-05-01", "LiveCodeBench: the day after the last contest day, as YYYY-MM-DD.")
    validation_share: float = option(
        0.05,
        "Share of the training tasks held out for validation, where the data has no such split; 0 chooses the best "
        "checkpoint on the test tasks, as SDPO does, and the tables say so.",
        minimum=0,
        maximum=0.5,
    )
    weights: dict[str, float] = option(
        {},
        "Share of a domain's training tasks that an epoch visits, the next ones in every epoch, in (0, 1]; domains "
        "without a weight are visited whole.",
        above=0,
        maximum=1,
    )
    max_train: int | None = option(None, "Use only this many training tasks.", minimum=1, maximum=MAX_COUNT)
    max_validation: int | None = option(None, "Use only this many validation tasks.", minimum=1, maximum=MAX_COUNT)
    max_test: int | None = option(None, "Use only this many test tasks.", minimum=1, maximum=MAX_COUNT)
    seed: int | None = option(
        None, "Seed of splits and of the tiny world; null uses seed_everything.", minimum=0, maximum=MAX_SEED
    )
    world: TinyWorldConfig = field(default_factory=TinyWorldConfig, metadata={"help": "The size of a tiny world."})


@dataclass
class VLLMConfig:
    """vLLM, in this process or as a server: its memory, its limits, and how much its log-probs may differ."""

    memory_fraction: float | None = option(
        None,
        "Share of the GPU's memory that vLLM may use while awake; null is what the trainer leaves (pmd doctor).",
        above=0, maximum=0.98,
    )  # fmt: skip
    kv_cache_memory_bytes: int | None = option(
        None,
        "Size of the KV cache in bytes; null uses what memory_fraction leaves. Required on a CPU.",
        minimum=1 << 20,
        maximum=1 << 44,
    )
    max_num_seqs: int = option(256, "Completions generated at once.", minimum=1, maximum=MAX_SEQUENCES)
    max_model_len: int | None = option(
        None, "Longest prompt plus completion, in tokens; null is the longest that the other sections allow.",
        minimum=16, maximum=2 * MAX_TOKENS,
    )  # fmt: skip
    block_size: int | None = option(
        None, "Tokens in a block of the KV cache; null leaves it to vLLM.", minimum=8, maximum=1024
    )
    enforce_eager: bool = option(False, "No CUDA graphs: slower, but starts sooner and needs less memory.")
    quantization: Literal["none", "fp8", "bitsandbytes"] = option(
        "none", "vLLM's own quantisation of the frozen base; adapters go on top of it."
    )
    share_weights: bool | Literal["auto"] = option(
        "auto",
        "Trainer and vLLM compute with the same copy of the base (LoRA); `auto` where the architecture allows it.",
    )
    sleep: bool | Literal["auto"] = option(
        "auto",
        "Free the KV cache, and weights that are not shared, while training; `auto` unless both are predicted to fit.",
    )
    request_seeds: bool = option(
        True,
        "Each completion is drawn with a seed of its own, so that it does not depend on the others in its batch; false "
        "draws them from one stream.",
    )
    parity_completions: int = option(
        4, "Completions scored by the trainer after each sync; 0 turns it off.", minimum=0, maximum=1000
    )
    parity_tokens: int = option(32, "Tokens in each of these completions.", minimum=1, maximum=MAX_TOKENS)
    parity_bound: float = option(
        0.1,
        "Stop if the log-probs of engine and trainer differ by more than this on average, in nats per token.",
        above=0,
        maximum=100,
    )
    stall_s: float = option(600.0, "Stop if no token arrives for this many seconds.", above=0, maximum=MAX_SECONDS)


@dataclass
class ServerConfig:
    """vLLM servers, started by `python -m pmd serve` and used with `rollouts.engine: vllm_server`."""

    urls: list[str] = option(["http://127.0.0.1:8000"], "Addresses of the servers.")
    adapter_dir: str | None = option(
        None,
        "Folder for adapters, at the same path here and for the servers; null is the system's temporary folder.",
    )
    concurrency: int = option(64, "Requests in flight at each server.", minimum=1, maximum=MAX_THREADS)
    retries: int = option(5, "How often a failed request is sent again before the run stops.", minimum=0, maximum=1000)
    backoff_s: float = option(
        1.0, "First pause before a failed server is tried again, in seconds; pauses double.", above=0, maximum=3600
    )
    recovery_s: float = option(
        600.0, "Seconds for which all servers may be unreachable before the run stops.", above=0, maximum=MAX_SECONDS
    )
    request_timeout_s: float = option(
        1800.0, "Seconds after which an unanswered request is sent again.", above=0, maximum=MAX_SECONDS
    )


@dataclass
class RolloutsConfig:
    """How the student attempts tasks, and how rollouts become batches."""

    engine: Literal["hf", "vllm", "vllm_server"] = option(
        "hf", "`hf`: generate with the training weights; `vllm`: vLLM in this process; `vllm_server`: vLLM elsewhere."
    )
    vllm: VLLMConfig = field(default_factory=VLLMConfig, metadata={"help": "vLLM's settings."})
    server: ServerConfig = field(default_factory=ServerConfig, metadata={"help": "Where the vLLM servers are."})
    tasks_per_step: int = option(32, "Tasks in one rollout batch.", minimum=1, maximum=MAX_SEQUENCES)
    group_size: int = option(8, "Rollouts of each task.", minimum=1, maximum=MAX_SAMPLES)
    updates_per_batch: int = option(
        1, "Optimizer steps per rollout batch; the tasks are divided among them.", minimum=1, maximum=MAX_SEQUENCES
    )
    temperature: float = option(
        1.0, "Sampling temperature in training; the importance weights assume 1.", minimum=MIN_TEMPERATURE, maximum=100
    )
    max_new_tokens: int = option(8192, "Longest completion, in tokens.", minimum=1, maximum=MAX_TOKENS)
    max_prompt_tokens: int = option(
        2048,
        "Longest student prompt, in tokens; longer tasks are refused before training.",
        minimum=1,
        maximum=MAX_TOKENS,
    )
    uniform_groups: Literal["keep", "drop", "resample"] = option(
        "keep",
        "Groups whose rewards are all equal, which give a policy gradient no signal: `drop` leaves them out; "
        "`resample` attempts their tasks again before (DAPO draws other tasks).",
    )
    max_resamples: int = option(
        2, "With uniform_groups `resample`: further groups of one task before it is left out.", minimum=1, maximum=100
    )
    prefetch: bool = option(
        False, "Generate the next batch while this one trains, with weights that are one batch old; needs vllm_server."
    )
    engine_batch: int = option(256, "Sequences that the hf engine generates at once.", minimum=1, maximum=MAX_SEQUENCES)
    micro_batch_tokens: int | Literal["auto"] = option(
        "auto",
        "Tokens in one forward pass, padding included; fewer need less memory. `auto` is what fits into the GPU's "
        "memory, and 16,384 on a CPU.",
        minimum=1,
        maximum=16 * MAX_TOKENS,
    )
    share_prefixes: Literal["off", "teacher", "both"] = option(
        "both",
        "Compute a prompt that a group's rollouts share only once, where it pays: for the teacher, or for both roles.",
    )


@dataclass
class VerificationConfig:
    """Held-out evaluation at the end of epochs and of the run, without memory in the student's prompt."""

    every_epochs: int = option(
        1, "Evaluate on the validation tasks every this many epochs.", minimum=1, maximum=MAX_COUNT
    )
    every_steps: int | None = option(
        None,
        "Evaluate also within an epoch, every this many optimizer steps, after the rollout batch that they end in. The "
        "best checkpoint may be one of these.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    samples: int = option(4, "Completions per validation task at the end of an epoch.", minimum=1, maximum=MAX_SAMPLES)
    final_samples: int = option(
        16, "Completions per test task before and after training.", minimum=1, maximum=MAX_SAMPLES
    )
    temperature: float = option(0.6, "Sampling temperature in evaluation.", minimum=MIN_TEMPERATURE, maximum=100)
    top_p: float = option(
        0.95, "Nucleus sampling in evaluation: probability of the tokens that are kept.", above=0, maximum=1
    )
    pass_at: list[int] = option(
        [1, 8], "The values of k for pass@k, coverage@k and maj@k in tables.", minimum=1, maximum=MAX_SAMPLES
    )
    memory_conditioned: bool = option(
        True, "Also score the policy with memory in its prompt, to see what is not yet internalized."
    )


@dataclass
class VerifiersConfig:
    """How completions are verified: in parallel, within a deadline, programs in a sandbox."""

    workers: int | None = option(
        None,
        "Completions verified at once, while others are generated; null is one per core.",
        minimum=1,
        maximum=MAX_THREADS,
    )
    deadline_s: float = option(
        900.0,
        "Seconds after which a verification is given up, counted as an error, and not learned from.",
        minimum=0.01,
        maximum=MAX_SECONDS,
    )
    sandbox: Literal["strongest", "namespaces", "bubblewrap", "landlock", "rlimits"] = option(
        "strongest", "Isolation of programs; `rlimits` is weak and used only if it is named here."
    )


@dataclass
class BehaviourWriterConfig:
    """An external model that writes the behaviours instead of the policy, at an OpenAI-compatible endpoint."""

    base_url: str | None = option(
        None, "Address of the endpoint up to /v1, e.g. https://api.openai.com/v1; null: the policy writes them."
    )
    model: str | None = option(None, "The model's name at the endpoint.")
    api_key_env: str | None = option(
        None, "Name of the environment variable that holds the key; null sends none. The key itself is saved nowhere."
    )
    max_calls_per_step: int = option(
        1,
        "Calls for each optimizer step since behaviours were last written; further clusters wait.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    timeout_s: float = option(60.0, "Seconds after which a call has failed.", above=0, maximum=MAX_SECONDS)


@dataclass
class ReflectionConfig:
    """The policy reflects on its own rollouts and writes down what they teach."""

    enabled: bool = option(True, "Reflect with each update of the memory.")
    by: Literal["teacher", "student"] = option(
        "teacher", "Whose weights write the reflections; a student can forget how to during training."
    )
    temperature: float = option(0.0, "Sampling temperature; 0 is greedy.", minimum=0, maximum=100)
    max_new_tokens: int = option(512, "Longest reflection, in tokens.", minimum=1, maximum=MAX_TOKENS)
    max_prompt_tokens: int = option(
        16384,
        "Longest prompt of a reflection, in tokens; a longer one shows fewer attempts, then shorter ones.",
        minimum=1,
        maximum=MAX_TOKENS,
    )
    retry: bool = option(True, "Ask once more, at a temperature of at least 0.7, if the output is malformed.")
    max_groups: int | None = option(
        None, "Reflect on at most this many groups an update, drawn by seed; null is all.", minimum=1, maximum=MAX_COUNT
    )
    behaviour_writer: BehaviourWriterConfig = field(
        default_factory=BehaviourWriterConfig, metadata={"help": "An external model that writes the behaviours."}
    )


@dataclass
class MemoryConfig:
    """The procedural memory: what is kept, what is retrieved, and when it may change."""

    enabled: bool = option(True, "Keep and retrieve memory.")
    update: Literal["epoch", "batch"] = option(
        "epoch",
        "When memory is written: at the end of an epoch, or with each rollout batch, before its teachers' prompts are "
        "made (the paper).",
    )
    behaviour_every: int = option(
        1, "Behaviours are written anew in every this many updates of the memory.", minimum=1, maximum=MAX_COUNT
    )
    frozen: bool = option(False, "Write once, from one pass of the initial policy before training, then never again.")
    transient: bool = option(
        False, "Forget everything before each update: with `update: batch`, nothing is kept across batches."
    )
    replay: bool = option(
        True, "Show the teacher a verified success from an earlier batch where its group has none to show."
    )
    k: int = option(4, "Items retrieved for one task.", minimum=0, maximum=MAX_SHOWN)
    levels: list[Literal[0, 1, 2]] = option(
        [1, 2], "Levels that retrieval may return: 0 experience, 1 insight, 2 behaviour."
    )
    kinds: list[ItemKind] = option(
        ["experience", "strategy", "lesson", "contrast", "behaviour"], "Kinds that retrieval may return."
    )
    max_behaviours: int = option(1, "Quota of behaviours among the k items.", minimum=0, maximum=MAX_SHOWN)
    max_strategies: int = option(
        2, "Quota of strategies and contrasts among the k items.", minimum=0, maximum=MAX_SHOWN
    )
    max_lessons: int | None = option(
        None,
        "Quota of lessons among the k items; null lets them fill the remaining places.",
        minimum=0,
        maximum=MAX_SHOWN,
    )
    neighbours: int = option(16, "Tasks whose items are considered for a query.", minimum=1, maximum=MAX_SAMPLES)
    min_similarity: float = option(0.2, "Neighbours below this cosine similarity are ignored.", minimum=-1, maximum=1)
    max_tokens: int = option(
        768, "Limit on memory in the teacher's prompt; whole items are dropped to fit.", minimum=1, maximum=MAX_TOKENS
    )
    capacity: int = option(
        100_000,
        "Most active insights in the store; the oldest redundant ones are retired first.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    insights_per_task: int = option(6, "Most active insights of one task.", minimum=1, maximum=MAX_SAMPLES)
    experiences_per_task: int = option(
        4, "Most successes, and most failures, kept of one task.", minimum=1, maximum=MAX_SAMPLES
    )
    embedder: str = option("hash", "`hash` (seeded, no weights) or the path or id of a sentence-transformers model.")
    embedder_device: Literal["cpu", "cuda"] = option(
        "cpu", "Where a sentence-transformers model runs: beside the training on the CPU, or on its GPU."
    )
    cluster_similarity: float | None = option(
        None,
        "Average cosine similarity from which insights form one behaviour; null measures it on the insights.",
        above=0,
        maximum=1,
    )
    cluster_over: Literal["insights", "tasks"] = option(
        "insights",
        "What is clustered for behaviours: similar insights, or similar tasks with their insights (the paper).",
    )
    cluster_support: int = option(2, "Tasks that a behaviour must rest on.", minimum=1, maximum=MAX_SAMPLES)
    merge_similarity: float | None = option(
        None,
        "Insights of one task and kind with at least this cosine similarity are merged; null measures it.",
        above=0,
        maximum=1,
    )
    import_path: str | None = option(None, "An export that a new memory starts with; null starts empty.")
    keep_generations: int | None = option(
        10,
        "Updates that differences and rollbacks reach back; older log rows, and items retired before, are dropped; "
        "null keeps everything.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    archive: bool = option(False, "Write what `keep_generations` drops to files in memory/archive/.")
    audit_groups: int = option(
        0, "Groups per epoch on which the teacher audits the items it was shown.", minimum=0, maximum=MAX_COUNT
    )
    audit_evidence: int = option(
        3, "Groups in which an item is audited before its status changes.", minimum=2, maximum=MAX_SAMPLES
    )
    audit_margin: float = option(
        0.01, "Lifts within this distance of 0 count as none; nats per token.", above=0, maximum=100
    )
    usefulness_weight: float = option(
        0.5, "Usefulness raises or lowers an item's score by up to this share.", minimum=0, maximum=1
    )
    scope: Literal["own", "neighbours", "both"] = option(
        "both",
        "Whose insights are retrieved: the task's own, its neighbours', or both. `own` reads experience and insights "
        "of the task directly, and finds behaviours by the similarity of their text alone (the paper).",
    )


@dataclass
class WandbConfig:
    """Weights & Biases (needs the extra `wandb`); `wandb: online` is short for `wandb: {mode: online}`."""

    mode: Literal["off", "online", "offline"] = option("off", "Whether runs are logged there, and from where.")
    project: str = option("pmd", "The project.")
    entity: str | None = option(None, "The user or team; null is the account's own.")
    group: str | None = option(None, "The group, such as the name of a sweep.")
    tags: list[str] = option([], "Tags of the run.")


@dataclass
class RunConfig:
    """A whole run: all sections except `trainer`, which is Lightning's."""

    method: str = option("pmd", "Name of the method in tables; it changes nothing else.")
    run_dir: str | None = option(None, "Directory of the run; null picks the next free runs/NAME.")
    ckpt_path: str | None = option(
        None, "`last`, `best` or a file: resume (fit) or evaluate (validate, test) this checkpoint."
    )
    seed_everything: int = option(0, "Seed of everything random.", minimum=0, maximum=MAX_SEED)
    cpu_threads: int | None = option(
        None,
        "CPU threads of torch; null leaves it to torch. A tiny model is fastest with one.",
        minimum=1,
        maximum=MAX_THREADS,
    )
    trace_every: int = option(
        1, "Keep a trace for `pmd inspect step` every this many steps; 0 keeps none.", minimum=0, maximum=MAX_COUNT
    )
    checkpoint_every_steps: int | None = option(
        None,
        "Also write a checkpoint at the end of a rollout batch after at least this many steps; null writes one at each "
        "epoch's end only.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    stop_on_collapse: bool = option(
        False, "End the run when the policy has collapsed; false only warns of it (docs/evaluation.md)."
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollouts: RolloutsConfig = field(default_factory=RolloutsConfig)
    verifiers: VerifiersConfig = field(default_factory=VerifiersConfig)
    verification: VerificationConfig = field(default_factory=VerificationConfig)
    reflection: ReflectionConfig = field(default_factory=ReflectionConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt plus completion that the sections allow."""
        attempted = max(self.rollouts.max_prompt_tokens, self.teacher.max_prompt_tokens) + self.rollouts.max_new_tokens
        return max(attempted, self.reflection.max_prompt_tokens + self.reflection.max_new_tokens)
