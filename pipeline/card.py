"""The model card beside a saved model: what was done, what was measured, what it weighs."""

from pathlib import Path

from pipeline.files import replacing

TEMPLATE = """---
library_name: transformers
tags: [sparse-expansion, sparsity]
---
# {name}, {experts} sparse expert{s} per feed-forward linear

Made by Sparse Expansion on Ray: every feed-forward linear of {model} became {experts} expert{s}, pruned by SparseGPT{bits}
for one cluster of its inputs each. A token goes to the expert of its nearest centroid; attention, embeddings and the head are dense.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{directory}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{directory}", trust_remote_code=True)
```

| | |
|---|---|
{rows}

Experts are stored packed: which weights are kept, and their values{codes}, without the zeros (`sparse-expansion inspect` shows the parts;
`packed_experts.py` beside this file says how to read them). `sha256sum -c SHA256SUMS` checks the files.
"""


def write_card(directory: Path, name: str, model: str, result: dict) -> None:
    """`result`: what `run --json` prints."""
    experts = result["num_clusters"]
    measured = {
        "sparsity asked for, and measured": f"{result['sparsity']}, {result['measured_sparsity']:.4f} of the feed-forward weights are 0",
        "perplexity": result["perplexity"] and f"{result['perplexity']:.3f}",
        "perplexity of the dense model": result["dense_perplexity"] and f"{result['dense_perplexity']:.3f}",
        "perplexities are": result["perplexity"] and result["measured_on"],
        "calibrated on": result["calibrated_on"],
        "recipe": ", ".join(f"{key} {value}" for key, value in result["recipe"].items()),
        "size on disk": f"{result['model_bytes'] / 1e6:.1f} MB, against {result['dense_bytes'] / 1e6:.1f} MB of the dense checkpoint",
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in measured.items() if value)
    bits = f" and rounded to {result['recipe']['bits']} bits by GPTQ in the same pass" if result["recipe"]["quantize"] else ""
    with replacing(directory / "README.md") as temporary:
        temporary.write_text(TEMPLATE.format(name=name, experts=experts, s="" if experts == 1 else "s", model=model, bits=bits,
                                             directory=directory, rows=rows,
                                             codes=" as integers" if bits else ""))
