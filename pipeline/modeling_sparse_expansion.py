"""A causal LM whose feed-forward linears are mixtures of sparse experts.

This file and those that it imports travel inside every saved model and need torch and transformers alone:

    AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)

Shapes: N tokens, C columns (in features), R rows (out features), E experts.
Source of the method: Sparse Expansion (arXiv 2405.15756).
"""

import hashlib
import importlib.util
import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel

from .packed_experts import Form, check, unpack

FEW = 16  # tokens that are multiplied straight from the packed experts, on a GPU


SUMS = "SHA256SUMS"  # of a saved model's files, as sha256sum writes and checks them
UNSUMMED = (SUMS, "README.md", ".gitattributes")  # written or changed later


def write_sums(directory: Path) -> dict[str, str]:
    """Write the hashes of a saved model's files beside them, and return them."""
    hashes = _sums([file for file in sorted(directory.iterdir()) if file.is_file() and file.name not in UNSUMMED])
    (directory / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in hashes.items()))
    return hashes


def check_sums(directory: Path) -> None:
    """Raises ValueError, naming the file, if one of them is not what was saved. Files that are not there, and models saved without
    hashes, are left to whoever reads them."""
    if not (directory / SUMS).is_file():
        return
    try:
        saved = dict(reversed(line.split("  ", 1)) for line in (directory / SUMS).read_text().splitlines())
    except ValueError:
        raise ValueError(f"{directory / SUMS} is damaged.") from None
    for name, digest in _sums([directory / name for name in saved if (directory / name).is_file()]).items():
        if digest != saved[name]:
            raise ValueError(f"{directory / name} is damaged, or was changed: its SHA-256 is not the one in {SUMS} (remove that file if the change is meant).")


def _sums(files: list[Path]) -> dict[str, str]:
    def of(file: Path) -> str:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()

    with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as threads:
        return dict(zip([file.name for file in files], threads.map(of, files)))


@cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def kernels():
    """Imported where they are used: triton needs a compiler at hand."""
    from . import expert_kernels

    return expert_kernels


class Router(nn.Module):
    """Sends every token to the expert of its nearest centroid, as one small linear classifier.

    With principal components V (orthonormal rows), mean m and centroid c_e of the components' space, the nearest
    centroid of V (x - m) is the e with the largest c_e . V (x - m) - |c_e|^2 / 2. That is linear in x, so the router
    is `weight` = c V (E, C) and `bias` = -|c_e|^2 / 2 - (c V) . m (E), both float32: the components are not needed.
    """

    def __init__(self, num_experts: int, in_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, in_features, dtype=torch.float32), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(num_experts, dtype=torch.float32), requires_grad=False)
        self._last: tuple | None = None

    def forward(self, x_NC: Tensor) -> Tensor:
        """The expert of every token, int64 (N)."""
        if len(self.bias) == 1:
            return x_NC.new_zeros(len(x_NC), dtype=torch.long)
        return functional.linear(x_NC.float(), self.weight.float(), self.bias.float()).argmax(-1)

    def experts_of(self, hidden: Tensor) -> Tensor:
        """As `forward`, for (..., C); linears that share an input (gate and up) ask with the same tensor and share the answer."""
        if self._last is not None and self._last[0]() is hidden and self._last[1] == hidden._version:
            return self._last[2]
        experts = self(hidden.reshape(-1, hidden.shape[-1]))
        if not torch.compiler.is_compiling() and not torch.is_inference(hidden):
            self._last = (weakref.ref(hidden), hidden._version, experts)
        return experts

    def __getstate__(self):
        return {**self.__dict__, "_last": None}  # a weak reference can be neither copied nor pickled


