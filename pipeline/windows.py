"""Token windows: what the model is calibrated on and what it is judged on.

Shapes: W windows, L tokens of a window.
"""

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.errors import UserError
from pipeline.files import sha256
from pipeline.texts import Text, read_text
from pipeline.weights import save_tensors

TOKENS_PER_GROUP = {"cpu": 4096, "cuda": 16384}  # windows run through a block in groups of about this many tokens
HELD_OUT = 0.1  # of a local file, from its end, when it is to serve for calibration and evaluation both
C4_EVAL_WINDOWS = 256  # as published


@dataclass
class Windows:
    """ids_WL: int64. source: data set, split, revision or hash, for people."""

    ids_WL: Tensor
    source: str

    @property
    def count(self) -> int:
        return self.ids_WL.shape[0]

    @property
    def length(self) -> int:
        return self.ids_WL.shape[1]

    def groups(self, device_type: str) -> list[Tensor]:
        """Groups of whole windows. Their shapes depend on nothing but the window length and the kind of device, so that
        results do not depend on who runs which group."""
        return list(self.ids_WL.split(max(1, TOKENS_PER_GROUP[device_type] // self.length)))

    def digest(self) -> str:
        shape = repr(tuple(self.ids_WL.shape)).encode()
        return hashlib.sha256(shape + self.ids_WL.contiguous().numpy().tobytes()).hexdigest()

    def save(self, path: Path) -> None:
        save_tensors({"ids": self.ids_WL}, path, {"source": self.source})

    @classmethod
    def load(cls, path: Path) -> "Windows":
        """Raises UserError if the file is damaged."""
        try:
            with safe_open(path, framework="pt") as opened:
                return cls(opened.get_tensor("ids"), opened.metadata()["source"])
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged: {error}.") from None


@dataclass(frozen=True)
class Request:
    """What to cut: `length` tokens a window (None: the file's own), `count` windows (None: all there are).

    test: evaluation windows (consecutive, from the data set's test split) or calibration windows (random, from its train
    split). held_out: of a local file, use only its last tenth (test) or all but it, since both kinds come from it.
    """

    name: str
    test: bool
    length: int | None
    count: int | None
    seed: int
    cache_dir: str | None
    held_out: bool = False

    @property
    def option(self) -> str:
        return "--eval-dataset" if self.test else "--dataset"

    def digest(self) -> str:
        """Of windows that are still to be sampled: together with the model, these fields decide them."""
        return hashlib.sha256(repr((self.name, self.test, self.length, self.count, self.seed)).encode()).hexdigest()

    @property
    def size_option(self) -> str:
        return "--eval-size" if self.test else "--dataset-size"


def read_windows(request: Request, tokenizer, vocabulary: int) -> Windows:
    """Windows of a named data set, a local file, or a .npy of token windows. Raises UserError for what cannot be had.

    tokenizer: called only for text, with no arguments, to get the tokenizer.
    """
    if request.name.endswith(".npy"):
        return _from_array(request, vocabulary)
    text = read_text(request.name, "test" if request.test else "train", request.option, request.cache_dir)
    if request.name == "c4" and not request.test:
        return _from_long_documents(text, request, tokenizer())
    stream = _tokens(text, tokenizer())
    source = text.source
    if request.held_out:
        cut = int(len(stream) * (1 - HELD_OUT))
        stream = stream[cut:] if request.test else stream[:cut]
        source += f", {'last' if request.test else 'all but the last'} {HELD_OUT:.0%} of its tokens"
    windows = _consecutive(stream, request) if request.test else _random(stream, request)
    return Windows(windows, source)


def _tokens(text: Text, tokenizer) -> Tensor:
    joined = text.separator.join(text.documents)
    return torch.tensor(tokenizer(joined, verbose=False)["input_ids"], dtype=torch.long)


def _need(request: Request, needed: int, had: int) -> None:
    if had < needed:
        raise UserError(f"{request.option} {request.name} holds {had} tokens, but {needed} are needed for {request.count or 1} windows of "
                        f"{request.length}; give more text, a smaller {request.size_option} or a smaller --seq-len.")


def _random(stream: Tensor, request: Request) -> Tensor:
    """Windows at random places of one stream, as published (they may overlap)."""
    # As many tokens as the windows hold: fewer could still be cut, but from the same text over and over.
    _need(request, request.count * request.length + 1, len(stream))
    generator = random.Random(request.seed)
    starts = [generator.randint(0, len(stream) - request.length - 1) for _ in range(request.count)]
    return torch.stack([stream[start:start + request.length] for start in starts])


def _consecutive(stream: Tensor, request: Request) -> Tensor:
    """Non-overlapping windows from the start; what is left over at the end is dropped."""
    limit = request.count or (C4_EVAL_WINDOWS if request.name == "c4" else None)
    _need(request, (request.count or 1) * request.length, len(stream))
    windows = stream[:len(stream) // request.length * request.length].view(-1, request.length)
    return windows[:limit]


def _from_long_documents(text: Text, request: Request, tokenizer) -> Windows:
    """Each window from a random document longer than a window, as published for C4."""
    generator = random.Random(request.seed)
    windows, tries = [], 0
    while len(windows) < request.count:
        tries += 1
        if tries > 1000 * request.count:
            raise UserError(f"{request.option} {request.name} has too few documents longer than --seq-len {request.length}; give a smaller one.")
        document = text.documents[generator.randint(0, len(text.documents) - 1)]
        if len(document) <= request.length:  # a token is at least a character, nearly always more
            continue
        ids = tokenizer(document, verbose=False)["input_ids"]
        if len(ids) > request.length:
            start = generator.randint(0, len(ids) - request.length - 1)
            windows.append(torch.tensor(ids[start:start + request.length]))
    return Windows(torch.stack(windows), text.source)


def _from_array(request: Request, vocabulary: int) -> Windows:
    path = Path(request.name)
    if not path.is_file():
        raise UserError(f"{request.option} {path} is no file on this machine.")
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{request.option} {path} is damaged: {error}.") from None
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer) or 0 in array.shape or array.shape[1] < 2:
        raise UserError(f"{request.option} {path} holds {array.dtype} of shape {array.shape}; integer token ids of shape (windows, tokens) are needed.")
    if array.min() < 0 or array.max() >= vocabulary:
        raise UserError(f"{request.option} {path} holds the token id {array.max() if array.max() >= vocabulary else array.min()}; "
                        f"the model's go from 0 to {vocabulary - 1}.")
    if request.length is not None and request.length != array.shape[1]:
        raise UserError(f"--seq-len is {request.length}, but the windows of {request.option} {path} have {array.shape[1]} tokens.")
    source = f"{path.name} (sha256 {sha256(path)[:12]})"
    if request.held_out:
        cut = int(len(array) * (1 - HELD_OUT))
        array = array[cut:] if request.test else array[:cut]
        source += f", {'last' if request.test else 'all but the last'} {HELD_OUT:.0%} of its windows"
    if len(array) == 0 or request.count is not None and len(array) < request.count:
        raise UserError(f"{request.size_option} is {request.count or 1}, but {path} holds {len(array)} windows for it.")
    return Windows(torch.from_numpy(array[:request.count].astype(np.int64)), source)
