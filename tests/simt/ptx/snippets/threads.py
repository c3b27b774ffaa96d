"""Instructions of a block's threads together, and of memory."""

from __future__ import annotations

from collections.abc import Callable

from tests.simt.ptx.snippets.snippet import THREADS, Row, Snippet

Block = list[Row]
SHARED = ".shared .align 16 .b8 buffer[1024];\n.shared .align 4 .u32 count;\n"


def _block(code: str, gives: str, takes: str, oracle: Callable[[Block], list[object]]) -> Snippet:
    return Snippet(code, gives, takes, oracle, together=True)


def _warps(function: Callable[[Block, int], object]) -> Callable[[Block], list[object]]:
    """The oracle that gives a lane what a function makes of its warp and the lane's number."""
    return lambda rows: [function(rows[i - i % 32 : i - i % 32 + 32], i % 32) for i in range(THREADS)]


def _shuffle(mode: str) -> Callable[[Block, int], object]:
    """The ISA's definition: %d and the predicate %f."""

    def oracle(warp: Block, lane: int) -> object:
        b, c = warp[lane][1] & 31, warp[lane][2]
        segment, clamp = c >> 8 & 31, c & 31
        last = lane & segment | clamp & ~segment
        source, valid = {
            "up": (lane - b, lane - b >= last),
            "down": (lane + b, lane + b <= last),
            "bfly": (lane ^ b, lane ^ b <= last),
            "idx": (lane & segment | b & ~segment, (lane & segment | b & ~segment) <= last),
        }[mode]
        return warp[source if valid else lane][0], int(valid)

    return oracle


def _shuffles() -> list[Snippet]:
    snippets = []
    for mode in ("up", "down", "bfly", "idx"):
        clamps = {"up": (0x1800, 0), "down": (0x1807, 0x1F), "bfly": (0x1807, 0x1F), "idx": (0x1807, 0x1F)}[
            mode
        ]

        def prepare(row: Row, clamps: tuple[int, int] = clamps) -> Row:
            return (row[0], row[1] % 32, clamps[row[2] % 2])

        code = f"shfl.sync.{mode}.b32 %d|%f, %a, %b, %c, -1;"
        snippets.append(
            Snippet(code, "b32 pred", "b32 b32 b32", _warps(_shuffle(mode)), together=True, prepare=prepare)
        )
    return snippets


def _ballot(warp: Block) -> int:
    return sum(row[0] << i for i, row in enumerate(warp))


ALL_LANES = 0xFFFFFFFF


def _neighbour(rows: Block) -> list[object]:
    return [rows[(i + 1) % THREADS][0] for i in range(THREADS)]


