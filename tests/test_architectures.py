"""Every known model type, block by block and routed, against transformers' own forward."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.activations import Kept, Shelf
from pipeline.architectures import ARCHITECTURES, architecture_of
from pipeline.blocks import BlockwiseModel
from pipeline.errors import UserError
from pipeline.expansion import capture, propagate, routed_block
from pipeline.modeling_sparse_expansion import SparseExpansionConfig, SparseExpansionForCausalLM
from tests.models import CONFIGS, save_tiny, tiny_model, token_windows

CPU = torch.device("cpu")


def test_every_architecture_is_tested():
    assert CONFIGS.keys() == ARCHITECTURES.keys()


@pytest.fixture(params=ARCHITECTURES)
def model_type(request) -> str:
    return request.param


@torch.no_grad()
def test_blockwise_equals_transformers(model_type, tmp_path):
    directory = save_tiny(tmp_path / "model", model_type)
    ids_WL = token_windows(3, 24)
    model = BlockwiseModel(directory, torch.float32, CPU)
    hidden = model.embed(ids_WL)
    for index in range(model.num_blocks):
        hidden = model.run(model.load_block(index), index, hidden)
    truth = AutoModelForCausalLM.from_pretrained(directory)(ids_WL).logits
    torch.testing.assert_close(model.head(hidden), truth, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_sharded_checkpoint(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = (BlockwiseModel(tmp_path / name, torch.float32, CPU) for name in ("one", "many"))
    for index in range(3):
        there = many.block_weights(index)
        assert all(torch.equal(there[name], tensor) for name, tensor in one.block_weights(index).items())


def test_no_block_is_read_before_it_is_asked_for(tmp_path):
    """Of a fresh model nothing is real but the buffers; one loaded block leaves the others without weights."""
    model = BlockwiseModel(save_tiny(tmp_path / "model"), torch.float32, CPU)
    model.embed(token_windows(1, 8))
    model.load_block(1)
    assert all(parameter.is_meta for block in model._blocks for parameter in block.parameters())


@torch.no_grad()
def test_capture_sees_what_the_linears_read(model_type, tmp_path):
    directory = save_tiny(tmp_path / "model", model_type)
    architecture = architecture_of(model_type, "")
    ids_WL = token_windows(5, 16)
    model = BlockwiseModel(directory, torch.float32, CPU)
    hidden = {number: Kept(model.embed(part)) for number, part in enumerate(ids_WL.split(2))}
    captured = capture(model, model.load_block(0), 0, hidden, architecture, Shelf(CPU))
    truth = AutoModelForCausalLM.from_pretrained(directory)
    block = truth.get_submodule(architecture.blocks)[0]
    seen = {}
    for group in architecture.router_groups:
        for path in group:
            block.get_submodule(path).register_forward_pre_hook(lambda _, args, path=path: seen.__setitem__(path, args[0].reshape(80, -1)))
    truth(ids_WL)
    for group, inputs in zip(architecture.router_groups, captured.inputs):
        for path in group:  # all of a group read the same
            torch.testing.assert_close(inputs.tensor, seen[path], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_capture_without_windows_has_the_linears_widths(tmp_path):
    """An actor that no window group fell to still hands its (no) tokens to the others."""
    model = BlockwiseModel(save_tiny(tmp_path / "model"), torch.bfloat16, CPU)
    captured = capture(model, model.load_block(0), 0, {}, architecture_of("gpt_neox", ""), Shelf(CPU))
    assert [(inputs.tensor.shape, inputs.tensor.dtype) for inputs in captured.inputs] == [((0, 32), torch.bfloat16), ((0, 64), torch.bfloat16)]


@torch.no_grad()
def test_routed_model_with_dense_experts_equals_dense(model_type):
    """Three copies of each dense weight as experts and routers that really spread the tokens: nothing may change."""
    dense = tiny_model(model_type)
    architecture = architecture_of(model_type, "")
    config = SparseExpansionConfig(dense.config.to_dict(), 3, architecture.blocks, architecture.router_groups)
    routed = SparseExpansionForCausalLM(config).eval()
    wanted, generator = routed.state_dict(), torch.Generator().manual_seed(1)
    for name, tensor in wanted.items():
        if "_router." in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) if name.endswith("weight") else torch.zeros(3))
        else:
            tensor.copy_(dense.state_dict()[name.removeprefix("model.")].expand_as(tensor))
    ids_WL = token_windows(3, 24)
    chosen = []
    for module in routed.modules():
        if type(module).__name__ == "Router":
            module.register_forward_hook(lambda _, args, experts: chosen.append(experts.unique().tolist()))
    torch.testing.assert_close(routed(ids_WL).logits, dense(ids_WL).logits, rtol=1e-5, atol=1e-5)
    assert len(chosen) == 2 * 3  # two routers a block, each asked once
    assert sum(len(experts) > 1 for experts in chosen) >= 3


@torch.no_grad()
def test_propagation_through_dense_experts_equals_dense(model_type, tmp_path):
    """Copies of the dense weights as experts, tokens spread over them by given labels: nothing may change, whether the attention's
    outputs are remembered from the capture or computed again."""
    model = BlockwiseModel(save_tiny(tmp_path / "model", model_type), torch.float32, CPU)
    architecture = architecture_of(model_type, "")
    block = model.load_block(1)
    entering = {number: model.embed(part) for number, part in enumerate(token_windows(5, 16).split(2))}
    expected = {number: model.run(block, 1, hidden_WLH) for number, hidden_WLH in entering.items()}
    weights = {path: block.get_submodule(path).weight.expand(4, -1, -1) for group in architecture.router_groups for path in group}
    labels = [torch.arange(80) % 4, torch.arange(80) // 20]
    remembered = capture(model, block, 1, {number: Kept(hidden_WLH, at=1) for number, hidden_WLH in entering.items()}, architecture, Shelf(CPU)).attention
    for attention in (remembered, None):
        hidden = {number: Kept(hidden_WLH.clone(), at=1) for number, hidden_WLH in entering.items()}
        for _ in range(2):  # made again, it changes nothing
            propagate(model, block, 1, hidden, architecture, weights, labels, attention)
            for number, kept in hidden.items():
                torch.testing.assert_close(kept.tensor, expected[number], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_each_token_gets_its_experts_weight():
    model = tiny_model("llama")
    block = model.model.layers[0]
    architecture = architecture_of("llama", "")
    weights = {path: torch.stack([(1 + expert) * block.get_submodule(path).weight for expert in range(3)])
               for group in architecture.router_groups for path in group}
    routed, routers = routed_block(block, architecture, weights)
    labels = torch.tensor([2, 0, 1, 2, 2])
    tokens = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(2))
    for router in routers:
        router.labels_N = labels
    truth = torch.nn.functional.linear(tokens, block.mlp.up_proj.weight) * (1 + labels)[None, :, None]
    torch.testing.assert_close(routed.mlp.up_proj(tokens), truth, rtol=1e-5, atol=1e-6)


def test_unknown_type_lists_the_known_ones():
    with pytest.raises(UserError, match="gpt_neox, llama, mistral, qwen2, qwen3, olmo2, gemma2, phi, opt"):
        architecture_of("mamba", "some/model")
