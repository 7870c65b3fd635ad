"""The plain way, as published: one window, one expert and one column at a time, each restart over all tokens.

Shapes: W windows, L tokens of a window, H hidden size, N tokens, C columns (in features).
"""

import torch
from torch import Tensor, nn

from pipeline.architectures import Architecture
from pipeline.blocks import BlockwiseModel
from pipeline.config import Job
from tests import textbook


def capture(model: BlockwiseModel, block: nn.Module, index: int, hidden_WLH: Tensor, path: str) -> Tensor:
    """The inputs (N, C) of one linear: a whole pass, window by window."""
    found = []
    hook = block.get_submodule(path).register_forward_pre_hook(lambda _, args: found.append(args[0].reshape(-1, args[0].shape[-1])))
    for window_LH in hidden_WLH:
        model.run(block, index, window_LH[None])
    hook.remove()
    return torch.cat(found)


def fit(tokens_NC: Tensor, clusters: int, components: int, restarts: int) -> Tensor:
    """The labels (N) of a full PCA and of `restarts` KMeans runs over all tokens, by cuML on a GPU, else by scikit-learn."""
    if tokens_NC.is_cuda:
        from cuml import PCA, KMeans

        fitted = PCA(n_components=components, output_type="cupy").fit(tokens_NC.float())
        labels = KMeans(n_clusters=clusters, n_init=restarts, random_state=0, output_type="cupy").fit(fitted.transform(tokens_NC.float())).labels_
        return torch.as_tensor(labels, device=tokens_NC.device)
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    tokens = PCA(components).fit_transform(tokens_NC.float().numpy())
    return torch.from_numpy(KMeans(clusters, n_init=restarts, random_state=0).fit(tokens).labels_)


def hessians(tokens_NC: Tensor, labels_N: Tensor, experts: int, length: int) -> list[Tensor]:
    """Each expert's (C, C), window by window as running means."""
    totals = [torch.zeros(tokens_NC.shape[1], tokens_NC.shape[1], device=tokens_NC.device) for _ in range(experts)]
    seen = [0] * experts
    for part_NC, part_N in zip(tokens_NC.split(length), labels_N.split(length)):
        for expert in range(experts):
            own_NC = part_NC[part_N == expert].float()
            if len(own_NC):
                totals[expert] *= seen[expert] / (seen[expert] + len(own_NC))
                seen[expert] += len(own_NC)
                own_NC = (2 / seen[expert]) ** 0.5 * own_NC
                totals[expert] += own_NC.T @ own_NC
    return totals


def expand_block(model: BlockwiseModel, block: nn.Module, index: int, hidden_WLH: Tensor, architecture: Architecture, job: Job) -> Tensor:
    """One block from its inputs to its outputs."""
    pattern, experts, length = job.pattern, job.num_clusters, hidden_WLH.shape[1]
    labels, weights = {}, {}
    for group in architecture.router_groups:
        tokens_NC = capture(model, block, index, hidden_WLH, group[0])
        labels_N = fit(tokens_NC, experts, tokens_NC.shape[1] // job.pca_reduction_factor, job.kmeans_restarts)
        sums = hessians(tokens_NC, labels_N, experts, length)
        for path in group:
            labels[path] = labels_N
            weights[path] = [textbook.sparsegpt(block.get_submodule(path).weight, one, pattern.fraction, dtype=torch.float32) for one in sums]
    window = 0

    def routed(path: str):
        def hook(module, args, output):
            own = labels[path][window * length:(window + 1) * length]
            for expert in own.unique().tolist():
                output[0, own == expert] = nn.functional.linear(args[0][0, own == expert], weights[path][expert].to(output.dtype), module.bias)
            return output
        return hook

    hooks = [block.get_submodule(path).register_forward_hook(routed(path)) for path in weights]
    outputs = []
    for window, window_LH in enumerate(hidden_WLH):  # noqa: B007 (the hooks read it)
        outputs.append(model.run(block, index, window_LH[None]))
    for hook in hooks:
        hook.remove()
    return torch.cat(outputs)
