"""The same work by a peer: llm-compressor's SparseGPTModifier, which makes one sparse expert, on the same windows.

    python3.11 -m venv peer && peer/bin/pip install llmcompressor==0.14.0.1
    peer/bin/python tests/benchmarks/peer_llmcompressor.py MODEL WINDOWS.npy

Prints the seconds of its one-shot run: model loading, saving and evaluation are not in them.
"""

import sys
import time

import numpy as np
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier
from transformers import AutoModelForCausalLM

model_path, windows_path = sys.argv[1:]
ids = np.load(windows_path)
model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
windows = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()})
recipe = SparseGPTModifier(sparsity=0.8, mask_structure="0:0", targets=[r"re:.*mlp\..*"])
started = time.monotonic()
oneshot(model=model, dataset=windows, recipe=recipe, num_calibration_samples=len(ids), max_seq_length=ids.shape[1])
seconds = time.monotonic() - started
weights = [module.weight for name, module in model.named_modules() if ".mlp." in name and isinstance(module, torch.nn.Linear)]
zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
print(f"llm-compressor: {seconds:.1f} s for {len(weights)} linears, {zeros:.1%} zeros, {torch.get_num_threads()} threads")
