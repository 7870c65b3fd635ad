"""The command line: parse, call, print. Nothing else.

    sparse-expansion demo
    sparse-expansion run --model pythia --model-size 70m --sparsity 0.5 --num-clusters 16
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from pipeline.config import Job, make_job
from pipeline.errors import UserError, for_the_user
from pipeline.grid import make_grid

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_show_locals=False,
                  help="Turn a Hugging Face causal LM into a mixture of sparse experts.")

MODEL, SPARSITY, EXPERTS, DATA, WHERE = "Model", "Sparsity and bits", "Experts", "Data and evaluation", "Where and how it runs"
DESCRIBED = "A cluster that is not at hand"


def _option(name: str, panel: str, flag: str | None = None, more: str = "") -> Any:
    """An option of the job with the job's own line of doc; unset means the configuration file's value or the job's own."""
    field = Job.model_fields[name]
    shown = "" if field.default is None or field.is_required() or isinstance(field.default, bool) else f" \\[default: {field.default}]"
    return typer.Option(flag or "--" + name.replace("_", "-"), help=field.description + more + shown, rich_help_panel=panel, show_default=False)


Model = Annotated[str | None, _option("model", MODEL)]
ModelSize = Annotated[str | None, _option("model_size", MODEL)]
Revision = Annotated[str | None, _option("revision", MODEL)]
CacheDir = Annotated[str | None, _option("cache_dir", MODEL)]
Dtype = Annotated[str | None, _option("dtype", MODEL)]
Sparsity = Annotated[str | None, _option("sparsity", SPARSITY)]
Quantize = Annotated[bool | None, _option("quantize", SPARSITY, "--quantize/--no-quantize")]
Bits = Annotated[int | None, _option("bits", SPARSITY)]
GroupSize = Annotated[int | None, _option("group_size", SPARSITY)]
Symmetric = Annotated[bool | None, _option("symmetric", SPARSITY, "--symmetric/--asymmetric")]
Mse = Annotated[bool | None, _option("mse", SPARSITY, "--mse/--no-mse")]
NumClusters = Annotated[int | None, _option("num_clusters", EXPERTS)]
PcaFactor = Annotated[int | None, _option("pca_reduction_factor", EXPERTS)]
NoPca = Annotated[bool | None, _option("no_pca", EXPERTS, "--no-pca/--pca")]
Restarts = Annotated[int | None, _option("kmeans_restarts", EXPERTS)]
Propagation = Annotated[str | None, _option("propagation", EXPERTS)]
Dataset = Annotated[str | None, _option("dataset", DATA)]
DatasetSize = Annotated[int | None, _option("dataset_size", DATA)]
SeqLen = Annotated[int | None, _option("seq_len", DATA)]
EvalDataset = Annotated[str | None, _option("eval_dataset", DATA)]
EvalSize = Annotated[int | None, _option("eval_size", DATA)]
NoDense = Annotated[bool | None, _option("no_dense", DATA, "--no-dense/--dense")]
Seed = Annotated[int | None, _option("seed", DATA)]
OutputDir = Annotated[str | None, _option("output_dir", WHERE)]
Resume = Annotated[str | None, _option("resume", WHERE)]
Actors = Annotated[int | None, _option("actors", WHERE)]
GpusPerActor = Annotated[float | None, _option("gpus_per_actor", WHERE)]
Threads = Annotated[int | None, _option("threads", WHERE)]
Address = Annotated[str | None, _option("address", WHERE)]
Storage = Annotated[str | None, _option("storage", WHERE)]
Activations = Annotated[str | None, _option("activations", WHERE)]
StallLimit = Annotated[float | None, _option("stall_limit", WHERE)]
Profile = Annotated[bool | None, _option("profile", WHERE, "--profile/--no-profile")]
Verbose = Annotated[bool | None, _option("verbose", WHERE, "--verbose/--quiet")]
Config = Annotated[str | None, typer.Option(help="YAML of options; the command line wins.", rich_help_panel=WHERE)]
Head = Annotated[str, typer.Option("--address", help="Of the cluster's job server: http://HEAD:8265.", rich_help_panel=WHERE)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.", rich_help_panel=WHERE)]

Gpus = Annotated[int | None, typer.Option(help="Of a cluster that is only described: its GPUs.", rich_help_panel=DESCRIBED)]
GpuMemory = Annotated[float | None, typer.Option(help="GB of each GPU, as its maker prints them.", rich_help_panel=DESCRIBED)]
Nodes = Annotated[int | None, typer.Option(help="Machines that share the GPUs evenly. \\[default: 1]", rich_help_panel=DESCRIBED)]
HostMemory = Annotated[float | None, typer.Option(help="GB of each machine; twice its GPUs' unless given.", rich_help_panel=DESCRIBED)]

AGAIN = " May be given several times."
Sparsities = Annotated[list[str] | None, _option("sparsity", SPARSITY, more=AGAIN)]
SomeBits = Annotated[list[int] | None, _option("bits", SPARSITY, more=AGAIN)]
Clusters = Annotated[list[int] | None, _option("num_clusters", EXPERTS, more=AGAIN)]
Propagations = Annotated[list[str] | None, _option("propagation", EXPERTS, more=AGAIN)]
Seeds = Annotated[list[int] | None, _option("seed", DATA, more=AGAIN)]
SweepDir = Annotated[str | None, typer.Option("--output-dir", help="Of the sweep; each job has a run directory in it. runs/MODEL-sweep unless given.",
                                              rich_help_panel=WHERE)]
Lists = Annotated[str | None, typer.Option("--config", help="YAML of options, these and --quantize as lists too; the command line wins.", rich_help_panel=WHERE)]


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    try:
        yield
    except (UserError, OSError, MemoryError) as error:
        sentence = for_the_user(error, "this machine")
        if sentence is None:
            raise
        print(f"Error: {sentence}", file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        print("Stopped; what is finished stays, and the same command goes on.", file=sys.stderr)
        raise typer.Exit(130) from None


def _print(text: str, result: dict, as_json: bool) -> None:
    print(text)
    if as_json:
        print(json.dumps(result), flush=True)


@app.command()
def run(model: Model = None, model_size: ModelSize = None, revision: Revision = None, cache_dir: CacheDir = None, dtype: Dtype = None,
        sparsity: Sparsity = None, quantize: Quantize = None, bits: Bits = None, group_size: GroupSize = None, symmetric: Symmetric = None,
        mse: Mse = None, num_clusters: NumClusters = None, pca_reduction_factor: PcaFactor = None, no_pca: NoPca = None,
        kmeans_restarts: Restarts = None, propagation: Propagation = None, dataset: Dataset = None, dataset_size: DatasetSize = None, seq_len: SeqLen = None,
        eval_dataset: EvalDataset = None, eval_size: EvalSize = None, no_dense: NoDense = None, seed: Seed = None,
        output_dir: OutputDir = None, resume: Resume = None, actors: Actors = None, gpus_per_actor: GpusPerActor = None, threads: Threads = None,
        address: Address = None, storage: Storage = None, activations: Activations = None, stall_limit: StallLimit = None,
        profile: Profile = None, verbose: Verbose = None, config: Config = None, json: Json = False) -> None:
    """Expand a model, save it, and measure its perplexity. Run again after a kill, it goes on."""
    options = {name: value for name, value in locals().items() if name in Job.model_fields}
    with _user_errors():
        job = make_job(options, config)
        from actors import jobs  # ray and torch take seconds to load: not for a mistyped option
        from pipeline.summary import describe_run

        result = jobs.run(job)
        _print(describe_run(result), result, json)


@app.command()
def plan(model: Model = None, model_size: ModelSize = None, revision: Revision = None, cache_dir: CacheDir = None, dtype: Dtype = None,
         sparsity: Sparsity = None, quantize: Quantize = None, bits: Bits = None, num_clusters: NumClusters = None,
         pca_reduction_factor: PcaFactor = None, no_pca: NoPca = None, kmeans_restarts: Restarts = None, propagation: Propagation = None,
         dataset: Dataset = None, dataset_size: DatasetSize = None, seq_len: SeqLen = None, eval_dataset: EvalDataset = None, eval_size: EvalSize = None,
         no_dense: NoDense = None, output_dir: OutputDir = None, actors: Actors = None, gpus_per_actor: GpusPerActor = None, threads: Threads = None,
         address: Address = None, storage: Storage = None, activations: Activations = None, verbose: Verbose = None, config: Config = None,
         gpus: Gpus = None, gpu_memory: GpuMemory = None, nodes: Nodes = None, host_memory: HostMemory = None, json: Json = False) -> None:
    """Will a run fit, and how long will it take? From the model's config.json alone: no weights, no text.

    On the cluster at hand, by a short measurement, or on one that is only described: --gpus 8 --gpu-memory 80
    """
    options = {name: value for name, value in locals().items() if name in Job.model_fields}
    with _user_errors():
        job = make_job(options, config)
        from actors.planning import Described, plan

        result = plan(job, Described(gpus, gpu_memory, nodes, host_memory))
        text = result.pop("text")
        _print(text, result, json)


@app.command()
def demo(output_dir: OutputDir = None, actors: Actors = None, threads: Threads = None, verbose: Verbose = None, json: Json = False) -> None:
    """The whole job on an embedded model, with windows sampled from itself: no network, no text, a minute or two."""
    with _user_errors():
        from actors.demo import run_demo
        from pipeline.summary import describe_demo

        result = run_demo(output_dir, actors, threads, bool(verbose))
        _print(describe_demo(result), result, json)


@app.command(name="eval")
def evaluate(model: Model = None, model_size: ModelSize = None, revision: Revision = None, cache_dir: CacheDir = None, dtype: Dtype = None,
             eval_dataset: EvalDataset = None, eval_size: EvalSize = None, seq_len: SeqLen = None, seed: Seed = None,
             actors: Actors = None, gpus_per_actor: GpusPerActor = None, threads: Threads = None, address: Address = None,
             stall_limit: StallLimit = None, verbose: Verbose = None, json: Json = False) -> None:
    """Perplexity of a dense or a saved model, block by block from its files."""
    options = {name: value for name, value in locals().items() if name in Job.model_fields}
    with _user_errors():
        job = make_job(options)
        from actors import jobs
        from pipeline.summary import describe_evaluation

        result = jobs.evaluate(job)
        _print(describe_evaluation(result), result, json)


@app.command()
def sweep(model: Model = None, model_size: ModelSize = None, revision: Revision = None, cache_dir: CacheDir = None, dtype: Dtype = None,
          sparsity: Sparsities = None, quantize: Quantize = None, bits: SomeBits = None, group_size: GroupSize = None, symmetric: Symmetric = None,
          mse: Mse = None, num_clusters: Clusters = None, pca_reduction_factor: PcaFactor = None, no_pca: NoPca = None,
          kmeans_restarts: Restarts = None, propagation: Propagations = None, dataset: Dataset = None, dataset_size: DatasetSize = None,
          seq_len: SeqLen = None, eval_dataset: EvalDataset = None, eval_size: EvalSize = None, no_dense: NoDense = None, seed: Seeds = None,
          output_dir: SweepDir = None, resume: Resume = None, actors: Actors = None, gpus_per_actor: GpusPerActor = None, threads: Threads = None,
          address: Address = None, storage: Storage = None, activations: Activations = None, stall_limit: StallLimit = None,
          profile: Profile = None, verbose: Verbose = None, config: Lists = None, json: Json = False) -> None:
    """Run every combination of several sparsities, numbers of experts, ... Ends with a table and a plot. Run again, it goes on.

    sparse-expansion sweep --model pythia --model-size 70m --sparsity 0.5 --sparsity 0.8 --num-clusters 1 --num-clusters 16
    """
    options = {name: value for name, value in locals().items() if name in Job.model_fields}
    with _user_errors():
        grid = make_grid(options, config)
        from actors import sweeps
        from pipeline.sweep import describe_sweep, failed

        result = sweeps.sweep(grid)
        _print(describe_sweep(result), result, json)
        if sentences := failed(result):
            raise UserError(" ".join(sentences))


@app.command()
def status(directory: Annotated[str, typer.Argument(help="A run directory.")],
           watch: Annotated[bool, typer.Option("--watch", help="Print it again whenever it changes, until the job ends.")] = False, json: Json = False) -> None:
    """What a run directory holds: done, left, time, warnings; and where a running job is."""
    with _user_errors():
        from pipeline.summary import describe_status, read_status, watch_status

        for result in watch_status(directory) if watch else [read_status(directory)]:
            _print(describe_status(result), result, json)


def _parsed(command: list[str]) -> dict[str, Any]:
    """The options of a command that another machine is to run: one that computes with a model."""
    commands = typer.main.get_command(app).commands
    allowed = [name for name, known in commands.items() if "model" in [option.name for option in known.params]]
    if command[0] not in allowed:
        raise UserError(f"{command[0]!r} cannot be submitted; allowed is {' or '.join(allowed)}, with its options.")
    return commands[command[0]].make_context(command[0], command[1:]).params


Saved = Annotated[str, typer.Argument(help="A saved model: RUN/model.")]


@app.command()
def inspect(directory: Saved, json: Json = False) -> None:
    """What a saved model is made of: bytes by part, beside the least possible and the dense model."""
    with _user_errors():
        from pipeline.inspection import describe_inspection
        from pipeline.inspection import inspect as look_into
        from pipeline.saved_model import existing

        result = look_into(existing(directory, "DIRECTORY"))
        _print(describe_inspection(result), result, json)


@app.command()
def generate(directory: Saved, prompt: Annotated[str | None, typer.Option(help="Text to go on from. Without it, one line after the other is asked for.")] = None,
             max_new_tokens: Annotated[int, typer.Option(min=1, help="Of each answer.")] = 100,
             temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.0,
             seed: Annotated[int, typer.Option(min=0)] = 0) -> None:
    """Let a saved or a dense model go on from a text: a quick look."""
    with _user_errors():
        from pipeline.saved_model import complete, existing, load

        loaded = load(existing(directory, "DIRECTORY"))
        for line in [prompt] if prompt is not None else (line.rstrip("\n") for line in sys.stdin):
            print(complete(loaded, line, max_new_tokens, temperature, seed), flush=True)


@app.command()
def compare(directory: Saved, dense: Annotated[str, typer.Option(help="The dense model that it was made of: a directory.")],
            text: Annotated[str, typer.Option(help="To read with both.")],
            layer: Annotated[int | None, typer.Option(min=0, help="Whose experts are shown. \\[default: the middle one]")] = None, json: Json = False) -> None:
    """A saved and its dense model side by side on a text: the loss of every token and its experts, in colour."""
    with _user_errors():
        from rich.console import Console

        from pipeline.comparison import compare as read_both
        from pipeline.comparison import show
        from pipeline.saved_model import existing, load

        found = read_both(load(existing(dense, "--dense")), load(existing(directory, "DIRECTORY")), text)
        show(found, layer, Console())
        _print("", found.as_dict(), json)


@app.command()
def export(directory: Saved, output_dir: Annotated[str, typer.Option(help="A new directory.")],
           expert: Annotated[str | None, typer.Option(help="Its number in every linear, or mean; of a model with one it may be left out.")] = None,
           json: Json = False) -> None:
    """Write a dense model with one expert's weights, zeros included, for tools that know nothing of experts."""
    with _user_errors():
        from pathlib import Path

        from pipeline.export import describe_export
        from pipeline.export import export as write
        from pipeline.saved_model import existing

        result = write(existing(directory, "DIRECTORY"), Path(output_dir), expert)
        _print(describe_export(result), result, json)


@app.command()
def push(directory: Saved, to: Annotated[str, typer.Option(help="NAME/REPOSITORY on the Hugging Face hub.")],
         private: Annotated[bool, typer.Option("--private", help="Of a new repository.")] = False) -> None:
    """Upload a saved model and its card to the Hugging Face hub."""
    with _user_errors():
        from pipeline.hub import push as upload
        from pipeline.saved_model import existing

        print(upload(existing(directory, "DIRECTORY"), to, private))


@app.command(context_settings={"allow_interspersed_args": False})
def submit(command: Annotated[list[str], typer.Argument(metavar="COMMAND...", help="run, eval or sweep with its options; paths are the cluster's.")],
           address: Head, no_wait: Annotated[bool, typer.Option("--no-wait", help="Print the job's id and leave.")] = False) -> None:
    """Run a command on a Ray cluster. Prints the job's id, then its log, and exits as the job does.

    sparse-expansion submit --address http://HEAD:8265 -- run --model pythia --model-size 12b --output-dir /shared/runs/12b
    """
    with _user_errors():
        options = _parsed(command)
        config = options.get("config")
        job = make_grid({name: value for name, value in options.items() if name in Job.model_fields}, config)[0]
        from actors import submission
        from actors.secrets import secrets_here

        submitted = submission.submit(address, command, job, config)
        print(submitted, flush=True)
        if secrets_here():
            print(f"Set here, but not shipped: {', '.join(secrets_here())}. The job has what is set where ray start ran.", file=sys.stderr)
        if no_wait:
            return
        try:
            code, sentence = submission.follow(address, submitted, lambda text: print(text, end="", flush=True))
        except KeyboardInterrupt:
            print(submission.goes_on(address, submitted), file=sys.stderr)
            raise typer.Exit(130) from None
        if sentence:
            print(sentence, file=sys.stderr)
        raise typer.Exit(code)


@app.command()
def cancel(submitted: Annotated[str, typer.Argument(metavar="ID", help="What submit printed first.")], address: Head) -> None:
    """Stop a submitted job. What is finished stays; the same submit goes on."""
    with _user_errors():
        from actors import submission

        print(submission.cancel(address, submitted))


if __name__ == "__main__":
    app()
