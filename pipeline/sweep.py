"""The jobs of a sweep side by side: sweep.parquet, sweep.md, and what is printed."""

from pathlib import Path

import pyarrow
from pyarrow import parquet

from pipeline.config import Job
from pipeline.files import replacing
from pipeline.grid import name_of
from pipeline.summary import table

SCHEMA = pyarrow.schema([
    ("sparsity", pyarrow.string()), ("fraction", pyarrow.float64()), ("num_clusters", pyarrow.int64()), ("propagation", pyarrow.string()),
    ("bits", pyarrow.int64()), ("seed", pyarrow.int64()), ("perplexity", pyarrow.float64()), ("dense_perplexity", pyarrow.float64()),
    ("ratio", pyarrow.float64()), ("against_sparse", pyarrow.float64()), ("measured_sparsity", pyarrow.float64()), ("warnings", pyarrow.int64()),
    ("seconds", pyarrow.float64()), ("directory", pyarrow.string()), ("error", pyarrow.string())])


def make_rows(jobs: list[Job], results: list[dict | None], errors: dict[str, str]) -> list[dict]:
    """The table. results: of `run`; None of a job that failed, which `errors` has by name."""
    rows = [_row(job, result or {}, errors.get(name_of(job))) for job, result in zip(jobs, results)]
    axes = ("sparsity", "num_clusters", "bits", "seed")
    sparse = {tuple(row[axis] for axis in axes): row["perplexity"] for row in rows if row["propagation"] == "sparse"}
    for row in rows:
        other = sparse.get(tuple(row[axis] for axis in axes))
        if row["propagation"] == "dense" and None not in (other, row["perplexity"]):
            row["against_sparse"] = row["perplexity"] - other
    return rows


def _row(job: Job, result: dict, error: str | None) -> dict:
    perplexity, dense = result.get("perplexity"), result.get("dense_perplexity")
    return {
        "sparsity": job.sparsity, "fraction": job.pattern.fraction, "num_clusters": job.num_clusters, "propagation": job.propagation,
        "bits": job.bits if job.quantize else None, "seed": job.seed,
        "perplexity": perplexity, "dense_perplexity": dense, "ratio": perplexity / dense if perplexity and dense else None, "against_sparse": None,
        "measured_sparsity": result.get("measured_sparsity"), "warnings": len(result["warnings"]) if result else None,
        "seconds": result.get("seconds"), "directory": name_of(job), "error": error}


def write_tables(root: Path, result: dict) -> None:
    """sweep.parquet, and sweep.md, which shows sweep.png too."""
    with replacing(root / "sweep.parquet") as temporary:
        parquet.write_table(pyarrow.Table.from_pylist(result["rows"], SCHEMA), temporary)
    heading, *rows = _cells(result["rows"])
    lines = [f"# Sweep over {result['model']}", "", *("| " + " | ".join(cells) + " |" for cells in [heading, ["---"] * len(heading), *rows]), "",
             *(f"{sentence}\n" for sentence in _sentences(result)), "![Perplexity against sparsity](sweep.png)"]
    with replacing(root / "sweep.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n")


def describe_sweep(result: dict) -> str:
    lines = [table(_cells(result["rows"])), "", *_sentences(result), f"{result['seconds']:.1f} s; {result['finished_before']} of {len(result['rows'])} jobs were finished before.",
             f"Saved in {result['sweep_dir']}: a run directory for each row, sweep.parquet, sweep.md, sweep.png"]
    if "profile" in result:
        lines += ["", result["profile"], "", f"Timeline, its picture and this table: {result['profile_dir']}"]
    return "\n".join(lines)


def failed(result: dict) -> list[str]:
    """A sentence for each job that failed."""
    return [f"{row['directory']} failed: {row['error']}" for row in result["rows"] if row["error"]]


def _cells(rows: list[dict]) -> list[list[str]]:
    """The table as text. Axes that do not vary have no column, but sparsity and experts."""
    columns = {"sparsity": "sparsity", "num_clusters": "experts"}
    columns |= {axis: axis for axis in ("bits", "propagation", "seed") if len({row[axis] for row in rows}) > 1}
    columns |= {"perplexity": "perplexity", "dense_perplexity": "dense model", "ratio": "ratio"}
    columns |= {"against_sparse": "against sparse propagation"} if any(row["against_sparse"] is not None for row in rows) else {}
    columns |= {"measured_sparsity": "zeros", "warnings": "warnings", "seconds": "seconds", "directory": "directory"}
    return [list(columns.values()), *([_cell(row, name) for name in columns] for row in rows)]


def _cell(row: dict, name: str) -> str:
    forms = {"perplexity": "{:.2f}", "dense_perplexity": "{:.2f}", "ratio": "{:.3f}", "against_sparse": "{:+.2f}", "measured_sparsity": "{:.2%}", "seconds": "{:.1f}"}
    if name == "perplexity" and row["error"]:
        return "failed"
    return "" if row[name] is None else forms.get(name, "{}").format(row[name])


def _sentences(result: dict) -> list[str]:
    return [*(f"Perplexity: {what}." for what in result["measured_on"]), *(f"Calibrated on {what}." for what in result["calibrated_on"]), *failed(result)]
