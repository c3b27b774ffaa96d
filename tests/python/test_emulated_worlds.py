"""Properties of whole worlds of 1 to 128 ranks on networks worse than EFA, whatever is drawn.

Every rank receives exactly the rows that the oracle lists, gets back the weighted sums, finishes all its
rounds, and leaves the source of a write alone until the write is complete.
"""

import json
import os

import pytest
from emulated_world import ROUTINGS, Scene, play
from hypothesis import given, settings
from hypothesis import strategies as st

LONG = os.environ.get("LONG_TESTS") == "1"
PROFILES = ["p5", "p5en", "p6-b200", "p6-b300", "hostile"]
# Dispatched with scales: fp8, and fp4 as bytes.
_PACKED = ["float8_e4m3fn", "uint8"]
# The oracle looks at every token on every rank.
MOST_TOKENS = 2048 if LONG else 256


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    """Draw worlds of up to 128 ranks, most of them small."""
    most_ranks = draw(st.sampled_from([4, 12, 12, 40, 128]))
    nodes = draw(st.integers(1, most_ranks))
    ranks_per_node = draw(st.integers(1, min(8, most_ranks // nodes)))
    size = nodes * ranks_per_node
    combine_dtype = draw(st.sampled_from(["bfloat16", "float16", "float32"]))
    dtype = draw(st.sampled_from([combine_dtype, "bfloat16", "float16", "float32", *_PACKED]))
    hidden = 16 * draw(st.sampled_from([1, 2, 3, 5, 80])) if size <= 16 else 16
    if size <= 4 and draw(st.booleans()):
        hidden = draw(st.sampled_from([2880, 7168]))
    return Scene(
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        experts=draw(st.integers(1, 2 * size)),
        placement=draw(st.sampled_from(["linear", "round_robin", "random"])),
        top_k=draw(st.sampled_from([1, 2, 3, 8, 32])),
        max_tokens=draw(st.integers(1, min(40, MOST_TOKENS // size))),
        hidden=hidden,
        dtype=dtype,
        combine_dtype=combine_dtype,
        # Two fp4 values per byte, in rows of whole 16 bytes.
        payload_columns=-(-hidden // 32) * 16 if dtype == "uint8" else None,
        scale_columns=draw(st.integers(1, 5)) if dtype in _PACKED else 0,
        layout=draw(st.sampled_from(["per_token", "per_expert"])),
        channels=draw(st.integers(1, 2)),
        routing=draw(st.sampled_from(sorted(ROUTINGS))),
        rounds=draw(st.sampled_from([1, 2, 3, 20])) if size <= 16 else 1,
        exact=draw(st.booleans()),
        in_place=draw(st.booleans()),
        per_slot=draw(st.booleans()),
        weighted=draw(st.booleans()),
        signal_policy=draw(st.sampled_from(["counted", "counted", "coupled", "decoupled", "nic_ordered"])),
        chunk_bytes=draw(st.sampled_from([1, 100, 2000, 256 * 1024])),
        nics=draw(st.integers(1, 4)),
        profile=draw(st.sampled_from(PROFILES)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


@settings(max_examples=5000 if LONG else 500)
@given(scene=scenes())
def test_worlds_match_the_oracle(scene: Scene) -> None:
    """What arrives is exact; what comes back is exact where arithmetic is, else within the derived bound."""
    play(scene)


def _chosen_scenes() -> list[Scene]:
    """Return the scene that a failure printed, if the caller passes one, else 128 ranks of each shape."""
    if chosen := os.environ.get("TEST_SCENE"):
        return [Scene(**json.loads(chosen))]
    return [
        Scene(nodes, 128 // nodes, experts=128, max_tokens=2, layout=layout, routing="zipf", nics=2)
        for nodes in (1, 16, 128)
        for layout in ("per_token", "per_expert")
    ]


@pytest.mark.parametrize("scene", _chosen_scenes(), ids=lambda s: f"{s.nodes}x{s.ranks_per_node}-{s.layout}")
def test_chosen_worlds_match_the_oracle(scene: Scene) -> None:
    """128 ranks in every run, not only when they are drawn."""
    play(scene)
