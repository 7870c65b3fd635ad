"""What a saved model is made of, in bytes: from its headers alone, but for the few that count the kept weights."""

from math import prod
from pathlib import Path

from safetensors import safe_open

from pipeline.packed_experts import Form
from pipeline.packing import minimum_bytes
from pipeline.saved_model import saved_config
from pipeline.weights import Checkpoint

EXPERTS = {"mask": "which weights are kept", "words": "which weights are kept", "starts": "which weights are kept", "values": "kept weights",
           "codes": "kept weights", "weight": "kept weights", "scale": "scales and zero points", "zero": "scales and zero points"}
ROUTERS, REST, OUTSIDE = "routers", "the blocks' other weights", "outside the blocks"
BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}


def inspect(directory: Path) -> dict:
    """Bytes by part; of the experts: the least that as many kept weights can take, and what they take unpacked; of the dense model. Raises
    UserError if the directory holds no expanded model or a file is damaged."""
    config = saved_config(directory)
    forms = {path: Form(**form) for path, form in config.forms.items()}
    paths = [path for group in config.router_groups for path in group]
    parts: dict[str, int] = {}
    kept: dict[str, float] = {}
    sizes = {"minimum": 0.0, "unpacked": 0, "dense": 0}
    value_bits: dict[str, int] = {}
    shapes: dict[str, list[int]] = {}
    for name, (kind, shape, size, counted) in _tensors(directory).items():
        linear, _, part = name.rpartition(".")
        within = linear.removeprefix(f"model.{config.blocks}.").partition(".")[2]
        if not name.startswith(f"model.{config.blocks}."):
            where = OUTSIDE
        elif within in paths and part in EXPERTS:
            where = EXPERTS[part]
            if part == "starts":
                kept[linear] = counted
            if part in ("values", "codes", "weight"):
                value_bits[linear], shapes[linear] = BITS[kind], shape
        else:
            where = ROUTERS if within.endswith("_router") else REST
        parts[where] = parts.get(where, 0) + size
    itemsize = {"float32": 4, "bfloat16": 2, "float16": 2}[str(config.dtype).removeprefix("torch.")]
    for linear, shape in shapes.items():
        form = forms.get(linear.removeprefix(f"model.{config.blocks}.").partition(".")[2])
        experts, rows, columns = (form.experts, form.rows, form.columns) if form else shape
        counts = kept.get(linear) or [rows * (form.kept if form else columns)] * experts
        whole = form or Form("all", experts, rows, columns)
        sizes["minimum"] += minimum_bytes(whole, counts, whole.bits or value_bits[linear])
        sizes["unpacked"] += experts * rows * columns * itemsize
        sizes["dense"] += rows * columns * itemsize
    own = parts.get("which weights are kept", 0) + parts["kept weights"]
    rest = parts.get(OUTSIDE, 0) + parts.get(REST, 0)
    return {"directory": str(directory), "experts": config.num_experts, "parts": parts, "bytes": sum(parts.values()), "expert_bytes": own,
            "minimum_bytes": round(sizes["minimum"]), "unpacked_bytes": sizes["unpacked"] + sum(parts.values()) - own - parts.get("scales and zero points", 0),
            "dense_bytes": sizes["dense"] + rest}


def describe_inspection(result: dict) -> str:
    whole, own = result["bytes"], result["expert_bytes"]
    lines = [f"{result['directory']}: {result['experts']} expert{'s' if result['experts'] > 1 else ''} a linear, {_size(whole)}"]
    lines += [f"  {part:<26} {_size(size):>10}  {size / whole:6.1%}" for part, size in sorted(result["parts"].items(), key=lambda item: -item[1])]
    lines.append(f"Experts take {_size(own)}, {own / result['minimum_bytes'] - 1:+.1%} of the least that their kept weights can ({_size(result['minimum_bytes'])}).")
    lines.append(f"The dense model: {_size(result['dense_bytes'])} (this one is {whole / result['dense_bytes']:.2f}x); "
                 f"with unpacked experts: {_size(result['unpacked_bytes'])} ({whole / result['unpacked_bytes']:.2f}x).")
    return "\n".join(lines)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


def _tensors(directory: Path) -> dict[str, tuple[str, list[int], int, list[int] | None]]:
    """Dtype, shape and bytes of every tensor; of `starts` also the weights that each expert keeps."""
    found = {}
    for file in Checkpoint(directory).files:  # which has looked into their headers
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                part = opened.get_slice(name)
                shape, kind = part.get_shape(), part.get_dtype()
                found[name] = kind, shape, prod(shape) * BITS[kind] // 8, opened.get_tensor(name).diff().tolist() if name.endswith(".starts") else None
    return found
