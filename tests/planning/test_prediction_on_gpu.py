"""The predicted memory of a training step against peaks that an H200 showed (docs/gpu.md); no GPU is needed here."""

import pytest

from benchmarks.gpu.step import Mode, Workload, architecture, run_config
from pmd.planning.gpu_memory import predict, shape_of
from pmd.planning.synthetic import Lengths

#: Size, adapter, tokens of the one row of a micro-batch, of its completion, all recomputed or nothing, measured GB.
MEASURED = [
    ("8b", "lora", 8192, 1024, True, 20.62),
    ("8b", "lora", 24_576, 1024, True, 28.13),
    ("8b", "lora", 130_048, 1024, True, 76.43),
    ("8b", "qlora", 4096, 1024, True, 9.64),
    ("4b", "lora", 16_384, 8192, False, 75.46),
]


@pytest.mark.parametrize(("size", "finetune", "tokens", "completion", "recomputed", "measured"), MEASURED)
def test_the_prediction_is_near_and_hardly_below(size, finetune, tokens, completion, recomputed, measured):
    prompt = tokens - completion
    workload = Workload(1, 1, Lengths(prompt, prompt, completion, completion))
    run = run_config(workload, Mode("measured", checkpointing=recomputed, tokens=tokens), "cuda", finetune)
    predicted = sum(predict(shape_of(architecture(size, "cuda")), run, tokens, completion, "cuda").values()) / 1e9
    assert 0.98 * measured < predicted < 1.1 * measured
