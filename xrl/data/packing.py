"""Samples into micro-batches: which samples go together, and in which order their tokens stand.

A pack is one row of tokens. Its sequences are gathered in *clusters* of similar length, so that attention
can pad a cluster to a rectangle at little cost. A cluster holds *roots* (sequences that start at position
0) and, when answers share their prompt, *branches* (answers that continue a root):

    roots    [prompt 0][prompt 1]...                 or  [prompt 0 + answer 0][prompt 0 + answer 1]...
    branches [answer 0 of 0][answer 1 of 0][answer 0 of 1]...

The model's input ends in front of the last trained token: from there on nothing is predicted that is trained on. Only
trained tokens have a row: for what the model was given, no logits are computed.

Pure arithmetic on numbers and arrays; tensors are made where they are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from xrl.types import Sample, SampleSize

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from xrl.types import IntArray

    LongArray = NDArray[np.int64]

# A cluster takes in the next sequence while its padded attention area stays within this factor of the real one.
PADDING_LIMIT = 1.3


@dataclass(frozen=True, kw_only=True)
class PackedCluster:
    """Sequences padded together in attention; their tokens stand roots first, then branches."""

    root_lengths: tuple[int, ...]
    branch_lengths: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()  # for each branch: the root it continues


@dataclass(frozen=True, kw_only=True)
class Pack:
    """One micro-batch: T tokens, of which R are trained."""

    token_ids: LongArray  # [T] packed; [B * S] padded, sequence by sequence
    position_ids: LongArray  # the same shape
    clusters: tuple[PackedCluster, ...]  # empty when padded; tokens behind them only fill the row up
    padded_shape: tuple[int, int] | None  # (B, S) of a padded micro-batch
    rows: LongArray  # [R] index in token_ids whose output predicts each trained token
    targets: LongArray  # [R] the trained tokens
    order: tuple[int, ...]  # indices of the samples, in the order of their trained tokens


def size_of(sample: Sample) -> SampleSize:
    """How large a sample is.

    Raises:
        ValueError: a token of its prompt is trained, or it has no prompt.
    """
    trained = np.flatnonzero(sample.trained)
    if sample.prompt_length < 1 or (len(trained) and trained[0] < sample.prompt_length):
        raise ValueError(
            f"a sample's prompt must have a token, and none that is trained; found {sample.prompt_length} tokens, "
            f"the first trained token at {trained[:1].tolist()}"
        )
    return SampleSize(
        num_tokens=len(sample.token_ids),
        prompt_length=sample.prompt_length,
        input_length=int(trained[-1]) if len(trained) else sample.prompt_length,
        num_trained=len(trained),
        group_id=sample.group_id,
        episode_id=sample.episode_id,
        temperature=sample.temperature,
    )


def num_tokens(sizes: Sequence[SampleSize], indices: Iterable[int], *, share_prompts: bool) -> int:
    """Tokens that a pack of these samples holds."""
    total = 0
    prompts: set[int] = set()
    for index in indices:
        size = sizes[index]
        total += size.input_length - size.prompt_length
        if not share_prompts or size.group_id not in prompts:
            total += size.prompt_length
            prompts.add(size.group_id)
    return total


def plan_microbatches(
    sizes: Sequence[SampleSize],
    *,
    num_replicas: int,
    max_tokens: int,
    share_prompts: bool,
    samples_per_microbatch: int | None = None,
) -> list[list[list[int]]]:
    """Spread one update's samples over data-parallel replicas and micro-batches.

    Every replica gets the same number of micro-batches, as the pipeline schedule and the gradient
    reduction need; a replica short of samples gets empty ones. Deterministic, so each rank makes the
    same plan by itself.

    Samples of different temperatures never meet in a micro-batch: its log-probs are taken at one. The samples of one
    episode are in one micro-batch, so that a loss may add up over a whole answer; today each episode is one sample.

    Args:
        max_tokens: most tokens in a micro-batch.
        share_prompts: samples of a group count their prompt once, and are kept together where they fit.
        samples_per_microbatch: fixed size instead of the token budget.

    Returns:
        [replica][micro-batch] -> indices of samples

    Raises:
        ValueError: an episode has samples in several micro-batches.
    """
    bins: list[list[int]] = []
    for together in _by_temperature(sizes):
        if samples_per_microbatch is not None:
            step = samples_per_microbatch
            bins += [together[i : i + step] for i in range(0, len(together), step)]
        else:
            bins += _fill(sizes, together, max_tokens=max_tokens, share_prompts=share_prompts)
    if samples_per_microbatch is None:
        bins = _split_largest(sizes, bins, num_replicas, share_prompts=share_prompts)
    _refuse_split_episodes(sizes, bins)
    lengths = [num_tokens(sizes, indices, share_prompts=share_prompts) for indices in bins]
    return _deal(bins, lengths, num_replicas)


def _by_temperature(sizes: Sequence[SampleSize]) -> list[list[int]]:
    parts: dict[float, list[int]] = {}
    for index, size in enumerate(sizes):
        parts.setdefault(size.temperature, []).append(index)
    return list(parts.values())


def _refuse_split_episodes(sizes: Sequence[SampleSize], bins: Sequence[Sequence[int]]) -> None:
    bin_of: dict[int, int] = {}
    for number, indices in enumerate(bins):
        for index in indices:
            episode_id = sizes[index].episode_id
            if bin_of.setdefault(episode_id, number) != number:
                raise ValueError(f"episode {episode_id} has samples in several micro-batches, it must be in one whole")


def _by_group(sizes: Sequence[SampleSize], indices: Iterable[int]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for index in indices:
        groups.setdefault(sizes[index].group_id, []).append(index)
    return list(groups.values())


def _fill(
    sizes: Sequence[SampleSize], indices: Sequence[int], *, max_tokens: int, share_prompts: bool
) -> list[list[int]]:
    """First-fit decreasing: few bins, each within the budget."""
    # Answers that share a prompt stay together: it is computed once in every micro-batch that holds one of them.
    units = _by_group(sizes, indices) if share_prompts else [[index] for index in indices]
    pieces: list[list[int]] = []
    for unit in units:
        piece: list[int] = []
        for index in unit:
            if piece and num_tokens(sizes, [*piece, index], share_prompts=share_prompts) > max_tokens:
                pieces.append(piece)
                piece = []
            piece.append(index)
        pieces.append(piece)
    sized = [(num_tokens(sizes, piece, share_prompts=share_prompts), piece) for piece in pieces]
    bins: list[list[int]] = []
    remaining: list[int] = []
    for size, piece in sorted(sized, key=lambda entry: -entry[0]):
        for index, free in enumerate(remaining):
            if size <= free:
                bins[index].extend(piece)
                remaining[index] -= size
                break
        else:
            bins.append(list(piece))
            remaining.append(max_tokens - size)
    return bins


def _split_largest(
    sizes: Sequence[SampleSize], bins: list[list[int]], num_replicas: int, *, share_prompts: bool
) -> list[list[int]]:
    """Split big bins until the replicas can have equally many, so that none idles while another works twice."""
    wanted = -(-len(bins) // num_replicas) * num_replicas
    bins = sorted(bins, key=lambda indices: num_tokens(sizes, indices, share_prompts=share_prompts))
    while len(bins) < wanted and any(len(indices) > 1 for indices in bins):
        largest = max(
            (indices for indices in bins if len(indices) > 1),
            key=lambda indices: num_tokens(sizes, indices, share_prompts=share_prompts),
        )
        bins.remove(largest)
        middle = _middle(sizes, largest, share_prompts=share_prompts)
        bins += [largest[:middle], largest[middle:]]
    return bins


def _middle(sizes: Sequence[SampleSize], indices: list[int], *, share_prompts: bool) -> int:
    """Where to cut a bin: half of its tokens, at a group's border if it has one."""
    cuts = range(1, len(indices))
    borders = [i for i in cuts if sizes[indices[i]].group_id != sizes[indices[i - 1]].group_id]
    half = num_tokens(sizes, indices, share_prompts=share_prompts) / 2
    return min(
        borders if share_prompts and borders else cuts,
        key=lambda cut: abs(num_tokens(sizes, indices[:cut], share_prompts=share_prompts) - half),
    )


