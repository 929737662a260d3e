"""Planning runs: will it fit in memory, how fast is a step, and sweeps over many runs."""
