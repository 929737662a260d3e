"""`python -m pmd generate RUN --prompt TEXT`: what a run's student writes."""

import sys
from pathlib import Path

from pmd.cli.arguments import make_parser
from pmd.cli.export import load_module
from pmd.cli.printable import printable
from pmd.config.load import load_config
from pmd.errors import ConfigError
from pmd.run_dir import open_run
from pmd.types import Message, Task

DESCRIPTION = """Prompt a checkpoint of a run, as the student is prompted: with the chat template, without any memory.

  python -m pmd generate runs/tiny --prompt "task red 3 blue 5 green 1 gold 7 plan zib"
  python -m pmd generate runs/mine --prompt "What is 2 + 2?" --samples 4 --temperature 1
  python -m pmd generate runs/mine --prompt - < question.txt

Sampling is that of the run's evaluation unless options say otherwise."""


def main(argv: list[str]) -> int:
    """Print the completions; return 0."""
    parser = make_parser("generate", DESCRIPTION)
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the user message; - reads standard input")
    parser.add_argument("--system", metavar="TEXT", help="a system prompt")
    parser.add_argument("--ckpt", default="last", help="last, best or a checkpoint file (default: last)")
    parser.add_argument("--samples", type=int, default=1, help="completions (default: 1)")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: verification.temperature)")
    parser.add_argument("--max-new-tokens", type=int, help="longest completion (default: rollouts.max_new_tokens)")
    parser.add_argument("--seed", type=int, default=0, help="of the first completion (default: 0)")
    options = parser.parse_args(argv)
    run_dir = open_run(options.run)
    loaded = load_config([run_dir.config])
    problems = list(loaded.problems)
    for flag, value, least in (
        ("samples", options.samples, 1),
        ("temperature", options.temperature, 0),
        ("max-new-tokens", options.max_new_tokens, 1),
        ("seed", options.seed, 0),
    ):
        if value is not None and not value >= least:
            problems.append(f"--{flag}={value} must be at least {least}.")
    if problems:
        raise ConfigError(problems)
    text = sys.stdin.read() if options.prompt == "-" else options.prompt
    system = [Message("system", options.system)] if options.system else []
    task = Task("prompt", (*system, Message("user", text)), "exact", "test")
    import torch

    from pmd.engines.base import Request, Sampling
    from pmd.engines.hf import HFEngine
    from pmd.tasks.prompts import make_prompts

    run, checkpoint = loaded.run, run_dir.checkpoint(options.ckpt)
    on_gpu = torch.cuda.is_available() and loaded.trainer.get("accelerator", "auto") != "cpu"
    module = load_module(loaded, Path(checkpoint)).to("cuda" if on_gpu else "cpu")
    prompt_ids = tuple(make_prompts(run, module.tokenizer).student(task))
    temperature = run.verification.temperature if options.temperature is None else options.temperature
    sampling = Sampling(temperature, options.max_new_tokens or run.rollouts.max_new_tokens, run.verification.top_p)
    requests = [Request(prompt_ids, options.seed + number) for number in range(options.samples)]
    engine = HFEngine(module.policy, module.tokenizer, run.rollouts.engine_batch)
    completions = dict(engine.generate(requests, sampling))
    for number in range(options.samples):
        if number:
            print("---")
        print(printable(completions[number].text))
    return 0