def _deal(bins: list[list[int]], lengths: list[int], num_replicas: int) -> list[list[list[int]]]:
    """Largest first, each to the least loaded replica that still has room for an equal count."""
    per_replica = max(1, -(-len(bins) // num_replicas))
    replicas: list[list[list[int]]] = [[] for _ in range(num_replicas)]
    loads = [0] * num_replicas
    for length, indices in sorted(zip(lengths, bins, strict=True), key=lambda entry: -entry[0]):
        with_room = [replica for replica in range(num_replicas) if len(replicas[replica]) < per_replica]
        replica = min(with_room, key=lambda candidate: loads[candidate])
        replicas[replica].append(sorted(indices))
        loads[replica] += length
    for microbatches in replicas:
        microbatches.extend([] for _ in range(per_replica - len(microbatches)))
    return replicas


def pack(samples: Sequence[Sample], *, share_prompts: bool, multiple: int = 1) -> Pack:
    """Lay samples out as one row of tokens.

    Args:
        share_prompts: compute each prompt once, with its answers as branches.
        multiple: pad the row to a multiple of this (the tensor-parallel size under sequence parallelism).
    """
    builder = _PackBuilder(samples)
    for cluster in _clusters(_roots(builder.sizes, share_prompts=share_prompts)):
        if share_prompts:
            builder.add_branching(cluster)
        else:
            builder.add_plain(cluster)
    # A pack may not be empty: the pipeline schedule sends it through every stage all the same.
    missing = -builder.length % multiple if builder.length else multiple
    if missing:
        builder.add_padding(missing)
    return builder.finish()


def pad(samples: Sequence[Sample], *, multiple: int = 1) -> Pack:
    """Lay samples out as rows of a rectangle, padded at the end: the unpacked layout."""
    lengths = [size_of(sample).input_length for sample in samples]
    width = -(-max(lengths, default=1) // multiple) * multiple
    height = max(1, len(samples))
    token_ids = np.zeros((height, width), np.int64)
    rows = []
    for line, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        token_ids[line, :length] = sample.token_ids[:length]
        rows.append(line * width + np.flatnonzero(sample.trained) - 1)
    return Pack(
        token_ids=token_ids.reshape(-1),
        position_ids=np.tile(np.arange(width), height),
        clusters=(),
        padded_shape=(height, width),
        rows=_joined(rows),
        targets=_joined([sample.token_ids[sample.trained] for sample in samples]),
        order=tuple(range(len(samples))),
    )


@dataclass(frozen=True, kw_only=True)
class _Root:
    """A sequence from position 0 and, when prompts are shared, the samples that branch off it."""

    samples: list[int]
    length: int  # of the root itself
    longest: int  # longest branch; 0 without branches

    @property
    def area(self) -> int:
        return self.length**2 + len(self.samples) * self.longest * (self.length + self.longest)


def _roots(sizes: Sequence[SampleSize], *, share_prompts: bool) -> list[_Root]:
    everyone = range(len(sizes))
    if not share_prompts:
        return [_Root(samples=[i], length=sizes[i].input_length, longest=0) for i in everyone]
    return [
        _Root(
            samples=group,
            length=sizes[group[0]].prompt_length,
            longest=max(sizes[i].input_length - sizes[i].prompt_length for i in group),
        )
        for group in _by_group(sizes, everyone)
    ]


def _clusters(roots: list[_Root]) -> list[list[_Root]]:
    """Roots of similar shape together, so that padding each cluster to a rectangle wastes little."""
    clusters: list[list[_Root]] = []
    for root in sorted(roots, key=lambda r: (-r.longest, -r.length)):
        if clusters and _padded_area([*clusters[-1], root]) <= PADDING_LIMIT * (
            sum(member.area for member in clusters[-1]) + root.area
        ):
            clusters[-1].append(root)
        else:
            clusters.append([root])
    return clusters


def _padded_area(roots: list[_Root]) -> int:
    length = max(root.length for root in roots)
    longest = max(root.longest for root in roots)
    return len(roots) * length**2 + sum(len(root.samples) for root in roots) * longest * (length + longest)


class _PackBuilder:
    """Lays clusters one behind the other and keeps count of tokens."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples
        self.sizes = [size_of(sample) for sample in samples]
        self.length = 0  # tokens so far
        self.token_ids: list[IntArray] = []
        self.position_ids: list[LongArray] = []
        self.clusters: list[PackedCluster] = []
        self.rows: list[LongArray] = []
        self.order: list[int] = []

    def add_plain(self, roots: list[_Root]) -> None:
        """Prompt and answer as one sequence each."""
        for root in roots:
            (index,) = root.samples
            sample = self.samples[index]
            start = self._add_tokens(sample.token_ids[: root.length], position=0)
            self._add_trained(index, start + np.flatnonzero(sample.trained) - 1)
        self.clusters.append(PackedCluster(root_lengths=tuple(root.length for root in roots)))

    def add_branching(self, roots: list[_Root]) -> None:
        """Every prompt once, then the answers that continue them."""
        last_tokens = []
        for root in roots:
            prompt = self.samples[root.samples[0]].token_ids[: root.length]
            last_tokens.append(self._add_tokens(prompt, position=0) + root.length - 1)
        branch_lengths, parents = [], []
        for parent, root in enumerate(roots):
            for index in root.samples:
                sample, length = self.samples[index], self.sizes[index].input_length - root.length
                start = self._add_tokens(sample.token_ids[root.length : root.length + length], position=root.length)
                trained = np.flatnonzero(sample.trained) - root.length  # in the answer
                # The prompt's last token predicts the first token of every answer to it.
                self._add_trained(index, np.where(trained > 0, start + trained - 1, last_tokens[parent]))
                if length:
                    branch_lengths.append(length)
                    parents.append(parent)
        self.clusters.append(
            PackedCluster(
                root_lengths=tuple(root.length for root in roots),
                branch_lengths=tuple(branch_lengths),
                parents=tuple(parents),
            )
        )

    def add_padding(self, count: int) -> None:
        """Tokens at the end that belong to no sequence."""
        self._add_tokens(np.zeros(count, np.int32), position=0)

    def finish(self) -> Pack:
        return Pack(
            token_ids=_joined(self.token_ids),
            position_ids=_joined(self.position_ids),
            clusters=tuple(self.clusters),
            padded_shape=None,
            rows=_joined(self.rows),
            targets=_joined([self.samples[index].token_ids[self.samples[index].trained] for index in self.order]),
            order=tuple(self.order),
        )

    def _add_tokens(self, token_ids: IntArray, *, position: int) -> int:
        start = self.length
        self.length += len(token_ids)
        self.token_ids.append(token_ids)
        self.position_ids.append(np.arange(position, position + len(token_ids)))
        return start

    def _add_trained(self, index: int, rows: LongArray) -> None:
        self.rows.append(rows)
        self.order.append(index)


def _joined(parts: Sequence[NDArray[np.integer]]) -> LongArray:
    return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64, copy=False)
