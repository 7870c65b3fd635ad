"""A causal LM run block by block: no process ever holds more than the embeddings, the head and one block.

    model = BlockwiseModel(directory, torch.float32, torch.device("cpu"))
    hidden = model.embed(ids)
    for index in range(model.num_blocks):
        hidden = model.run(model.load_block(index), index, hidden)
    logits = model.head(hidden)

Shapes: W windows of a group, L tokens of a window, H hidden size, V vocabulary.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from pipeline.architectures import architecture_of
from pipeline.errors import UserError
from pipeline.model_config import is_expanded, read_config
from pipeline.modeling_sparse_expansion import RoutedLinear, SparseExpansionForCausalLM
from pipeline.weights import Checkpoint


@contextlib.contextmanager
def _weightless() -> Iterator[None]:
    """Modules made inside hold their parameters on the meta device; buffers (rotary tables) are real.

    Building everything on the meta device would lose the buffers that no checkpoint stores.
    """
    register = nn.Module.register_parameter

    def register_meta(module, name, parameter):
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    nn.Module.register_parameter = register_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


class BlockwiseModel:
    """A dense or an expanded causal LM in `dtype` on `device`; routers stay in float32.

    directory: of its files. None where they are not to be seen: then `config` and `shell` (what `shell_weights` gives) are
    what somebody else read, and blocks are loaded from weights that are handed over.
    """

    def __init__(self, directory: Path | None, dtype: torch.dtype, device: torch.device, config: PretrainedConfig | None = None,
                 shell: dict[str, Tensor] | None = None):
        self.dtype, self.device = dtype, device
        self.config = read_config(directory) if directory else config
        expanded = is_expanded(self.config)
        with _weightless():
            self._skeleton = SparseExpansionForCausalLM(self.config) if expanded else AutoModelForCausalLM.from_config(self.config)
        self._skeleton.eval()
        self._prefix = f"model.{self.config.blocks}" if expanded else architecture_of(self.config.model_type, str(directory)).blocks
        self._blocks = self._skeleton.get_submodule(self._prefix)
        self._checkpoint = Checkpoint(directory) if directory else None
        self._given_shell = shell
        self._calls: dict[tuple[int, ...], list[tuple[tuple, dict]]] = {}
        self._shell_loaded = False

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    @property
    def empty_block(self) -> nn.Module:
        """The first block, without its weights."""
        return self._blocks[0]

    @property
    def vocabulary(self) -> int:
        return getattr(self.config, "text_config", self.config).vocab_size

    # Weights

    def block_weights(self, index: int) -> dict[str, Tensor]:
        """The tensors of one block as the checkpoint stores them, on the CPU, by name in the block."""
        return self._read(self._blocks[index], f"{self._prefix}.{index}.")

    def load_block(self, index: int, weights: dict[str, Tensor] | None = None) -> nn.Module:
        """One block with its weights (read from the checkpoint if they are not given) on the device. Experts are unpacked: there
        is room for those of one block."""
        block = copy.deepcopy(self._blocks[index])
        block.__dict__.pop("forward", None)
        self._fill(block, self.block_weights(index) if weights is None else weights)
        for name, module in block.named_modules():
            if isinstance(module, RoutedLinear):
                try:
                    module.check(f"{self._prefix}.{index}.{name}")
                except ValueError as error:
                    raise UserError(f"{self._checkpoint.directory if self._checkpoint else 'the model'}: {error}.") from None
                module.unpack_(self.dtype)
        return block.requires_grad_(False)

    def shell_weights(self) -> dict[str, Tensor]:
        """All tensors outside the blocks as stored, by the model's names; tied ones once."""
        self._tie()
        return self._read(self._skeleton, "", skip=f"{self._prefix}.")

    def _read(self, module: nn.Module, prefix: str, skip: str | None = None) -> dict[str, Tensor]:
        parameters = dict(module.named_parameters())  # tied ones once
        tied = dict(module.named_parameters(remove_duplicate=False)).keys() - parameters.keys()
        names = {}
        for name in module.state_dict():
            if name in tied or skip and name.startswith(skip):
                continue
            stored = self._checkpoint.find(prefix + name)
            if stored is None:
                raise UserError(f"{self._checkpoint.directory} lacks the tensor {prefix + name}.")
            names[name] = stored
        return self._checkpoint.load(names)

    def _fill(self, module: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
        expected = module.state_dict()
        for name, tensor in weights.items():
            if tensor.shape != expected[name].shape:
                raise UserError(f"{self._checkpoint.directory if self._checkpoint else 'the model'}: the tensor {name} has shape {tuple(tensor.shape)}, "
                                f"the configuration asks for {tuple(expected[name].shape)}.")
        cast = {name: tensor if "_router." in name or name.endswith(".scale") or not tensor.is_floating_point() else tensor.to(self.dtype)
                for name, tensor in weights.items()}
        module.load_state_dict({name: tensor.to(self.device) for name, tensor in cast.items()}, strict=False, assign=True)
        self._tie()  # assigning a tied parameter leaves the other end with the old one
        return module.to(self.device).requires_grad_(False)

    def _tie(self) -> None:
        """Where the configuration ties head and embeddings, make them one parameter, so that it is read once."""
        text_config = getattr(self.config, "text_config", self.config)
        if text_config.tie_word_embeddings:
            self._skeleton.get_output_embeddings().weight = self._skeleton.get_input_embeddings().weight

    def load_shell(self) -> None:
        """Read what lies outside the blocks; `embed` and `head` do so when they are first called."""
        if self._shell_loaded:
            return
        weights = self.shell_weights() if self._given_shell is None else self._given_shell
        blocks = list(self._blocks)
        parent, _, name = self._prefix.rpartition(".")
        # The blocks stay on the meta device: they are taken out while the rest is filled.
        setattr(self._skeleton.get_submodule(parent), name, nn.ModuleList())
        self._fill(self._skeleton, weights)
        setattr(self._skeleton.get_submodule(parent), name, nn.ModuleList(blocks))
        self._blocks = self._skeleton.get_submodule(self._prefix)
        self._shell_loaded = True

    # Running

    @torch.no_grad()
    def embed(self, ids_WL: Tensor) -> Tensor:
        """Hidden states that enter block 0 (W, L, H). Remembers what each block is called with for windows of this shape:
        masks and positions differ from block to block in some models (sliding windows)."""
        entered: list[Tensor] = []
        calls = []

        def record(hidden, *args, **kwargs):
            entered.append(hidden)
            calls.append((args, kwargs))
            return hidden

        self._pass_through(ids_WL, record)
        self._calls.setdefault(tuple(ids_WL.shape), calls)
        return entered[0]

    @torch.no_grad()
    def run(self, block: nn.Module, index: int, hidden_WLH: Tensor) -> Tensor:
        """One block's output for hidden states whose windows went through `embed` in the same shape."""
        args, kwargs = self._calls[tuple(hidden_WLH.shape[:2])][index]
        output = block(hidden_WLH.to(self.device, non_blocking=True), *args, **kwargs)
        return output if isinstance(output, Tensor) else output[0]

    @torch.no_grad()
    def head(self, hidden_WLH: Tensor) -> Tensor:
        """Logits (W, L, V) of what left the last block: the model's own final norm and head."""
        placeholder = torch.zeros(hidden_WLH.shape[:2], dtype=torch.long, device=self.device)
        return self._pass_through(placeholder, lambda hidden, *args, **kwargs: hidden_WLH).logits

    def _pass_through(self, ids_WL: Tensor, forward: Callable):
        """The model's own forward with every block's replaced."""
        self.load_shell()
        for block in self._blocks:
            block.forward = forward
        return self._skeleton(input_ids=ids_WL.to(self.device), use_cache=False)
