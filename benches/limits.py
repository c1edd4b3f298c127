"""What the machine can do at most: copy bandwidth and multiply-add rate of one core, measured here and now."""

import ctypes
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch

PEAK_SOURCE = r"""
typedef float lanes __attribute__((vector_size(LANES * 4)));
/* Ten independent chains of multiply-adds, one register each, keep two units busy through the latency. */
double run(long rounds) {
  lanes x = {1.0f, 0.5f}, y = {1e-9f, 1e-9f};
  lanes a = x, b = x, c = x, d = x, e = x, f = x, g = x, h = x, i = x, j = x;
  for (long r = 0; r < rounds; ++r) {
    a = a * x + y; b = b * x + y; c = c * x + y; d = d * x + y; e = e * x + y;
    f = f * x + y; g = g * x + y; h = h * x + y; i = i * x + y; j = j * x + y;
    __asm__ volatile("" : "+v"(a), "+v"(b), "+v"(c), "+v"(d), "+v"(e), "+v"(f), "+v"(g), "+v"(h), "+v"(i), "+v"(j));
  }
  a = a + b + c + d + e + f + g + h + i + j;
  return a[0] + a[1];
}
"""


def fma_peak() -> float | None:
    """fp32 operations a second of one core's multiply-add units; None without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    lanes = 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "peak.c", Path(folder) / "peak.so"
        source.write_text(PEAK_SOURCE)
        flags = ["-O2", "-march=native", "-ffp-contract=fast", f"-DLANES={lanes}", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
        run = ctypes.CDLL(str(library)).run
        run.argtypes, run.restype = [ctypes.c_long], ctypes.c_double
        rounds = 3_000_000
        best = min(_process_time(lambda: run(rounds)) for _ in range(5))
    return 2.0 * lanes * 10 * rounds / best


def copy_bandwidth() -> float:
    """Bytes read plus written a second by one core copying 256 MB between warm buffers."""
    source, target = torch.ones(64 << 20), torch.zeros(64 << 20)
    best = min(_process_time(lambda: target.copy_(source)) for _ in range(5))
    return 2.0 * source.numel() * 4 / best


def _process_time(function) -> float:
    begin = time.process_time()
    function()
    return time.process_time() - begin
