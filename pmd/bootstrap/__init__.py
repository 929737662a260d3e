"""Makes the shipped models: samples, training, probes, and the `bootstrap` command."""
