// Attention of single tokens over a paged cache, whose keys and values lie in blocks
// [blocks, kv_heads, block_size, head_dim].
//
// Three passes over a token's positions: the scores of all query heads that share a key head, their
// softmax, the values' weighted sums. A block is in the cache when the second head of the group
// comes to it. Scores are made kLanes positions at a time: adding up one vector's lanes is slow,
// adding up as many vectors together is not. A token's result depends on its own length only, not
// on the batch.
#include <cmath>
#include <cstring>
#include <vector>

#include "simd.h"

namespace {

struct Shape {
  long tokens, heads, kv_heads, dim, block_size, query_stride, table_stride;
  float scale;
};

// One head's scores of `count` positions, at most kLanes; the other lanes are without meaning.
template <class Cache>
Vec dots(const float* query, const Cache* keys, long count, long dim) {
  Vec products[kLanes] = {};
  if (count == kLanes) {
    for (long d = 0; d < dim; d += kLanes) {
      Vec q = load(query + d);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++) products[i] += q * load(keys + i * dim + d);
    }
  } else {
    for (long i = 0; i < count; i++)
      for (long d = 0; d < dim; d += kLanes)
        products[i] += load(query + d) * load(keys + i * dim + d);
  }
  return sums(products);
}

// scores -> exp(scores - largest) of `length` positions; gives their sum.
float exponentials(float* scores, long length) {
  for (long i = length; i % kLanes; i++) scores[i] = -INFINITY;
  Vec most = load(scores);
  for (long i = kLanes; i < length; i += kLanes) {
    Vec here = load(scores + i);
    most = here > most ? here : most;
  }
  float largest = most[0];
  for (int i = 1; i < kLanes; i++) largest = most[i] > largest ? most[i] : largest;
  Vec total = {};
  for (long i = 0; i < length; i += kLanes) {
    Vec share = exponential(load(scores + i) - largest);
    store(scores + i, share);
    total += share;
  }
  return sum(total);
}

// out += share · values, in registers down the positions.
template <int Vectors, class Cache>
void add_values(float* out, const float* share, const Cache* values, long count, long dim) {
  Vec held[Vectors];
#pragma GCC unroll 8
  for (int v = 0; v < Vectors; v++) held[v] = load(out + v * kLanes);
  for (long i = 0; i < count; i++)
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; v++) held[v] += share[i] * load(values + i * dim + v * kLanes);
#pragma GCC unroll 8
  for (int v = 0; v < Vectors; v++) store(out + v * kLanes, held[v]);
}

template <class Cache>
void add_values(float* out, const float* share, const Cache* values, long count, long dim) {
  long d = 0;
  for (; d + 8 * kLanes <= dim; d += 8 * kLanes)
    add_values<8>(out + d, share, values + d, count, dim);
  for (; d + 4 * kLanes <= dim; d += 4 * kLanes)
    add_values<4>(out + d, share, values + d, count, dim);
  for (; d < dim; d += kLanes) add_values<1>(out + d, share, values + d, count, dim);
}

// `group` query heads of one token, which share a key head; out [group, dim].
template <class Cache>
void attend(const float* query, const Cache* keys, const Cache* values, const int32_t* table,
            long length, long kv_head, long group, std::vector<float>& scores, float* out,
            const Shape& s) {
  long row = (length / kLanes + 2) * kLanes;
  if ((long)scores.size() < group * row) scores.resize(group * row);
  auto block_at = [&](long position) {
    return (table[position / s.block_size] * s.kv_heads + kv_head) * s.block_size * s.dim;
  };
  for (long start = 0; start < length; start += s.block_size) {
    const Cache* block = keys + block_at(start);
    long held = smaller(s.block_size, length - start);
    for (long h = 0; h < group; h++)
      for (long i = 0; i < held; i += kLanes) {
        Vec dot = dots(query + h * s.dim, block + i * s.dim, smaller(kLanes, held - i), s.dim);
        store(&scores[h * row + start + i], dot * s.scale);
      }
  }
  std::memset(out, 0, group * s.dim * 4);
  for (long h = 0; h < group && length; h++) {
    float total = exponentials(&scores[h * row], length);
    for (long i = 0; i < length; i++) scores[h * row + i] /= total;
  }
  for (long start = 0; start < length; start += s.block_size) {
    const Cache* block = values + block_at(start);
    long held = smaller(s.block_size, length - start);
    for (long h = 0; h < group; h++)
      add_values(out + h * s.dim, &scores[h * row + start], block, held, s.dim);
  }
}

template <class Cache>
void attention(const float* query, const Cache* keys, const Cache* values, const int32_t* tables,
               const int32_t* lengths, float* out, const Shape& s, int threads) {
  long positions = 0;
  for (long i = 0; i < s.tokens; i++) positions += lengths[i];
  threads = threads_for(positions * s.heads * s.dim, threads);
  // Few tokens: every head is a task, so that all threads have one.
  long shared = s.heads / s.kv_heads, group = s.tokens * s.kv_heads < 4 * threads ? 1 : shared;
  long tasks = s.heads / group;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> scores;
#pragma omp for schedule(dynamic)
    for (long i = 0; i < s.tokens * tasks; i++) {
      long token = i / tasks, head = i % tasks * group;
      attend(query + token * s.query_stride + head * s.dim, keys, values,
             tables + token * s.table_stride, lengths[token], head / shared, group, scores,
             out + (token * s.heads + head) * s.dim, s);
    }
  }
}

}  // namespace

extern "C" {

// What the operator takes: heads that are whole vectors.
int attention_takes(long dim) { return dim % kLanes == 0; }

void attention_float32(const float* query, const float* keys, const float* values,
                       const int32_t* tables, const int32_t* lengths, float* out, long tokens,
                       long heads, long kv_heads, long dim, long block_size, long query_stride,
                       long table_stride, float scale, int threads) {
  Shape shape{tokens, heads, kv_heads, dim, block_size, query_stride, table_stride, scale};
  attention(query, keys, values, tables, lengths, out, shape, threads);
}

void attention_bfloat16(const float* query, const uint16_t* keys, const uint16_t* values,
                        const int32_t* tables, const int32_t* lengths, float* out, long tokens,
                        long heads, long kv_heads, long dim, long block_size, long query_stride,
                        long table_stride, float scale, int threads) {
  Shape shape{tokens, heads, kv_heads, dim, block_size, query_stride, table_stride, scale};
  attention(query, keys, values, tables, lengths, out, shape, threads);
}
}
