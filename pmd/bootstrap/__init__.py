"""How the shipped models are made: samples, training, probes, and the `bootstrap` command."""
