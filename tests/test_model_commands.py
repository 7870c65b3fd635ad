"""The commands that look at a saved model or hand it on."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.demo import DEMO_MODEL
from tests.conftest import command
from tests.saved import make_saved


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return make_saved(tmp_path_factory.mktemp("three"), num_clusters=3, sparsity="2:4", quantize=True, bits=4)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return make_saved(tmp_path_factory.mktemp("one"), num_clusters=1, sparsity="0.5")


def test_inspect(saved, one):
    for directory in (saved, one):
        result = command("inspect", directory, "--json").json
        files = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
        assert result["bytes"] == pytest.approx(files, rel=0.01) and sum(result["parts"].values()) == result["bytes"]
        assert 1 <= result["expert_bytes"] / result["minimum_bytes"] < 1.03
        dense = sum(4 * tensor.numel() for tensor in AutoModelForCausalLM.from_pretrained(DEMO_MODEL).state_dict().values())
        assert result["dense_bytes"] == pytest.approx(dense, rel=0.01)
    assert "of the least that their kept weights can" in command("inspect", saved).out
    assert command("inspect", DEMO_MODEL).code == 2


def test_generate(saved):
    options = ("generate", saved, "--prompt", "The night was", "--max-new-tokens", 6)
    first = command(*options)
    assert first.code == 0 and first.out.strip() and command(*options).out == first.out
    warm = [command(*options, "--temperature", 1.5, "--seed", seed).out for seed in (1, 2, 1)]
    assert warm[0] == warm[2] != warm[1]
    assert "is no directory" in command("generate", "/nowhere", "--prompt", "x").err


def test_compare(saved):
    text = "It was the best of times, it was the worst of times."
    result = command("compare", saved, "--dense", DEMO_MODEL, "--text", text, "--layer", 2, "--json")
    found = result.json
    assert result.code == 0 and "layers.2.mlp.dense_h_to_4h_router: experts" in result.out
    assert len(found["tokens"]) == len(found["dense_loss"]) + 1 and "".join(found["tokens"]) == text
    assert all(len(experts) == len(found["tokens"]) and set(experts) <= {0, 1, 2} for experts in found["experts"].values()) and len(found["experts"]) == 8
    itself = command("compare", DEMO_MODEL, "--dense", DEMO_MODEL, "--text", text, "--json").json
    assert itself["dense_loss"] == itself["expanded_loss"] == found["dense_loss"]
    assert "--layer is 9; allowed is 0 to 3" in command("compare", saved, "--dense", DEMO_MODEL, "--text", text, "--layer", 9).err


@torch.no_grad()
def test_export(saved, one, tmp_path):
    ids = torch.randint(2, 1000, (2, 20), generator=torch.Generator().manual_seed(0))
    result = command("export", one, "--output-dir", tmp_path / "one", "--json").json
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert type(plain).__name__ == "GPTNeoXForCausalLM" and result["sparsity"] == pytest.approx(0.5, abs=0.01)
    expanded = AutoModelForCausalLM.from_pretrained(one, trust_remote_code=True)
    torch.testing.assert_close(plain(ids).logits, expanded(ids).logits, rtol=1e-4, atol=1e-4)
    assert command("export", saved, "--output-dir", tmp_path / "two", "--expert", 2).code == 0
    whole = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True).unpack()
    name = "gpt_neox.layers.3.mlp.dense_h_to_4h.weight"
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "two").get_parameter(name), whole.get_parameter(f"model.{name}")[2])
    assert command("export", saved, "--output-dir", tmp_path / "mean", "--expert", "mean").code == 0
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "mean").get_parameter(name), whole.get_parameter(f"model.{name}").mean(0))
    for options, sentence in (((), "give --expert, a number from 0 to 2, or mean"), (("--expert", "3"), "--expert is 3; allowed is a number from 0 to 2")):
        refused = command("export", saved, "--output-dir", tmp_path / "none", *options)
        assert refused.code == 2 and sentence in refused.err and not (tmp_path / "none").exists()
    assert "is there already" in command("export", one, "--output-dir", tmp_path / "one").err


def test_push(saved, monkeypatch):
    """Against a hub of its own: the repository is made, every file arrives, and a refusal is a sentence."""
    uploaded, asked = {}, []

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, value, status=200):
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.answer({"id": "me/model", "sha": "0" * 40, "siblings": [], "private": True})

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked.append((self.path, self.headers.get("Authorization")))
            if self.headers.get("Authorization") != "Bearer hf_good":
                self.answer({"error": "Invalid token"}, 401)
            elif self.path == "/api/repos/create":
                asked.append(json.loads(body))
                self.answer({"url": f"http://127.0.0.1:{self.server.server_port}/me/model", "name": "me/model"})
            elif "/preupload/" in self.path:
                self.answer({"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]})
            elif "/commit/" in self.path:
                for line in body.decode().splitlines():
                    if (told := json.loads(line))["key"] == "file":
                        uploaded[told["value"]["path"]] = told["value"]
                self.answer({"commitUrl": f"http://127.0.0.1:{self.server.server_port}/me/model/commit/1", "commitOid": "1" * 40, "success": True})
            else:
                self.answer({}, 200)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        import huggingface_hub.constants as constants
        from huggingface_hub import HfApi

        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for token in ("hf_good", "hf_bad"):
            monkeypatch.setattr("pipeline.hub.HfApi", lambda token=token: HfApi(endpoint=address, token=token))
            result = command("push", saved, "--to", "me/model", "--private")
            if token == "hf_good":
                assert result.code == 0 and f"{address}/me/model" in result.out, result.err
                assert uploaded.keys() == {file.name for file in saved.iterdir()} and any(isinstance(one, dict) and "private" in (one.get("visibility"), one.get("private") and "private") for one in asked)
            else:
                assert result.code == 2 and "--to me/model: the hub refused it" in result.err
    finally:
        server.shutdown()
