"""A digest that tells models apart, by their configuration and a few numbers of each weight."""

from __future__ import annotations

import xxhash
from torch import Tensor, nn

SEEN_NUMBERS = 64  # numbers of each weight that tell two models apart


def digest_of(model: nn.Module) -> bytes:
    """Return the digest of a model, or the one that was made before its layers were moved."""
    return vars(model).get("digest") or _digest(model)


def keep_digest(model: nn.Module) -> None:
    """Make the digest of a model now, because its weights will not be there to be read."""
    vars(model)["digest"] = _digest(model)


def some_numbers(weight: Tensor) -> bytes:
    """Return a few numbers of a weight; none of one that is quantised or elsewhere."""
    if type(weight.data) is not Tensor or weight.is_meta or not weight.numel():
        return b""
    flat = weight.detach().flatten()
    step = max(len(flat) // SEEN_NUMBERS, 1)
    return flat[::step][:SEEN_NUMBERS].float().cpu().numpy().tobytes()


def _digest(model: nn.Module) -> bytes:
    digest = xxhash.xxh3_64()
    if hasattr(model, "config"):
        known = str(model.config).splitlines()
        lines = [line for line in known if '"transformers_version"' not in line]
        digest.update("\n".join(lines).encode("utf-8", "surrogatepass"))
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(some_numbers(weight))
    return digest.digest()
