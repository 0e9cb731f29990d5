"""Samples into micro-batches: which samples go together, and in which order their tokens stand.

A pack is one row of tokens. Its sequences are gathered in *clusters* of similar length, so that attention
can pad a cluster to a rectangle at little cost. A cluster holds *roots* (sequences that start at position
0) and, when answers share their prompt, *branches* (answers that continue a root):

    roots    [prompt 0][prompt 1]...                 or  [prompt 0 + answer 0][prompt 0 + answer 1]...
    branches [answer 0 of 0][answer 1 of 0][answer 0 of 1]...

An answer's last token predicts nothing that is trained on, so it is left out of the model's input.

Pure arithmetic on lists; tensors are made where they are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from xrl.types import Sample

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
    """One micro-batch as plain lists: T tokens, R response tokens."""

    token_ids: list[int]  # [T] packed; [B * S] padded, sequence by sequence
    position_ids: list[int]  # the same shape
    clusters: tuple[PackedCluster, ...]  # empty when padded; tokens behind them only fill the row up
    padded_shape: tuple[int, int] | None  # (B, S) of a padded micro-batch
    response_rows: list[int]  # [R] place in token_ids whose output predicts each response token
    response_ids: list[int]  # [R] the response tokens
    samples: tuple[int, ...]  # indices of the samples, in the order of their response tokens


def num_tokens(samples: Sequence[Sample], indices: Iterable[int], *, share_prompts: bool) -> int:
    """Tokens a pack of these samples holds."""
    total = 0
    prompts: set[int] = set()
    for index in indices:
        sample = samples[index]
        total += len(sample.response_ids) - 1
        if not share_prompts or sample.group_id not in prompts:
            total += len(sample.prompt_ids)
            prompts.add(sample.group_id)
    return total


def plan_microbatches(
    samples: Sequence[Sample],
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

    Args:
        max_tokens: most tokens in a micro-batch.
        share_prompts: samples of a group count their prompt once, and are kept together where they fit.
        samples_per_microbatch: fixed size instead of the token budget.

    Returns:
        [replica][micro-batch] -> indices of samples
    """
    if samples_per_microbatch is not None:
        everyone = list(range(len(samples)))
        bins = [everyone[i : i + samples_per_microbatch] for i in range(0, len(samples), samples_per_microbatch)]
    else:
        bins = _fill(samples, max_tokens=max_tokens, share_prompts=share_prompts)
        bins = _split_largest(samples, bins, num_replicas, share_prompts=share_prompts)
    sizes = [num_tokens(samples, indices, share_prompts=share_prompts) for indices in bins]
    return _deal(bins, sizes, num_replicas)


