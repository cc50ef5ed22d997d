"""Decodes bitplanes to float16 values in registers, for every kernel that reads quantised weights.

A word of a plane holds one bit of 32 weights. `words_of` transposes B such words, bit by bit, into words of whole
codes: 8 codes of 4 bits each or 4 codes of 8 bits. `pairs_of` looks the codes of a word up and gives packed pairs of
float16; pair m of word kw holds columns 2 * (m * KW + kw) and the next (pack.py puts them there), so that the
activations of a pair are one aligned 32-bit word, and those of neighbouring kw lie side by side.

The source of the values depends on the width:
2-4   byte permutations: a row's 2^B float16 values sit in registers as low bytes and high bytes, and one PRMT
      translates four codes.
5, 6  shuffles: the lanes of a warp, which are all in one row (LANES), hold its 32 or 64 values between them.
7, 8  loads: a row's 256 values are four lines of the L1 cache. Also 5 and 6 where a warp has many rows.

ASM=False computes the same without inline assembly, which Triton's interpreter does not support.
"""

from __future__ import annotations

import triton
import triton.language as tl

TABLE_ALIGN = tl.constexpr(128)  # bytes; the tables of every width begin at a multiple of it


@triton.jit
def table_offset(tables, B: tl.constexpr, SEED: tl.constexpr):
    """Returns the bytes before width B's tables, which are those of `tables` tables of each narrower width."""
    at = 0
    for b in tl.static_range(SEED, B):
        at += (tables * 2 ** (b + 1) + (TABLE_ALIGN - 1)) // TABLE_ALIGN * TABLE_ALIGN
    return at


