"""A driver for Triton that compiles for an H100 and launches into tests/fake_libcuda.c: all that
happens on the host happens, and what would have been launched can be read. Tensors lie on the CPU.
"""

import contextlib
import ctypes
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
from triton.runtime import driver

from cgpt_kernels.triton_substrate import launch

SOURCE = Path(__file__).with_name("fake_libcuda.c")
FIELDS = ("x", "y", "z", "threads", "shared", "stream", "function", "pointer")


class Launch(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in FIELDS]


class FakeDriver(CudaDriver):
    """On device 0, an H100, and on `stream`."""

    def __init__(self, library):
        self.utils, self.launcher_cls, self.stream = CudaUtils(), CudaLauncher, 0
        self.get_device_capability = lambda device=0: (9, 0)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: self.stream
        self.library = library

    def launches(self) -> list[dict[str, int]]:
        """What was launched since the last call of this."""
        count = ctypes.c_uint64.in_dll(self.library, "launch_count")
        found = (Launch * count.value).in_dll(self.library, "launches")
        count.value = 0
        return [{name: getattr(entry, name) for name in FIELDS} for entry in found]


@contextlib.contextmanager
def fake_gpu() -> Iterator[FakeDriver]:
    """Kernels are launched on a GPU that is not there."""
    with tempfile.TemporaryDirectory() as folder:
        # the launcher looks for the library by this name, and finds the one that is loaded
        path = Path(folder, "libcuda.so.1")
        options = ["-shared", "-fPIC", "-O2", "-w", "-Wl,-soname,libcuda.so.1"]
        subprocess.run(["gcc", *options, "-o", path, SOURCE], check=True)
        library = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
        with triton.knobs.nvidia.scope():
            triton.knobs.nvidia.libcuda_path = folder
            found = FakeDriver(library)
        before = driver._active
        driver.set_active(found)
        try:
            with launch.as_if("9.0"):
                yield found
        finally:
            driver._active = before
