"""Whatever a server does, each completion arrives once and complete, or one error names the cause; the run resumes."""

import signal
import socket
import threading
import time

import pytest
import torch
from command_line import LORA, ROOT, SMALL, run_pmd, small_fit, start_pmd
from scripted_server import FAILURES, made_up, serving

from pmd.config.load import load_config
from pmd.config.save import saved_yaml
from pmd.config.schema import ModelConfig, ServerConfig, TeacherConfig
from pmd.engines.base import Request, Sampling
from pmd.engines.make import make_engine
from pmd.engines.server import VLLMServerEngine
from pmd.engines.server_client import ServerClient
from pmd.errors import EngineError
from pmd.policy import make_policy
from pmd.pretrained import load_base, load_tokenizer

REQUESTS = [Request((1, 2, 3 + number % 4), number) for number in range(24)]
SAMPLING = Sampling(1.0, 8)


def engine_on(url, folder, teacher="frozen", **changes) -> VLLMServerEngine:
    model = ModelConfig(path="tiny", finetune="lora", lora_rank=4)
    policy = make_policy(load_base(model), model, TeacherConfig(kind=teacher))
    config = ServerConfig(urls=[url], concurrency=4, backoff_s=0.05, recovery_s=20.0, retries=3)
    for name, value in changes.items():
        setattr(config, name, value)
    return VLLMServerEngine(policy, load_tokenizer(model), config, folder)


@pytest.mark.parametrize("failure", [*FAILURES, "hang"])
def test_every_completion_arrives_once_and_complete(failure, tmp_path):
    with serving(lambda number: failure if number % 7 == 2 else None) as server:
        engine = engine_on(server.url, tmp_path, retries=10, request_timeout_s=0.5)
        arrived = list(engine.generate(REQUESTS, SAMPLING))
        stop_id = engine.stop_ids[0]
    assert sorted(position for position, _ in arrived) == list(range(len(REQUESTS)))
    for position, completion in arrived:
        ids, logprobs = made_up(list(REQUESTS[position].prompt_ids), REQUESTS[position].seed, stop_id, 100)
        assert (list(completion.token_ids), list(completion.logprobs)) == (ids, logprobs)
    assert server.count > len(REQUESTS)


@pytest.mark.parametrize("failure", [*FAILURES, "hang"])
def test_retries_are_limited_and_the_request_is_named(failure, tmp_path):
    with serving(lambda number: failure) as server:
        engine = engine_on(server.url, tmp_path, retries=2, request_timeout_s=0.3)
        with pytest.raises(EngineError, match=r"request \d+ failed 3 times, most recently: .*the batch was discarded"):
            list(engine.generate(REQUESTS[:4], SAMPLING))
        assert max(server.asked.values()) == 3


def test_two_servers_share_the_requests_and_each_gets_an_adapter_once(tmp_path):
    with serving(lambda number: None) as one, serving(lambda number: None) as other:
        engine = engine_on(one.url, tmp_path, urls=[one.url, other.url])
        for version in (1, 2):
            engine.sync(version)
            list(engine.generate(REQUESTS, SAMPLING))
        assert one.num_loads == other.num_loads
        assert list(one.num_loads.values()) == [1, 1]
        assert one.count + other.count == 2 * len(REQUESTS)
        assert min(one.count, other.count) > len(REQUESTS) / 2  # each has as many connections


def test_a_batch_that_one_server_could_take_alone_is_shared(tmp_path):
    all_sent = threading.Barrier(len(REQUESTS))
    with serving(lambda _: all_sent.wait(20) and None) as one, serving(lambda _: all_sent.wait(20) and None) as other:
        engine = engine_on(one.url, tmp_path, urls=[one.url, other.url], concurrency=64)
        list(engine.generate(REQUESTS, SAMPLING))
        assert min(one.count, other.count) > len(REQUESTS) / 3


def test_the_other_server_takes_over_what_a_dead_one_had(tmp_path):
    with serving(lambda number: "reset" if number >= 5 else None) as dying, serving(lambda number: None) as other:
        engine = engine_on(dying.url, tmp_path, urls=[dying.url, other.url])
        engine.sync(1)
        arrived = dict(engine.generate(REQUESTS, SAMPLING))
        stop_id = engine.stop_ids[0]
        assert dying.count > 5
    assert sorted(arrived) == list(range(len(REQUESTS)))
    for position, completion in arrived.items():
        ids, _ = made_up(list(REQUESTS[position].prompt_ids), REQUESTS[position].seed, stop_id, 100)
        assert list(completion.token_ids) == ids


def test_a_server_that_fails_quickly_does_not_use_up_the_tries_of_requests_that_another_could_take(tmp_path):
    with serving(lambda _: "500") as bad, serving(lambda _: time.sleep(0.02)) as good:
        engine = engine_on(bad.url, tmp_path, urls=[bad.url, good.url], concurrency=2, retries=1)
        arrived = dict(engine.generate(REQUESTS, SAMPLING))
        assert bad.count > 0
    assert sorted(arrived) == list(range(len(REQUESTS)))


def test_a_server_that_refuses_the_adapter_is_given_up_in_the_end(tmp_path):
    with serving(lambda number: None) as server:
        engine = engine_on(server.url, tmp_path, recovery_s=0.5)
        engine.sync(1)
        server.adapters.clear()  # as after a restart
        server.takes_adapters = False
        with pytest.raises(EngineError, match=r"no server answered for .*while request \d+ \(prompt of 3 tokens\)"):
            list(engine.generate(REQUESTS, SAMPLING))


