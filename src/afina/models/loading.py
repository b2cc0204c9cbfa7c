"""Load a model, frozen, from a folder, the Hugging Face hub or the package itself.

Weights are read from safetensors only. What can go wrong is told with its remedy: a folder of .bin files, a
gated or missing model, a download that stopped half-way, code that would have to be run.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import (
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
from afina.models.bnb_format import is_quantised
from afina.models.causal_lm import CausalLM
from afina.models.dtype import choose_dtype
from afina.models.fast_llama import install_fast_modules
from afina.models.nf4 import LayerQuantization
from afina.models.nf4_loading import load_nf4, read_nf4
from afina.models.packed_attention import ATTENTION_NAME
from afina.settings import EMBEDDED

EMBEDDED_FOLDER = Path(__file__).parent / "embedded"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Within the block transformers says nothing: what is missing or left over in the files is ours to tell."""
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
    """The device meant by `name`; "auto" takes CUDA, then Apple's MPS, then the CPU."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        raise SettingsError(
            f"device {name!r} is not available here", hint="--device auto, or --device cpu"
        )
    return torch.device(name)


def resolve_model_dir(base: str, revision: str | None, weights: bool = True) -> Path:
    """The local folder of a base: the package's own, a path as given, or the hub's cache (downloaded if need be).

    Without `weights` nothing but the small files is fetched.
    """
    if base == EMBEDDED:
        return EMBEDDED_FOLDER
    folder = Path(base).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or base.startswith((".", "/", "~")):
        raise BaseError(
            "not a folder of a model", where=base, hint="give the folder that holds config.json"
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

    looked = f"looked for {Path(name).expanduser().absolute()}"
    login = "accept its terms on its page, then type: hf auth login"
    try:
        patterns = ["*.json", "*.model", "*.txt", "*.jinja", "*.py"] + (
            ["*.safetensors"] if weights else []
        )
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise BaseError(
            "this model asks for a licence to be accepted", where=name, hint=login
        ) from error
    except RevisionNotFoundError as error:
        raise BaseError(f"this model has no revision {revision!r}", where=name) from error
    except RepositoryNotFoundError as error:
        what = "no such folder here, and no such model on the hub, or a private one"
        raise BaseError(what, where=name, hint=f"check the name; if private, {login}") from error
    except HFValidationError as error:
        what = "no such folder here, nor can it be a model's name"
        raise BaseError(
            what, where=name, why=looked, hint="a name looks like owner/model"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reached = (
            "the hub was not asked (HF_HUB_OFFLINE)"
            if is_offline_mode()
            else "the hub cannot be reached"
        )
        what, why = (
            "no such folder here, nor such a model in the local cache of the hub",
            f"{looked}; {reached}",
        )
        hint = "the path of the folder that holds config.json, or the name of a model with a network to fetch it"
        raise BaseError(what, where=name, why=why, hint=hint) from error


def checked_weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder, each complete; raises `BaseError` on what is missing or damaged."""
    if not (folder / "config.json").is_file():
        for adapter in (folder, folder / "adapter"):
            if (adapter / "adapter_config.json").is_file():
                hint = f"give it as --adapter {folder}, or as `afina chat {folder}`; --base is the model below it"
                raise BaseError("this is an adapter, not a model", where=str(folder), hint=hint)
        raise BaseError(
            "no config.json in the model's folder",
            where=str(folder),
            hint="is this a Hugging Face folder?",
        )
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BaseError(
                "cannot read the list of weight files", where=str(folder / INDEX)
            ) from error
        files = [folder / name for name in names]
    else:
        files = [folder / WEIGHTS]
    missing = [file.name for file in files if not file.is_file()]
    if (
        missing
        and (list(folder.glob("*.bin")) or list(folder.glob("*.pt*")))
        and not (folder / INDEX).is_file()
    ):
        raise BaseError(
            "the weights are pickled (.bin), which can run code when opened",
            where=str(folder),
            hint=f"convert them once: python -m afina.models.convert {folder} NEW_FOLDER",
        )
    if missing:
        why = (
            "the download stopped half-way"
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


def load_base(
    base: str = EMBEDDED,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    quantization: Literal["none", "nf4"] = "none",
) -> CausalLM:
    """A causal language model, frozen and in eval mode, with its tokenizer.

    With `quantization` "nf4" the layers in its blocks are held in four bits a weight (`afina.models.nf4`); all else, and all
    arithmetic, stays in `dtype`. Raises `BaseError` where the model is missing, damaged, closed, or no decoder.
    """
    folder = resolve_model_dir(base, revision)
    files = checked_weight_files(folder)
    config = load_config(folder, base, trust_remote_code)
    place = choose_device(device)
    options = {
        "dtype": choose_dtype(dtype, place, config, file_bytes(files)),
        "trust_remote_code": trust_remote_code,
    }
    transformers.utils.logging.disable_progress_bar()
    written = is_quantised(config, base)
    quantization = "nf4" if written else quantization
    digest = hash_tensor_files(files) if quantization == "nf4" else None

    def load(attention: str) -> tuple[PreTrainedModel, list[LayerQuantization]]:
        chosen = options | {"attn_implementation": attention}
        if written:
            return read_nf4(folder, files, config, chosen), []
        if digest is None:
            return _load_whole(folder, base, chosen), []
        return load_nf4(
            folder, files, config, digest, chosen, partial(_load_whole, folder, base, chosen)
        )

    try:
        try:
            (model, report), flat = load(ATTENTION_NAME), True
        except (
            ValueError,
            KeyError,
        ):  # families from before the AttentionInterface: run sequence by sequence
            (model, report), flat = load("eager"), False
    except (ValueError, KeyError, OSError) as error:
        raise BaseError(
            "transformers cannot load this model", where=base, why=str(error).splitlines()[0]
        ) from error
    model.requires_grad_(False)
    model.eval().to(place)
    install_fast_modules(model)
    made = CausalLM(
        model=model,
        tokenizer=load_tokenizer(folder, base, trust_remote_code),
        name=str(folder.resolve())
        if base != EMBEDDED and Path(base).expanduser().is_dir()
        else base,
        revision=revision,
        folder=folder,
        files=files,
        remote_code=trust_remote_code and bool(getattr(config, "auto_map", None)),
        supports_packing=flat,
        quantization=quantization,
        quantization_report=report,
    )
    if digest is not None:
        made.hash = digest  # known already: the weights need not be read again for it
    return made


def _load_whole(folder: Path, name: str, options: dict[str, Any]) -> PreTrainedModel:
    """The model as transformers loads it.

    Raises `BaseError` where it gave a tensor random numbers, because the files lack it or hold another shape.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    model, info = loaded
    missing = sorted(info["missing_keys"]) + sorted(key for key, *_ in info["mismatched_keys"])
    if missing:
        why = f"missing or of another shape: {pluralize(len(missing), 'tensor')}, the first: {missing[0]}"
        raise BaseError(
            "the weights do not fit config.json",
            where=name,
            why=why,
            hint="download the model again",
        )
    return model


def load_config(folder: Path, name: str, trust_remote_code: bool) -> PretrainedConfig:
    """A model's configuration; raises `BaseError` where transformers does not know it, or it is an encoder-decoder."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        needs_code = "trust_remote_code" in str(error)
        raise BaseError(
            "this model brings Python code of its own"
            if needs_code
            else "transformers does not know this model",
            where=name,
            why=str(error).splitlines()[0],
            hint="read the code first; if you trust it: --trust-remote-code"
            if needs_code
            else None,
        ) from error
    if getattr(config, "is_encoder_decoder", False):
        raise BaseError(
            f"{config.model_type} is an encoder-decoder; afina adapts decoders so far", where=name
        )
    return config


def load_tokenizer(folder: Path, name: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer that lies with a model; raises `BaseError` where there is none that can be read."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise BaseError(
            "the model's tokenizer cannot be loaded", where=name, why=str(error).splitlines()[0]
        ) from error
