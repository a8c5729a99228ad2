"""Making files of a tier again, in place, for who finds them damaged while reading (spec B5)."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress

from raytier.checkpoint.manifest import Parameter, SourceFile
from raytier.codecs.codec import Encoder, checksum
from raytier.codecs.scheme import element_of
from raytier.errors import DamagedError, RaytierError
from raytier.tiers.aligned import ALIGNMENT, AlignedBuffer
from raytier.tiers.checks import SourceChecks
from raytier.tiers.copying import CHUNK_BYTES, Source, form_frames, row_pieces
from raytier.tiers.files import DirectFile
from raytier.tiers.striping import slice_extents

logger = logging.getLogger(__name__)


def mend(parameter: Parameter, files: Sequence[SourceFile], checks: SourceChecks | None) -> None:
    """Write the files of a parameter that is `stored` again, with the same bytes, converted from the checkpoint.

    Who has them open sees what is written. If it cannot be done, the files are removed: the next start makes others.

    Args:
        files: what the extents of the parameter, and of what is stored of it, index.

    Raises:
        DamagedError: the checkpoint is damaged as well, or gone, or makes other bytes than it did.
    """
    stored = parameter.stored
    if stored is None:
        raise ValueError(f"{parameter.name} is in no file of a tier")
    paths = {extent.file: files[extent.file].path for extent in stored.extents}
    try:
        with ExitStack() as stack:
            used = {extent.file for extent in parameter.extents}
            sources = {n: stack.enter_context(DirectFile(files[n].path, files[n].size)) for n in used}
            memory = stack.enter_context(AlignedBuffer(CHUNK_BYTES + 2 * ALIGNMENT))
            source = Source(sources, memory.view, lambda *_: None, lambda: False, checks)
            targets: dict[int, int] = {}
            for number, path in paths.items():
                targets[number] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
                stack.callback(os.close, targets[number])
            encoder = Encoder(stored.codec, element_of(stored.form, parameter.dtype))
            offsets = stored.frames.offsets()
            frames = (
                frame
                for rows in row_pieces(parameter, stored.piece_rows)
                for frame in form_frames(parameter, stored.form, rows, source.read, stored.frames.step)
            )
            for index, frame in enumerate(frames):
                coded = memoryview(encoder.encode(frame))
                if checksum(coded) != stored.frames.checksums[index]:
                    raise DamagedError("the checkpoint does not make the same bytes again")
                for extent in slice_extents(stored.extents, offsets[index], offsets[index + 1]):
                    os.pwrite(targets[extent.file], coded[: extent.nbytes], extent.offset)
                    coded = coded[extent.nbytes :]
            for number, target in targets.items():
                os.ftruncate(target, files[number].size)
                os.fsync(target)
                os.posix_fadvise(target, 0, 0, os.POSIX_FADV_DONTNEED)
    except (RaytierError, OSError, RuntimeError, ValueError) as error:
        for path in paths.values():
            with suppress(OSError):
                os.unlink(path)
        reason = error.message if isinstance(error, RaytierError) else str(error)
        where = ", ".join(paths.values())
        raise DamagedError(f"{where} of {parameter.name} is damaged, and cannot be made again: {reason}") from error
    logger.warning("%s of %s was damaged and has been made again", ", ".join(paths.values()), parameter.name)
