// y = x Wᵀ + b for a weight packed in panels of kColumns output columns: [panels, depth, kColumns].
//
// A tile of kTileRows x kColumns sums stays in registers while it walks down the depth: two vectors
// of a panel and one number of each row give 2 * kTileRows multiply-adds. With one row a panel is
// read once and in order, at the memory's speed; with many it is read from the first cache. A sum
// adds its products in the order of the depth, and the slices' sums, however many the rows: a row's
// result does not depend on the rows beside it.
#include <cstring>

#include "_kernels_simd.h"

constexpr long kColumns = 2 * kLanes;
constexpr long kDepth = 288;  // at most, of a panel's slice, which the first cache holds
constexpr long kRows = 192;   // of x, whose slice the second cache holds

namespace {

template <int Rows, class Weight>
void tile(const float* x, long x_stride, const Weight* panel, long depth, float* y,
          const char* ahead, long step) {
  Vec sums[Rows][2] = {};
  for (long k = 0; k < depth; k++) {
    // The hardware's own prefetching suffices only for the plainest stream, one row of float32.
    if (Rows > 1 || sizeof(Weight) == 2) __builtin_prefetch(ahead + k * step);
    Vec left = load(panel + k * kColumns), right = load(panel + k * kColumns + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; r++) {
      float one = x[r * x_stride + k];
      sums[r][0] += one * left;
      sums[r][1] += one * right;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; r++) {
    float* left = y + r * kColumns;
    store(left, load(left) + sums[r][0]);
    store(left + kLanes, load(left + kLanes) + sums[r][1]);
  }
}

template <int Rows, class Weight>
void tile_of(int rows, const float* x, long x_stride, const Weight* panel, long depth, float* y,
             const char* ahead, long step) {
  if constexpr (Rows > 0) {
    if (rows == Rows)
      tile<Rows>(x, x_stride, panel, depth, y, ahead, step);
    else
      tile_of<Rows - 1>(rows, x, x_stride, panel, depth, y, ahead, step);
  }
}

// Rows of x against one panel: y [rows, kColumns] += x [rows, depth] · panel [depth, kColumns].
template <class Weight>
void panel_product(const float* x, const Weight* panel, long rows, long depth, float* y) {
  alignas(64) float widened[sizeof(Weight) == 2 ? kDepth * kColumns : 1];
  long tiles = (rows + kTileRows - 1) / kTileRows;  // of nearly equal heights
  bool widen = sizeof(Weight) == 2 && tiles > 1;    // once for all tiles
  long slices = (depth + kDepth - 1) / kDepth;  // of nearly equal depths, too
  for (long s = 0; s < slices; s++) {
    long k = depth * s / slices, deep = depth * (s + 1) / slices - k;
    const Weight* slice = panel + k * kColumns;
    if (widen)
      for (long i = 0; i < deep * kColumns; i += kLanes) store(widened + i, load(slice + i));
    // While one slice is worked on, the tiles together fetch the next.
    const char* ahead = (const char*)(slice + deep * kColumns);
    long step = kColumns * sizeof(Weight) / tiles;
    for (long t = 0; t < tiles; t++) {
      long from = rows * t / tiles, to = rows * (t + 1) / tiles;
      const float* part = x + from * depth + k;
      float* sums = y + from * kColumns;
      if (widen)
        tile_of<kTileRows, float>(to - from, part, depth, widened, deep, sums, ahead, step);
      else
        tile_of<kTileRows, Weight>(to - from, part, depth, slice, deep, sums, ahead, step);
    }
  }
}

template <class Weight>
void linear(const float* x, const Weight* weight, const float* bias, float* y, long rows,
            long columns, long depth, int threads) {
  long panels = (columns + kColumns - 1) / kColumns;
  threads = threads_for(rows * columns * depth, threads);
#pragma omp parallel for collapse(2) num_threads(threads) schedule(dynamic)
  for (long row = 0; row < rows; row += kRows)
    for (long p = 0; p < panels; p++) {
      long count = smaller(kRows, rows - row), width = smaller(kColumns, columns - p * kColumns);
      alignas(64) float sums[kRows * kColumns];
      if (bias)
        for (long r = 0; r < count; r++)
          std::memcpy(sums + r * kColumns, bias + p * kColumns, kColumns * 4);
      else
        std::memset(sums, 0, count * kColumns * 4);
      panel_product(x + row * depth, weight + p * depth * kColumns, count, depth, sums);
      float* to = y + row * columns + p * kColumns;
      for (long r = 0; r < count; r++)
        if (width == kColumns)  // a copy of known size is two stores
          std::memcpy(to + r * columns, sums + r * kColumns, kColumns * 4);
        else
          std::memcpy(to + r * columns, sums + r * kColumns, width * 4);
    }
}

}  // namespace

extern "C" {

int panel_columns() { return kColumns; }

void linear_float32(const float* x, const float* weight, const float* bias, float* y, long rows,
                    long columns, long depth, int threads) {
  linear(x, weight, bias, y, rows, columns, depth, threads);
}

void linear_bfloat16(const float* x, const uint16_t* weight, const float* bias, float* y,
                     long rows, long columns, long depth, int threads) {
  linear(x, weight, bias, y, rows, columns, depth, threads);
}
}
