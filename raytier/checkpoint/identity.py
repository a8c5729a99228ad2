"""What a model's results depend on, as one text: for what is computed by it and kept beyond this process."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from hashlib import blake2b

from raytier.checkpoint.manifest import ModelManifest
from raytier.errors import CheckpointError

#: A header of safetensors is no longer than that.
_MOST_HEADER = 100 << 20


def model_identity(manifest: ModelManifest) -> str:
    """The checkpoint's files as they are now (name, size, time of change, hash of the header), and its configuration.

    Raises:
        CheckpointError: a file cannot be read.
    """
    files = []
    for file in manifest.files:
        try:
            with open(file.path, "rb") as opened:
                status = os.fstat(opened.fileno())
                length = opened.read(8)
                header = opened.read(min(int.from_bytes(length, "little"), _MOST_HEADER))
        except OSError as error:
            raise CheckpointError(f"{file.path}: {error.strerror}; restore the file") from None
        stamp = blake2b(length + header, digest_size=16).hexdigest()
        files.append([os.path.basename(file.path), status.st_size, status.st_mtime_ns, stamp])
    configuration = ""
    with suppress(OSError), open(os.path.join(manifest.model_dir, "config.json"), encoding="utf-8") as opened_config:
        configuration = opened_config.read()
    return json.dumps([manifest.architecture, configuration, files])
