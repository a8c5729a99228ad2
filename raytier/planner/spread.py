"""Choosing which parameters leave the device, spread evenly over the layers. Integers only."""

from __future__ import annotations

from collections.abc import Sequence


def even_shares(fixed: Sequence[int], free: Sequence[int], target: int) -> list[int]:
    """Bytes that each layer gives up so that together they give up `target`.

    Layer i streams `fixed[i]` bytes anyway and can give up at most `free[i]` more. All layers are levelled: the result
    is clamp(level - fixed[i], 0, free[i]) for the lowest level that reaches the target (up to rounding upwards).
    """
    low, high = 0, max((a + b for a, b in zip(fixed, free, strict=True)), default=0)

    def shares(level: int) -> list[int]:
        return [min(max(level - a, 0), b) for a, b in zip(fixed, free, strict=True)]

    while low < high:
        middle = (low + high) // 2
        if sum(shares(middle)) >= target:
            high = middle
        else:
            low = middle + 1
    return shares(high)


def spread(sizes: Sequence[Sequence[int]], fixed: Sequence[int], target: int) -> list[list[int]]:
    """Positions of the parameters per layer that give up at least `target` bytes (or all there are).

    `sizes[i]` are the parameters of layer i that may go. Parameters go whole, so each layer rounds its share up and
    the next one is asked for that much less: every prefix of the layers gives up its shares and less than one
    parameter more.
    """
    free = [sum(s) for s in sizes]
    if target <= 0:
        return [[] for _ in sizes]
    if target >= sum(free):
        return [list(range(len(s))) for s in sizes]
    chosen, carry = [], 0
    for layer, share in zip(sizes, even_shares(fixed, free, target), strict=True):
        want = share - carry
        picked = choose(layer, want)
        carry = sum(layer[i] for i in picked) - want
        chosen.append(picked)
    return chosen


def choose(sizes: Sequence[int], want: int) -> list[int]:
    """Positions of few parameters whose sizes add up to `want` or a little more (all of them if they do not).

    Largest first while they fit, then the smallest that covers the rest, then drop what that made superfluous.
    """
    if want <= 0:
        return []
    if sizes and min(sizes) == max(sizes):  # as the experts of a mixture are, by the hundred
        count = min(len(sizes), -(-want // sizes[0]))
        return list(range(len(sizes) - count, len(sizes)))
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], -i))
    picked, rest = [], want
    for i in order:
        if sizes[i] <= rest:
            picked.append(i)
            rest -= sizes[i]
    if rest > 0:
        taken = set(picked)
        cover = next((i for i in reversed(order) if i not in taken and sizes[i] >= rest), None)
        if cover is not None:
            rest -= sizes[cover]
            for i in list(picked):
                if sizes[i] <= -rest:
                    picked.remove(i)
                    rest += sizes[i]
            picked.append(cover)
    return sorted(picked)