def test_a_closed_engine_refuses_to_generate_and_leaves_no_adapters(tmp_path):
    with serving(lambda number: None) as server:
        engine = engine_on(server.url, tmp_path / "adapters")
        engine.sync(1)
        engine.close()
        with pytest.raises(EngineError, match="was closed"):
            list(engine.generate(REQUESTS, SAMPLING))
        assert not server.adapters
    assert not (tmp_path / "adapters").exists()


def test_servers_are_given_absolute_paths_of_adapters(tmp_path, monkeypatch):
    """They run in other directories than the trainer; the saved configuration is valid in any directory, too."""
    (tmp_path / "shared").mkdir()
    monkeypatch.chdir(tmp_path)
    overrides = ["rollouts.engine=vllm_server", "rollouts.server.adapter_dir=shared", "model.finetune=lora"]
    loaded = load_config([ROOT / "configs" / "tiny.yaml"], overrides)
    policy = make_policy(load_base(loaded.run.model), loaded.run.model, loaded.run.teacher)
    engine = make_engine(loaded.run, policy, load_tokenizer(loaded.run.model))
    assert isinstance(engine, VLLMServerEngine)
    assert engine.adapters.parent == tmp_path / "shared"
    assert f"adapter_dir: {tmp_path / 'shared'}" in saved_yaml(loaded)
    engine.close()


def test_an_unloaded_adapter_is_not_loaded_again(tmp_path):
    """A thread that recovers a server may try after the run has ended."""
    with serving(lambda number: None) as server:
        client = ServerClient(server.url, 5.0)
        client.load_adapter("student-1", tmp_path)
        assert server.adapters == {"student-1"}
        client.unload_adapter("student-1")
        client.load_adapter("student-1", tmp_path)
        assert not server.adapters


def free_url() -> str:
    """An address at which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_a_server_that_never_answers_is_named(tmp_path):
    engine = engine_on(free_url(), tmp_path, recovery_s=0.5, retries=10**6)
    with pytest.raises(EngineError, match="no server answered"):
        list(engine.generate(REQUESTS[:2], SAMPLING))


def test_without_retries_the_first_failure_ends_the_call(tmp_path):
    engine = engine_on(free_url(), tmp_path, retries=0)
    with pytest.raises(EngineError, match="request 0 failed 1 times"):
        list(engine.generate(REQUESTS[:1], SAMPLING))


def test_a_teachers_adapter_is_loaded_anew_and_the_students_stays(tmp_path):
    """The teacher may have been refreshed since; the reference policy is the base model, without an adapter."""
    with serving(lambda number: None) as server:
        engine = engine_on(server.url, tmp_path, teacher="ema")
        engine.sync(1)
        (student,) = server.adapters
        seen = []
        for role in ("teacher", "teacher", "student", "reference"):
            list(engine.generate(REQUESTS[:1], SAMPLING, role))
            seen.append(set(server.adapters) - {student})
        assert student in server.adapters
        engine.close()
    assert [len(names) for names in seen] == [1, 1, 1, 1]
    assert seen[0] != seen[1] == seen[2] == seen[3]


def options(server, adapter_dir) -> list[str]:
    """The arguments of a run that generates with the server."""
    adapter_dir.mkdir(exist_ok=True)
    return [
        *LORA, "--rollouts.engine=vllm_server", f"--rollouts.server.urls=[{server.url}]",
        f"--rollouts.server.adapter_dir={adapter_dir}", "--rollouts.vllm.parity_completions=0",
        "--rollouts.server.retries=1", "--rollouts.server.recovery_s=2", "--rollouts.server.backoff_s=0.05",
    ]  # fmt: skip


def test_a_run_resumed_after_its_server_died_equals_an_undisturbed_one(tmp_path):
    def fit(run_dir, server, *arguments, code=0):
        done = small_fit(run_dir, 2, *options(server, tmp_path / "adapters"), *arguments, code=code)
        assert not server.adapters
        assert not list((tmp_path / "adapters").iterdir())
        return done

    with serving(lambda number: None) as server:
        fit(tmp_path / "whole", server)
        run_pmd(
            "test", "--config", str(tmp_path / "whole" / "config.yaml"), "--ckpt_path=last",
            f"--rollouts.server.urls=[{server.url}]",
        )  # fmt: skip
        assert not server.adapters
        assert not list((tmp_path / "adapters").iterdir())
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    with serving(lambda number: "500" if last.is_file() else None) as server:
        done = fit(tmp_path / "run", server, code=1)
        assert "EngineError: request" in done.stderr
        assert "--ckpt_path last" in done.stderr
        assert "Traceback" not in done.stderr
    with serving(lambda number: None) as server:
        fit(tmp_path / "run", server, "--ckpt_path=last")
    whole, resumed = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
        for name in ("whole", "run")
    )
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_a_terminated_run_does_not_wait_for_the_prefetched_batch(tmp_path):
    """A thread generates the next batch; it must not keep the process alive."""
    trained, hangs = tmp_path / "run" / "traces" / "step-000000.jsonl.gz", threading.Event()

    def script(number: int) -> str | None:
        if not trained.is_file():
            return None
        hangs.set()
        return "hang"

    with serving(script) as server:
        run = start_pmd(
            "fit", "--config", "configs/tiny.yaml", *SMALL, f"--run_dir={tmp_path / 'run'}",
            *options(server, tmp_path / "adapters"), "--rollouts.prefetch=true", "--rollouts.tasks_per_step=4",
        )  # fmt: skip
        assert hangs.wait(timeout=120)
        run.send_signal(signal.SIGTERM)
        done = run.wait(50)  # the server answers after 60 s
        assert done.returncode == 130
        assert "stopped in the first epoch" in done.stderr
        assert not server.adapters
    assert not list((tmp_path / "adapters").iterdir())
