"""What a server of forked processes imports once, so that a run in one of them starts at once."""

import gc

import peft  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import llmdistill.run  # noqa: F401
import tests.toy  # noqa: F401

gc.freeze()  # Trainer collects garbage in each run: not among all that is imported
