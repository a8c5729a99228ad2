from tests.tiers.blobs import blob, small_disk

__all__ = ["blob", "small_disk"]
