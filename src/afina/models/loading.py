"""Load a model, frozen, from a folder, the Hugging Face hub or the package itself.

Weights are read from safetensors only. Errors name their cause and a hint: a folder of .bin files,
a gated or missing model, an incomplete download, code that would have to run.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from afina.errors import BaseError, SettingsError, pluralize
from afina.io.hashing import hash_tensor_files
from afina.io.safetensors import check_safetensors
from afina.models.bnb_format import is_quantized
from afina.models.causal_lm import CausalLM
from afina.models.dtype import choose_dtype
from afina.models.fast_llama import install_fast_modules
from afina.models.frozen import hidden_size
from afina.models.nf4 import LayerQuantization
from afina.models.nf4_loading import load_nf4, read_nf4
from afina.models.packed_attention import ATTENTION_NAME
from afina.settings import EMBEDDED
from afina.settings.common import ModelSettings

EMBEDDED_FOLDER = Path(__file__).parent / "embedded"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Silence transformers within `with`: afina reports missing and unknown tensors itself."""
    logging = transformers.utils.logging
    before, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bar:
            logging.enable_progress_bar()


def choose_device(name: str) -> torch.device:
    """Return the device `name`; "auto" is CUDA, else Apple's MPS, else the CPU.

    Raises:
        SettingsError: this machine has no such device.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        raise SettingsError(
            f"device {name!r} is not available", hint="--device auto, or --device cpu"
        )
    return torch.device(name)


def resolve_model_dir(base: str, revision: str | None, weights: bool = True) -> Path:
    """Return the local folder of a base: embedded, a path, or the hub's cache after a download.

    Args:
        base: "embedded", a path, or a name on the hub.
        revision: Revision on the hub.
        weights: False downloads configuration and tokenizer only.

    Raises:
        BaseError: there is no such folder or model, or it cannot be downloaded.
    """
    if base == EMBEDDED:
        return EMBEDDED_FOLDER
    folder = Path(base).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or base.startswith((".", "/", "~")):
        raise BaseError(
            "not a model folder", where=base, hint="the path of a folder with config.json"
        )
    return _download(base, revision, weights)


def _download(name: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import is_offline_mode, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    searched = f"there is no {Path(name).expanduser().absolute()}"
    login = "accept its license on its page, then run: hf auth login"
    try:
        patterns = ["*.json", "*.model", "*.txt", "*.jinja", "*.py"] + (
            ["*.safetensors"] if weights else []
        )
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise BaseError("this model needs an accepted license", where=name, hint=login) from error
    except RevisionNotFoundError as error:
        raise BaseError(f"this model has no revision {revision!r}", where=name) from error
    except RepositoryNotFoundError as error:
        what = "no such folder, and no such public model on the hub"
        raise BaseError(what, where=name, hint=f"check the name; if private, {login}") from error
    except HFValidationError as error:
        what = "no such folder, and not a valid name of a model"
        raise BaseError(
            what, where=name, why=searched, hint="names have the form owner/model"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        is_offline = is_offline_mode()
        reason = "HF_HUB_OFFLINE is set" if is_offline else "the hub cannot be reached"
        what = "no such folder, and no such model in the local cache of the hub"
        hint = "the path of a folder with config.json, or the name of a model, and a network"
        raise BaseError(what, where=name, why=f"{searched}; {reason}", hint=hint) from error


def checked_weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a model folder.

    Raises:
        BaseError: the folder is an adapter, has pickled weights, or a file is missing or damaged.
    """
    if not (folder / "config.json").is_file():
        for adapter in (folder, folder / "adapter"):
            if (adapter / "adapter_config.json").is_file():
                hint = f"--adapter {folder}, or `afina chat {folder}`; --base is the model under it"
                raise BaseError("this is an adapter, not a model", where=str(folder), hint=hint)
        raise BaseError(
            "the model folder has no config.json",
            where=str(folder),
            hint="the path of a folder in the format of Hugging Face",
        )
    files = _weight_files(folder)
    missing = [file.name for file in files if not file.is_file()]
    if (
        missing
        and (any(folder.glob("*.bin")) or any(folder.glob("*.pt*")))
        and not (folder / INDEX).is_file()
    ):
        raise BaseError(
            "the weights are pickled (.bin), and opening them can run code",
            where=str(folder),
            hint=f"convert them: python -m afina.models.convert {folder} NEW_FOLDER",
        )
    if missing:
        why = (
            "the download is incomplete"
            if list(folder.rglob("*.incomplete")) or len(missing) < len(files)
            else None
        )
        raise BaseError(
            f"missing weights: {', '.join(missing)}",
            where=str(folder),
            why=why,
            hint="download the model again",
        )
    for file in files:
        check_safetensors(file)
    return files


def file_bytes(files: list[Path]) -> int:
    """Return the bytes of some files together."""
    return sum(file.stat().st_size for file in files)


def _weight_files(folder: Path) -> list[Path]:
    """Return the weight files that the folder's index names, or the only one."""
    if not (folder / INDEX).is_file():
        return [folder / WEIGHTS]
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseError(
            "cannot read the index of weight files", where=str(folder / INDEX)
        ) from error
    return [folder / name for name in names]


