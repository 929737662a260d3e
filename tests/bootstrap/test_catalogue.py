"""Each model of the catalogue learns from samples of its own tokens, with something to learn in each."""

import random

import pytest
import torch

from pmd.bootstrap.catalogue import HARD_SIZES, TINY_SIZES, find_blueprint
from pmd.bootstrap.random_model import main as write_random_model


@pytest.mark.parametrize("name", [*TINY_SIZES, *HARD_SIZES, "tiny_exam"])
def test_samples_are_of_the_models_own_tokens(name):
    blueprint = find_blueprint(name)
    model, stream = blueprint.make_model(0), random.Random(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    assert len(blueprint.make_tokenizer()) <= vocabulary
    for progress in (0.0, 0.5, 1.0):
        sample = blueprint.draw_sample(stream, progress)
        assert max(sample.ids) < vocabulary
        assert sample.weights
        assert max(sample.weights) < len(sample.ids)
    blueprint.finish(model)
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


def test_a_model_of_an_architecture_with_random_weights(tmp_path, capsys):
    folder = tmp_path / "olmo"
    assert write_random_model(["--architecture", "olmo3", "--out", str(folder)]) == 0
    assert capsys.readouterr().out == f"wrote {folder}\n"
    assert (folder / "model.safetensors").is_file()