THREADS_TOGETHER = [
    *_shuffles(),
    _block("vote.sync.ballot.b32 %d, %a, -1;", "b32", "pred", _warps(lambda w, _: _ballot(w))),
    _block("vote.sync.ballot.b32 %d, !%a, -1;", "b32", "pred", _warps(lambda w, _: _ballot(w) ^ ALL_LANES)),
    _block("vote.sync.any.pred %d, %a, -1;", "pred", "pred", _warps(lambda w, _: int(_ballot(w) != 0))),
    _block("vote.sync.all.pred %d, %a, -1;", "pred", "pred", _warps(lambda w, _: min(w)[0])),
    _block(
        "and.b32 %a, %a, 3;\nmatch.any.sync.b32 %d, %a, -1;", "b32", "b32",
        _warps(lambda warp, i: sum(1 << j for j, row in enumerate(warp) if row[0] & 3 == warp[i][0] & 3)),
    ),
    # Barriers, as votes and as order: everybody sees what his neighbour wrote.
    _block("bar.red.or.pred %d, 0, %a;", "pred", "pred", lambda rows: [max(rows)[0]] * THREADS),
    _block("bar.red.and.pred %d, 0, %a;", "pred", "pred", lambda rows: [min(rows)[0]] * THREADS),
    _block(
        SHARED + """.reg .b32 %own, %next;
  mov.u32 %own, buffer;
  add.s32 %next, %t, 1;
  and.b32 %next, %next, 255;
  mad.lo.s32 %next, %next, 4, %own;
  mad.lo.s32 %own, %t, 4, %own;
  st.shared.u32 [%own], %a;
  barrier.sync 0;
  ld.shared.u32 %d, [%next];""",
        "b32", "b32", _neighbour,
    ),
    # Through generic addresses, an offset below zero, and the half of the block that counts
    _block(
        SHARED + """.reg .b64 %g, %s;
  .reg .b32 %next, %n;
  mov.u64 %s, buffer;
  cvta.shared.u64 %g, %s;
  mad.wide.u32 %g, %t, 4, %g;
  st.u32 [%g+-0], %a;
  bar.sync 1, 256;
  add.s32 %next, %t, 1;
  and.b32 %next, %next, 255;
  cvta.shared.u64 %g, %s;
  mad.wide.u32 %g, %next, 4, %g;
  add.s64 %g, %g, 16;
  ld.u32 %d, [%g+-16];""",
        "b32", "b32", _neighbour,
    ),
    # Atomics, with and without their result
    _block(
        SHARED + """.reg .pred %p;
  setp.eq.s32 %p, %t, 0;
  @%p st.shared.u32 [count], 5;
  bar.sync 0;
  atom.shared.add.u32 %d, [count], 1;
  red.shared.add.u32 [count], 2;
  bar.sync 0;
  ld.shared.u32 %d, [count];""",
        "b32", "", lambda _: [5 + 3 * THREADS] * THREADS,
    ),
    # A thread's 16 bytes through shared memory and back, twice, so that both parities are seen
    *(
        _block(
            f""".shared .align 16 .b8 pieces[4096];
  .shared .align 8 .b8 arrived[2048];
  .reg .b32 %piece, %barrier, %parity;
  .reg .b64 %global;
  .reg .pred %p;
  mov.u32 %piece, pieces;
  mad.lo.s32 %piece, %t, 16, %piece;
  mov.u32 %barrier, arrived;
  mad.lo.s32 %barrier, %t, 8, %barrier;
  mbarrier.init.shared::cta.b64 [%barrier], 1;
  add.s64 %global, %out, 16;
  mov.b32 %parity, 0;
$round:
  st.global.u64 [%global], %a;
  st.global.u64 [%global+8], %b;
  fence.proxy.async;
  mbarrier.arrive.expect_tx.shared::cta.b64 _, [%barrier], 16;
  cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%piece], [%global], 16, [%barrier];
$again:
  mbarrier.try_wait.parity.shared::cta.b64 %p, [%barrier], %parity;
  @!%p bra $again;
  ld.shared.u64 %d, [%piece];
  add.s64 %a, %a, %b;
  st.shared.u64 [%piece], %a;
  fence.proxy.async;
  cp.async.bulk.global.shared::cta.bulk_group [%global], [%piece], 16;
  cp.async.bulk.commit_group;
  cp.async.bulk.wait_group{read} 0;
  {whole}
  ld.global.u64 %f, [%global];
  xor.b32 %parity, %parity, 1;
  setp.ne.b32 %p, %parity, 0;
  @%p bra $round;""",
            "b64 b64", "b64 b64",
            lambda rows: [((x + y) % (1 << 64), (x + 2 * y) % (1 << 64)) for x, y in rows],
        )
        for read, whole in (("", ""), (".read", "cp.async.bulk.wait_group 0;"))
    ),
]  # fmt: skip


def _atomic(opcode: str, kind: str, function: Callable[[int, int], int]) -> Snippet:
    """One on the thread's own output: the old value, and what is then there."""
    bits = kind[1:]
    return Snippet(
        f"st.global.u64 [%out+16], %a;\n  atom.{opcode}.{kind} %d, [%out+16], %b;\n"
        f"  ld.global.u{bits} %f, [%out+16];",
        f"b{bits} b{bits}",
        "b64 b" + bits,
        lambda x, y: (x % (1 << int(bits)), function(x % (1 << int(bits)), y)),
    )


