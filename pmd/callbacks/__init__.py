"""What happens around training steps and at epoch boundaries, one job a file."""
