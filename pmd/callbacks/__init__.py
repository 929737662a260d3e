"""Lightning callbacks around training steps and at epoch boundaries, one job per file."""
