"""Shards and the dense checkpoint -> a directory that plain transformers loads."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline import modeling_sparse_expansion
from pipeline.blocks import BlockwiseModel
from pipeline.config import Job
from pipeline.files import MARK, sha256
from pipeline.modeling_sparse_expansion import SUMS, SparseExpansionConfig, write_sums
from pipeline.packing import forms_of
from pipeline.shard import joined_parts
from pipeline.storage import Storage
from pipeline.weights import CheckpointWriter

CODE = ("modeling_sparse_expansion.py", "packed_experts.py", "expert_kernels.py")  # that a saved model brings along
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "chat_template*")


@dataclass(frozen=True)
class Assembly:
    """What to assemble: `source` is the dense model's directory, `storage` holds the shards of `job`, `recipe` goes into config.json."""

    source: Path
    storage: Storage
    job: Job
    router_groups: tuple[tuple[str, ...], ...]
    blocks: str
    dtype: str
    recipe: dict


def copy_companions(source: Path, target: Path) -> None:
    """What a model directory holds besides its weights and configuration."""
    for pattern in (*TOKENIZER_FILES, "generation_config.json"):
        for file in sorted(source.glob(pattern)):
            shutil.copy(file, target / file.name)


def assemble(assembly: Assembly, target: Path, advance: Callable[[int], object]) -> dict[str, str]:
    """Write the saved model into `target`, which appears whole or not at all; returns SHA-256 by file name. advance: is told
    the number of each layer before it is written.

    One file a layer and one for the rest, so that no more than a layer is in memory. Experts are packed.
    """
    dtype = getattr(torch, assembly.dtype)
    model = BlockwiseModel(assembly.source, dtype, torch.device("cpu"))
    temporary = target.with_name(f"{target.name}{MARK}new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    written = CheckpointWriter(temporary, model.num_blocks + 1)

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    written.write({f"model.{name}": cast(tensor) for name, tensor in model.shell_weights().items()})
    paths = [path for group in assembly.router_groups for path in group]
    expanded = {f"{path}.weight" for path in paths}
    forms = forms_of(assembly.job, {path: model.empty_block.get_submodule(path).weight for path in paths}, dtype)
    stored: list[dict[str, int]] = []
    for index in range(model.num_blocks):
        advance(index)
        dense = {name: cast(tensor) for name, tensor in model.block_weights(index).items() if name not in expanded}
        tensors = assembly.storage.read(index)
        made = {name: tensor for name, tensor in tensors.items() if "_router." in name}
        for path, form in forms.items():
            made |= {f"{path}.{part}": tensor for part, tensor in joined_parts(tensors, path, form, range(assembly.job.num_clusters)).items()}
        stored.append({path: len(made[f"{path}.{'codes' if form.bits else 'values'}"]) for path, form in forms.items() if form and form.index == "mask"})
        prefix = f"model.{assembly.blocks}.{index}."
        written.write({prefix + name: tensor for name, tensor in (dense | made).items()})

    written.finish()
    config = SparseExpansionConfig(
        model.config.to_dict(), assembly.job.num_clusters, assembly.blocks, assembly.router_groups,
        {path: form.to_dict() for path, form in forms.items() if form}, stored, assembly.recipe,
        architectures=["SparseExpansionForCausalLM"], dtype=assembly.dtype,
        auto_map={"AutoConfig": "modeling_sparse_expansion.SparseExpansionConfig",
                  "AutoModelForCausalLM": "modeling_sparse_expansion.SparseExpansionForCausalLM"})
    (temporary / "config.json").write_text(config.to_json_string(use_diff=False))
    for file in CODE:
        shutil.copy(Path(modeling_sparse_expansion.__file__).with_name(file), temporary)
    copy_companions(assembly.source, temporary)
    hashes = write_sums(temporary)
    hashes[SUMS] = sha256(temporary / SUMS)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    return hashes
