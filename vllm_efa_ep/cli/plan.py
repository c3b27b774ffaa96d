"""``vllm-efa-ep plan``: the memory of a rank, before anything is allocated."""

import argparse

from vllm_efa_ep.errors import ConfigurationError

NAME = "plan"
HELP = "print the memory a rank will take, its arena and its received rows, without allocating it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--ranks", type=int, required=True, help="ranks of the world")
    parser.add_argument("--ranks-per-node", type=int, default=8, help="ranks that share memory (default 8)")
    parser.add_argument("--tokens", type=int, required=True, help="most tokens per rank and round")
    parser.add_argument("--hidden", type=int, required=True, help="hidden size")
    parser.add_argument("--experts", type=int, required=True, help="experts of the model")
    parser.add_argument("--top-k", type=int, required=True, help="experts per token")
    parser.add_argument("--dtype", default="bfloat16", help="activation dtype on dispatch (default bfloat16)")
    parser.add_argument("--scales", type=int, default=0, help="float32 block scales per token (default 0)")
    parser.add_argument(
        "--layout",
        choices=("per_token", "per_expert"),
        default="per_token",
        help="of received rows: per_token (default, efa_ep_high_throughput) or per_expert "
        "(efa_ep_low_latency)",
    )
    parser.add_argument("--channels", type=int, default=1, help="rounds in flight, 2 with dual-batch overlap")


def run(options: argparse.Namespace) -> int:
    """Print the plan.

    Raises:
        ConfigurationError: A value is out of bounds.

    """
    import torch

    from vllm_efa_ep.all_to_all import AllToAllConfig

    dtype = getattr(torch, options.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigurationError(f"--dtype {options.dtype} is no torch dtype; use for example float8_e4m3fn")
    config = AllToAllConfig(
        hidden_size=options.hidden,
        num_experts=options.experts,
        top_k=options.top_k,
        max_tokens_per_rank=options.tokens,
        dtype=dtype,
        scale_columns=options.scales,
        layout=options.layout,
        channels=options.channels,
    )
    print(config.memory_plan(options.ranks, options.ranks_per_node))
    return 0
