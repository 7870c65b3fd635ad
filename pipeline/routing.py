"""Fitting a router: principal components, then KMeans by cuML on a GPU, by scikit-learn on a CPU, turned into two tensors.

Many restarts cheaply: they run on a sample, in heats; the winner of each heat goes a little further over all tokens, and
the best of those to the end. In 24 fits of 16 clusters to 65,536 tokens that ended 1.3 % below to 0.08 % above
the inertia of 10 restarts over all tokens (0.35 % below on average), in half the time. A round's runs do not need each other:
`Tournament` says which they are, `play` makes some of them, on whichever actor.

Shapes: N tokens, C columns (in features), D principal components, E experts (clusters).
"""

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline import principal

# Tokens for each cluster, in the sample: a GPU takes no longer over four times as many.
SAMPLED = {"cpu": 512, "cuda": 2048}
STARTS = 3  # on the sample, for each restart asked for
HEATS, FINALISTS = 6, 2
FIRST_STEPS = 2  # iterations over all tokens before the finalists are chosen
LAST_STEPS = 300  # both libraries' own limit


@dataclass
class Routing:
    """A fitted router and what the fit did with the calibration tokens.

    weight_EC, bias_E: float32, see `modeling_sparse_expansion.Router`. labels_N: int32, the fit's own cluster of every
    token. inertia: sum of squared distances to the centroids, in the space that was clustered.
    """

    weight_EC: Tensor
    bias_E: Tensor
    labels_N: Tensor
    inertia: float


@dataclass(frozen=True)
class Entry:
    """A KMeans run that is to be made: from `restarts` starts of a seed, of which the best is kept, or from centroids."""

    seed: int = 0
    restarts: int = 1
    start_ED: Tensor | None = None
    steps: int = LAST_STEPS
    sampled: bool = False  # on the sample alone


@dataclass
class Run:
    """A KMeans run that was made, on the CPU; `labels_N` int32."""

    centroids_ED: Tensor
    labels_N: Tensor
    inertia: float


