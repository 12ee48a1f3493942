"""Copies between the CPU and the device of a model, and who waits for them.

A GPU works through a queue, and the CPU runs ahead of it.  As soon as the CPU asks for a number
that the GPU computes (`.item()`, `nonzero`, a boolean index), it waits until the queue is empty.
While a model writes, that costs more than the small operations themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor


def waits(device: torch.device) -> bool:
    """Whether the CPU has to wait for numbers on this device."""
    return device.type != "cpu"


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device, without waiting for what a GPU still computes."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        # Only a copy from pinned memory joins the queue.
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def fetch(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU, after the device has computed it."""
    return tensor.cpu()
