"""What is minimised, as pure functions of tensors."""
