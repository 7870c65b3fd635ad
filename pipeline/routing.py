"""Fitting a router: PCA and KMeans by cuML on a GPU, by scikit-learn on a CPU, both turned into the same two tensors.

Shapes: N tokens, C columns (in features), D principal components, E experts (clusters).
"""

import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


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
class _Clusters:
    mean_C: Tensor
    components_DC: Tensor | None
    centroids_ED: Tensor
    labels_N: Tensor
    inertia: float


def fit(tokens_NC: Tensor, num_clusters: int, components: int | None, restarts: int, seed: int) -> Routing:
    """Cluster the tokens: PCA to `components` dimensions (None: no PCA), then the best of `restarts` KMeans runs.

    Euclidean KMeans, as published. scikit-learn starts by k-means++ and restart r from seed + r; cuML by its own k-means||.
    """
    if num_clusters == 1:
        clusters = _one_cluster(tokens_NC)
    elif _has_cuml(tokens_NC.device):
        clusters = _fit_cuml(tokens_NC.float(), num_clusters, components, restarts, seed)
    else:
        clusters = _fit_sklearn(tokens_NC.float(), num_clusters, components, restarts, seed)
    return _as_routing(clusters)


def _as_routing(clusters: _Clusters) -> Routing:
    """Fold mean, components and centroids into one linear classifier, in float64."""
    centroids_ED = clusters.centroids_ED.double()
    components_DC = clusters.components_DC
    weight_EC = centroids_ED if components_DC is None else centroids_ED @ components_DC.double()
    bias_E = -0.5 * centroids_ED.square().sum(1) - weight_EC @ clusters.mean_C.double()
    return Routing(weight_EC.float(), bias_E.float(), clusters.labels_N.int(), clusters.inertia)


def _one_cluster(tokens_NC: Tensor) -> _Clusters:
    columns, device = tokens_NC.shape[1], tokens_NC.device
    zeros = torch.zeros(1, columns, device=device)
    return _Clusters(zeros[0], None, zeros, torch.zeros(len(tokens_NC), dtype=torch.int32, device=device), 0.0)


def load_libraries(device: torch.device) -> None:
    """Import what a fit on this device uses."""
    if not _has_cuml(device):
        import sklearn.cluster
        import sklearn.decomposition  # noqa: F401


def _has_cuml(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    try:
        import cuml  # noqa: F401
    except ImportError:
        return False
    return True


def _fit_sklearn(tokens_NC: Tensor, num_clusters: int, components: int | None, restarts: int, seed: int) -> _Clusters:
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    tokens = tokens_NC.cpu().numpy()
    mean, axes, projected = np.zeros(tokens.shape[1], np.float32), None, tokens
    if components is not None:
        with threadpool_limits(torch.get_num_threads()):  # numpy's threads too are this actor's, whatever Ray set
            pca = PCA(components, svd_solver="covariance_eigh").fit(tokens)
            projected = np.ascontiguousarray(pca.transform(tokens))
        mean, axes = pca.mean_, pca.components_

    def restart(number: int) -> KMeans:
        # scikit-learn sums over its threads in the order in which they finish, so a run has one thread and the restarts share
        # the cores: the same bits every time, and faster. OpenMP's limit belongs to the thread that sets it.
        with threadpool_limits(1, user_api="openmp"), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct tokens than clusters: empty experts are reported
            return KMeans(num_clusters, n_init=1, random_state=seed + number).fit(projected)

    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(torch.get_num_threads()) as threads:
        best = min(threads.map(restart, range(restarts)), key=lambda kmeans: kmeans.inertia_)
    to_tensor = lambda array: torch.from_numpy(np.ascontiguousarray(array)).to(tokens_NC.device)  # noqa: E731
    return _Clusters(
        to_tensor(mean), None if axes is None else to_tensor(axes), to_tensor(best.cluster_centers_), to_tensor(best.labels_),
        float(best.inertia_))


def _fit_cuml(tokens_NC: Tensor, num_clusters: int, components: int | None, restarts: int, seed: int) -> _Clusters:
    from cuml import PCA, KMeans

    to_tensor = lambda array: torch.as_tensor(array, device=tokens_NC.device)  # noqa: E731
    mean_C, axes_DC, projected = torch.zeros(tokens_NC.shape[1], device=tokens_NC.device), None, tokens_NC
    if components is not None:
        pca = PCA(n_components=components, output_type="cupy").fit(tokens_NC)
        mean_C, axes_DC = to_tensor(pca.mean_).reshape(-1), to_tensor(pca.components_)
        projected = to_tensor(pca.transform(tokens_NC)).contiguous()

    kmeans = KMeans(n_clusters=num_clusters, n_init=restarts, random_state=seed, output_type="cupy").fit(projected)
    return _Clusters(mean_C, axes_DC, to_tensor(kmeans.cluster_centers_), to_tensor(kmeans.labels_), float(kmeans.inertia_))
