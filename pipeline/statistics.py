"""What happened to every expert, as a Parquet table."""

from pathlib import Path

import pyarrow
from pyarrow import parquet

from pipeline.files import replacing
from pipeline.solver.factor import DAMPING


def write_expert_table(layers: dict[str, dict], path: Path) -> None:
    """One row for each layer, router, linear and expert. `layers`: the manifest's, by layer number."""
    rows = [
        {"layer": int(index), "router": report["router"], "linear": linear, **{name: report[name] for name in (
            "expert", "tokens", "fallback", "damping", "dead_columns")}, "sparsity": report["sparsity"][linear], "loss": report["loss"][linear]}
        for index, layer in sorted(layers.items(), key=lambda item: int(item[0]))
        for report in layer["experts"] for linear in report["sparsity"]
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        parquet.write_table(pyarrow.Table.from_pylist(rows), temporary)


def warnings_of(layers: dict[str, dict]) -> list[str]:
    """One line for each kind of trouble in the numbers; the table holds the rest."""
    reports = [(index, report) for index, layer in layers.items() for report in layer["experts"]]
    kinds = {
        "had no tokens and were solved on all tokens of their layer": [where for where in reports if where[1]["fallback"]],
        "needed more than the usual damping": [where for where in reports if where[1]["damping"] > DAMPING],
    }
    return [f"{len(found)} of {len(reports)} experts {what} (first: layer {found[0][0]}, {found[0][1]['router']}, expert {found[0][1]['expert']})."
            for what, found in kinds.items() if found]
