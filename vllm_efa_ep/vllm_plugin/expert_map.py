"""Agreement with vLLM about which rank owns which expert."""

import torch

from vllm_efa_ep.errors import ConfigurationError
from vllm_efa_ep.placement import experts_of


def check_expert_map(expert_map: torch.Tensor | None, owners: tuple[int, ...], rank: int) -> None:
    """Compare our placement with vLLM's, so that a disagreement is an error and not a wrong answer.

    Args:
        expert_map: vLLM's map from expert to local index, -1 for experts of other ranks; None if the
            expert kernel has no use for it.
        owners: Owner rank of every expert.
        rank: This rank.

    Raises:
        ConfigurationError: They differ.

    """
    if expert_map is None:
        return
    theirs = (expert_map >= 0).nonzero().flatten().tolist()
    ours = list(experts_of(owners, rank))
    if theirs != ours:
        raise ConfigurationError(
            f"vLLM placed experts {theirs} on EP rank {rank}, vllm-efa-ep expects {ours}; "
            "use --expert-placement-strategy linear"
        )
