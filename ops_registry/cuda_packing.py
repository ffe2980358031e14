"""pack and unpack in Triton, which are one: elements of ``x_width`` bits become elements of ``out_width``, same bits.

Groups of 8 codes are as many bytes as a code has bits, and one word. Every row begins with a group of its own.
"""

import triton
import triton.language as tl

_INTEGERS = ["rows", "groups", "x_size", "out_size"]


@triton.jit
def regroup_block(
    x_ptr, out_ptr, row, at, x_size, out_size, x_count: tl.constexpr, x_width: tl.constexpr, out_count: tl.constexpr,
    out_width: tl.constexpr, is_full: tl.constexpr,
):  # fmt: skip
    """Groups at of rows; unless all are full, without what is behind the ends of rows."""
    word: tl.constexpr = tl.int32 if x_count * x_width <= 32 else tl.int64
    # Powers of two from the counts on.
    x_room: tl.constexpr = x_count if x_count < 3 else 4 if x_count <= 4 else 8
    out_room: tl.constexpr = out_count if out_count < 3 else 4 if out_count <= 4 else 8
    i, j = tl.arange(0, x_room)[None, :], tl.arange(0, out_room)[None, :]
    x_at, out_at = at * x_count + i, at * out_count + j
    x_exists, out_exists = i < x_count, j < out_count
    if not is_full:
        x_exists, out_exists = x_exists & (x_at < x_size), out_exists & (out_at < out_size)
    if is_full and x_room == x_count:  # without a mask, accesses are of 16 bytes
        x = tl.load(x_ptr + row * x_size + x_at)
    else:
        x = tl.load(x_ptr + row * x_size + x_at, x_exists, 0)
    # The bits of a word are those of one element each, so that the sum has no carries.
    words = tl.sum((x.to(word) & ((1 << x_width) - 1)) << i * x_width, axis=1, keep_dims=True)
    out = ((words >> j * out_width) & ((1 << out_width) - 1)).to(tl.uint8)
    if is_full and out_room == out_count:
        tl.store(out_ptr + row * out_size + out_at, out)
    else:
        tl.store(out_ptr + row * out_size + out_at, out, out_exists)


@triton.jit(do_not_specialize=_INTEGERS)
def regroup_kernel(
    x_ptr, out_ptr, rows: tl.int64, groups: tl.int64, x_size: tl.int64, out_size: tl.int64, block: tl.constexpr,
    x_count: tl.constexpr, x_width: tl.constexpr, out_count: tl.constexpr, out_width: tl.constexpr,
    has_rows: tl.constexpr, is_wide: tl.constexpr,
):  # fmt: skip
    """A block of groups a program, of rows with as many groups and these sizes of x and of out."""
    index: tl.constexpr = tl.int64 if is_wide else tl.int32
    first = tl.program_id(0).to(index) * block
    group = first + tl.arange(0, block)[:, None]
    groups, x_size, out_size = groups.to(index), x_size.to(index), out_size.to(index)
    if has_rows:
        # Groups behind the last row are behind the end of it.
        row = tl.minimum(group // groups, rows.to(index) - 1)
        regroup_block(
            x_ptr, out_ptr, row, group - row * groups, x_size, out_size, x_count, x_width, out_count, out_width, False
        )
    elif (first + block) * x_count <= x_size and (first + block) * out_count <= out_size:
        regroup_block(x_ptr, out_ptr, 0, group, x_size, out_size, x_count, x_width, out_count, out_width, True)
    else:
        regroup_block(x_ptr, out_ptr, 0, group, x_size, out_size, x_count, x_width, out_count, out_width, False)
