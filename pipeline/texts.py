"""Text by name or path: the documents behind --dataset and --eval-dataset.

A hub data set is read through `datasets` (honouring HF_HUB_OFFLINE and the cache directory); a file by its ending.
"""

from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files import sha256

FILE_ENDINGS = (".txt", ".jsonl", ".json.gz", ".jsonl.gz", ".json", ".parquet")
HUB_SETS = ("wikitext2", "c4", "ptb")
KNOWN = f"{', '.join(HUB_SETS)}, self, a .npy file of token windows, a {', '.join(FILE_ENDINGS)} file, or a directory saved by datasets"


@dataclass
class Text:
    """Documents, how they are joined into one stream, and where they come from (name, split, revision or hash)."""

    documents: list[str]
    separator: str
    source: str


def read_text(name: str, split: str, option: str, cache_dir: str | None) -> Text:
    """split: "train" or "test". Local files have no splits. Raises UserError naming `option`."""
    if name in HUB_SETS:
        return _read_hub(name, split, option, cache_dir)
    path = Path(name)
    if path.is_dir():
        return _read_saved(path, split, option)
    if not path.is_file():
        known = "" if path.suffix or "/" in name else f" and no known data set ({KNOWN})"
        raise UserError(f"{option} {name} is no file on this machine{known}.")
    if path.stat().st_size == 0:
        raise UserError(f"{option} {name} is empty.")
    if name.endswith(".txt"):
        try:
            documents = [path.read_text(encoding="utf-8")]
        except UnicodeDecodeError as error:
            raise UserError(f"{option} {name} is not UTF-8 text: {error}.") from None
    elif name.endswith((".jsonl", ".json.gz", ".jsonl.gz", ".json")):
        documents = _column(_load("json", path, option), option, name)
    elif name.endswith(".parquet"):
        documents = _column(_load("parquet", path, option), option, name)
    else:
        raise UserError(f"{option} {name} has an ending that is not known; allowed are .npy, {', '.join(FILE_ENDINGS)}.")
    return Text(documents, "\n\n", f"{path.name} (sha256 {sha256(path)[:12]})")


def _read_hub(name: str, split: str, option: str, cache_dir: str | None) -> Text:
    import datasets

    test = split == "test"
    requests = {
        "wikitext2": dict(path="Salesforce/wikitext", name="wikitext-2-raw-v1", split=split),
        "ptb": dict(path="ptb-text-only/ptb_text_only", revision="refs/convert/parquet", split=split),
        "c4": dict(path="allenai/c4", split="validation" if test else "train", data_files={
            "validation" if test else "train": f"en/c4-{'validation.00000-of-00008' if test else 'train.00000-of-01024'}.json.gz"}),
    }
    try:
        data = datasets.load_dataset(**requests[name], cache_dir=cache_dir)
    except Exception as error:  # datasets raises a different class for every way of not finding something
        raise UserError(f"{option} {name} could not be loaded through datasets ({type(error).__name__}: {' '.join(str(error).split())[:200]}); "
                        "offline it must be in the cache, or give a local file.") from None
    documents = data["sentence" if name == "ptb" else "text"]
    if name == "c4" and test:
        documents = documents[:1100]  # as published
    separator = {"wikitext2": "\n\n" if test else " ", "ptb": " ", "c4": " "}[name]
    return Text(list(documents), separator, f"{requests[name]['path']} {requests[name].get('name', '')} {requests[name]['split']} "
                f"(revision {_revision(data)})".replace("  ", " "))


def _revision(data) -> str:
    """The commit of a hub data set, as datasets' cache writes it into its paths, or else its fingerprint."""
    for file in data.cache_files:
        for part in Path(file["filename"]).parts:
            if len(part) == 40 and set(part) <= set("0123456789abcdef"):
                return part
    return data._fingerprint


def _load(kind: str, path: Path, option: str):
    import datasets

    try:
        return datasets.load_dataset(kind, data_files=str(path), split="train")
    except Exception as error:  # as above
        cause = error.__cause__ or error
        raise UserError(f"{option} {path} is damaged: {' '.join(str(cause).split())[:200]}.") from None


def _read_saved(path: Path, split: str, option: str) -> Text:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:
        raise UserError(f"{option} {path} is no directory saved by datasets: {' '.join(str(error).split())[:200]}.") from None
    source = path.name
    if isinstance(data, datasets.DatasetDict):
        wanted = next((known for known in (split, "validation", "train") if known in data), None)
        if wanted is None:
            raise UserError(f"{option} {path} has the splits {', '.join(data)}; expected {split}.")
        data, source = data[wanted], f"{path.name} {wanted}"
    return Text(_column(data, option, str(path)), "\n\n", f"{source} (fingerprint {data._fingerprint})")


def _column(data, option: str, name: str) -> list[str]:
    if "text" not in data.column_names:
        raise UserError(f"{option} {name} has the columns {', '.join(data.column_names)}; one named text is needed.")
    return [document for document in data["text"] if document]
