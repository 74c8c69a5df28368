"""Cluster centres of a language model's token embeddings, towards which a policy's tokens are drawn (eq. 5, L_cos)."""

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from dt.errors import UserError

CLUSTERS = 1000  # the original's `--gpt_kmeans`


def cluster_centres(token_embedding: Tensor, count: int = CLUSTERS, seed: int = 0) -> Tensor:
    """k-means by cosine: token embeddings (V, d) → centres (count, d), the same for the same seed.

    Differs from the original: the embeddings are scaled to length 1 before, so centres are means of directions. Only a
    centre's direction is ever used. Raises UserError when there are fewer tokens than clusters.
    """
    from sklearn.cluster import KMeans

    check_count(count, len(token_embedding))
    directions = F.normalize(token_embedding.detach().cpu().float(), dim=1).numpy()
    with threadpool_limits(1):  # with several threads, sums differ by the order in which they finish
        means = KMeans(count, n_init=1, max_iter=100, random_state=seed).fit(directions).cluster_centers_
    return torch.from_numpy(means).float().contiguous()


def check_count(clusters: int, tokens: int) -> None:
    """Raises UserError when there are fewer tokens than clusters."""
    if tokens < clusters:
        raise UserError(
            f"{clusters} clusters of {tokens} token embeddings do not exist: "
            "ask for fewer clusters or a larger vocabulary"
        )