def _signed(function: Callable[[int, int], int]) -> Callable[[int, int], int]:
    half = 1 << 31
    return lambda x, y: (function((x ^ half) - half, (y ^ half) - half)) % (1 << 32)


MEMORY = [
    _atomic("relaxed.gpu.global.add", "u64", lambda x, y: (x + y) % (1 << 64)),
    _atomic("add", "u32", lambda x, y: (x + y) % (1 << 32)),
    _atomic("acq_rel.gpu.global.min", "s32", _signed(min)),
    _atomic("release.sys.global.max", "u32", max),
    _atomic("acquire.gpu.or", "b32", lambda x, y: x | y),
    _atomic("and", "b64", lambda x, y: x & y),
    _atomic("exch", "b32", lambda _, y: y),
    Snippet(
        "st.global.u64 [%out+16], %a;\n  atom.relaxed.gpu.global.cas.b32 %d, [%out+16], %b, %c;\n"
        "  ld.relaxed.gpu.global.u32 %f, [%out+16];",
        "b32 b32", "b64 b32 b32",
        lambda x, y, z: (x % (1 << 32), z if x % (1 << 32) == y else x % (1 << 32)),
        prepare=lambda row: (row[0], row[0] % (1 << 32) if row[2] & 1 else row[1], row[2]),
    ),
    Snippet(
        "st.release.sys.global.u64 [%out+16], %a;\n  ld.acquire.sys.global.u64 %d, [%out+16];",
        "b64", "b64", lambda x: x,
    ),
    Snippet(
        "st.relaxed.sys.global.v2.u64 [%out+16], {%a, %b};\n  ld.relaxed.sys.u64 %d, [%out+16];\n"
        "  ld.weak.u64 %f, [%out+24];",
        "b64 b64", "b64 b64", lambda x, y: (x, y),
    ),
    Snippet(
        "st.global.L1::no_allocate.v4.b32 [%out+16], {%a, %b, 7, %c};\n"
        "  ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {_, %d, _, %f}, [%out+16];",
        "b32 b32", "b32 b32 b32", lambda _, y, z: (y, z),
    ),
    # Bytes and halves: extended as the type says
    Snippet("st.u64 [%out+16], %a;\n  ld.s8 %d, [%out+17];\n  ld.u8 %f, [%out+17];", "b32 b32", "b64",
            lambda x: (((x >> 8 & 255 ^ 128) - 128) % (1 << 32), x >> 8 & 255)),
    Snippet("st.u64 [%out+16], 0;\n  st.global.u8 [%out+19], %a;\n  ld.u64 %d, [%out+16];", "b64", "b16",
            lambda x: (x & 255) << 24),
    Snippet("ld.global.v2.s16 {%d, %f}, [%in];", "b32 b32", "b64",
            lambda x: tuple(((x >> s & 0xFFFF ^ 0x8000) - 0x8000) % (1 << 32) for s in (0, 16))),
    # Guards, branches, scopes with a register of the same name
    Snippet("mov.b32 %d, 1;\n  @%a mov.b32 %d, 2;\n  @!%a add.s32 %d, %d, 10;", "b32", "pred",
            lambda p: 2 if p else 11),
    Snippet("mov.b32 %d, 0;\n$again:\n  add.s32 %d, %d, 3;\n  .reg .pred %p;\n  setp.lt.u32 %p, %d, %a;\n"
            "  @%p bra $again;\n  bra.uni $end;\n  mov.b32 %d, 0;\n$end:", "b32", "b32",
            lambda n: 3 * max(1, -(-n // 3)), prepare=lambda row: (row[0] % 100,)),
    Snippet("mov.b32 %d, %a;\n  { .reg .b32 %d;\n  mov.b32 %d, 0; }", "b32", "b32", lambda x: x),
    _block("mov.u32 %d, %tid.x;\n  mov.u32 %f, %laneid;", "b32 b32", "",
           lambda _: [(i, i % 32) for i in range(THREADS)]),
    _block("mov.u32 %d, %ntid.x;\n  mov.u32 %f, %nctaid.x;", "b32 b32", "",
           lambda _: [(THREADS, 1)] * THREADS),
]  # fmt: skip
