"""`llmdistill env`: print versions and devices for bug reports."""

from __future__ import annotations


def env() -> None:
    """Print the versions and devices that a bug report needs."""
    import importlib.metadata
    import importlib.util
    import platform

    import torch

    from llmdistill.models.load import EMBEDDED, default_device, native_bfloat16, preferred_dtype

    device = default_device()
    print(f"python         {platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in ("llmdistill", "torch", "transformers", "accelerate", "datasets", "peft"):
        print(f"{package:<14} {importlib.metadata.version(package)}")
    print(f"device         {device} ({torch.get_num_threads()} threads)")
    native = "native" if native_bfloat16(device) else "not native: products in it would be slow"
    print(f"bfloat16       {native}")
    print(f"dtype auto     {str(preferred_dtype(device)).removeprefix('torch.')}")
    for name, embedded in EMBEDDED.items():
        found = importlib.util.find_spec(embedded.module) is not None
        print(f"{name}  {'installed' if found else embedded.install}")
