"""What stops a run before it does harm.

R = ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmdistill.errors import NonFiniteLossError

if TYPE_CHECKING:
    from accelerate import Accelerator


def stop_if_not_finite(
    accelerator: Accelerator, loss: Tensor, grad_norm: Tensor | float, step: int
) -> None:
    """Raises NonFiniteLossError on every rank if any rank's loss or gradient norm is NaN or
    infinite.

    Called before the optimiser's update, so the weights stay those of the last good step.
    """
    norm = torch.as_tensor(grad_norm, device=loss.device)
    finite_R2 = accelerator.gather(torch.stack([torch.isfinite(loss), torch.isfinite(norm)])[None])
    if bool(finite_R2.all()):
        return
    # Gradients are shared by then, so a bad loss names its rank and a bad gradient names them all.
    bad_R = ~finite_R2[:, 0] if not finite_R2[:, 0].all() else ~finite_R2[:, 1]
    ranks = bad_R.nonzero()[:, 0].tolist()
    here = f"loss {float(loss):.4g}, gradient norm {float(grad_norm):.4g}"
    raise NonFiniteLossError(
        f"step {step}, rank {', '.join(map(str, ranks))}: the loss or its gradient is not finite "
        f"({here} on rank {accelerator.process_index}). The update was not made. Lower "
        "training.learning_rate, look at the rows of this step, or resume from the last checkpoint."
    )
