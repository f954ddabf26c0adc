"""All ranks make the same call, or all of them raise.

A rank that raised alone would leave the others waiting for it. So each says what it was given, a
few integers, before anything that is large moves; what does not fit is an error on every rank.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from crosscut.backends.protocol import ShardProblem, VocabShard
from crosscut.options import HeadOptions

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LocalHead(NamedTuple):
    """A head's tensors on this rank, checked."""

    hidden: Tensor
    classifier: Tensor
    target: Tensor
    bias: Tensor | None


@dataclass(frozen=True, kw_only=True)
class ParallelProblem(ShardProblem):
    """A shard, and the processes that hold the others.

    Attributes:
        group: of the processes, by ascending class.
    """

    group: ProcessGroup


_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def agree(
    group: ProcessGroup, check: Callable[[], LocalHead], options: HeadOptions
) -> tuple[LocalHead, VocabShard]:
    """What ``check`` returns, and which classes are here; or an error on every rank.

    Args:
        group: of the processes.
        check: raises what is wrong with this rank's arguments.
        options: of the head.

    Raises:
        RuntimeError: ``check`` raised on another rank.
        ValueError: ranks were given what does not fit together.
    """
    try:
        head, error = check(), None
    except Exception as raised:
        head, error = None, raised
    described = [0] * 10 if head is None else [1, len(head.classifier), *_described(head, options)]
    by_rank = _gathered(group, described)
    if error is not None or any(not ok for ok, *_ in by_rank):
        _raise_together(group, error)
    assert head is not None
    _check_same([values for _, _, *values in by_rank])
    sizes, rank = [size for _, size, *_ in by_rank], torch.distributed.get_rank(group)
    if not sum(sizes):
        raise ValueError("linear_weight must have a class on some rank, got none on any")
    return head, VocabShard(sum(sizes[:rank]), sum(sizes))


def _described(head: LocalHead, options: HeadOptions) -> list[int]:
    hidden, target = head.hidden, head.target
    dtype = _DTYPES.index(hidden.dtype) if hidden.dtype in _DTYPES else -1
    gradient = torch.is_grad_enabled() and hidden.requires_grad
    return [
        hidden.shape[:-1].numel(), hidden.shape[-1], dtype, int(gradient),
        target.dim() - hidden.dim(), target.shape[-1] if target.dim() else 0, _checksum(target),
        int(head.bias is not None) * (1 << 32) + zlib.crc32(repr(options).encode()),
    ]  # fmt: skip


def _checksum(target: Tensor) -> int:
    """A number that other targets, or those in another order, hardly have too."""
    values = target.detach().flatten().long()
    place = torch.arange(1, len(values) + 1, device=values.device)
    return int(((values + 1) * place * 0x9E3779B97F4A7C1).sum())  # modulo 2**64


def _gathered(group: ProcessGroup, values: list[int]) -> list[list[int]]:
    """Integers of every rank. The host waits for them."""
    distributed = torch.distributed
    device = "cuda" if distributed.get_backend(group) == "nccl" else "cpu"
    mine = torch.tensor(values, dtype=torch.int64, device=device)
    all_of_them = [torch.empty_like(mine) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(all_of_them, mine, group=group)
    return torch.stack(all_of_them).tolist()


def _raise_together(group: ProcessGroup, error: Exception | None) -> None:
    message = None if error is None else f"{type(error).__name__}: {error}"
    messages: list[str | None] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(messages, message, group=group)
    if error is not None:
        raise error
    raise RuntimeError(
        "another process of the head's group raised: "
        + "; ".join(f"rank {rank}: {said}" for rank, said in enumerate(messages) if said)
    )


def _check_same(by_rank: list[list[int]]) -> None:
    names = (
        "the number of tokens of input", "the hidden size of input", "the dtype of input",
        "whether input requires a gradient", "the dimensions of target",
        "the last dimension of target", "target",
        "whether there is a linear_bias, and the options",
    )  # fmt: skip
    for name, values in zip(names, zip(*by_rank, strict=True), strict=True):
        if len(set(values)) == 1:
            continue
        given: list[object] = list(values)
        if name == "the dtype of input":
            given = [_DTYPES[value] for value in values]
        elif name == names[-1]:
            given = [f"{value:x}" for value in values]
        elif name == "target":  # by what is no value of anyone's
            raise ValueError(
                "target must be the same on all ranks that hold the head, and is not: input and "
                "target are those of all of the head's tokens on each of its ranks. A weight that "
                "FSDP has sharded is to be gathered first, as it is within the module that owns it"
            )
        raise ValueError(
            f"{name} must be the same on all ranks that hold the head, got by rank {given}"
        )