class Tournament:
    """Which KMeans runs a router of `tokens` tokens takes, round by round; or, where there are so few tokens or restarts that
    sampling would save nothing, every restart over all tokens.

    entries: the round to be played; empty when `winner` is known.
    """

    def __init__(self, tokens: int, num_clusters: int, restarts: int, seed: int, device_type: str):
        self.tokens, self.seed = tokens, seed
        self.sampled = SAMPLED[device_type] * num_clusters
        self.winner: Run | None = None
        if restarts <= FINALISTS or 2 * STARTS * self.sampled > tokens:
            self.entries = [Entry(seed + restart) for restart in range(restarts)]
            self._following = []
        else:
            self.entries = [Entry(seed + heat, -(-STARTS * restarts // HEATS), sampled=True) for heat in range(HEATS)]
            self._following = [(HEATS, FIRST_STEPS), (FINALISTS, LAST_STEPS)]  # how many go on, and how far

    def advance(self, runs: Sequence[Run]) -> None:
        """`runs`: the round's, in the order of `entries`."""
        ranked = sorted(runs, key=lambda run: run.inertia)
        if not self._following:
            self.entries, self.winner = [], ranked[0]
            return
        kept, steps = self._following.pop(0)
        self.entries = [Entry(start_ED=run.centroids_ED, steps=steps) for run in ranked[:kept]]

    def sample(self, tokens_ND: Tensor) -> Tensor:
        places = torch.randperm(self.tokens, generator=torch.Generator().manual_seed(self.seed))[:self.sampled]
        return tokens_ND[places.to(tokens_ND.device)]


def play(tournament: Tournament, entries: Sequence[Entry], tokens_ND: Tensor, num_clusters: int) -> list[Run]:
    """Make some of a round's runs over all tokens, as they were projected. On a CPU, one run a thread."""
    sample_ND = tournament.sample(tokens_ND) if any(entry.sampled for entry in entries) else tokens_ND

    def make(entry: Entry) -> Run:
        return kmeans(sample_ND if entry.sampled else tokens_ND, num_clusters, entry.seed, entry.restarts, entry.start_ED, entry.steps)

    if _has_cuml(tokens_ND.device):
        kmeans = _kmeans_cuml
        return [make(entry) for entry in entries]
    from threadpoolctl import threadpool_limits

    kmeans = _kmeans_sklearn
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(torch.get_num_threads()) as threads:
        return list(threads.map(make, entries))


def fit(tokens_NC: Tensor, num_clusters: int, components: int | None, restarts: int, seed: int, sizes: Sequence[int] | None = None,
        device: torch.device | None = None) -> Routing:
    """Cluster tokens that all lie here: PCA to `components` dimensions (None: no PCA), then KMeans, as good as the best of
    `restarts` runs. sizes: tokens of each window group. device: that computes, if it is not the tokens' own.

    Euclidean KMeans, as published, started by k-means++. The same bits as when several actors fit it together.
    """
    device, sizes = device or tokens_NC.device, sizes or [len(tokens_NC)]
    if num_clusters == 1:
        return one_cluster(len(tokens_NC), tokens_NC.shape[1], device)
    mean_C = axes_DC = None
    if components is not None:
        mean_C = principal.mean_of([principal.token_sums(tokens_NC, sizes, device)], len(tokens_NC))
        parts = principal.scatter_parts(tokens_NC, sizes, 0, len(sizes), mean_C, device)
        axes_DC = principal.leading_axes(parts, len(sizes), len(tokens_NC), components, seed)
    tokens_ND = points(tokens_NC, sizes, mean_C, axes_DC, device)
    tournament = Tournament(len(tokens_NC), num_clusters, restarts, seed, device.type)
    while tournament.entries:
        tournament.advance(play(tournament, tournament.entries, tokens_ND, num_clusters))
    return as_routing(mean_C, axes_DC, tournament.winner, device)


def points(tokens_NC: Tensor, sizes: Sequence[int], mean_C: Tensor | None, axes_DC: Tensor | None, device: torch.device) -> Tensor:
    """What KMeans clusters (N, D): the tokens in their principal components, or as they are."""
    if axes_DC is None:
        return tokens_NC.to(device).float()
    return principal.project(tokens_NC, sizes, mean_C, axes_DC, device)


def as_routing(mean_C: Tensor | None, axes_DC: Tensor | None, best: Run, device: torch.device) -> Routing:
    """Fold mean, components and centroids into one linear classifier, in float64."""
    weight_EC = centroids_ED = best.centroids_ED.to(device).double()
    bias_E = -0.5 * centroids_ED.square().sum(1)
    if axes_DC is not None:
        weight_EC = centroids_ED @ axes_DC.double()
        bias_E -= weight_EC @ mean_C.double()
    return Routing(weight_EC.float(), bias_E.float(), best.labels_N.to(device), best.inertia)


def one_cluster(tokens: int, columns: int, device: torch.device) -> Routing:
    """The router of a single expert."""
    labels_N = torch.zeros(tokens, dtype=torch.int32, device=device)
    return Routing(torch.zeros(1, columns, device=device), torch.zeros(1, device=device), labels_N, 0.0)


def _has_cuml(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    try:
        import cuml  # noqa: F401
    except ImportError:
        return False
    return True


def _kmeans_sklearn(tokens_ND: Tensor, num_clusters: int, seed: int, restarts: int, start: Tensor | None, steps: int) -> Run:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    # scikit-learn sums over its threads in the order in which they finish, so a run has one thread and several runs share
    # the cores: the same bits every time, and faster. OpenMP's limit belongs to the thread that sets it.
    with threadpool_limits(1, user_api="openmp"), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct tokens than clusters: empty experts are reported
        init = "k-means++" if start is None else start.cpu().numpy()
        fitted = KMeans(num_clusters, init=init, n_init=restarts, max_iter=steps, random_state=seed).fit(tokens_ND.cpu().numpy())
    to_tensor = lambda array: torch.from_numpy(np.ascontiguousarray(array))  # noqa: E731
    return Run(to_tensor(fitted.cluster_centers_), to_tensor(fitted.labels_).int(), float(fitted.inertia_))


def _kmeans_cuml(tokens_ND: Tensor, num_clusters: int, seed: int, restarts: int, start: Tensor | None, steps: int) -> Run:
    from cuml import KMeans

    init = "k-means++" if start is None else start.to(tokens_ND.device)
    fitted = KMeans(n_clusters=num_clusters, init=init, n_init=restarts, max_iter=steps, random_state=seed, output_type="cupy").fit(tokens_ND)
    to_tensor = lambda array: torch.as_tensor(array, device=tokens_ND.device)  # noqa: E731
    return Run(to_tensor(fitted.cluster_centers_).cpu(), to_tensor(fitted.labels_).int().cpu(), float(fitted.inertia_))
