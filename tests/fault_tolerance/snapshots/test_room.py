"""How much memory is free, by what the kernel says: of this machine, and of made-up ones with limits."""

import psutil
import pytest

from fault_tolerance.snapshots.room import room

MEMINFO = "MemTotal:  8000 kB\nMemAvailable:    4000 kB\n"


def machine(folder, cgroup_line, files):
    """A /proc and a /sys/fs/cgroup with these texts."""
    proc, cgroups = folder / "proc", folder / "cgroup"
    texts = {proc / "meminfo": MEMINFO, proc / "self/cgroup": cgroup_line, proc / "sys/kernel/random/boot_id": "ab12cd34-x"}
    for path, text in (texts | {cgroups / name: text for name, text in files.items()}).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return {name.partition(" ")[0]: free for name, free in room(proc, cgroups).items()}


def test_this_machine_has_what_psutil_says():
    [free] = [free for pool, free in room().items() if pool.startswith("machine")]
    assert free == pytest.approx(psutil.virtual_memory().available, rel=0.05)


def test_a_limited_cgroup_is_a_pool_of_its_own_and_reclaimable_cache_is_free(tmp_path):
    files = {"job/memory.max": "3000000", "job/memory.current": "1000000", "job/memory.stat": "anon 5\ninactive_file 200000\n"}
    assert machine(tmp_path, "0::/job\n", files) == {"machine": 4000 << 10, "cgroup": 2200000}


def test_the_limit_of_a_cgroup_above_counts_too(tmp_path):
    files = {"a/b/memory.max": "max", "a/memory.max": "500", "a/memory.current": "100", "a/memory.stat": ""}
    assert machine(tmp_path, "0::/a/b\n", files)["cgroup"] == 400


def test_the_older_kind_of_cgroup_is_read_and_no_limit_is_none(tmp_path):
    files = {
        "memory/job/memory.limit_in_bytes": "1000",
        "memory/job/memory.usage_in_bytes": "1200",
        "memory/job/memory.stat": "total_inactive_file 300\n",
        "memory/memory.limit_in_bytes": "9223372036854771712",
    }
    lines = "5:cpu:/x\n4:memory:/job\n0::/\n"
    assert machine(tmp_path, lines, files) == {"machine": 4000 << 10, "cgroup": 100}
