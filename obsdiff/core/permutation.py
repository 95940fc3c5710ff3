"""An order of the input channels in which N:M costs less.

s       (out, in), at least 0: what losing a weight costs, w_ij^2 G_jj
group   M consecutive channels, of which each row keeps the M - N dearest: its *retained* score
theta   of a channel and a row: the (M - N)-th dearest of the others in its group. A channel that takes its place is
        kept exactly where its score is above theta, so it brings max(s - theta, 0) to what the others retain.

Channels are dealt to the groups by their total score, then groups meet at random in pairs and exchange the two
channels whose exchange retains most. All pairs of a round are evaluated at once.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from obsdiff.core.support import check_groups
from obsdiff.sparsity import NM
from obsdiff_runtime.errors import ConfigError

CHUNK: Final = 1 << 23
"""Entries of the largest working tensor: the pairs of a round are taken in chunks of about this size."""

PATIENCE: Final = 8
"""Rounds between two looks at the gain: groups that meet at random may gain nothing once."""

NOISE: Final = 1e-6
"""An exchange must gain this share of what its two groups retain: below it is the rounding of float32 sums."""


def permute(
    scores: Sequence[Tensor],
    pattern: NM,
    *,
    width: int | None = None,
    rounds: int = 200,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> Tensor:
    """Finds an order of the channels that retains more than the present one.

    Args:
        scores: one or more (out_i, in), float, at least 0: linears that read the same channels, such as the two
            output projections of joint attention. Scale them as their losses are to be weighed.
        pattern: N of every M are removed.
        width: channels move only inside consecutive segments of this many (a head's); None: anywhere.
        rounds: at most.
        tolerance: ends the search when PATIENCE rounds gain no more than this share of what is retained.
        seed: of who meets whom. The same on every device.

    Returns:
        (in,), int64: the channel at place p is now order[p]. Take weight[:, order] here and the producer's rows
        [order]. Never worse than the identity in any segment, which comes back where nothing helps.

    Raises:
        ConfigError: M does not divide the segments, or the segments do not divide the channels.
    """
    stacked = torch.cat([score.detach().float() for score in scores]).mT.contiguous()  # (in, out)
    channels = len(stacked)
    segment = channels if width is None else width
    check_groups(segment, pattern)
    if channels % segment:
        raise ConfigError(f"{channels} channels cannot be cut into segments of {segment}")
    identity = torch.arange(channels, device=stacked.device)
    order = _better(identity, _dealt(stacked, segment, pattern.m), stacked, pattern, segment)
    shape = (channels // segment, segment // pattern.m)  # segments, groups in each
    if shape[1] > 1:
        _exchange(stacked[order], order, shape, pattern, rounds, tolerance, torch.Generator().manual_seed(seed))
    return _better(identity, order, stacked, pattern, segment)


def retained(score: Tensor, pattern: NM) -> float:
    """The sum over rows and groups of the M - N largest scores.

    Args:
        score: (out, in), float, at least 0.
        pattern: N of every M are removed.

    Raises:
        ConfigError: `in` is no multiple of M.
    """
    check_groups(score.shape[1], pattern)
    return float(_retained(score.mT, pattern).sum())


def _retained(score: Tensor, pattern: NM) -> Tensor:
    """What each group retains, (in / m,), float64, of (in, out)."""
    groups = score.reshape(-1, pattern.m, score.shape[1])
    return groups.topk(pattern.m - pattern.n, dim=1).values.sum(dim=(1, 2), dtype=torch.float64)


def _dealt(score: Tensor, segment: int, m: int) -> Tensor:
    """The channels of each segment by falling total, dealt to its groups one at a time."""
    totals = score.sum(dim=1, dtype=torch.float64).view(-1, segment)
    ranked = totals.argsort(dim=1, descending=True, stable=True)
    ranked += torch.arange(len(totals), device=score.device)[:, None] * segment
    return ranked.view(len(totals), m, -1).mT.reshape(-1)


def _better(first: Tensor, second: Tensor, score: Tensor, pattern: NM, segment: int) -> Tensor:
    """In each segment the order that retains more, the first where they are equal."""
    groups = segment // pattern.m
    totals = [_retained(score[order], pattern).view(-1, groups).sum(dim=1) for order in (first, second)]
    take = (totals[1] > totals[0] * (1 + 1e-12)).repeat_interleave(segment)
    return torch.where(take, second, first)


def _exchange(
    score: Tensor,
    order: Tensor,
    shape: tuple[int, int],
    pattern: NM,
    rounds: int,
    tolerance: float,
    generator: torch.Generator,
) -> None:
    """Lets groups meet and exchange channels; changes `score`, (in, out), and `order`, both in the present order."""
    segments, groups = shape
    pairs = segments * (groups // 2)
    height = max(1, CHUNK // (pattern.m**2 * score.shape[1]))
    enough = tolerance * float(_retained(score, pattern).sum())
    first_group = torch.arange(segments)[:, None] * groups
    gain = torch.zeros((), dtype=torch.float64, device=score.device)
    for done in range(rounds):
        met = torch.rand(shape, generator=generator).argsort(dim=1)[:, : groups // 2 * 2] + first_group
        met = met.view(pairs, 2).to(score.device)
        for top in range(0, pairs, height):
            gain += _exchange_pairs(score, order, met[top : top + height], pattern)
        if done % PATIENCE == PATIENCE - 1:
            if float(gain) <= enough:
                break
            gain.zero_()


def _exchange_pairs(score: Tensor, order: Tensor, met: Tensor, pattern: NM) -> Tensor:
    """Makes the best exchange of each pair of groups, if any gains. Returns the sum of the gains."""
    m = pattern.m
    members = met[:, :, None] * m + torch.arange(m, device=met.device)  # (pairs, 2, m)
    values = score[members]  # (pairs, 2, m, out)
    theta, rest, total = _thresholds(values, m - pattern.n)
    brings = [  # [a, b]: what b of the one group would bring in the place of a of the other, (pairs, m, m)
        (values[:, 1 - side, None, :, :] - theta[:, side, :, None, :]).relu_().sum(dim=-1) for side in (0, 1)
    ]
    after = brings[0] + rest[:, 0, :, None] + brings[1].mT + rest[:, 1, None, :]
    before = total.sum(dim=1)  # (pairs,)
    best, place = after.flatten(1).max(dim=1)
    gain = best - before
    chosen = torch.nonzero(gain > NOISE * before)[:, 0]
    one, other = members[chosen, 0, place[chosen] // m], members[chosen, 1, place[chosen] % m]
    moved = torch.cat([one, other]), torch.cat([other, one])
    score[moved[0]] = score[moved[1]]
    order[moved[0]] = order[moved[1]]
    return gain[chosen].sum(dtype=torch.float64)


def _thresholds(values: Tensor, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """theta, and what is retained without each channel and with all.

    Args:
        values: (pairs, 2, m, out).
        kept: of each m.

    Returns:
        theta, (pairs, 2, m, out); rest, (pairs, 2, m); total, (pairs, 2).
    """
    falling = list(values.unbind(dim=2))
    for done in range(kept + 1):  # a selection sort by maxima and minima, as far as it is needed
        for place in range(len(falling) - 1, done, -1):
            high, low = falling[place - 1], falling[place]
            falling[place - 1], falling[place] = torch.maximum(high, low), torch.minimum(high, low)
    last, next_one = falling[kept - 1][:, :, None], falling[kept][:, :, None]  # (pairs, 2, 1, out)
    inside = values >= last
    total = torch.stack(falling[:kept]).sum(dim=(0, -1))
    lost = torch.where(inside, values - next_one, 0).sum(dim=-1)
    return torch.where(inside, next_one, last), total[:, :, None] - lost, total
