"""The paper's configuration on real SciKnowEval chemistry, with scripted completions: what teachers' prompts hold."""

import json
from dataclasses import replace

import pytest
from command_line import ROOT

from pmd.cli.run import build
from pmd.config.load import load_config
from pmd.run_dir import RunDir
from pmd.types import Completion

TOPICS = ("rings", "charges", "solubility", "reactions", "units")


class Scripted:
    """Attempts the four options in turn, reflects on each group, and describes each cluster in words of its own."""

    policy_version = 0

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.num_behaviours = 0

    def generate(self, requests, sampling, role="student"):
        for position, request in enumerate(requests):
            text = self._answer(position, request.seed, self.tokenizer.decode(request.prompt_ids))
            yield position, Completion((5, 6), (-1.0, -1.0), text, "stop", 0)

    def _answer(self, position, seed, prompt):
        if "Write the common pattern" in prompt:
            self.num_behaviours += 1
            return json.dumps({"title": f"Rule {self.num_behaviours}", "content": "Look at the whole molecule."})
        if "Write what was learnt" in prompt:
            assert "mixed (2 of 8 attempts correct)" in prompt
            item = {"kind": "contrast", "title": f"Mind {TOPICS[position % 5]}", "content": "The right one did so."}
            return json.dumps(item)
        return f"<reasoning>\ntry {seed}\n</reasoning>\n<answer>\n{'ABCD'[position % 4]}\n</answer>"


@pytest.fixture
def run(data_folder, tmp_path):
    files = [ROOT / "configs" / name for name in ("tiny_sciknoweval.yaml", "methods/tiny/pmd_paper.yaml")]
    settings = [
        "data.max_train=16",
        "data.max_validation=2",
        "data.max_test=2",
        "rollouts.group_size=8",
        "memory.behaviour_every=2",
    ]
    run = build(
        load_config(files, [f"data.path={data_folder}", *settings, "memory.cluster_similarity=0.1"]).run,
        RunDir(tmp_path / "run"),
    )
    engine = Scripted(run.module.tokenizer)
    run.data.engine = engine
    run.data.updater = replace(run.data.updater, reflector=replace(run.reflector, engine=engine))
    return run


def test_the_first_epochs_prompts_hold_memory_of_their_own_batch(run):
    decode, store = run.module.tokenizer.decode, run.memory.store
    batches = [(batch, store.generation) for batch in run.data.epoch(0)]
    assert [generation for _, generation in batches] == [1, 2]
    owners = {insight.id: insight.task_id for insight in store.insights(None)}
    for batch, generation in batches:
        for example in batch.examples:
            context, prompt = example.context, decode(example.context.prompt_ids)
            assert context.memory_generation == generation
            assert {owners[item.item_id] for item in context.items if item.level == 1} == {example.rollout.task_id}
            assert "Learned when 2 of 8 attempts were correct." in prompt
            assert "memory" not in decode(example.rollout.prompt_ids).lower()
            shown = example.rollout.completion.text in prompt
            assert not (shown and example.rollout.verdict.correct)  # its own success reaches no teacher
    last = batches[-1][0].examples  # of the update that wrote behaviours
    wrong = [example.context for example in last if not example.rollout.verdict.correct]
    assert {tuple(sorted(item.level for item in context.items)) for context in wrong} == {
        (0, 1, 2, 2, 2)
    }  # of the two successes, the other is shown as a sibling's
    print(decode(wrong[0].prompt_ids))  # pytest -s shows one
