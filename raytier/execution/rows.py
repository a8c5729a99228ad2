"""Single rows of a parameter that stays on disk: the input embedding."""

from __future__ import annotations

from collections.abc import Sequence

from raytier.checkpoint.manifest import Parameter, SourceFile
from raytier.execution.layout import assemble, num_rows, row_bytes, row_unit
from raytier.execution.reader import ReaderPool, Urgency
from raytier.tiers.aligned import ALIGNMENT, AlignedBuffer, align_up


class RowFetcher:
    """Reads rows of one parameter whose extents lie in `files`, in as many rounds as a staging buffer of
    `staging_bytes` makes necessary.

    Not thread-safe: one fetch at a time.
    """

    def __init__(
        self, parameter: Parameter, files: Sequence[SourceFile], pool: ReaderPool, staging_bytes: int = 8 << 20
    ) -> None:
        self._parameter = parameter
        self._pool = pool
        self._files = files
        self.row_bytes = row_bytes(parameter)
        # A row costs at most its own bytes rounded up, one block of misalignment, and again if it must be assembled.
        row_cost = 2 * align_up(self.row_bytes) + 2 * ALIGNMENT
        self._rows_per_round = max(1, staging_bytes // row_cost)
        self._staging: AlignedBuffer | None = None

    def fetch(self, rows: Sequence[int]) -> memoryview:
        """The bytes of `rows` in their order, packed: `len(rows) * row_bytes`, new writable memory.

        Raises:
            TierError: a read failed.
            IndexError: there is no such row.
        """
        limit = num_rows(self._parameter)
        if rows and not 0 <= min(rows) <= max(rows) < limit:
            raise IndexError(f"{self._parameter.name} has {limit} rows, asked for {min(rows)} to {max(rows)}")
        packed = memoryview(bytearray(len(rows) * self.row_bytes))
        places: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            places.setdefault(row, []).append(place)
        distinct = sorted(places)
        for start in range(0, len(distinct), self._rows_per_round):
            self._fetch_round(distinct[start : start + self._rows_per_round], places, packed)
        return packed

    def _fetch_round(self, rows: Sequence[int], places: dict[int, list[int]], packed: memoryview) -> None:
        size = self.row_bytes
        unit = row_unit(self._parameter, rows, self._files)
        view = self._staging_of(unit.nbytes).view[: unit.nbytes]
        self._pool.submit(unit.reads, view, Urgency.URGENT).wait()
        assemble(unit, view)
        for member in unit.members:
            for row in range(member.row_start, member.row_stop):
                source = member.offset + (row - member.row_start) * size
                for place in places[row]:
                    packed[place * size : (place + 1) * size] = view[source : source + size]

    def _staging_of(self, nbytes: int) -> AlignedBuffer:
        if self._staging is None or self._staging.nbytes < nbytes:
            self._staging = AlignedBuffer(nbytes)
        return self._staging

    def close(self) -> None:
        """Let go of the staging memory."""
        self._staging = None
