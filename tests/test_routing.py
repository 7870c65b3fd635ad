"""Routers against scikit-learn: the folded classifier is PCA, centring and nearest centroid."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from pipeline import routing
from pipeline.modeling_sparse_expansion import Router


def blobs(clusters: int, tokens: int, columns: int, seed: int) -> torch.Tensor:
    """Clustered tokens with a large common offset, as hidden states have."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, columns, generator=generator) * 3
    labels = torch.randint(clusters, (tokens,), generator=generator)
    return centres[labels] + torch.randn(tokens, columns, generator=generator) + 10 * torch.randn(columns, generator=generator)


def router_of(fitted: routing.Routing) -> Router:
    router = Router(*fitted.weight_EC.shape)
    router.load_state_dict({"weight": fitted.weight_EC, "bias": fitted.bias_E})
    return router


@pytest.mark.parametrize("components", [None, 6])
def test_routes_new_tokens_to_the_nearest_centroid(components):
    tokens_NC, new_NC = blobs(5, 3000, 24, 0).split([2000, 1000])
    fitted = routing.fit(tokens_NC, 5, components, restarts=3, seed=0)
    pca = PCA(components, svd_solver="full").fit(tokens_NC.double().numpy()) if components else None
    project = (lambda tokens: pca.transform(tokens.double().numpy())) if pca else (lambda tokens: tokens.double().numpy())
    best = min((KMeans(5, n_init=1, random_state=seed).fit(project(tokens_NC)) for seed in range(3)), key=lambda kmeans: kmeans.inertia_)
    assert fitted.inertia == pytest.approx(best.inertia_, rel=1e-4)
    distances = ((project(new_NC)[:, None, :] - best.cluster_centers_[None]) ** 2).sum(-1)
    mine = router_of(fitted)(new_NC).numpy()
    to_theirs = np.array([np.bincount(distances.argmin(1)[mine == cluster]).argmax() for cluster in range(5)])  # clusters have no order
    assert sorted(to_theirs) == list(range(5))
    nearest_two = np.sort(distances, axis=1)[:, :2]
    clear = nearest_two[:, 1] - nearest_two[:, 0] > 1e-3 * nearest_two[:, 1]
    assert (to_theirs[mine] == distances.argmin(1))[clear].all() and clear.mean() > 0.95


def test_labels_are_the_fits_own_and_agree_with_the_router():
    tokens_NC = blobs(4, 3000, 16, 2)
    fitted = routing.fit(tokens_NC, 4, 4, restarts=2, seed=0)
    assert (router_of(fitted)(tokens_NC) == fitted.labels_N).float().mean() > 0.999


def test_the_best_restart_is_kept():
    tokens_NC = blobs(12, 1500, 8, 3)
    one, many = (routing.fit(tokens_NC, 12, None, restarts, seed=0).inertia for restarts in (1, 8))
    assert many <= one
    assert many == pytest.approx(min(KMeans(12, n_init=1, random_state=seed).fit(tokens_NC.numpy()).inertia_ for seed in range(8)), rel=1e-5)


def test_restarts_on_a_sample_are_as_good_as_over_all_tokens():
    """Enough tokens for the tournament, and clusters on which a single start may end high."""
    tokens_NC = blobs(40, 16000, 12, 9)
    runs = [KMeans(4, n_init=1, random_state=seed).fit(tokens_NC.numpy()) for seed in range(10)]
    assert 2 * routing.STARTS * routing.SAMPLED["cpu"] * 4 <= len(tokens_NC)
    fitted = routing.fit(tokens_NC, 4, None, restarts=10, seed=0)
    best, worst = min(run.inertia_ for run in runs), max(run.inertia_ for run in runs)
    assert fitted.inertia <= 1.001 * best < worst
    distances = torch.cdist(tokens_NC.double(), fitted.weight_EC.double()) ** 2
    assert fitted.inertia == pytest.approx(float(distances.gather(1, fitted.labels_N.long()[:, None]).sum()), rel=1e-3)


@pytest.mark.parametrize("tokens", [2000, 20000])  # every restart over all tokens, and the tournament on a sample
def test_same_seed_same_bits_however_many_runs_at_a_time(tokens):
    tokens_NC = blobs(6, tokens, 32, 4)
    before = torch.get_num_threads()
    try:
        fits = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            fits.append(routing.fit(tokens_NC, 6, None, restarts=4, seed=5))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(getattr(fits[0], name), getattr(fits[1], name)) for name in ("weight_EC", "bias_E", "labels_N"))


def test_no_global_seed_is_touched():
    np.random.seed(1)
    torch.manual_seed(1)
    expected = np.random.RandomState(1).rand(), torch.rand(1, generator=torch.Generator().manual_seed(1))
    routing.fit(blobs(3, 200, 8, 5), 3, 4, restarts=2, seed=9)
    assert np.random.rand() == expected[0] and torch.equal(torch.rand(1), expected[1])


def test_one_cluster_is_one_expert():
    fitted = routing.fit(blobs(3, 100, 8, 6), 1, 4, restarts=1, seed=0)
    assert (router_of(fitted)(torch.randn(20, 8)) == 0).all() and (fitted.labels_N == 0).all()


def test_fewer_distinct_tokens_than_clusters_leaves_empty_ones():
    tokens_NC = torch.randn(2, 8, generator=torch.Generator().manual_seed(7)).repeat(50, 1)
    fitted = routing.fit(tokens_NC, 4, 2, restarts=1, seed=0)
    assert fitted.weight_EC.isfinite().all() and len(fitted.labels_N.unique()) == 2
    assert len(router_of(fitted)(tokens_NC[:2]).unique()) == 2