@triton.jit
def swap(a, c, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """Exchanges the low SHIFT-bit blocks of a with the high ones of c (two shifts, two LOP3)."""
    keep: tl.constexpr = 0xFFFFFFFF ^ MASK
    return (a & keep) | ((c >> SHIFT) & MASK), ((a << SHIFT) & keep) | (c & MASK)


@triton.jit
def transpose4(r0, r1, r2, r3):
    """Turns planes (r0 most significant) into words of eight 4-bit codes: nibble t of word i is bit 4 t + 3 - i."""
    r0, r2 = swap(r0, r2, 2, 0x33333333)
    r1, r3 = swap(r1, r3, 2, 0x33333333)
    r0, r1 = swap(r0, r1, 1, 0x55555555)
    r2, r3 = swap(r2, r3, 1, 0x55555555)
    return r0, r1, r2, r3


@triton.jit
def transpose8(r0, r1, r2, r3, r4, r5, r6, r7):
    """Turns planes into words of four 8-bit codes: byte t of word i is bit 8 t + 7 - i."""
    r0, r4 = swap(r0, r4, 4, 0x0F0F0F0F)
    r1, r5 = swap(r1, r5, 4, 0x0F0F0F0F)
    r2, r6 = swap(r2, r6, 4, 0x0F0F0F0F)
    r3, r7 = swap(r3, r7, 4, 0x0F0F0F0F)
    r0, r1, r2, r3 = transpose4(r0, r1, r2, r3)
    r4, r5, r6, r7 = transpose4(r4, r5, r6, r7)
    return r0, r1, r2, r3, r4, r5, r6, r7


@triton.jit
def load_words(at, mask):
    """Loads 32-bit words, 0 where they are masked out. mask None: loads all."""
    if mask is None:
        found = tl.load(at)
    else:
        found = tl.load(at, mask=tl.broadcast_to(mask, at.shape), other=0)
    return found


@triton.jit
def load_planes(w_ptr, at, plane, mask, FIRST: tl.constexpr, LAST: tl.constexpr):
    """Loads words of planes FIRST .. LAST - 1. They are read once, so other data keeps its place in the L1 cache."""
    words = ()
    for j in tl.static_range(FIRST, LAST):
        if mask is None:
            q = tl.load((w_ptr + j * plane) + at, eviction_policy="evict_first")
        else:
            q = tl.load((w_ptr + j * plane) + at, mask=mask, other=0, eviction_policy="evict_first")
        words = words + (q.to(tl.uint32, bitcast=True),)  # noqa: RUF005 (no stars in kernels)
    return words


@triton.jit
def words_of(q, B: tl.constexpr):
    """Turns planes q (a tuple of B) into 4 words of 4-bit codes (B <= 4) or 8 words of 8-bit codes."""
    z = q[0] & 0  # missing planes are zero; the compiler folds their part of the transposition away
    if B == 2:
        return transpose4(z, z, q[0], q[1])
    elif B == 3:
        return transpose4(z, q[0], q[1], q[2])
    elif B == 4:
        return transpose4(q[0], q[1], q[2], q[3])
    elif B == 5:
        return transpose8(z, z, z, q[0], q[1], q[2], q[3], q[4])
    elif B == 6:
        return transpose8(z, z, q[0], q[1], q[2], q[3], q[4], q[5])
    elif B == 7:
        return transpose8(z, q[0], q[1], q[2], q[3], q[4], q[5], q[6])
    else:
        return transpose8(q[0], q[1], q[2], q[3], q[4], q[5], q[6], q[7])


@triton.jit
def lane_entries(table, B: tl.constexpr):
    """Returns each lane l's share of a table as one register: entry l of 32, or entries 2 l and 2 l + 1 of 64."""
    if B == 5:
        found = tl.inline_asm_elementwise(
            """{ .reg .b32 l; .reg .b64 at; .reg .b16 v;
            mov.u32 l, %laneid; mad.wide.u32 at, l, 2, $1; ld.global.nc.b16 v, [at]; mov.b32 $0, {v, v}; }""",
            "=r,l", [table.to(tl.int64)], dtype=tl.uint32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        found = tl.inline_asm_elementwise(
            """{ .reg .b32 l; .reg .b64 at;
            mov.u32 l, %laneid; mad.wide.u32 at, l, 4, $1; ld.global.nc.b32 $0, [at]; }""",
            "=r,l", [table.to(tl.int64)], dtype=tl.uint32, is_pure=True, pack=1,
        )  # fmt: skip
    return found


@triton.jit
def load_table(table_ptr, table, B: tl.constexpr, BKW: tl.constexpr, LANES: tl.constexpr, ASM: tl.constexpr):
    """Loads the table for `pairs_of`. table_ptr: bytes of width B's tables; table [R, 1]: index of each row's table."""
    if B <= 4 and ASM:
        words = table_ptr.to(tl.pointer_type(tl.uint32)) + (table << (B - 1))
        found = ()
        for j in tl.static_range(2 ** (B - 1)):
            found = found + (tl.load(words + j),)  # noqa: RUF005
    elif ASM and LANES and (B == 5 or B == 6):
        found = (lane_entries(tl.broadcast_to(table_ptr + (table << (B + 1)), [table.shape[0], BKW]), B),)
    else:
        found = (table_ptr + (table << (B + 1)),)
    return found


@triton.jit
def lookup(n, SHIFT: tl.constexpr, table, B: tl.constexpr):
    """Looks up the code at bit SHIFT of each word in memory. Returns float16 bits in uint32."""
    code = (n >> SHIFT) & (15 if B <= 4 else 255)
    if B > 4:
        found = tl.load(table.to(tl.pointer_type(tl.uint16)) + code).to(tl.uint32)
    else:
        found = tl.load(table + code).to(tl.uint32) | (tl.load(table + (code + 2**B)).to(tl.uint32) << 8)
    return found


@triton.jit
def pairs8(n, table, FIRST: tl.constexpr, SECOND: tl.constexpr, B: tl.constexpr):
    """Returns the packed pair of values of the codes at bits FIRST and SECOND of each word."""
    return lookup(n, FIRST, table, B) | (lookup(n, SECOND, table, B) << 16)


@triton.jit
def eight(n, low0, low1, high0, high1):
    """Returns packed pairs of values of the nibbles (0, 2), (1, 3), (4, 6), (5, 7) of n, each below 8."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 s, lo, hi;
        prmt.b32 lo, $5, $6, $4; prmt.b32 hi, $7, $8, $4;
        prmt.b32 $0, lo, hi, 0x6240; prmt.b32 $1, lo, hi, 0x7351;
        shr.u32 s, $4, 16;
        prmt.b32 lo, $5, $6, s; prmt.b32 hi, $7, $8, s;
        prmt.b32 $2, lo, hi, 0x6240; prmt.b32 $3, lo, hi, 0x7351; }""",
        "=&r,=&r,=&r,=&r,r,r,r,r,r",
        [n, low0, low1, high0, high1],
        dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def sixteen(n, table):
    """Does the same as `eight` for nibbles below 16."""
    # Bit 3 of a selector would copy the sign, so it is masked away. It chooses between both halves of the table.
    return tl.inline_asm_elementwise(
        """{ .reg .b32 a, b, s, t, lo, hi;
        and.b32 s, $4, 0x77777777;
        shr.u32 t, $4, 1; lop3.b32 t, t, 0x44444444, 0x32103210, 0xEA;
        prmt.b32 a, $5, $6, s; prmt.b32 b, $7, $8, s; prmt.b32 lo, a, b, t;
        prmt.b32 a, $9, $10, s; prmt.b32 b, $11, $12, s; prmt.b32 hi, a, b, t;
        prmt.b32 $0, lo, hi, 0x6240; prmt.b32 $1, lo, hi, 0x7351;
        shr.u32 s, s, 16; shr.u32 t, t, 16;
        prmt.b32 a, $5, $6, s; prmt.b32 b, $7, $8, s; prmt.b32 lo, a, b, t;
        prmt.b32 a, $9, $10, s; prmt.b32 b, $11, $12, s; prmt.b32 hi, a, b, t;
        prmt.b32 $2, lo, hi, 0x6240; prmt.b32 $3, lo, hi, 0x7351; }""",
        "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
        [n, table[0], table[1], table[2], table[3], table[4], table[5], table[6], table[7]],
        dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def gathered(n, table):
    """Returns packed pairs of values of the bytes (0, 1), (2, 3) of n, at address table + 2 * byte."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 i; .reg .b64 at; .reg .b16 v, w;
        prmt.b32 i, $2, 0, 0x4440; mad.wide.u32 at, i, 2, $3; ld.global.nc.L1::evict_last.u16 v, [at];
        prmt.b32 i, $2, 0, 0x4441; mad.wide.u32 at, i, 2, $3; ld.global.nc.L1::evict_last.u16 w, [at];
        mov.b32 $0, {v, w};
        prmt.b32 i, $2, 0, 0x4442; mad.wide.u32 at, i, 2, $3; ld.global.nc.L1::evict_last.u16 v, [at];
        prmt.b32 i, $2, 0, 0x4443; mad.wide.u32 at, i, 2, $3; ld.global.nc.L1::evict_last.u16 w, [at];
        mov.b32 $1, {v, w}; }""",
        "=&r,=&r,r,l", [n, table.to(tl.int64)], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def shuffled32(n, entries):
    """Returns packed pairs of values of bytes (0, 1), (2, 3) of n, each below 32. Lane b has the value of byte b."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 i, v, w;
        shfl.sync.idx.b32 v, $3, $2, 31, -1;
        shr.u32 i, $2, 8; shfl.sync.idx.b32 w, $3, i, 31, -1; prmt.b32 $0, v, w, 0x5410;
        shr.u32 i, $2, 16; shfl.sync.idx.b32 v, $3, i, 31, -1;
        shr.u32 i, $2, 24; shfl.sync.idx.b32 w, $3, i, 31, -1; prmt.b32 $1, v, w, 0x5410; }""",
        "=&r,=&r,r,r", [n, entries], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def shuffled64(n, entries):
    """Does the same for bytes below 64: bits 1 .. 5 are the lane, bit 0 chooses the half of its register."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 i, s, v, w;
        and.b32 s, $2, 0x01010101; mad.lo.u32 s, s, 0x22, 0x54105410;
        shr.u32 i, $2, 1; shfl.sync.idx.b32 v, $3, i, 31, -1;
        shr.u32 i, $2, 9; shfl.sync.idx.b32 w, $3, i, 31, -1; prmt.b32 $0, v, w, s;
        shr.u32 i, $2, 17; shfl.sync.idx.b32 v, $3, i, 31, -1;
        shr.u32 i, $2, 25; shfl.sync.idx.b32 w, $3, i, 31, -1; shr.u32 s, s, 16; prmt.b32 $1, v, w, s; }""",
        "=&r,=&r,r,r", [n, entries], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def pairs_of(n, table, B: tl.constexpr, LANES: tl.constexpr, ASM: tl.constexpr):
    """Returns the values of word i as pairs m = (3, 7, 11, 15) - i for B <= 4, (7, 15) - i for wider codes."""
    if not ASM and B > 4:
        found = pairs8(n, table[0], 0, 8, B), pairs8(n, table[0], 16, 24, B)
    elif not ASM:
        found = (
            pairs8(n, table[0], 0, 8, B), pairs8(n, table[0], 4, 12, B),
            pairs8(n, table[0], 16, 24, B), pairs8(n, table[0], 20, 28, B),
        )  # fmt: skip
    elif B > 6 or (B > 4 and not LANES):
        found = gathered(n, table[0])
    elif B == 6:
        found = shuffled64(n, table[0])
    elif B == 5:
        found = shuffled32(n, table[0])
    elif B == 4:
        found = sixteen(n, table)
    else:
        found = eight(n, table[0], table[2 ** (B - 2) - 1], table[2 ** (B - 2)], table[2 ** (B - 1) - 1])
    return found
