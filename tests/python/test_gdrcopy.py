"""GDRCopy's calls, on a library whose "GPU memory" is the process's own."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from vllm_efa_ep.cuda.gdrcopy import GdrCopy
from vllm_efa_ep.errors import DeviceUnavailableError

PAGE = 64 << 10
# Signatures as in gdrapi.h; `calls` counts what is open, `refuse` names the call that fails.
SOURCE = """
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
typedef struct { unsigned long h; } gdr_mh_t;
int calls = 0, missing = 0;
const char *refuse = "";
static struct { unsigned long addr; size_t size; } pinned;
void *gdr_open(void) { if (missing) return NULL; ++calls; return &pinned; }
int gdr_close(void *g) { --calls; return g == &pinned ? 0 : EINVAL; }
int gdr_pin_buffer(void *g, unsigned long addr, size_t size, uint64_t token, uint32_t space,
                   gdr_mh_t *handle) {
  if (!strcmp(refuse, "gdr_pin_buffer")) return ENOMEM;
  if (g != &pinned || addr % 65536 || size % 65536 || token || space) return EINVAL;
  pinned.addr = addr; pinned.size = size; handle->h = 77; ++calls; return 0;
}
int gdr_unpin_buffer(void *g, gdr_mh_t handle) {
  --calls; return g == &pinned && handle.h == 77 ? 0 : EINVAL;
}
int gdr_map(void *g, gdr_mh_t handle, void **va, size_t size) {
  if (!strcmp(refuse, "gdr_map")) return EPERM;
  if (g != &pinned || handle.h != 77 || size != pinned.size) return EINVAL;
  *va = (void *)pinned.addr; ++calls; return 0;
}
int gdr_unmap(void *g, gdr_mh_t handle, void *va, size_t size) {
  --calls;
  if (g != &pinned || handle.h != 77) return EINVAL;
  return va == (void *)pinned.addr && size == pinned.size ? 0 : EINVAL;
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the stub."""
    directory = tmp_path_factory.mktemp("gdrapi")
    source, built = directory / "gdrapi.c", directory / "libgdrapi.so.2"
    source.write_text(SOURCE)
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler, "the project is built with a C compiler"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", built, source], check=True)
    return built


def state(library: Path, name: str) -> ctypes.c_int:
    """Return a variable of the stub."""
    return ctypes.c_int.in_dll(ctypes.CDLL(str(library)), name)


@pytest.mark.parametrize(("start", "size"), [(0, 8), (4096, 8192), (PAGE - 64, 128), (0, 3 * PAGE)])
def test_a_mapping_starts_at_the_address_and_is_given_back(library: Path, start: int, size: int) -> None:
    """Also inside a page and over its end: whole pages are pinned, the caller's address is returned."""
    memory = ctypes.create_string_buffer(5 * PAGE)
    first = -(-ctypes.addressof(memory) // PAGE) * PAGE
    gdrcopy = GdrCopy(str(library))
    assert gdrcopy.map(first + start, size) == first + start
    assert state(library, "calls").value == 3
    gdrcopy.close()
    assert state(library, "calls").value == 0


@pytest.mark.parametrize("call", ["gdr_pin_buffer", "gdr_map"])
def test_a_refused_call_leaves_nothing_pinned(library: Path, call: str) -> None:
    """The error names the call and the reason."""
    refuse = ctypes.c_char_p.in_dll(ctypes.CDLL(str(library)), "refuse")
    gdrcopy = GdrCopy(str(library))
    refuse.value = call.encode()
    with pytest.raises(DeviceUnavailableError, match=f"{call} failed.*versions of libgdrapi"):
        gdrcopy.map(16 * PAGE, PAGE)
    refuse.value = b""
    assert state(library, "calls").value == 1
    gdrcopy.close()


def test_a_missing_driver_is_named(library: Path) -> None:
    """gdr_open() says nothing but null."""
    missing = state(library, "missing")
    missing.value = 1
    with pytest.raises(DeviceUnavailableError, match=r"/dev/gdrdrv.*gdrdrv"):
        GdrCopy(str(library))
    missing.value = 0


def test_a_missing_library_is_named() -> None:
    """As on machines without GDRCopy."""
    with pytest.raises(DeviceUnavailableError, match=r"GDRCopy's library cannot be opened.*install gdrcopy"):
        GdrCopy("libgdrapi-that-is-not-there.so")
