"""The host emulator of CUDA kernels: right kernels give right results, and wrong ones are found (tests/emu)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.asan

SANITIZED = os.environ.get("HDROPS_SANITIZE", "0") == "1"
SCHEDULES = ["mixed", "ahead"]


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def bits_of(array: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Rounded to a 16-bit format, as its bits."""
    return torch.from_numpy(array).to(dtype).view(torch.uint16).numpy()


def rounded(array: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(array).to(dtype).double().numpy()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("threads", [32, 256, 1024])
def test_reduction_with_shuffles(emulated, schedule, threads):
    emulated.set_schedule(schedule)
    x, sums = normal(7, 1500), np.zeros(7, np.float32)
    emulated.emulator_row_sums(x, sums, threads)
    np.testing.assert_allclose(sums, x.sum(1, dtype=np.float64), rtol=0, atol=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tiled_matmul(emulated, schedule):
    emulated.set_schedule(schedule)
    a, b, c = normal(48, 48), normal(48, 48)[::-1].copy(), np.zeros((48, 48), np.float32)
    emulated.emulator_matmul("", a, b, c)
    np.testing.assert_allclose(c, a.astype(float) @ b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("without", ["first", "second"])
def test_missing_barrier_is_found(emulated, schedule, without):
    emulated.set_schedule(schedule)
    a, b = normal(32, 32), normal(32, 32)[::-1].copy()
    for seed in range(10):
        emulated.set_seed(seed)
        c = np.zeros((32, 32), np.float32)
        emulated.emulator_matmul(without, a, b, c)
        assert not np.allclose(c, a.astype(float) @ b, atol=1e-5)


def test_indices_of_a_3d_grid(emulated):
    blocks, threads = (3, 2, 4), (5, 3, 2)
    indices = np.full((np.prod(blocks) * np.prod(threads), 6), -1, np.int32)
    emulated.emulator_indices(blocks, threads, indices)
    expected = np.indices((*blocks[::-1], *threads[::-1])).reshape(6, -1).T[:, [2, 1, 0, 5, 4, 3]]
    np.testing.assert_array_equal(indices, expected)


def test_seed_gives_the_order_and_only_the_seed(emulated):
    def order(seed: int) -> list[int]:
        emulated.set_seed(seed)
        taken = np.full(8 * 64, -1, np.int32)
        emulated.emulator_tickets(8, 64, taken)
        assert sorted(taken) == list(range(512))
        return taken.tolist()

    orders = [order(seed) for seed in range(20)]
    assert orders == [order(seed) for seed in range(20)]
    assert len(set(map(tuple, orders))) == 20
    blocks = [[thread // 64 for thread in taken[::64]] for taken in orders]
    assert all(sorted(order) == list(range(8)) for order in blocks)
    assert len(set(map(tuple, blocks))) > 5


def test_schedules(emulated):
    def changes_of_warp(schedule: str) -> int:
        emulated.set_schedule(schedule)
        taken = np.full(256, -1, np.int32)
        emulated.emulator_tickets(1, 256, taken)
        return int(np.count_nonzero(np.diff(taken // 32)))

    assert changes_of_warp("ahead") == 7
    assert changes_of_warp("mixed") > 100


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warp_primitives(emulated, schedule):
    emulated.set_schedule(schedule)
    x = np.random.default_rng(1).integers(-5, 6, 96, dtype=np.int32)
    results = np.zeros((96, 16), np.int32)
    emulated.emulator_warp_primitives(x, results)

    def bits(flags) -> int:
        return int(np.uint32(sum(1 << lane for lane in np.flatnonzero(flags))).astype(np.int32))

    for warp in range(3):
        w = x[32 * warp : 32 * warp + 32]
        for i in range(32):
            segment8, down4 = i // 8 * 8, i + 1 if i % 4 + 1 < 4 else i
            xor8 = i ^ 12 if i ^ 12 < segment8 + 8 else i
            half = np.arange(32) // 16 == i // 16
            expected = [
                w[5], w[segment8 + (i + 3) % 8], w[i - 2 if i >= 2 else i], w[i - 3 if i % 16 >= 3 else i],
                w[i + 4 if i + 4 < 32 else i], w[down4], w[i ^ 9], w[xor8],
                bits(w > 0), int((w == 3).any()), 1, bits(w == w[i]), w.sum(), w.max(), (x > 0).sum(),
                bits((w > 0) & half),
            ]  # fmt: skip
            np.testing.assert_array_equal(results[32 * warp + i], expected, err_msg=f"lane {i}")


def test_block_votes(emulated):
    for x, expected in [([1] * 40, (1, 1)), ([1] * 39 + [0], (0, 1)), ([0] * 40, (0, 0))]:
        results = np.full((40, 2), -1, np.int32)
        emulated.emulator_block_votes(np.array(x, np.int32), results)
        np.testing.assert_array_equal(results, np.tile(expected, (40, 1)))


def test_threads_that_have_exited_are_not_waited_for(emulated):
    results = np.full(96, -1, np.int32)
    emulated.emulator_early_return(results, 70)
    np.testing.assert_array_equal(results[:64], -1)  # a full ballot
    np.testing.assert_array_equal(results[64:70], 0b111111)
    np.testing.assert_array_equal(results[70:], -1)


def test_atomics(emulated):
    ints = np.array([0, 0, 0, 0, 0, 0, 0], np.int32)
    unsigneds = np.array([0, 0, 2**32 - 1, 0, 0], np.uint32)
    longs, floats, doubles = np.zeros(3, np.uint64), np.zeros(8, np.float32), np.zeros(1)
    emulated.emulator_atomics(100, ints, unsigneds, longs, floats, doubles)
    total = 99 * 50
    assert ints.tolist() == [-total, 99, -99, -total, 7, 0, 100]
    assert unsigneds.tolist() == [total, 2**32 - 1, 0xFFFF0000, np.bitwise_xor.reduce(range(100)), 0]
    assert longs.tolist() == [100 << 40, 99 << 40, 2**64 - total]
    assert floats.tolist() == [50, 0, 0, 0, 100, 200, 300, total]
    assert doubles.tolist() == [25]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mma_16_bit(emulated, dtype):
    a, b, c = normal(16, 16), normal(17, 16)[1:][:, :8].copy(), normal(16, 8)
    kind = getattr(torch, dtype)
    expected = c + rounded(a, kind) @ rounded(b, kind)
    emulated.emulator_mma(dtype, bits_of(a, kind), bits_of(b.T.copy(), kind), c)
    np.testing.assert_allclose(c, expected, rtol=0, atol=2e-6 * 16)


def test_mma_through_shared_memory(emulated):
    a, b, c = normal(16, 16), normal(17, 16)[1:][:, :8].copy(), np.zeros((16, 8), np.float32)
    emulated.emulator_mma_ldmatrix(bits_of(a, torch.bfloat16), bits_of(b, torch.bfloat16), c)
    expected = rounded(a, torch.bfloat16) @ rounded(b, torch.bfloat16)
    np.testing.assert_allclose(c, expected, rtol=0, atol=2e-6 * 16)


def tf32(x: np.ndarray) -> np.ndarray:
    """To 11 significant bits, ties away from zero, in float64 arithmetic."""
    mantissa, exponent = np.frexp(x.astype(np.float64))
    return np.ldexp(np.copysign(np.floor(np.abs(mantissa) * 2048 + 0.5) / 2048, mantissa), exponent)


def test_mma_tf32(emulated):
    a, b, c = normal(16, 8), normal(9, 8)[1:].copy(), np.zeros((16, 8), np.float32)
    emulated.emulator_mma_tf32(a, b, c, True)
    np.testing.assert_allclose(c, tf32(a) @ tf32(b), rtol=0, atol=2e-6 * 8)
    with pytest.raises(RuntimeError, match="not rounded by to_tf32"):
        emulated.emulator_mma_tf32(a, b, c, False)


def test_to_tf32(emulated):
    ties = np.float32([1 + 2**-11, 1 + 3 * 2**-11, -1 - 2**-11, 2 - 2**-11, 3e38, 1e-3])
    special = np.float32([np.inf, -np.inf, np.nan, 0, -0.0, np.finfo(np.float32).max])
    x = np.concatenate([ties, special, normal(20)])
    y = np.zeros(32 + 6, np.float32)
    emulated.emulator_round_tf32(x, y)
    np.testing.assert_array_equal(y[:6], tf32(ties).astype(np.float32))
    np.testing.assert_array_equal(y[6:12], np.float32([np.inf, -np.inf, np.nan, 0, -0.0, np.inf]))
    assert np.signbit(y[10])
    np.testing.assert_array_equal(y[12:32], tf32(x[12:]).astype(np.float32))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_store_as_16_bit(emulated, dtype):
    x = np.concatenate(
        [normal(500) * 100, normal(200) * np.float32(1e-6), np.float32([np.inf, -np.inf, 1e30, 65519.9])]
    )
    y = np.zeros(x.size, np.uint16)
    emulated.emulator_round_to(dtype, x, y)
    np.testing.assert_array_equal(y, bits_of(x, getattr(torch, dtype)))


def test_shared_memory_is_nan_at_the_start_of_every_block(emulated):
    values = np.zeros(100, np.float32)
    emulated.emulator_read_shared(5, values)
    assert np.isnan(values).all()


@pytest.mark.parametrize("pending", [0, 1, 2])
def test_async_copies_happen_when_waited_for(emulated, pending):
    x, y = normal(8 * 64), np.zeros(8 * 64, np.float32)
    emulated.emulator_async_copies(x, y, pending)
    first, second = slice(0, 256), slice(256, 512)
    for group, here in [(first, pending < 2), (second, pending < 1)]:
        np.testing.assert_array_equal(y[group], x[group] if here else np.full(256, np.nan))


def test_async_copies_are_immediate_on_old_devices(emulated):
    emulated.set_device(compute_capability=75)
    x, y = normal(8 * 64), np.zeros(8 * 64, np.float32)
    emulated.emulator_async_copies(x, y, 2)
    np.testing.assert_array_equal(y, x)


HERE = r"emulator_kernels\.cpp:\d+"
FAULTS = {
    "barrier in branches": rf"divergent barrier of the block: in block \([01], 0, 0\) no thread can go on\n"
    rf"  threads 0-31 at __syncthreads in {HERE}\n  threads 32-63 at __syncthreads in {HERE}$",
    "warp barrier in branches": rf"divergent warp: .*\n  threads 0-15 at __syncwarp \(mask 0xffffffff\) in {HERE}\n"
    rf"  threads 16-31 at __syncwarp \(mask 0xffffffff\) in {HERE}\n",
    "shuffle and barrier": rf"divergent warp: .*\n  threads 0-2 at __shfl_xor_sync \(mask 0xffffffff\) in {HERE}\n"
    rf"  thread 3 at __syncthreads in {HERE}\n",
    "masks overlap": rf"divergent warp: .*\n  threads 0-7 at __syncthreads .*\n  threads 8-31 at __syncwarp .*{HERE}",
    "missing thread": rf"divergent warp: .*\n  threads 0-4 at __syncthreads in {HERE}\n"
    rf"  thread 5 at __syncwarp \(mask 0xffffffff\) in {HERE}\n  threads 6-63 at __syncthreads",
    "mask without the caller": rf"block .* thread \((0|32), 0, 0\): the mask of __syncwarp does not name .* in {HERE}",
    "shuffle of an exited lane": rf"lane 8 reads lane 24, which has exited, .* in {HERE}",
    "product of a partial warp": rf"mma_m16n8k16 by a warp of which lanes have exited or do not exist in {HERE}",
    "unaligned load": rf"thread \(\d+, 0, 0\): load_global at an address that is not a multiple of 16 in {HERE}",
    "unaligned row": rf"ldmatrix_x4 at an address that is not a multiple of 16 in {HERE}",
    "unaligned copy": rf"cp_async_16 at an address that is not a multiple of 16 in {HERE}",
    "copy to global": rf"cp_async_16 outside the block's dynamic shared memory in {HERE}",
    "trap": rf"thread \(7, 0, 0\): __trap\(\) in {HERE}",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_fault_is_told(emulated, fault, schedule):
    emulated.set_schedule(schedule)
    for seed in range(5):
        emulated.set_seed(seed)
        with pytest.raises(RuntimeError) as error:
            emulated.emulator_wrong(fault, np.zeros(64, np.float32))
        assert re.search(FAULTS[fault], str(error.value)), str(error.value)
        test_reduction_with_shuffles(emulated, schedule, 64)  # the emulator is as good as before


def test_shuffle_of_a_lane_that_does_not_exist(emulated):
    with pytest.raises(RuntimeError, match="reads lane"):
        emulated.emulator_wrong("shuffle of an exited lane", np.zeros(64, np.float32), threads=20)


def test_exception_of_a_thread_comes_out(emulated):
    with pytest.raises(IndexError, match="thread nine"):
        emulated.emulator_wrong("exception", np.zeros(64, np.float32))
    for _ in range(3):
        assert emulated.emulator_objects_after_exception() == "thread forty, 0 objects left"


@pytest.mark.skipif(SANITIZED, reason="AddressSanitizer ends the process: test_sanitizer_finds_overrun")
@pytest.mark.parametrize("fault, byte", [("overrun", 0), ("far overrun", 544)])
def test_overrun_of_shared_memory_is_found(emulated, fault, byte):
    with pytest.raises(RuntimeError, match=rf"wrote byte {byte} past the end of its 256 bytes of dynamic shared"):
        emulated.emulator_wrong(fault, np.zeros(64, np.float32))


@pytest.mark.skipif(not SANITIZED, reason="needs AddressSanitizer: make test-asan")
@pytest.mark.parametrize("fault", ["overrun", "far overrun", "read overrun"])
def test_sanitizer_finds_overrun(emulated, fault):
    program = f"""
import importlib.util, numpy
specification = importlib.util.spec_from_file_location("hdrops_emulated", {emulated.__file__!r})
module = importlib.util.module_from_spec(specification)
specification.loader.exec_module(module)
module.emulator_wrong({fault!r}, numpy.zeros(64, numpy.float32))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode != 0
    assert "AddressSanitizer: use-after-poison" in done.stderr, done.stderr
    assert Path("emulator_kernels.cpp").name in done.stderr


@pytest.mark.parametrize(
    "blocks, threads, shared_bytes, capability, message",
    [
        ((0, 1, 1), (32, 1, 1), 0, 90, None),
        ((1, 65536, 1), (32, 1, 1), 0, 90, "a grid of (1, 65536, 1) blocks"),
        ((2**31, 1, 1), (32, 1, 1), 0, 90, "a grid of (2147483648, 1, 1) blocks"),
        ((1, 1, 1), (1025, 1, 1), 0, 90, "blocks of (1025, 1, 1) threads"),
        ((1, 1, 1), (0, 1, 1), 0, 90, "blocks of (0, 1, 1) threads"),
        ((1, 1, 1), (1, 1, 65), 0, 90, "blocks of (1, 1, 65) threads"),
        ((1, 1, 1), (32, 1, 1), 232449, 90, "232449 bytes of shared memory, of 232448 on sm_90"),
        ((1, 1, 1), (32, 1, 1), 65537, 75, "65537 bytes of shared memory, of 65536 on sm_75"),
    ],
)
def test_launch_that_a_device_would_refuse(emulated, blocks, threads, shared_bytes, capability, message):
    emulated.set_device(compute_capability=capability)
    if message is None:
        emulated.emulator_launch(blocks, threads, shared_bytes)
    else:
        with pytest.raises(RuntimeError, match="launch refused: " + re.escape(message)):
            emulated.emulator_launch(blocks, threads, shared_bytes)


def test_matrix_units_need_their_device(emulated):
    emulated.set_device(compute_capability=75)
    with pytest.raises(RuntimeError, match="mma_m16n8k16 needs sm_80"):
        emulated.emulator_mma_ldmatrix(np.zeros(256, np.uint16), np.zeros(128, np.uint16), np.zeros(128, np.float32))


def test_arrays_are_checked(emulated):
    with pytest.raises(ValueError, match="array of float64, expected float32"):
        emulated.emulator_row_sums(np.zeros((2, 2)), np.zeros(2, np.float32), 32)
    with pytest.raises(ValueError, match="C-contiguous"):
        emulated.emulator_row_sums(np.zeros((2, 4), np.float32)[:, ::2], np.zeros(2, np.float32), 32)
    frozen = np.zeros(2, np.float32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="not writeable"):
        emulated.emulator_row_sums(np.zeros((2, 2), np.float32), frozen, 32)
