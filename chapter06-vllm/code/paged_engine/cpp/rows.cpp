// What a layer does to each token's row between its matrix products, each in one pass.
#include <cmath>

#include "simd.h"

namespace {

template <class Cache>
void store_row(Cache* to, const float* from, long dim) {
  for (long d = 0; d < dim; d++) put(to + d, from[d]);
}

// Halves, in place: (a, b) -> (a cos - b sin, b cos + a sin).
void rotate(float* head, const float* cosine, const float* sine, long dim) {
  long half = dim / 2;
  for (long d = 0; d < half; d++) {
    float a = head[d], b = head[d + half];
    head[d] = a * cosine[d] - b * sine[d];
    head[d + half] = b * cosine[d] + a * sine[d];
  }
}

template <class Cache>
void rotate_and_store(float* qkv, const float* cosine, const float* sine, const int64_t* slots,
                      Cache* keys, Cache* values, long tokens, long heads, long kv_heads, long dim,
                      long block_size, int threads) {
  long width = (heads + 2 * kv_heads) * dim;
#pragma omp parallel for num_threads(threads_for(tokens* width, threads))
  for (long t = 0; t < tokens; t++) {
    float* row = qkv + t * width;
    for (long h = 0; h < heads + kv_heads; h++)
      rotate(row + h * dim, cosine + t * dim / 2, sine + t * dim / 2, dim);
    if (slots[t] < 0) continue;
    long block = slots[t] / block_size, at = slots[t] % block_size;
    for (long h = 0; h < kv_heads; h++) {
      long to = ((block * kv_heads + h) * block_size + at) * dim;
      const float* key = row + (heads + h) * dim;
      store_row(keys + to, key, dim);
      store_row(values + to, key + kv_heads * dim, dim);
    }
  }
}

}  // namespace

extern "C" {

// x += added, where there is one; out = x / rms(x) · weight.
void rms_norm(float* x, const float* added, const float* weight, float* out, long rows, long width,
              float eps, int threads) {
#pragma omp parallel for num_threads(threads_for(rows* width, threads))
  for (long r = 0; r < rows; r++) {
    float* row = x + r * width;
    if (added)
      for (long i = 0; i < width; i++) row[i] += added[r * width + i];
    Vec squares = {};
    long i = 0;
    for (; i + kLanes <= width; i += kLanes) squares += load(row + i) * load(row + i);
    float all = sum(squares);
    for (; i < width; i++) all += row[i] * row[i];
    float scale = 1 / std::sqrt(all / width + eps);
    for (long j = 0; j < width; j++) out[r * width + j] = row[j] * scale * weight[j];
  }
}

// out [rows, width] = silu(gate) · up, of rows [gate, up].
void silu_mul(const float* gate_up, float* out, long rows, long width, int threads) {
  const Vec least = Vec{} - 87.0f;
#pragma omp parallel for num_threads(threads_for(rows* width, threads))
  for (long r = 0; r < rows; r++) {
    const float *gate = gate_up + 2 * r * width, *up = gate + width;
    long i = 0;
    for (; i + kLanes <= width; i += kLanes) {
      Vec g = load(gate + i), minus = g > least ? -g : -least;
      store(out + r * width + i, g / (1.0f + exponential(minus)) * load(up + i));
    }
    for (; i < width; i++) out[r * width + i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
  }
}

void rotate_and_store_float32(float* qkv, const float* cosine, const float* sine,
                              const int64_t* slots, float* keys, float* values, long tokens,
                              long heads, long kv_heads, long dim, long block_size, int threads) {
  rotate_and_store(qkv, cosine, sine, slots, keys, values, tokens, heads, kv_heads, dim, block_size,
                   threads);
}

void rotate_and_store_bfloat16(float* qkv, const float* cosine, const float* sine,
                               const int64_t* slots, uint16_t* keys, uint16_t* values, long tokens,
                               long heads, long kv_heads, long dim, long block_size, int threads) {
  rotate_and_store(qkv, cosine, sine, slots, keys, values, tokens, heads, kv_heads, dim, block_size,
                   threads);
}
}
