"""The training losses, as pure functions of tensors."""
