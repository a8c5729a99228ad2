"""What codecs make of a model's weights, from a small part of them."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from raytier.checkpoint.manifest import Parameter, SourceFile
from raytier.codecs.codec import FRAME_BYTES, RATIOS, Codec, Encoder
from raytier.codecs.planes import BYTES, ELEMENTS
from raytier.errors import CheckpointError

#: Parts that are coded, a frame of each.
_PARTS = 4
#: Smaller parts say little about a frame.
_LEAST_BYTES = 64 << 10


def sample_ratios(parameters: Sequence[Parameter], files: Sequence[SourceFile]) -> dict[str, dict[str, float]]:
    """Codec -> dtype -> coded over plain bytes, of the dtypes that codecs know; none where there is too little to say.

    Raises:
        CheckpointError: a file cannot be read.
    """
    found: dict[str, dict[str, float]] = {}
    for dtype in ELEMENTS:
        large = [p for p in parameters if p.dtype == dtype and p.matrix and p.extents and p.nbytes >= _LEAST_BYTES]
        if not large:
            continue
        step = max(1, len(large) // _PARTS)
        parts = [_middle(p, files) for p in large[step // 2 :: step][:_PARTS]]
        for name in RATIOS:
            encoder = Encoder(Codec("zstd-planes" if name == "zstd-planes" else "zstd"), ELEMENTS.get(dtype, BYTES))
            coded = sum(len(encoder.encode(np.frombuffer(part, np.uint8))) for part in parts)
            found.setdefault(name, {})[dtype] = min(1.0, coded / sum(map(len, parts)))
    return found


def _middle(parameter: Parameter, files: Sequence[SourceFile]) -> bytes:
    """A frame from the middle of a parameter's largest extent."""
    extent = max(parameter.extents, key=lambda e: e.nbytes)
    nbytes = min(FRAME_BYTES, extent.nbytes) // 4 * 4
    start = extent.offset + (extent.nbytes - nbytes) // 2 // 4 * 4
    path = files[extent.file].path
    try:
        with open(path, "rb") as file:
            data = os.pread(file.fileno(), nbytes, start)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; restore the file") from None
    if len(data) < nbytes:
        raise CheckpointError(f"{path} ends within {parameter.name}: it is truncated; restore the file")
    return data
