// y = x Wᵀ + b for a weight packed in panels of kColumns output columns: [panels, depth, kColumns].
//
// A tile of kTileRows x kColumns sums stays in registers while it walks down the depth: two vectors
// of a panel and one number of each row give 2 * kTileRows multiply-adds. With one row a panel is
// read once and in order, at the memory's speed; with many it is read from a cache. A sum adds its
// products in the order of the depth, however that is cut into slices: a row's result does not
// depend on the rows beside it.
#include <cstring>

#include "simd.h"

constexpr long kColumns = 2 * kLanes;
constexpr long kDepth = 9216 / kColumns;      // at most, of a panel's slice: 36 KiB of float32
constexpr long kNearDepth = 3072 / kColumns;  // for a lone tile, which is soon done with it
constexpr long kRows = 192;                   // of x, whose slice the second cache holds

namespace {

template <class Number>
struct Matrix {
  Number* first;
  long stride;
  Number* operator[](long row) const { return first + row * stride; }
};

// y [Rows, kColumns] = from + x [Rows, depth] · panel [depth, kColumns].
template <int Rows, class Weight>
void tile(Matrix<const float> x, const Weight* panel, long depth, Matrix<const float> from,
          Matrix<float> y, const char* ahead, long step) {
  Vec sums[Rows][2];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; r++) sums[r][0] = load(from[r]), sums[r][1] = load(from[r] + kLanes);
  for (long k = 0; k < depth; k++) {
    // The hardware's own prefetching suffices only for the plainest stream, one row of float32.
    if (Rows > 1 || sizeof(Weight) == 2) __builtin_prefetch(ahead + k * step);
    Vec left = load(panel + k * kColumns), right = load(panel + k * kColumns + kLanes);
    keep(left), keep(right);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; r++) {
      float one = x[r][k];
      sums[r][0] += one * left;
      sums[r][1] += one * right;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; r++) store(y[r], sums[r][0]), store(y[r] + kLanes, sums[r][1]);
}

template <int Rows, class Weight>
void tile_of(int rows, Matrix<const float> x, const Weight* panel, long depth,
             Matrix<const float> from, Matrix<float> y, const char* ahead, long step) {
  if constexpr (Rows > 0) {
    if (rows == Rows)
      tile<Rows>(x, panel, depth, from, y, ahead, step);
    else
      tile_of<Rows - 1>(rows, x, panel, depth, from, y, ahead, step);
  }
}

// y [rows, kColumns] = start [kColumns] + x [rows, depth] · panel [depth, kColumns]; `next` is the
// panel that this thread will probably take then.
template <class Weight>
void panel_product(Matrix<const float> x, const Weight* panel, const Weight* next,
                   const float* start, long rows, long depth, Matrix<float> y) {
  alignas(64) float widened[sizeof(Weight) == 2 ? kDepth * kColumns : 1];
  long tiles = (rows + kTileRows - 1) / kTileRows;  // of nearly equal heights
  bool widen = sizeof(Weight) == 2 && tiles > 1;    // once for all tiles
  long deepest = tiles > 1 ? kDepth : kNearDepth;
  long slices = (depth + deepest - 1) / deepest;  // of nearly equal depths, too
  for (long s = 0; s < slices; s++) {
    long k = depth * s / slices, deep = depth * (s + 1) / slices - k;
    const Weight* slice = panel + k * kColumns;
    if (widen)
      for (long i = 0; i < deep * kColumns; i += kLanes) store(widened + i, load(slice + i));
    // While one slice is worked on, the tiles together fetch the next.
    const char* ahead = (const char*)(s + 1 < slices ? slice + deep * kColumns : next);
    long step = kColumns * sizeof(Weight) / tiles;
    for (long t = 0; t < tiles; t++) {
      long row = rows * t / tiles, high = rows * (t + 1) / tiles - row;
      Matrix<const float> part{x[row] + k, x.stride};
      Matrix<float> sums{y[row], y.stride};
      Matrix<const float> from{s ? y[row] : start, s ? y.stride : 0};
      if (widen)
        tile_of<kTileRows, float>(high, part, widened, deep, from, sums, ahead, step);
      else
        tile_of<kTileRows, Weight>(high, part, slice, deep, from, sums, ahead, step);
    }
  }
}

template <class Weight>
void linear(const float* x, const Weight* weight, const float* bias, float* y, long rows,
            long columns, long depth, int threads) {
  static const float kZeros[kColumns] = {};
  long panels = (columns + kColumns - 1) / kColumns;
  threads = threads_for(rows * columns * depth, threads);
#pragma omp parallel for collapse(2) num_threads(threads) schedule(dynamic)
  for (long row = 0; row < rows; row += kRows)
    for (long p = 0; p < panels; p++) {
      long count = smaller(kRows, rows - row), width = smaller(kColumns, columns - p * kColumns);
      const Weight* panel = weight + p * depth * kColumns;
      const Weight* next = panel + threads * depth * kColumns;  // the others take those between
      const float* start = bias ? bias + p * kColumns : kZeros;
      Matrix<const float> part{x + row * depth, depth};
      Matrix<float> to{y + row * columns + p * kColumns, columns};
      if (width == kColumns) {
        panel_product(part, panel, next, start, count, depth, to);
      } else {  // the last panel is wider than what is left of y
        float sums[kRows * kColumns];
        panel_product(part, panel, next, start, count, depth, {sums, kColumns});
        for (long r = 0; r < count; r++) std::memcpy(to[r], sums + r * kColumns, width * 4);
      }
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
