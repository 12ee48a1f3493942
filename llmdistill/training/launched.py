"""Reads what the launcher was asked for, and compares the number of processes with it."""

from __future__ import annotations

import os

from accelerate import PartialState

from llmdistill.errors import TrainingError

# Variables by which launchers tell a process that it has others.
LAUNCHERS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def asked_by_launcher() -> bool:
    """Whether the launcher was asked to shard the model with FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def require_all_processes() -> None:
    """Raise TrainingError if the launcher was asked for more processes than there are.

    On a CPU, `accelerate launch` starts one process, however many it is asked for.  It tells that
    process where the others would meet, but not how many there are.
    """
    found = PartialState().num_processes
    asked = max(int(os.environ.get(name) or 1) for name in LAUNCHERS)
    if asked > found:
        raise TrainingError(
            f"the launcher started {asked} processes, but this one trains in a group of {found}. "
            "Use accelerate launch or torchrun, and start nothing distributed before."
        )
    told = {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT", "WORLD_SIZE"} & os.environ.keys()
    if found == 1 and told == {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"}:
        raise TrainingError(
            "accelerate launch was asked for several processes and started one, as it does on a "
            "CPU. Start them with torchrun, or ask for one process (and unset MASTER_PORT, if you "
            "have set it)."
        )