class RoutedLinear(nn.Module):
    """A linear with one weight for each expert, and a `bias` (R) shared by the experts or None.

    form: how the experts are packed; their parts (see `packed_experts`) stay packed, and an expert is unpacked where it is used.
    None: `weight` (E, R, C) is there as it is. stored: length of the part that varies, with a mask.
    """

    def __init__(self, router: nn.Module, num_experts: int, in_features: int, out_features: int, bias: bool, form: Form | None = None, stored: int = 0):
        super().__init__()
        self._router = [router]  # in a list: the router belongs to the parent module, once, whoever shares it
        self.num_experts, self.in_features, self.out_features, self.form = num_experts, in_features, out_features, form
        if form is None:
            self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        else:
            for part, (shape, dtype) in form.shapes(stored).items():
                self.register_parameter(part, nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=dtype is None))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self._ready: tuple | None = None  # of which tensor, and what the kernels need to know of it

    @property
    def parts(self) -> dict[str, Tensor]:
        """What the experts are packed in."""
        return {name: parameter for name, parameter in self.named_parameters(recurse=False) if name != "bias"}

    def check(self, name: str = "") -> None:
        """Raises ValueError, naming the tensor, if a packed part is damaged."""
        if self.form is not None:
            check(self.form, self.parts, name or f"experts of {self.out_features} x {self.in_features}")

    def _places(self) -> tuple[Tensor | None, Tensor | None]:
        """With a mask: where rows and experts begin, for the kernels."""
        if self.form.index != "mask":
            return None, None
        if self._ready is None or self._ready[0] is not self.mask or self._ready[1] != (self.mask.device, self.mask._version):
            self._ready = self.mask, (self.mask.device, self.mask._version), (kernels().row_starts(self.form, self.parts), kernels().first_stored(self.form, self.parts))
        return self._ready[2]

    def weight_of(self, expert: int, dtype: torch.dtype) -> Tensor:
        """One expert's weight (R, C)."""
        if self.form is None:
            return self.weight[expert]
        if self._by_kernel("can_unpack"):
            return kernels().unpack_expert(self.form, self.parts, *self._places(), expert, dtype)
        return unpack(self.form, self.parts, expert, dtype)

    def _by_kernel(self, can: str) -> bool:
        """On a GPU, where no gradient of the values is asked for."""
        part = self.codes if self.form.bits else self.values
        return part.is_cuda and has_triton() and not (torch.is_grad_enabled() and part.requires_grad) and getattr(kernels(), can)(self.form)

    def unpack_(self, dtype: torch.dtype) -> None:
        """Keep the experts unpacked from now on."""
        if self.form is None:
            return
        with torch.no_grad():
            whole = torch.empty(self.num_experts, self.out_features, self.in_features, dtype=dtype, device=next(self.parameters()).device)
            for expert in range(self.num_experts):
                whole[expert] = self.weight_of(expert, dtype)
        for part in self.parts:
            delattr(self, part)
        self.form, self.weight = None, nn.Parameter(whole)

    def _one(self, hidden: Tensor, expert: int) -> Tensor:
        return functional.linear(hidden, self.weight_of(expert, hidden.dtype), self.bias)

    def _of(self, hidden: Tensor, expert: int) -> Tensor:
        if self.form is not None and torch.is_grad_enabled():
            # What is unpacked would else be kept for the backward pass, of every expert.
            return checkpoint(self._one, hidden, expert, use_reentrant=False)
        return self._one(hidden, expert)

    def forward(self, hidden: Tensor) -> Tensor:
        few = hidden.numel() <= FEW * self.in_features and self.form is not None and not torch.is_grad_enabled() and self._by_kernel("can_multiply")
        if self.num_experts == 1 and not few:
            return self._of(hidden, 0)
        experts_N = self._router[0].experts_of(hidden)
        tokens_NC = hidden.reshape(-1, self.in_features)
        if few:
            output_NR = kernels().multiply(self.form, self.parts, *self._places(), tokens_NC, experts_N)
            return (output_NR if self.bias is None else output_NR + self.bias).view(*hidden.shape[:-1], self.out_features)
        order = experts_N.argsort(stable=True)
        counts = torch.bincount(experts_N, minlength=self.num_experts).tolist()
        sorted_NC = tokens_NC[order]
        outputs = [self._of(part, expert) for expert, part in enumerate(sorted_NC.split(counts)) if len(part)]
        sorted_NR = torch.cat(outputs)
        output_NR = torch.empty_like(sorted_NR).index_copy(0, order, sorted_NR)
        return output_NR.view(*hidden.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        form = "dense" if self.form is None else f"{self.form.index}, {self.form.bits} bits" if self.form.bits else self.form.index
        return f"experts={self.num_experts} ({form}), in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def router_name(group: list[str]) -> str:
    """Path in the block of the router that the linears of `group` share: beside the first of them."""
    return f"{group[0]}_router"


def expand(block: nn.Module, router_groups: list[list[str]], num_experts: int, forms: dict[str, Form | None] | None = None, stored: dict[str, int] | None = None) -> None:
    """Replace the linears of a block by routed ones of `num_experts` experts, with empty weights. forms, stored: by path, see `RoutedLinear`."""
    for group in router_groups:
        parent_path, _, name = router_name(group).rpartition(".")
        device = block.get_submodule(group[0]).weight.device
        with torch.device(device):
            router = Router(num_experts, block.get_submodule(group[0]).in_features)
            block.get_submodule(parent_path).add_module(name, router)
            for path in group:
                parent_path, _, name = path.rpartition(".")
                dense = block.get_submodule(path)
                form = (forms or {}).get(path)
                routed = RoutedLinear(router, num_experts, dense.in_features, dense.out_features, dense.bias is not None, form, (stored or {}).get(path, 0))
                setattr(block.get_submodule(parent_path), name, routed.to(dense.weight.dtype))
                if form is not None and form.bits:
                    routed.scale.data = routed.scale.data.float()
            router.float()


class SparseExpansionConfig(PretrainedConfig):
    """`text_config`: the dense model's own configuration. `blocks`: path of its list of blocks. `router_groups`: linears
    that share a router, by path in the block. `forms`: how their experts are packed, by path (absent: as they are). `stored`: for
    every block, by path, the length of the part that varies. `recipe`: how the experts were made, for people."""

    model_type = "sparse_expansion"
    sub_configs = {"text_config": AutoConfig}

    def __init__(self, text_config=None, num_experts=1, blocks="", router_groups=(), forms=None, stored=(), recipe=None, **kwargs):
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config
        self.num_experts = num_experts
        self.blocks = blocks
        self.router_groups = [list(group) for group in router_groups]
        self.forms, self.stored = dict(forms or {}), list(stored)
        self.recipe = recipe or {}
        if text_config is not None:
            for name in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
                kwargs.setdefault(name, getattr(text_config, name, None))
        super().__init__(**kwargs)

    def __getattr__(self, name):
        # Tools ask a causal LM's configuration for its sizes (hidden_size, vocab_size, ...).
        text_config = self.__dict__.get("text_config")
        if name.startswith("_") or text_config is None:
            raise AttributeError(name)
        return getattr(text_config, name)


class SparseExpansionForCausalLM(PreTrainedModel, GenerationMixin):
    """The dense causal LM of `config.text_config` with its feed-forward linears routed. Arguments and outputs are its own."""

    config_class = SparseExpansionConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["_router", "scale"]

    def __init__(self, config: SparseExpansionConfig):
        super().__init__(config)
        self.model = AutoModelForCausalLM.from_config(config.text_config)
        self._no_split_modules = list(self.model._no_split_modules or [])
        forms = {path: Form(**form) for path, form in config.forms.items()}
        for number, block in enumerate(self.model.get_submodule(config.blocks)):
            expand(block, config.router_groups, config.num_experts, forms, config.stored[number] if config.stored else None)
        self.post_init()

    def _init_weights(self, module):
        pass  # every weight comes from the checkpoint

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As transformers' own. A directory's files are checked before they are read, packed experts when they are."""
        if pretrained_model_name_or_path is not None and os.path.isdir(pretrained_model_name_or_path):
            check_sums(Path(pretrained_model_name_or_path))
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        for name, module in (loaded[0] if isinstance(loaded, tuple) else loaded).named_modules():
            if isinstance(module, RoutedLinear) and not any(part.is_meta for part in module.parts.values()):
                module.check(name)
        return loaded

    def save_pretrained(self, save_directory, *args, **kwargs):
        super().save_pretrained(save_directory, *args, **kwargs)
        write_sums(Path(save_directory))

    def unpack(self) -> "SparseExpansionForCausalLM":
        """Keep all experts unpacked from now on: as much memory as so many dense experts, and nothing to unpack where they are used. What
        is saved then is unpacked, too."""
        for module in self.modules():
            if isinstance(module, RoutedLinear):
                module.unpack_(self.dtype)
        self.config.forms, self.config.stored = {}, []
        return self

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.model.get_output_embeddings()

    def set_output_embeddings(self, value):
        self.model.set_output_embeddings(value)

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, labels=None, use_cache=None,
                logits_to_keep=0, **kwargs):
        # The cache is among kwargs, under whatever name this version of transformers gives it.
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds,
            labels=labels, use_cache=use_cache, logits_to_keep=logits_to_keep, **kwargs)


SparseExpansionConfig.register_for_auto_class()
SparseExpansionForCausalLM.register_for_auto_class("AutoModelForCausalLM")
