"""From what the user typed as --model to a directory on disk."""

import json
import os
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from pipeline.demo import DEMO_MODEL
from pipeline.errors import UserError
from pipeline.files import replacing
from pipeline.weights import save_tensors

PYTHIA_SIZES = ("14m", "31m", "70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")
PYTHIA_REVISION = "step143000"
LLAMA_MODELS = {
    "2-7b": "meta-llama/Llama-2-7b-hf", "2-13b": "meta-llama/Llama-2-13b-hf", "7b": "meta-llama/Llama-2-7b-hf",
    "13b": "meta-llama/Llama-2-13b-hf", "3-8b": "meta-llama/Meta-Llama-3-8B", "8b": "meta-llama/Meta-Llama-3-8B",
    "tinyllama-1.1b": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", "1.1b": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
}
_FILES = ["*.json", "tokenizer*", "*.model", "vocab*", "merges*"]


def hub_id(model: str, model_size: str | None, revision: str | None) -> tuple[str, str | None]:
    """The hub id and revision behind the short names `pythia` and `llama`; anything else is returned as it is."""
    if model == "pythia":
        size = (model_size or "").lower()
        if size not in PYTHIA_SIZES:
            raise UserError(f"--model-size is {model_size!r}; with --model pythia it is one of {', '.join(PYTHIA_SIZES)}.")
        return f"EleutherAI/pythia-{size}-deduped", revision or PYTHIA_REVISION
    if model == "llama":
        size = (model_size or "").lower()
        if size not in LLAMA_MODELS:
            raise UserError(f"--model-size is {model_size!r}; with --model llama it is one of {', '.join(LLAMA_MODELS)}.")
        return LLAMA_MODELS[size], revision
    if model_size is not None:
        raise UserError(f"--model-size is {model_size!r}, but it goes only with --model pythia or --model llama.")
    return model, revision


def fetch(model: str, model_size: str | None, revision: str | None, cache_dir: str | None) -> tuple[Path, str | None]:
    """A directory with config.json, safetensors and a tokenizer, and the revision it is at (None for a local one).

    `demo` is the embedded model. A hub revision that holds only pytorch_model.bin (as Pythia's step revisions do) is
    converted once, shard by shard, beside the downloaded files. Honours HF_HUB_OFFLINE and HF_TOKEN.
    """
    name, hub_revision = hub_id(model, model_size, revision)
    if model == "demo":
        return DEMO_MODEL, None
    if Path(model).is_dir():
        if revision is not None:
            raise UserError(f"--revision is {revision!r}, but --model {model} is a local directory, which has none.")
        return Path(model).resolve(), None
    if model.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"--model {model} is no directory on this machine.")
    if "/" not in name:
        raise UserError(f"--model {model!r} is not known: give a hub id such as EleutherAI/pythia-70m-deduped, a local directory, "
                        "demo, or pythia or llama with --model-size.")
    try:
        directory = Path(snapshot_download(name, revision=hub_revision, cache_dir=cache_dir, allow_patterns=[*_FILES, "*.safetensors"]))
        if not list(directory.glob("*.safetensors")):
            directory = Path(snapshot_download(name, revision=hub_revision, cache_dir=cache_dir, allow_patterns=[*_FILES, "pytorch_model*.bin"]))
            _convert(directory)
    except RevisionNotFoundError:
        raise UserError(f"--revision {hub_revision!r} does not exist for --model {name}.") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(f"--model {name} is neither a local directory nor a model that the hub shows you (gated models need HF_TOKEN).") from None
    except LocalEntryNotFoundError:
        offline = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0") else "the hub cannot be reached"
        raise UserError(f"--model {name} is neither a local directory nor in the cache, and {offline}.") from None
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"--model {name} could not be downloaded: {' '.join(str(error).split())}") from None
    return directory, hub_revision or directory.name


def _convert(directory: Path) -> None:
    """Write every pytorch_model*.bin as safetensors beside it. Only tensors are unpickled (weights_only)."""
    weight_map: dict[str, str] = {}
    for source in sorted(directory.glob("pytorch_model*.bin")):
        tensors = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
        target = directory / source.name.replace("pytorch_model", "model").replace(".bin", ".safetensors")
        with replacing(target) as temporary:
            save_tensors({name: tensor.clone() for name, tensor in tensors.items()}, temporary, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, target.name)
    if len(set(weight_map.values())) > 1:
        index = directory / "model.safetensors.index.json"
        with replacing(index) as temporary:
            temporary.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
