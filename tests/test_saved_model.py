"""The saved model where people use it: transformers, peft, lm-evaluation-harness, the hub; and when its files are damaged."""

import random
import shutil

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from pipeline.blocks import BlockwiseModel
from pipeline.modeling_sparse_expansion import RoutedLinear, SparseExpansionForCausalLM
from tests.saved import make_saved

KINDS = {"mask": dict(num_clusters=3, sparsity="0.5"), "pattern": dict(num_clusters=3, sparsity="2:4", quantize=True, bits=4),
         "codes": dict(num_clusters=2, sparsity="0.6", quantize=True, bits=3, group_size=64), "one": dict(num_clusters=1, sparsity="0.5")}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    made = {}

    def of(kind: str):
        if kind not in made:
            made[kind] = make_saved(tmp_path_factory.mktemp(kind), **KINDS[kind])
        return made[kind]
    return of


def loaded(directory, **options):
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **options).eval()


def unpacked(model):
    """The same model with experts that are not packed."""
    return model.unpack()


IDS = torch.randint(2, 1000, (3, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_packed_and_unpacked_give_the_same(saved, kind, tmp_path):
    model = loaded(saved(kind))
    packed = model(IDS, labels=IDS)
    plain = unpacked(loaded(saved(kind)))(IDS, labels=IDS)
    assert float(packed.loss.exp()) == pytest.approx(float(plain.loss.exp()), rel=1e-5)
    torch.testing.assert_close(packed.logits, plain.logits, rtol=1e-5, atol=1e-5)
    blockwise = BlockwiseModel(saved(kind), torch.float32, torch.device("cpu"))
    hidden = blockwise.embed(IDS)
    for index in range(blockwise.num_blocks):
        hidden = blockwise.run(blockwise.load_block(index), index, hidden)
    torch.testing.assert_close(blockwise.head(hidden), plain.logits, rtol=1e-4, atol=1e-4)
    unpacked(loaded(saved(kind))).save_pretrained(tmp_path / "unpacked")
    torch.testing.assert_close(loaded(tmp_path / "unpacked")(IDS).logits, plain.logits)
    assert sum(part.nbytes for part in model.state_dict().values()) < 0.8 * sum(part.nbytes for part in unpacked(loaded(saved(kind))).state_dict().values())


@pytest.mark.parametrize("kind", ["mask", "pattern"])
@torch.no_grad()
def test_saved_again_and_in_other_precisions(saved, kind, tmp_path):
    model = loaded(saved(kind), low_cpu_mem_usage=True)
    model.save_pretrained(tmp_path / "again")
    again = loaded(tmp_path / "again")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    for dtype in (torch.bfloat16, torch.float16):
        half = loaded(saved(kind), dtype=dtype, device_map="auto")
        assert half.dtype == dtype and all(tensor.dtype == torch.float32 for name, tensor in half.state_dict().items() if name.endswith(".scale") or "_router." in name)
        assert float(half(IDS, labels=IDS).loss) == pytest.approx(float(model(IDS, labels=IDS).loss), abs=0.05)


@torch.no_grad()
def test_generate_in_every_mode(saved):
    model, tokenizer = loaded(saved("mask")), AutoTokenizer.from_pretrained(saved("mask"))
    plain = unpacked(loaded(saved("mask")))
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.pad_token or tokenizer.eos_token, "left"
    batch = tokenizer(["The night was", "He said that she would never"], return_tensors="pt", padding=True)
    for mode in (dict(do_sample=False), dict(num_beams=3), dict(do_sample=True, top_p=0.9), dict(do_sample=False, cache_implementation="static"),
                 dict(do_sample=False, use_cache=False)):
        torch.manual_seed(0)
        found = model.generate(**batch, max_new_tokens=8, pad_token_id=tokenizer.pad_token_id, **mode)
        torch.manual_seed(0)
        assert torch.equal(found, plain.generate(**batch, max_new_tokens=8, pad_token_id=tokenizer.pad_token_id, **mode)), mode
    alone = model.generate(**tokenizer("The night was", return_tensors="pt"), max_new_tokens=8, pad_token_id=tokenizer.pad_token_id, do_sample=False)
    padded = model.generate(**batch, max_new_tokens=8, pad_token_id=tokenizer.pad_token_id, do_sample=False)
    assert alone[0, -8:].tolist() == padded[0, -8:].tolist()
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert write("The night was", max_new_tokens=5, do_sample=False)[0]["generated_text"].startswith("The night was")


@pytest.mark.parametrize("kind", ["mask", "pattern", "one"])
def test_gradients_are_those_of_unpacked_experts(saved, kind):
    model, plain = loaded(saved(kind)), unpacked(loaded(saved(kind)))
    for one in (model, plain):
        one.zero_grad()
        one(IDS, labels=IDS).loss.backward()
    name = "model.gpt_neox.layers.0.attention.dense.weight"
    torch.testing.assert_close(model.get_parameter(name).grad, plain.get_parameter(name).grad, rtol=1e-4, atol=1e-6)
    if kind == "mask":
        path = "model.gpt_neox.layers.1.mlp.dense_h_to_4h"
        whole = plain.get_parameter(f"{path}.weight")
        first = model.get_submodule(path).starts[1]
        torch.testing.assert_close(model.get_parameter(f"{path}.values").grad[:first], whole.grad[0][whole[0] != 0], rtol=1e-4, atol=1e-6)


def test_a_lora_step(saved):
    model = peft.get_peft_model(loaded(saved("pattern")), peft.LoraConfig(r=4, target_modules=["query_key_value"], task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([part for part in model.parameters() if part.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.01


def test_a_changed_file_is_named(saved, tmp_path):
    """One bit of any file that decides what the model computes."""
    choose = random.Random(1)
    for file in sorted(saved("codes").iterdir()):
        if file.suffix not in (".safetensors", ".json"):
            continue
        copy = tmp_path / file.stem
        shutil.copytree(saved("codes"), copy)
        data = bytearray((copy / file.name).read_bytes())
        data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
        (copy / file.name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{file.name} is damaged"):
            SparseExpansionForCausalLM.from_pretrained(copy)


def test_without_hashes_the_tensors_are_checked(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(saved("pattern"), tmp_path / "model")
    (tmp_path / "model" / "SHA256SUMS").unlink()
    file = next(file for file in sorted((tmp_path / "model").glob("*.safetensors")) if "model.gpt_neox.layers.1.mlp.dense_h_to_4h.words" in load_file(file))
    tensors = load_file(file)
    tensors["model.gpt_neox.layers.1.mlp.dense_h_to_4h.words"][1, 2, 3] = -1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match="layers.1.mlp.dense_h_to_4h.words is damaged: a choice is out of range"):
        loaded(tmp_path / "model")


def test_deep_copies_and_pickles(saved):
    import copy
    import pickle

    model = SparseExpansionForCausalLM.from_pretrained(saved("mask")).eval()
    with torch.no_grad():
        expected = model(IDS).logits
        assert torch.equal(copy.deepcopy(model)(IDS).logits, expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(IDS).logits, expected)
    assert any(isinstance(module, RoutedLinear) and module.form.index == "mask" for module in model.modules())
