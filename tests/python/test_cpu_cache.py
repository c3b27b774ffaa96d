"""How large a core's own cache is, by what Linux says."""

from pathlib import Path

from vllm_efa_ep.cpu_cache import own_cache_bytes

_CACHES = [(1, "32K"), (1, "32K"), (2, "1024K"), (3, "32768K")]  # as cpu0/cache/index* of an EPYC


def _sysfs(directory: Path, caches: list[tuple[int, str]]) -> Path:
    for index, (level, size) in enumerate(caches):
        cache = directory / f"index{index}"
        cache.mkdir()
        (cache / "level").write_text(f"{level}\n")
        (cache / "size").write_text(f"{size}\n")
    return directory


def test_the_second_level_is_the_cores_own(tmp_path: Path) -> None:
    """The first is too small to matter, and the third belongs to many cores."""
    assert own_cache_bytes(_sysfs(tmp_path, _CACHES)) == 2**20


def test_without_it_no_row_is_too_many(tmp_path: Path) -> None:
    """Containers may have no sysfs, and a kernel need not know every level."""
    assert own_cache_bytes(tmp_path / "nowhere") > 2**60
    assert own_cache_bytes(_sysfs(tmp_path, _CACHES[:2])) > 2**60


def test_what_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    """A size in another unit is no reason to fail."""
    assert own_cache_bytes(_sysfs(tmp_path, [(2, "1M")])) > 2**60
