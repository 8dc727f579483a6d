"""Masks of blocks of scores, as the lists that `block_sparse` and its backward pass walk. PyTorch only."""

import torch
import triton

from flashsim_kernels.arguments import ArgumentError, launch_arguments

MASK_BLOCKS = (16, 32, 64, 128, 256, 512, 1024)


def block_lists(seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Of each row of `seen` (batch or 1, heads or 1, rows, columns), bool: the columns that are true, rising, then the
    others; their number; both int32, contiguous. And the strides of batch and head, in rows, 0 if one is for all.

    Every list has room for a whole row: how much remains of a mask only its device knows, and nobody waits for it.
    """
    blocks = torch.argsort(seen.to(torch.uint8), dim=3, descending=True, stable=True).to(torch.int32).contiguous()
    batch, heads, rows, _ = seen.shape
    return blocks, count(seen), heads * rows if batch > 1 else 0, rows if heads > 1 else 0


def count(seen: torch.Tensor) -> torch.Tensor:
    """Of each row, how many are true; contiguous."""
    return seen.sum(3, dtype=torch.int32).contiguous()


def visible_blocks(
    block_mask: torch.Tensor, mask_block: int, seqlen_q: int, seqlen_k: int, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The blocks in which some query sees some key; and those in which every query sees every one of mask_block keys,
    which are the first ones of every row."""
    rows, keys = (torch.arange(n, device=block_mask.device) * mask_block for n in block_mask.shape[2:])
    first_row, first_key = rows[:, None], keys[None, :]
    last_row, last_key = first_row + mask_block - 1, first_key + mask_block - 1
    whole = block_mask & (last_key < seqlen_k)
    if causal:
        block_mask = block_mask & (first_key <= last_row + (seqlen_k - seqlen_q))
        whole = whole & (last_key <= first_row + (seqlen_k - seqlen_q))
    return block_mask, whole


def check_mask(
    q: torch.Tensor, k: torch.Tensor, block_mask: torch.Tensor, mask_block: int, overrides: dict[str, int | None]
) -> None:
    """Raise ArgumentError unless the mask goes with q and k, and given tiles with the mask."""
    (batch, seqlen_q, heads, _), seqlen_k = q.shape, k.shape[1]
    wrong = []
    if mask_block not in MASK_BLOCKS:
        wrong.append(f"mask_block: got {mask_block!r}, allowed are {', '.join(map(str, MASK_BLOCKS))}")
    else:
        blocks = triton.cdiv(seqlen_q, mask_block), triton.cdiv(seqlen_k, mask_block)
        shape = tuple(block_mask.shape)
        if len(shape) != 4 or shape[0] not in (1, batch) or shape[1] not in (1, heads) or shape[2:] != blocks:
            wrong.append(f"block_mask: shape {shape}, must be ({batch} or 1, {heads} or 1, {blocks[0]}, {blocks[1]})")
        for name in ("BLOCK_M", "BLOCK_N"):
            tile = overrides.get(name)
            if tile and mask_block % tile:
                wrong.append(f"{name}: got {tile}, must divide mask_block, {mask_block}")
    if block_mask.dtype != torch.bool:
        wrong.append(f"block_mask: dtype {block_mask.dtype}, must be torch.bool")
    if block_mask.device != q.device:
        wrong.append(f"block_mask: on {block_mask.device}, must be on {q.device} like q")
    if wrong:
        raise ArgumentError([f"block_sparse: {line}" for line in wrong])


def launch_of(
    kernel: str, q: torch.Tensor, v: torch.Tensor, mask_block: int, overrides: dict[str, int | None]
) -> dict[str, int]:
    """The launch parameters, with no tile larger than a block of the mask."""
    launch = launch_arguments("block_sparse", kernel, q, v, overrides)
    return launch | {name: min(launch[name], mask_block) for name in ("BLOCK_M", "BLOCK_N")}
