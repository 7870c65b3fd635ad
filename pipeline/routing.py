"""Fitting a router: principal components, then KMeans by cuML on a GPU, by scikit-learn on a CPU, turned into two tensors.

Many restarts cheaply: they run on a sample, in heats; the winner of each heat goes a little further over all tokens, and
the best of those to the end. In 24 fits of 16 clusters to 65,536 tokens that ended 1.3 % below to 0.08 % above
the inertia of 10 restarts over all tokens (0.35 % below on average), in half the time.

Shapes: N tokens, C columns (in features), D principal components, E experts (clusters).
"""

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.principal import principal_axes, project

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


@dataclass
class _Run:
    """One KMeans run; `labels_N` int32."""

    centroids_ED: Tensor
    labels_N: Tensor
    inertia: float


# A library's KMeans over some tokens: from `restarts` starts of a seed, of which the best is kept, or from centroids.
KMeans = Callable[..., _Run]


def fit(tokens_NC: Tensor, num_clusters: int, components: int | None, restarts: int, seed: int) -> Routing:
    """Cluster the tokens: PCA to `components` dimensions (None: no PCA), then KMeans, as good as the best of `restarts` runs.

    Euclidean KMeans, as published, started by k-means++.
    """
    if num_clusters == 1:
        return _one_cluster(tokens_NC)
    mean_C, axes_DC = (None, None) if components is None else principal_axes(tokens_NC, components, seed)
    tokens_ND = tokens_NC.float() if components is None else project(tokens_NC, mean_C, axes_DC)
    if _has_cuml(tokens_NC.device):
        best = _cluster(tokens_ND, num_clusters, restarts, seed, _kmeans_cuml, map)
    else:
        from threadpoolctl import threadpool_limits

        with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(torch.get_num_threads()) as threads:
            best = _cluster(tokens_ND, num_clusters, restarts, seed, _kmeans_sklearn, threads.map)
    return _as_routing(mean_C, axes_DC, best)


def _cluster(tokens_ND: Tensor, num_clusters: int, restarts: int, seed: int, kmeans: KMeans, map_over: Callable) -> _Run:
    """The tournament; or, where there are so few tokens or restarts that it would save nothing, every restart over all tokens."""
    sampled = SAMPLED[tokens_ND.device.type] * num_clusters
    if restarts <= FINALISTS or 2 * STARTS * sampled > len(tokens_ND):
        return min(map_over(lambda restart: kmeans(tokens_ND, num_clusters, seed=seed + restart), range(restarts)), key=_inertia)
    places = torch.randperm(len(tokens_ND), generator=torch.Generator().manual_seed(seed))[:sampled]
    sample_ND = tokens_ND[places.to(tokens_ND.device)]
    each = -(-STARTS * restarts // HEATS)
    runs = list(map_over(lambda heat: kmeans(sample_ND, num_clusters, seed=seed + heat, restarts=each), range(HEATS)))
    for steps, kept in ((FIRST_STEPS, FINALISTS), (LAST_STEPS, 1)):
        runs = list(map_over(lambda run, steps=steps: kmeans(tokens_ND, num_clusters, start=run.centroids_ED, steps=steps), runs))
        runs = sorted(runs, key=_inertia)[:kept]
    return runs[0]


def _inertia(run: _Run) -> float:
    return run.inertia


def _as_routing(mean_C: Tensor | None, axes_DC: Tensor | None, best: _Run) -> Routing:
    """Fold mean, components and centroids into one linear classifier, in float64."""
    weight_EC = centroids_ED = best.centroids_ED.double()
    bias_E = -0.5 * centroids_ED.square().sum(1)
    if axes_DC is not None:
        weight_EC = centroids_ED @ axes_DC.double()
        bias_E -= weight_EC @ mean_C.double()
    return Routing(weight_EC.float(), bias_E.float(), best.labels_N, best.inertia)


def _one_cluster(tokens_NC: Tensor) -> Routing:
    columns, device = tokens_NC.shape[1], tokens_NC.device
    labels_N = torch.zeros(len(tokens_NC), dtype=torch.int32, device=device)
    return Routing(torch.zeros(1, columns, device=device), torch.zeros(1, device=device), labels_N, 0.0)


def _has_cuml(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    try:
        import cuml  # noqa: F401
    except ImportError:
        return False
    return True


def _kmeans_sklearn(tokens_ND: Tensor, num_clusters: int, seed: int = 0, restarts: int = 1, start: Tensor | None = None, steps: int = LAST_STEPS) -> _Run:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    # scikit-learn sums over its threads in the order in which they finish, so a run has one thread and several runs share
    # the cores: the same bits every time, and faster. OpenMP's limit belongs to the thread that sets it.
    with threadpool_limits(1, user_api="openmp"), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct tokens than clusters: empty experts are reported
        init = "k-means++" if start is None else start.cpu().numpy()
        fitted = KMeans(num_clusters, init=init, n_init=restarts, max_iter=steps, random_state=seed).fit(tokens_ND.cpu().numpy())
    to_tensor = lambda array: torch.from_numpy(np.ascontiguousarray(array)).to(tokens_ND.device)  # noqa: E731
    return _Run(to_tensor(fitted.cluster_centers_), to_tensor(fitted.labels_).int(), float(fitted.inertia_))


def _kmeans_cuml(tokens_ND: Tensor, num_clusters: int, seed: int = 0, restarts: int = 1, start: Tensor | None = None, steps: int = LAST_STEPS) -> _Run:
    from cuml import KMeans

    init = "k-means++" if start is None else start
    fitted = KMeans(n_clusters=num_clusters, init=init, n_init=restarts, max_iter=steps, random_state=seed, output_type="cupy").fit(tokens_ND)
    to_tensor = lambda array: torch.as_tensor(array, device=tokens_ND.device)  # noqa: E731
    return _Run(to_tensor(fitted.cluster_centers_).clone(), to_tensor(fitted.labels_).int(), float(fitted.inertia_))