def load_base(
    base: str = EMBEDDED,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    quantization: Literal["none", "nf4"] = "none",
) -> CausalLM:
    """Return a frozen causal language model in eval mode, with its tokenizer.

    Args:
        base: "embedded", a path, or a name on the hub.
        revision: Revision on the hub.
        trust_remote_code: Run the model's own Python code.
        dtype: Compute dtype; "auto" is the stored one.
        device: Device; "auto" is the best one.
        quantization: "nf4" stores the modules in layers in 4 bits per weight (`afina.models.nf4`);
            others, and all arithmetic, use `dtype`.

    Raises:
        BaseError: the model is missing, damaged, gated, or not a decoder.
    """
    folder = resolve_model_dir(base, revision)
    files = checked_weight_files(folder)
    config = load_decoder_config(folder, base, trust_remote_code)
    target = choose_device(device)
    chosen_dtype = choose_dtype(dtype, target, config, file_bytes(files))
    options = {"dtype": chosen_dtype, "trust_remote_code": trust_remote_code}
    is_stored_quantized = is_quantized(config, base)
    quantization = "nf4" if is_stored_quantized else quantization
    digest = hash_tensor_files(files) if quantization == "nf4" else None

    def load(attention: str) -> tuple[PreTrainedModel, list[LayerQuantization]]:
        chosen = options | {"attn_implementation": attention}
        if is_stored_quantized:
            return read_nf4(folder, files, config, chosen), []
        complete = partial(_load_complete, folder, base, chosen)
        if digest is None:
            return complete(), []
        return load_nf4(folder, files, config, digest, chosen, complete)

    model, report, supports_packing = _load_with_attention(load, base)
    model.requires_grad_(False)
    model.eval().to(target)
    install_fast_modules(model)
    loaded = CausalLM(
        model=model,
        tokenizer=load_tokenizer(folder, base, trust_remote_code),
        name=_display_name(base, folder),
        revision=revision,
        folder=folder,
        files=files,
        remote_code=trust_remote_code and bool(getattr(config, "auto_map", None)),
        supports_packing=supports_packing,
        quantization=quantization,
        quantization_report=report,
    )
    if digest is not None:
        loaded.hash = digest  # known already: the weights are not read again for it
    return loaded


def _display_name(base: str, folder: Path) -> str:
    """Return the absolute path of a folder, or the name of another base."""
    is_folder = base != EMBEDDED and Path(base).expanduser().is_dir()
    return str(folder.resolve()) if is_folder else base


def _load_with_attention(
    load: Callable[[str], tuple[PreTrainedModel, list[LayerQuantization]]], name: str
) -> tuple[PreTrainedModel, list[LayerQuantization], bool]:
    """Return model, quantization report, and whether it uses afina's packed attention."""
    transformers.utils.logging.disable_progress_bar()
    try:
        try:
            return *load(ATTENTION_NAME), True
        except (ValueError, KeyError):
            # families from before the AttentionInterface: run sequence by sequence
            return *load("eager"), False
    except (ValueError, KeyError, OSError) as error:
        why = str(error).splitlines()[0]
        raise BaseError("transformers cannot load this model", where=name, why=why) from error


def _load_complete(folder: Path, name: str, options: dict[str, Any]) -> PreTrainedModel:
    """Return the model as transformers loads it.

    Raises:
        BaseError: a tensor was initialized, since the files lack it or have another shape.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    model, info = loaded
    missing = sorted(info["missing_keys"]) + sorted(key for key, *_ in info["mismatched_keys"])
    if missing:
        count = pluralize(len(missing), "tensor")
        why = f"missing or of another shape: {count}, the first: {missing[0]}"
        raise BaseError(
            "the weights do not fit config.json",
            where=name,
            why=why,
            hint="download the model again",
        )
    return model


def configured_width(settings: ModelSettings) -> int | None:
    """Return the hidden size of the settings' base by its config.json; raise `BaseError`."""
    folder = resolve_model_dir(settings.base, settings.revision, weights=False)
    return hidden_size(load_config(folder, settings.base, settings.trust_remote_code))


def load_decoder_config(folder: Path, name: str, trust_remote_code: bool) -> PretrainedConfig:
    """Return the configuration of a causal language model; raise `BaseError` on an encoder's."""
    config = load_config(folder, name, trust_remote_code)
    heads = ("ForCausalLM", "LMHeadModel")
    is_decoder = getattr(config, "is_decoder", False) or any(
        architecture.endswith(heads) for architecture in config.architectures or []
    )
    if not is_decoder and type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        raise BaseError(
            f"{config.model_type} is a text encoder: it generates no text",
            where=name,
            why="sft, pretrain and preferences need a causal language model",
            hint="--objective mlm for plain texts; rows with a label, two texts, a query and "
            "passages or tags for classify, embed, rerank or tag; or another --base",
        )
    return config


def load_config(folder: Path, name: str, trust_remote_code: bool) -> PretrainedConfig:
    """Return a model's configuration.

    Raises:
        BaseError: transformers does not support it, or it is an encoder-decoder.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        needs_code = "trust_remote_code" in str(error)
        raise BaseError(
            "this model contains Python code"
            if needs_code
            else "transformers does not support this model",
            where=name,
            why=str(error).splitlines()[0],
            hint="review the code, then: --trust-remote-code" if needs_code else None,
        ) from error
    if getattr(config, "is_encoder_decoder", False):
        raise BaseError(
            f"{config.model_type} is an encoder-decoder, which is not supported", where=name
        )
    return config


def load_tokenizer(folder: Path, name: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a model folder.

    Raises:
        BaseError: there is none that can be read.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise BaseError(
            "the model's tokenizer cannot be loaded", where=name, why=str(error).splitlines()[0]
        ) from error
