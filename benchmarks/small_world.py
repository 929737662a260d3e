"""The smallest tiny world in which everything happens: what the benchmarks of whole runs train in."""

from pathlib import Path

CONFIG = [
    "--config", str(Path(__file__).parents[1] / "configs" / "tiny.yaml"),
    "--data.world.families=3", "--data.world.train_per_family=2", "--data.world.test_per_family=1",
    "--data.world.validation_per_family=1", "--verification.final_samples=2", "--verification.samples=2",
    "--verification.pass_at=[1]", "--trainer.enable_progress_bar=false",
]  # fmt: skip
