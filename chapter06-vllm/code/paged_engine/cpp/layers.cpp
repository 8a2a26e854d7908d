// All layers of a step in one call: from Python each would be nine, of some microseconds, and a
// decode of one token has time for few of them.
#include "simd.h"

struct Product {
  const void* panels;
  const float* bias;  // or null
  int64_t columns, depth;
  int64_t narrow;  // whether the weight is bfloat16
};

struct Layer {
  const float *input_norm, *mlp_norm;
  Product qkv, output, gate_up, down;
  void *keys, *values;
};

struct Step {
  // x [tokens, hidden] is the residual stream; what the last layer adds to it is left in `added`.
  float *x, *added, *normed, *qkv, *attended, *gate_up, *active;
  const float *cosine, *sine;  // [tokens, dim / 2]
  const int64_t* slots;        // [tokens]
  const int32_t *tables, *lengths;
  int64_t tokens, hidden, heads, kv_heads, dim, block_size, table_stride, narrow_cache, threads;
  float scale, eps;
};

extern "C" {

// The operators, as the other files have them.
void linear_float32(const float*, const float*, const float*, float*, long, long, long, int);
void linear_bfloat16(const float*, const uint16_t*, const float*, float*, long, long, long, int);
void rms_norm(float*, const float*, const float*, float*, long, long, float, int);
void silu_mul(const float*, float*, long, long, int);
void rotate_and_store_float32(float*, const float*, const float*, const int64_t*, float*, float*,
                              long, long, long, long, long, int);
void rotate_and_store_bfloat16(float*, const float*, const float*, const int64_t*, uint16_t*,
                               uint16_t*, long, long, long, long, long, int);
void attention_float32(const float*, const float*, const float*, const int32_t*, const int32_t*,
                       float*, long, long, long, long, long, long, long, float, int);
void attention_bfloat16(const float*, const uint16_t*, const uint16_t*, const int32_t*,
                        const int32_t*, float*, long, long, long, long, long, long, long, float,
                        int);
}

namespace {

void product(const Product& w, const float* x, float* y, const Step& s) {
  if (w.narrow)
    linear_bfloat16(x, (const uint16_t*)w.panels, w.bias, y, s.tokens, w.columns, w.depth,
                    s.threads);
  else
    linear_float32(x, (const float*)w.panels, w.bias, y, s.tokens, w.columns, w.depth, s.threads);
}

template <class Cache, class Rotate, class Attention>
void attend(const Layer& layer, const Step& s, Rotate rotate_and_store, Attention attention) {
  Cache *keys = (Cache*)layer.keys, *values = (Cache*)layer.values;
  long width = (s.heads + 2 * s.kv_heads) * s.dim;
  rotate_and_store(s.qkv, s.cosine, s.sine, s.slots, keys, values, s.tokens, s.heads, s.kv_heads,
                   s.dim, s.block_size, s.threads);
  attention(s.qkv, keys, values, s.tables, s.lengths, s.attended, s.tokens, s.heads, s.kv_heads,
            s.dim, s.block_size, width, s.table_stride, s.scale, s.threads);
}

}  // namespace

extern "C" void decoder_layers(const Layer* layers, long count, const Step* step) {
  const Step& s = *step;
  for (long i = 0; i < count; i++) {
    const Layer& layer = layers[i];
    rms_norm(s.x, i ? s.added : nullptr, layer.input_norm, s.normed, s.tokens, s.hidden, s.eps,
             s.threads);
    product(layer.qkv, s.normed, s.qkv, s);
    if (s.narrow_cache)
      attend<uint16_t>(layer, s, rotate_and_store_bfloat16, attention_bfloat16);
    else
      attend<float>(layer, s, rotate_and_store_float32, attention_float32);
    product(layer.output, s.attended, s.added, s);
    rms_norm(s.x, s.added, layer.mlp_norm, s.normed, s.tokens, s.hidden, s.eps, s.threads);
    product(layer.gate_up, s.normed, s.gate_up, s);
    silu_mul(s.gate_up, s.active, s.tokens, layer.down.depth, s.threads);
    product(layer.down, s.active, s.added, s);
  }
}
