"""Tensors that span devices: which process group the vocabulary is over, and what is here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor


class Vocabulary(NamedTuple):
    """How the classes of a head are spread: over one dimension of a device mesh."""

    mesh: Any
    dim: int

    @property
    def group(self) -> ProcessGroup:
        """The ranks that hold the classes, those of lower rank first."""
        return self.mesh.get_group(self.dim)


def vocab_shard(values: Tensor, process_group: ProcessGroup) -> DTensor:
    """This rank's part of a head's weight or bias, as the public functions take it.

    >>> weight = crosscut.parallel.vocab_shard(output_layer.weight, tensor_parallel_group)
    >>> loss = crosscut.linear_cross_entropy(hidden_states, weight, labels)

    Ranks may hold different numbers of classes, or none. Rows that pad the vocabulary are to be
    sliced off: ``vocab_shard(weight[:real_rows], group)``. The shape of what is returned is that
    of the whole vocabulary only where all ranks hold as many classes; nothing here reads it.

    Args:
        values: the classes that are here, ``[V_rank, D]`` or ``[V_rank]``; differentiable.
        process_group: over which the vocabulary is spread, in the order of its ranks.

    Returns:
        A ``DTensor`` with placement ``Shard(0)``. No data is copied or moved.
    """
    from torch.distributed import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    if not isinstance(values, Tensor):
        raise TypeError(f"values must be a Tensor, got {type(values).__name__}")
    if is_spread(values):
        raise TypeError("values must be a plain tensor, got a DTensor: it needs no vocab_shard")
    mesh = DeviceMesh.from_group(process_group, values.device.type)
    return DTensor.from_local(values, mesh, [Shard(0)], run_check=False)


def is_spread(value: Any) -> bool:
    """Whether it is a DTensor; without importing them."""
    return isinstance(value, Tensor) and hasattr(value, "device_mesh")


def vocabulary_of(classifier: Any) -> Vocabulary | None:
    """How a head's weight is spread; None where it is a plain tensor.

    Raises:
        ValueError: it is spread otherwise than by class over one dimension of the mesh.
    """
    if not is_spread(classifier):
        return None
    placements = classifier.placements
    sharded = [dim for dim, placement in enumerate(placements) if placement.is_shard()]
    plain = all(type(placement).__name__ in ("Shard", "Replicate") for placement in placements)
    if len(sharded) != 1 or not plain or not placements[sharded[0]].is_shard(0):
        raise ValueError(
            "linear_weight must have placement Shard(0) in one dimension of its mesh and "
            f"Replicate() in the others, got {placements}"
        )
    return Vocabulary(classifier.device_mesh, sharded[0])


def local_classes(values: Tensor, name: str, vocabulary: Vocabulary, spread: list[Any]) -> Tensor:
    """The classes of a weight or bias that are here, differentiable.

    Args:
        values: a DTensor as :func:`vocabulary_of` wants it, or a plain tensor of this rank's part.
        name: what the caller calls them.
        vocabulary: how the weight is spread.
        spread: of the tokens, by :func:`spread_of_tokens`.
    """
    if not is_spread(values):
        return values
    if vocabulary_of_same_mesh(values, vocabulary) != vocabulary.dim:
        raise ValueError(f"{name} must be spread as linear_weight is, got {values.placements}")
    from torch.distributed.tensor import Partial

    # Where other ranks have other tokens, each has a part of the gradient.
    placements = [
        Partial() if dim != vocabulary.dim and of_tokens.is_shard() else placement
        for dim, (placement, of_tokens) in enumerate(zip(values.placements, spread, strict=True))
    ]
    return values.to_local(grad_placements=placements)


def vocabulary_of_same_mesh(values: Any, vocabulary: Vocabulary) -> int | None:
    """The dimension of the mesh that the classes of ``values`` are over; None if of another one."""
    if values.device_mesh != vocabulary.mesh:
        return None
    sharded = [dim for dim, placement in enumerate(values.placements) if placement.is_shard(0)]
    return sharded[0] if len(sharded) == 1 else None


def spread_of_tokens(hidden: Any, vocabulary: Vocabulary) -> list[Any]:
    """How the tokens are spread over the mesh, once every rank of the vocabulary has them."""
    from torch.distributed.tensor import Replicate

    if is_spread(hidden):
        if hidden.device_mesh != vocabulary.mesh:
            raise ValueError("input and linear_weight must be on the same device mesh")
        if any(placement.is_partial() for placement in hidden.placements):
            raise ValueError(f"input must be complete, got placements {hidden.placements}")
        placements = list(hidden.placements)
        placements[vocabulary.dim] = Replicate()
        return placements
    others = [
        size for dim, size in enumerate(vocabulary.mesh.shape) if dim != vocabulary.dim and size > 1
    ]
    if others:
        raise ValueError(
            "input must be a DTensor where linear_weight's mesh has more than one dimension, "
            f"{tuple(vocabulary.mesh.shape)}: whether other ranks have other tokens is not known"
        )
    return [Replicate()] * vocabulary.mesh.ndim


def local_tokens(hidden: Any, spread: list[Any]) -> Any:
    """The tokens of this rank, differentiable: the same ones on all ranks of the vocabulary."""
    if not is_spread(hidden):
        return hidden
    if list(hidden.placements) != spread:
        hidden = hidden.redistribute(placements=spread)
    return hidden.to_local(grad_placements=spread)


def local_target(target: Tensor, linear_weight: Tensor) -> Tensor:
    """The targets of this rank's tokens; a plain tensor is what it is."""
    vocabulary = vocabulary_of(linear_weight)
    if vocabulary is None or not is_spread(target):
        return target
    from torch.distributed.tensor import Replicate

    placements = list(target.placements)  # pyright: ignore[reportAttributeAccessIssue]
    placements[vocabulary.dim] = Replicate()
    return target.redistribute(placements=placements).to_local()  # pyright: ignore
