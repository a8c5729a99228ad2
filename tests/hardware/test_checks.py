"""A1, I4: what a user can mend."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from raytier.hardware.checks import warnings
from raytier.hardware.inventory import Disk, NodeInventory
from raytier.hardware.machine import Machine
from raytier.hardware.rates import Rates

GIB = 2**30
DISK = Disk("/data", "xfs", 50 * GIB, 100 * GIB, "1", True)
NODE = NodeInventory("n", 4, 16 * GIB, 15 * GIB, shm_free=8 * GIB, disks=(DISK,), huge_pages="madvise")
RATES = Rates(1e9, ((1, 1e9),))


def test_a_healthy_machine_has_no_warnings() -> None:
    assert warnings(Machine(NODE, RATES)) == ()
    assert warnings(Machine(NODE)) == ()


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        (Machine(replace(NODE, cgroup_limit=4 * GIB)), "limits memory to 4.0 of 16.0 GB"),
        (Machine(replace(NODE, shm_free=64 * 2**20)), "/dev/shm has 64 MB free.*--shm-size"),
        (Machine(replace(NODE, huge_pages="never")), "transparent huge pages are off.*echo madvise"),
        (Machine(replace(NODE, disks=(replace(DISK, direct_io=False),))), "/data .xfs. does not support O_DIRECT"),
        (Machine(replace(NODE, disks=(replace(DISK, free_bytes=3 * GIB),))), "/data has 3.0 GB free"),
        (Machine(NODE, replace(RATES, other_cores=1.5)), "other work used 1.5 cores.*doctor --measure"),
    ],
)
def test_each_says_what_to_do(machine: Machine, message: str) -> None:
    (found,) = warnings(machine)
    assert re.search(message, found)


def test_a_tmpfs_is_no_disk() -> None:
    shm = Disk("/dev/shm", "tmpfs", GIB, GIB, "2", False)
    assert warnings(Machine(replace(NODE, disks=(shm,)))) == ()
