"""How fast this node decodes what codecs have made of weights. No torch."""

from __future__ import annotations

import threading
import time

import numpy as np

from raytier.codecs.codec import FRAME_BYTES, Codec, Decoder, Encoder
from raytier.codecs.planes import ELEMENTS

#: Frames that are decoded in turn, so that they come from memory.
_FRAMES = 8


def measure_decoding(threads: int, seconds: float = 0.2) -> float:
    """Bytes per second into which `threads` threads together decode bf16 weights in byte planes, nothing else running.

    Weights are drawn from a normal distribution, which trained ones compress like (0.66 to 0.68 of their size).
    """
    codec, element = Codec("zstd-planes"), ELEMENTS["bfloat16"]
    draw = np.random.default_rng(0)
    encoder = Encoder(codec, element)
    frames = []
    for _ in range(_FRAMES):
        weights = draw.standard_normal(FRAME_BYTES // 2, np.float32) * np.float32(0.02)
        whole = (weights.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        frames.append(np.frombuffer(encoder.encode(whole), np.uint8))
    begin = threading.Barrier(threads + 1)
    deadline = [0.0]
    ends: list[tuple[float, int]] = []

    def run(first: int) -> None:
        decoder, into, count = Decoder(), np.empty((_FRAMES, FRAME_BYTES), np.uint8), 0
        into[:] = 1  # the first touch is not what is measured
        begin.wait()
        while time.perf_counter() < deadline[0]:
            number = (first + count) % _FRAMES
            decoder.decode(codec, element, frames[number], into[number])
            count += 1
        ends.append((time.perf_counter(), count))

    workers = [threading.Thread(target=run, args=(i,), name=f"decode-rate-{i}") for i in range(threads)]
    for worker in workers:
        worker.start()
    began = time.perf_counter()
    deadline[0] = began + seconds + 0.05  # by then all have passed the barrier
    begin.wait()
    began = time.perf_counter()
    for worker in workers:
        worker.join()
    return max(1, sum(count for _, count in ends)) * FRAME_BYTES / (max(end for end, _ in ends) - began)
