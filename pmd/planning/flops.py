"""The floating-point operations of a training step, and the peak rate of a device.

Only products with weights are counted: 2 operations per weight and token in the forward pass, 2 for the gradient w.r.t.
activations, and 2 for the gradient w.r.t. trained weights. Attention scores and the recomputation in gradient
checkpointing are not counted.
"""

import torch
from torch import nn

from pmd.module import PMDModule
from pmd.scoring import output_head

#: Dense bfloat16 operations per second, from the manufacturers' data sheets; matched as part of the device's name.
PEAKS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12,
    "L40S": 362e12, "RTX 4090": 165e12, "A10G": 70e12, "L4": 121e12,
}  # fmt: skip


def device_peak(device: torch.device) -> tuple[str, float | None]:
    """Return the device's name and its peak rate in bfloat16, or None if that is not known."""
    if device.type != "cuda":
        return device.type, None
    name = torch.cuda.get_device_name(device)
    return name, next((peak for known, peak in PEAKS.items() if known in name), None)


def step_flops(module: PMDModule, student_tokens: int, teacher_tokens: int, completion_tokens: int) -> float:
    """Return the number of operations in one optimizer step, given the tokens that each model processes."""
    with module.policy.weights("student") as model:
        head = output_head(model)
        layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.weight is not head]
        trained = sum(m.weight.numel() for m in layers if m.weight.requires_grad)
        weights = sum(m.in_features * m.out_features for m in layers)
        trains_head = head.requires_grad
    teachers = len(module.policy.teacher_mixture) if module.objective.distillation > 0 else 0
    student = student_tokens * (4 * weights + 2 * trained)
    teacher = teachers * teacher_tokens * 2 * weights
    heads = completion_tokens * head.numel() * (4 + 2 * trains_head + 2 * teachers)
    return float(student + teacher + heads)
