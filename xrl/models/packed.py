"""What our own attention is told about a micro-batch, as tensors: positions and padding indices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from xrl.data.packing import Pack, PackedCluster
from xrl.kernels.layers.choice import why_not_our_attention
from xrl.kernels.layers.self_attention import PackedSequences
from xrl.models.choice import layer_kind
from xrl.models.rotary import rotary_frequencies, rotary_table
from xrl.models.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Rectangle:
    """Where the t tokens of N sequences stand in an N x Q rectangle."""

    num_tokens: int  # t
    index: Tensor | None  # [N * Q] token in each slot, any token where there is padding; None: nothing is padded
    inverse: Tensor | None  # [t] slot of each token
    shape: tuple[int, int]  # (N, Q)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A PackedCluster, ready for attention."""

    roots: Rectangle
    branches: Rectangle | None
    parents: Tensor | None  # [branches] root each continues
    mask: Tensor | None  # [branches, 1, n / g * Q, P + Q] additive: what a branch sees of its prompt and of itself


@dataclass
class AttentionInputs(PackedSeqParams):
    """Travels to the attention in megatron-core's `packed_seq_params` argument."""

    cos: Tensor | None = None  # packed [T, d]; padded [S, d], or [S * B, d] beside `sequences`
    sin: Tensor | None = None
    sequences: PackedSequences | None = None  # for kernels/layers/self_attention.py, where that runs; else:
    clusters: tuple[Cluster, ...] | None = None  # for models/attention.py; None: padded rows


def attention_inputs(pack: Pack, shape: ModelShape, *, dtype: torch.dtype, device: torch.device) -> AttentionInputs:
    """Positions and borders of a micro-batch for our own attention."""
    has_kernels = not why_not_our_attention(layer_kind(shape, dtype=dtype, device=device))
    # Query heads that share a key/value head; latent attention makes keys and values for each.
    queries_per_key = shape.num_heads // shape.num_kv_heads if shape.latent is None else 1
    positions = torch.from_numpy(pack.position_ids)
    if pack.padded_shape is not None:
        num_rows, width = pack.padded_shape
        positions = torch.arange(width).repeat_interleave(num_rows if has_kernels else 1)
    cos, sin = (x.repeat(1, 2).to(device, dtype) for x in rotary_table(positions, rotary_frequencies(shape)))
    qkv_format = "thd" if pack.padded_shape is None else "sbhd"
    if has_kernels:
        return AttentionInputs(qkv_format=qkv_format, cos=cos, sin=sin, sequences=_sequences(pack))
    if pack.padded_shape is not None:
        return AttentionInputs(qkv_format=qkv_format, cos=cos, sin=sin)
    clusters = tuple(_cluster(cluster, queries_per_key, dtype, device) for cluster in pack.clusters)
    return AttentionInputs(qkv_format=qkv_format, cos=cos, sin=sin, clusters=clusters)


def flash_inputs(pack: Pack, *, device: torch.device) -> PackedSeqParams | None:
    """The borders of plain sequences for transformer-engine's attention; None for padded rows."""
    if pack.padded_shape is not None:
        return None
    sequences = [length for cluster in pack.clusters for length in cluster.root_lengths]
    padding = len(pack.token_ids) - sum(sequences)
    # A sequence of its own: tokens outside of all borders would come out uninitialised.
    lengths = torch.tensor([*sequences, padding] if padding else sequences)
    borders = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).to(device, torch.int32)
    longest = int(lengths.max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=borders,
        cu_seqlens_kv=borders,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _sequences(pack: Pack) -> PackedSequences:
    """Borders of the pack's sequences; of padded rows [S, B], which stand side by side, padding included."""
    if pack.padded_shape is not None:
        num_rows, width = pack.padded_shape
        return PackedSequences(
            starts=torch.arange(num_rows, dtype=torch.int32),
            lengths=torch.full((num_rows,), width, dtype=torch.int32),
            parents=torch.full((num_rows,), -1, dtype=torch.int32),
            num_tokens=num_rows * width,
            step=num_rows,
        )
    lengths: list[int] = []
    parents: list[int] = []
    for cluster in pack.clusters:
        first_root = len(lengths)
        lengths += [*cluster.root_lengths, *cluster.branch_lengths]
        parents += [-1] * len(cluster.root_lengths) + [first_root + parent for parent in cluster.parents]
    sizes = torch.tensor(lengths, dtype=torch.int32)
    return PackedSequences(
        starts=(sizes.cumsum(0) - sizes).to(torch.int32),
        lengths=sizes,
        parents=torch.tensor(parents, dtype=torch.int32),
        num_tokens=sum(lengths),
    )


def _cluster(cluster: PackedCluster, queries_per_key: int, dtype: torch.dtype, device: torch.device) -> Cluster:
    roots = _rectangle(cluster.root_lengths, device)
    if not cluster.branch_lengths:
        return Cluster(roots=roots, branches=None, parents=None, mask=None)
    branches = _rectangle(cluster.branch_lengths, device)
    parents = torch.tensor(cluster.parents)
    prompt_lengths = torch.tensor(cluster.root_lengths)[parents]
    seen_prompt = torch.arange(roots.shape[1]) < prompt_lengths[:, None]  # [N, P]
    width = branches.shape[1]
    seen_answer = torch.ones(width, width, dtype=torch.bool).tril()  # [Q, Q]: padding stands at the end
    seen = torch.cat(
        [
            seen_prompt[:, None, :].expand(-1, width, -1),
            seen_answer[None].expand(len(parents), -1, -1),
        ],
        dim=-1,
    )
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
    # The attention lines up the query heads of a key head as further queries of it.
    mask = mask.repeat(1, queries_per_key, 1)[:, None]
    return Cluster(roots=roots, branches=branches, parents=parents.to(device), mask=mask.to(device))


def _rectangle(lengths: tuple[int, ...], device: torch.device) -> Rectangle:
    width, total = max(lengths), sum(lengths)
    shape = (len(lengths), width)
    if all(length == width for length in lengths):
        return Rectangle(num_tokens=total, index=None, inverse=None, shape=shape)
    sizes = torch.tensor(lengths)
    starts = sizes.cumsum(0) - sizes
    slots = torch.arange(width)
    inside = slots < sizes[:, None]  # [N, Q]
    index = torch.where(inside, starts[:, None] + slots, starts[:, None])
    return Rectangle(
        num_tokens=total,
        index=index.flatten().to(device),
        inverse=inside.flatten().nonzero()[:, 0].to(device),
        shape=shape,
    )