def _by_group(samples: Sequence[Sample], indices: Iterable[int]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for index in indices:
        groups.setdefault(samples[index].group_id, []).append(index)
    return list(groups.values())


def _fill(samples: Sequence[Sample], *, max_tokens: int, share_prompts: bool) -> list[list[int]]:
    """First-fit decreasing: few bins, each within the budget."""
    everyone = range(len(samples))
    # Answers that share a prompt stay together: it is computed once in every micro-batch that holds one of them.
    units = _by_group(samples, everyone) if share_prompts else [[index] for index in everyone]
    pieces: list[list[int]] = []
    for unit in units:
        piece: list[int] = []
        for index in unit:
            if piece and num_tokens(samples, [*piece, index], share_prompts=share_prompts) > max_tokens:
                pieces.append(piece)
                piece = []
            piece.append(index)
        pieces.append(piece)
    sized = [(num_tokens(samples, piece, share_prompts=share_prompts), piece) for piece in pieces]
    bins: list[list[int]] = []
    room: list[int] = []
    for size, piece in sorted(sized, key=lambda entry: -entry[0]):
        for place, free in enumerate(room):
            if size <= free:
                bins[place].extend(piece)
                room[place] -= size
                break
        else:
            bins.append(list(piece))
            room.append(max_tokens - size)
    return bins


def _split_largest(
    samples: Sequence[Sample], bins: list[list[int]], num_replicas: int, *, share_prompts: bool
) -> list[list[int]]:
    """Split big bins until the replicas can have equally many, so that none idles while another works twice."""
    wanted = -(-len(bins) // num_replicas) * num_replicas
    bins = sorted(bins, key=lambda indices: num_tokens(samples, indices, share_prompts=share_prompts))
    while len(bins) < wanted and any(len(indices) > 1 for indices in bins):
        largest = max(
            (indices for indices in bins if len(indices) > 1),
            key=lambda indices: num_tokens(samples, indices, share_prompts=share_prompts),
        )
        bins.remove(largest)
        middle = _middle(samples, largest, share_prompts=share_prompts)
        bins += [largest[:middle], largest[middle:]]
    return bins


def _middle(samples: Sequence[Sample], indices: list[int], *, share_prompts: bool) -> int:
    """Where to cut a bin: half of its tokens, at a group's border if it has one."""
    places = range(1, len(indices))
    borders = [i for i in places if samples[indices[i]].group_id != samples[indices[i - 1]].group_id]
    half = num_tokens(samples, indices, share_prompts=share_prompts) / 2
    return min(
        borders if share_prompts and borders else places,
        key=lambda place: abs(num_tokens(samples, indices[:place], share_prompts=share_prompts) - half),
    )


def _deal(bins: list[list[int]], sizes: list[int], num_replicas: int) -> list[list[list[int]]]:
    """Largest first, each to the least loaded replica that still has room for an equal count."""
    per_replica = max(1, -(-len(bins) // num_replicas))
    replicas: list[list[list[int]]] = [[] for _ in range(num_replicas)]
    loads = [0] * num_replicas
    for size, indices in sorted(zip(sizes, bins, strict=True), key=lambda entry: -entry[0]):
        with_room = [replica for replica in range(num_replicas) if len(replicas[replica]) < per_replica]
        replica = min(with_room, key=lambda candidate: loads[candidate])
        replicas[replica].append(sorted(indices))
        loads[replica] += size
    for microbatches in replicas:
        microbatches.extend([] for _ in range(per_replica - len(microbatches)))
    return replicas


def pack(samples: Sequence[Sample], indices: Sequence[int], *, share_prompts: bool, multiple: int = 1) -> Pack:
    """One row of tokens for these samples.

    Args:
        share_prompts: compute each prompt once, with its answers as branches.
        multiple: pad the row to a multiple of this (the tensor-parallel size under sequence parallelism).
    """
    builder = _PackBuilder(samples)
    for cluster in _clusters(_roots(samples, indices, share_prompts=share_prompts)):
        if share_prompts:
            builder.add_branching(cluster)
        else:
            builder.add_plain(cluster)
    # A pack may not be empty: the pipeline schedule sends it through every stage all the same.
    missing = -len(builder.token_ids) % multiple if builder.token_ids else multiple
    if missing:
        builder.add_padding(missing)
    return builder.finish()


def pad(samples: Sequence[Sample], indices: Sequence[int], *, multiple: int = 1) -> Pack:
    """The samples as rows of a rectangle, padded at the end: the unpacked layout."""
    longest = max((len(samples[i].prompt_ids) + len(samples[i].response_ids) - 1 for i in indices), default=1)
    width = -(-longest // multiple) * multiple
    height = max(1, len(indices))
    token_ids = [0] * (height * width)
    rows: list[int] = []
    response_ids: list[int] = []
    for line, index in enumerate(indices):
        sample = samples[index]
        sequence = sample.prompt_ids + sample.response_ids[:-1]
        token_ids[line * width : line * width + len(sequence)] = sequence
        first = line * width + len(sample.prompt_ids) - 1
        rows += range(first, first + len(sample.response_ids))
        response_ids += sample.response_ids
    return Pack(
        token_ids=token_ids,
        position_ids=list(range(width)) * height,
        clusters=(),
        padded_shape=(height, width),
        response_rows=rows,
        response_ids=response_ids,
        samples=tuple(indices),
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


def _roots(samples: Sequence[Sample], indices: Sequence[int], *, share_prompts: bool) -> list[_Root]:
    if not share_prompts:
        return [
            _Root(samples=[i], length=len(samples[i].prompt_ids) + len(samples[i].response_ids) - 1, longest=0)
            for i in indices
        ]
    return [
        _Root(
            samples=group,
            length=len(samples[group[0]].prompt_ids),
            longest=max(len(samples[i].response_ids) for i in group) - 1,
        )
        for group in _by_group(samples, indices)
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
    """Lays clusters one behind the other and keeps count of places."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.all_samples = samples
        self.token_ids: list[int] = []
        self.position_ids: list[int] = []
        self.clusters: list[PackedCluster] = []
        self.rows: list[int] = []
        self.response_ids: list[int] = []
        self.samples: list[int] = []

    def add_plain(self, roots: list[_Root]) -> None:
        """Prompt and answer as one sequence each."""
        for root in roots:
            index = root.samples[0]
            sample = self.all_samples[index]
            start = self._add_tokens(sample.prompt_ids + sample.response_ids[:-1], position=0)
            first = start + len(sample.prompt_ids) - 1
            self._add_response(index, range(first, first + len(sample.response_ids)))
        self.clusters.append(PackedCluster(root_lengths=tuple(root.length for root in roots)))

    def add_branching(self, roots: list[_Root]) -> None:
        """Every prompt once, then the answers that continue them."""
        last_tokens = []
        for root in roots:
            prompt = self.all_samples[root.samples[0]].prompt_ids
            last_tokens.append(self._add_tokens(prompt, position=0) + len(prompt) - 1)
        branch_lengths, parents = [], []
        for parent, root in enumerate(roots):
            for index in root.samples:
                response = self.all_samples[index].response_ids
                start = self._add_tokens(response[:-1], position=root.length)
                # The prompt's last token predicts the first token of every answer to it.
                self._add_response(index, [last_tokens[parent], *range(start, start + len(response) - 1)])
                if len(response) > 1:
                    branch_lengths.append(len(response) - 1)
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
        self._add_tokens([0] * count, position=0)

    def finish(self) -> Pack:
        return Pack(
            token_ids=self.token_ids,
            position_ids=self.position_ids,
            clusters=tuple(self.clusters),
            padded_shape=None,
            response_rows=self.rows,
            response_ids=self.response_ids,
            samples=tuple(self.samples),
        )

    def _add_tokens(self, token_ids: Sequence[int], *, position: int) -> int:
        start = len(self.token_ids)
        self.token_ids += token_ids
        self.position_ids += range(position, position + len(token_ids))
        return start

    def _add_response(self, index: int, rows: Iterable[int]) -> None:
        self.rows += rows
        self.response_ids += self.all_samples[index].response_ids
        self.samples.append(index)
