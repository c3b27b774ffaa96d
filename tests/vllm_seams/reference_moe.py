"""What an MoE layer must compute, in plain float32: no ranks, no formats, no vLLM."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as functional

HIDDEN, INTERMEDIATE = 256, 128
FP8_BLOCK = 128


@dataclass(frozen=True)
class Layer:
    """The experts of one layer, of all ranks.

    Attributes:
        gate_up: ``[experts, 2 * INTERMEDIATE, HIDDEN]``.
        down: ``[experts, HIDDEN, INTERMEDIATE]``.

    """

    gate_up: torch.Tensor
    down: torch.Tensor

    @classmethod
    def random(cls, experts: int, seed: int) -> "Layer":
        """Return weights that keep the size of activations."""
        generator = torch.Generator().manual_seed(seed)
        gate_up = torch.randn(experts, 2 * INTERMEDIATE, HIDDEN, generator=generator) * HIDDEN**-0.5
        down = torch.randn(experts, HIDDEN, INTERMEDIATE, generator=generator) * INTERMEDIATE**-0.5
        return cls(gate_up.bfloat16(), down.bfloat16())

    def expert(self, number: int, rows: torch.Tensor) -> torch.Tensor:
        """Return what one expert makes of ``[n, HIDDEN]``."""
        gate, up = functional.linear(rows.float(), self.gate_up[number].float()).chunk(2, dim=-1)
        return functional.linear(functional.silu(gate) * up, self.down[number].float())


@dataclass(frozen=True)
class Tokens:
    """What one rank puts into the layer.

    Attributes:
        x: ``[T, HIDDEN]`` bfloat16.
        ids: int32 ``[T, K]``; -1 for no expert.
        weights: float32 ``[T, K]``.

    """

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def random(cls, count: int, top_k: int, experts: range, seed: int) -> "Tokens":
        """Return tokens for different experts of a range; some slots of long lists name none."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(count, HIDDEN, generator=generator).bfloat16()
        order = torch.rand(count, len(experts), generator=generator).argsort(-1)[:, :top_k]
        ids = torch.full((count, top_k), -1, dtype=torch.int32)
        ids[:, : order.shape[1]] = order + experts.start
        if top_k > 1:
            ids[torch.rand(count, top_k, generator=generator) < 0.1] = -1
        return cls(x, ids, torch.rand(count, top_k, generator=generator) + 0.1)


def output(
    layer: Layer,
    tokens: Tokens,
    seen: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.float,
    weights_on_input: bool = False,
) -> torch.Tensor:
    """Return ``[T, HIDDEN]`` float32: the weighted sum of each token's experts.

    Args:
        layer: The experts.
        tokens: Their input.
        seen: What becomes of the rows on the way, such as being quantised.
        weights_on_input: Whether the router's weights multiply the input instead of the output.

    """
    result = torch.zeros(tokens.x.shape)
    for token in range(tokens.x.shape[0]):
        for expert, weight in zip(tokens.ids[token].tolist(), tokens.weights[token], strict=True):
            if expert < 0:
                continue
            row = tokens.x[token : token + 1]
            if weights_on_input:
                result[token] += layer.expert(expert, seen(row * weight.to(row.dtype)))[0]
            else:
                result[token] += weight * layer.expert(expert, seen(row))[0]
    return result


def through_fp8(rows: torch.Tensor, block: int = FP8_BLOCK, power_of_2: bool = False) -> torch.Tensor:
    """Return rows after block quantisation to e4m3: ``block`` values share a float32 scale."""
    blocks = rows.float().reshape(rows.shape[0], -1, block)
    scale = blocks.abs().amax(2, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    if power_of_2:
        scale = 2 ** scale.log2().ceil()
    return ((blocks / scale).to(torch.float8_e4m3fn).float() * scale).reshape(rows.shape)


def through_fp8_rows(rows: torch.Tensor) -> torch.Tensor:
    """Return rows after quantisation to e4m3 with a scale per row."""
    return through_fp8_of(rows, rows.float().abs().amax(1, keepdim=True))


def through_fp8_of(rows: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Return rows after quantisation to e4m3, which takes ``largest`` to its largest value."""
    scale = largest / torch.finfo(torch.float8_e4m3fn).max
    return (rows.float() / scale).to(torch.float8_e4m3fn).float() * scale


def through_mxfp8(rows: torch.Tensor) -> torch.Tensor:
    """Return rows after quantisation to mxfp8: 32 values of e4m3 share a power of two."""
    blocks = rows.float().reshape(rows.shape[0], -1, 32)
    scale = 2 ** (blocks.abs().amax(2, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max).log2().ceil()
    return ((blocks / scale).to(torch.float8_e4m3fn).float() * scale).reshape(rows.shape)


def through_fp4(rows: torch.Tensor, global_scale: float) -> torch.Tensor:
    """Return rows after quantisation to nvfp4: 16 values of e2m1 share a scale in e4m3."""
    blocks = rows.float().reshape(rows.shape[0], -1, 16)
    stored = (blocks.abs().amax(2, keepdim=True) / 6 * global_scale).to(torch.float8_e4m3fn).float()
    scale = stored / global_scale
    magnitude = (blocks / scale).abs().clamp(max=6)
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return ((magnitude / step).round() * step * blocks.sign() * scale).reshape(rows.shape)


def assert_close(result: torch.Tensor, expected: torch.Tensor) -> None:
    """Allow every token the rounding of bfloat16 rows and sums; another expert's share is far more."""
    assert result.shape == expected.shape, (result.shape, expected.shape)
    error = (result.float() - expected).norm(dim=1)
    worst = (error / expected.norm(dim=1).clamp(min=0.1)).max().item() if len(error) else 0.0
    assert worst < 0.015, f"a token is {worst:.1%} off"
