"""How fast this node decodes what codecs have made of weights. No torch."""

from __future__ import annotations

import threading
import time

import numpy as np

from raytier.codecs.codec import FRAME_BYTES, Codec, Decoder, Encoder, checksum
from raytier.codecs.planes import ELEMENTS

#: Different frames, and copies of each: as in streaming, what is decoded comes from memory and goes there,
#: not from and to the caches of the CPU.
_FRAMES = 8
_COPIES = 8


def measure_decoding(threads: int, seconds: float = 0.2) -> float:
    """Bytes per second into which `threads` threads together check and decode bf16 weights in byte planes, nothing else
    running.

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
    frames = [frame.copy() for _ in range(_COPIES) for frame in frames]
    target = np.ones((len(frames), FRAME_BYTES), np.uint8)  # touched: that is not what is measured
    begin = threading.Barrier(threads + 1)
    deadline = [0.0]
    ends: list[tuple[float, int]] = []

    def run(first: int) -> None:
        decoder, count = Decoder(), 0
        begin.wait()
        while time.perf_counter() < deadline[0]:
            number = (first + count * threads) % len(frames)
            checksum(frames[number].data)
            decoder.decode(codec, element, frames[number], target[number])
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
