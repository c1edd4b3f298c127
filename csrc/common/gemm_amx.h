// Product of bf16 matrices with float sums on the processor's tiles (AMX), 16 rows x 16 columns x 32 k in one
// instruction. Included inside foreach_isa.h's sources, after gemm_bf16.h, whose shape and layout of A and B it shares;
// no include guard. Compiled beside the bf16 dot products and taken where isa() says amx.
//
// C is computed in blocks of two by two tiles, 32 rows and a panel, whose sums stay in four of the eight tile
// registers; the others take 16 rows of A each and 16 columns of B each. B's pairs of k lie as the instruction wants
// them. The instruction takes subnormal numbers for zero, as the dot product does.
#if defined(HDROPS_HAVE_AVX512_BF16)
namespace hdrops {
namespace HDROPS_ISA {

// How many k a step takes: a divisor of the depth that is even and at most 32; 0 where there is none that pays.
HDROPS_HD int64_t tile_depth(int64_t depth) {
  for (int64_t step = 32; step >= 8; step -= 2) {
    if (depth % step == 0) return step;
  }
  return 0;
}

// Registers 0 to 3 are sums (row of tiles, column of tiles), 4 and 5 tiles of A, 6 and 7 of B.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};  // of a row
  uint8_t rows[16] = {};

  void set(int tile, int64_t tile_rows, int64_t row_bytes) {
    rows[tile] = uint8_t(tile_rows), bytes[tile] = uint16_t(row_bytes);
  }
  // For blocks of `upper` and `lower` rows, at most 16 each and `lower` perhaps none.
  TileShapes(int64_t upper, int64_t lower, int64_t step) {
    for (int column = 0; column < 2; ++column) {
      set(column, upper, 64);
      set(2 + column, lower, lower > 0 ? 64 : 0);
      set(6 + column, step / 2, 64);
    }
    set(4, upper, 2 * step);
    set(5, lower, lower > 0 ? 2 * step : 0);
  }
};

// A block of one or two tiles' height and width.
template <bool kTall, bool kWide, bool kAccumulate>
HDROPS_HD void gemm_amx_block(const GemmShape& shape, int64_t step, const bfloat16* a, const bfloat16* b, float* c) {
  const int64_t a_row = 2 * shape.a_stride, b_row = 2 * shape.b_stride, c_row = 4 * shape.c_stride;
  const bfloat16* lower_a = a + 16 * shape.a_stride;
  float* lower_c = c + 16 * shape.c_stride;
  if constexpr (kAccumulate) {
    _tile_loadd(0, c, c_row);
    if constexpr (kWide) _tile_loadd(1, c + 16, c_row);
    if constexpr (kTall) _tile_loadd(2, lower_c, c_row);
    if constexpr (kTall && kWide) _tile_loadd(3, lower_c + 16, c_row);
  } else {
    _tile_zero(0);
    if constexpr (kWide) _tile_zero(1);
    if constexpr (kTall) _tile_zero(2);
    if constexpr (kTall && kWide) _tile_zero(3);
  }
  for (int64_t segment = 0; segment < shape.segments; ++segment) {
    const bfloat16* a_k = a + segment * shape.a_segment;
    const bfloat16* lower_k = lower_a + segment * shape.a_segment;
    const bfloat16* b_k = b + segment * shape.b_segment;
    for (int64_t k = 0; k < shape.depth; k += step, a_k += step, lower_k += step, b_k += step / 2 * shape.b_stride) {
      _tile_loadd(4, a_k, a_row);
      _tile_loadd(6, b_k, b_row);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kWide) {
        _tile_loadd(7, b_k + 32, b_row);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (kTall) {
        _tile_loadd(5, lower_k, a_row);
        _tile_dpbf16ps(2, 5, 6);
      }
      if constexpr (kTall && kWide) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_row);
  if constexpr (kWide) _tile_stored(1, c + 16, c_row);
  if constexpr (kTall) _tile_stored(2, lower_c, c_row);
  if constexpr (kTall && kWide) _tile_stored(3, lower_c + 16, c_row);
}

// All panels of a block of rows.
template <bool kTall, bool kAccumulate>
void gemm_amx_rows(const GemmShape& shape, int64_t step, const bfloat16* a, const bfloat16* b, float* c) {
  for (int64_t column = 0; column < shape.columns; column += kPanel<float>, b += shape.b_panel, c += kPanel<float>) {
    if (shape.columns - column > kLanes<float>) {
      gemm_amx_block<kTall, true, kAccumulate>(shape, step, a, b, c);
    } else {
      gemm_amx_block<kTall, false, kAccumulate>(shape, step, a, b, c);
    }
  }
}

// C = A B, or C += A B. `step` is the tile_depth() of shape.depth, not 0.
template <bool kAccumulate>
void gemm_amx(const GemmShape& shape, int64_t step, const bfloat16* a, const bfloat16* b, float* c) {
  int64_t loaded = 0;  // rows of the blocks that the shapes in the processor are for
  for (int64_t row = 0; row < shape.rows; row += 32) {
    const int64_t left = shape.rows - row, rows = left < 32 ? left : 32, upper = rows < 16 ? rows : 16;
    if (rows != loaded) {
      const TileShapes shapes(upper, rows - upper, step);
      // GCC's intrinsics do not tell it that they read memory: neither the shapes nor A may still be in registers.
      __asm__ volatile("" : : "r"(&shapes) : "memory");
      _tile_loadconfig(&shapes);
      loaded = rows;
    }
    const bfloat16* a_row = a + row * shape.a_stride;
    if (rows > 16) {
      gemm_amx_rows<true, kAccumulate>(shape, step, a_row, b, c + row * shape.c_stride);
    } else {
      gemm_amx_rows<false, kAccumulate>(shape, step, a_row, b, c + row * shape.c_stride);
    }
  }
  _tile_release();
}

}  // namespace HDROPS_ISA
}  // namespace hdrops
#endif
