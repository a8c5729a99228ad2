"""What computing tokens and loading their KV cost, as measured, and so which of the two is done. Pure."""

from __future__ import annotations

from raytier.kv.orders import KVReport

#: Weight of all earlier measurements when one more comes: the last fifty or so count.
_DECAY = 0.98
#: What one refusal takes from the weight of measurements, so that a bad one is not believed for ever.
_FORGET = 0.9
#: Weight of each of the two measurements that are assumed, beside 1 of one that was made.
_PRIOR = 0.02


class LinearCost:
    """seconds = fixed + each * x, fitted to measurements by least squares, the last ones counting most.

    What was assumed counts as two measurements, one with little and one with much, and keeps its weight: where all
    measurements are of one size, it says how seconds divide into the two parts.

    Args:
        fixed, each: what is assumed, in seconds, and seconds per unit of x.
        scale: an x that is much.
    """

    def __init__(self, fixed: float, each: float, scale: float) -> None:
        self._prior = ((_PRIOR, 0.0, fixed), (_PRIOR, 1.0, fixed + each * scale))  # weight, x / scale, seconds
        self._scale = scale
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)  # w, wx, wxx, wy, wxy
        self._fit()

    def measured(self, x: float, seconds: float) -> None:
        """One more measurement."""
        x /= self._scale
        more = (1.0, x, x * x, seconds, x * seconds)
        self._sums = tuple(_DECAY * old + new for old, new in zip(self._sums, more, strict=True))  # type: ignore[assignment]
        self._fit()

    def forget(self) -> None:
        """Measurements say that it does not pay, and will not be made any more: trust them a little less."""
        self._sums = tuple(_FORGET * each for each in self._sums)  # type: ignore[assignment]
        self._fit()

    def _fit(self) -> None:
        w, wx, wxx, wy, wxy = self._sums
        for weight, x, y in self._prior:
            w, wx, wxx, wy, wxy = (
                w + weight,
                wx + weight * x,
                wxx + weight * x * x,
                wy + weight * y,
                wxy + weight * x * y,
            )
        slope = (w * wxy - wx * wy) / (w * wxx - wx * wx)
        slope = min(max(slope, 0.0), wy / wx)  # neither part is negative
        self.each = slope / self._scale
        self.fixed = max(0.0, (wy - slope * wx) / w)

    def of(self, x: float) -> float:
        """Seconds for x; none for nothing."""
        return self.fixed + self.each * x if x > 0 else 0.0


class KVCosts:
    """Seconds of steps by their tokens, and of loads by their bytes.

    Args:
        step_s, token_s: of a step, and of each prompt token in it, as planned.
        chunk: tokens that a step carries at most.
        host_rate, disk_rate: bytes per second, as measured before.
    """

    def __init__(self, step_s: float, token_s: float, chunk: int, host_rate: float, disk_rate: float) -> None:
        much = 64 * 2**20
        self.chunk = chunk
        self.step = LinearCost(step_s, token_s, max(2, chunk))
        self.host = LinearCost(0.0002, 1 / host_rate, much)
        self.disk = LinearCost(0.0005, 1 / disk_rate, much)

    def compute(self, known: int, found: int) -> float:
        """Seconds to compute the KV of `known` tokens but for the leading `found` ones, and one more."""
        tokens = known - found
        return -(-tokens // self.chunk) * self.step.fixed + tokens * self.step.each

    def learn(self, report: KVReport, num_tokens: int, seconds: float) -> None:
        """From a step: what it loaded; if it loaded nothing, what its tokens cost."""
        for cost, moved in ((self.host, report.loaded), (self.disk, report.disk_loaded)):
            if moved.nbytes:
                cost.measured(moved.nbytes, moved.seconds)
        if num_tokens and not (report.loaded.blocks or report.disk_loaded.blocks):
            self.step.measured(num_tokens, seconds)

    def refused(self) -> None:
        """Something was found, and loading it was said to be slower."""
        self.host.forget()
        self.disk.forget()

    def load(self, host_bytes: int, disk_bytes: int) -> float:
        """Seconds to load that; one tier after the other."""
        return self.host.of(host_bytes) + self.disk.of(disk_bytes)
