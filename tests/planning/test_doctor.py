"""`pmd doctor`: exact numbers of weights, parts that follow the configuration, a verdict with a remedy."""

import pytest

from pmd.cli import main
from pmd.config.schema import ModelConfig, ObjectiveConfig, RunConfig, TeacherConfig
from pmd.planning.gpu_memory import predict, read_shape
from pmd.policy import make_policy
from pmd.pretrained import load_base


def test_the_number_of_weights_is_that_of_the_model():
    config = ModelConfig(path="tiny", finetune="lora", lora_rank=4)
    shape = read_shape(config)
    policy = make_policy(load_base(config), config, TeacherConfig())
    adapters = sum(p.numel() for n, p in policy.named_parameters() if ".student." in n)
    matrices = sum(p.numel() for n, p in policy.named_parameters() if ".student." not in n and p.ndim == 2)
    assert shape.adapter(4) == adapters
    assert shape.linear + shape.embedding == matrices


def test_parts_follow_the_configuration():
    config = ModelConfig(path="tiny")
    full = predict(read_shape(config), RunConfig(model=config), 10**6, 1000, "cpu")
    config = ModelConfig(path="tiny", finetune="lora", gradient_checkpointing=True)
    lora = predict(read_shape(config), RunConfig(model=config), 10**6, 1000, "cpu")
    assert full["frozen copies"] == full["base"]
    assert "frozen copies" not in lora
    assert lora["optimizer"] < full["optimizer"]


@pytest.mark.parametrize(("tokens", "code", "words"), [("1000", 0, "It fits"), ("1000000000", 1, "micro_batch_tokens")])
def test_the_verdict(tokens, code, words, capsys):
    arguments = ["doctor", "--config", "configs/tiny.yaml", f"--tokens={tokens}"]
    assert main(arguments) == code
    output = capsys.readouterr().out
    assert words in output
    assert "Python and libraries" in output


@pytest.mark.parametrize(
    ("teacher", "kl_weight", "copies"),
    [("live", 0.0, 0), ("live", 0.1, 1), ("frozen", 0.1, 1), ("ema", 0.0, 1), ("ema", 0.1, 2)],
)
def test_frozen_copies_match_the_policys(teacher, kl_weight, copies):
    run = RunConfig(teacher=TeacherConfig(kind=teacher), objective=ObjectiveConfig(kl_weight=kl_weight))
    parts = predict(read_shape(run.model), run, 1000, 100, "cpu")
    policy = make_policy(load_base(run.model), run.model, run.teacher, needs_reference=kl_weight > 0)
    assert [policy.reference, policy.teacher].count(None) == 2 - copies
    assert parts["frozen copies"] == copies * parts["base"]
