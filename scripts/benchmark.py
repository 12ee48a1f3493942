"""Tools that the benchmarks share: timing, peak memory, and tables with command and versions."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path

import torch
from transformers import LlamaConfig

PACKAGES = ("torch", "transformers", "trl", "liger-kernel")


def in_turn(variants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Call all variants in turn, `rounds` times; return the median seconds of each.

    Turns spread a slow phase of the machine over all variants.  A first round does not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, variant in variants.items():
            start = time.perf_counter()
            variant()
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # a call returns before the GPU is done
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(some) for name, some in seconds.items()}


def llama_config(shape: Sequence[int], vocab_size: int) -> LlamaConfig:
    """Return the configuration of a model with tied embeddings.

    `shape` is its layers, hidden size, neurons, heads, and heads of keys and values.
    """
    layers, hidden, neurons, heads, shared = shape
    return LlamaConfig(
        vocab_size=vocab_size, hidden_size=hidden, intermediate_size=neurons,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=shared,
        tie_word_embeddings=True, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip


def reset_peak() -> None:
    """Make `peak_mib` measure from here on."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (man 5 proc)


def peak_mib() -> float:
    """Return the peak in MiB since `reset_peak`: of GPU memory, or of the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def conditions() -> str:
    """Return a sentence with the command, date, device and versions of a table."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu()
    versions = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    command = " ".join(["python", *sys.argv])
    return f"`{command}`, {date.today()}, {device}, {torch.get_num_threads()} threads; {versions}."


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Format rows with the same keys as a Markdown table."""
    header = list(rows[0])
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(_cell(row[key]) for key in header) + " |" for row in rows]
    return "\n".join(lines)


def report(path: str | None, title: str, parts: Sequence[str], *, prints: bool = True) -> None:
    """Print a page of these parts; also write it to `path` if there is one."""
    text = "\n\n".join([f"# {title}", *parts, conditions()]) + "\n"
    if prints:
        print(text)
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")


def _cell(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next(line for line in lines if line.startswith("flags")).split()
    widest = next(name for name in ("avx512_bf16", "avx512f", "avx2") if name in flags)
    return f"{platform.machine()} CPU with {widest}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
