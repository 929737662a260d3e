"""What vLLM changes in the process that it shares with the trainer, and how it is given back."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def trainer_state_kept() -> Iterator[None]:
    """Give torch's random state, threads and default dtype back as they were: vLLM sets them for itself."""
    threads, set_threads, dtype = torch.get_num_threads(), torch.set_num_threads, torch.get_default_dtype()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            torch.set_num_threads = set_threads
            torch.set_default_dtype(dtype)
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)


def spare_from_compilation(trained: nn.Module) -> None:
    """Let the trainer's modules compute as they did before vLLM started.

    Where vLLM takes an architecture from transformers (OLMo 3), it gives the class a `__call__` that compiles
    and reads an attribute that only instances made by vLLM have.
    """
    for module in trained.modules():
        if type(module).__call__ is not nn.Module.__call__ and not hasattr(module, "do_not_compile"):
            module.do_not_compile = True  # pyright: ignore[reportArgumentType]
