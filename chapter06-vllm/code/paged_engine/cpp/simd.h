// Vectors of floats through the compiler's vector extension (GCC, Clang): one source for AVX2,
// AVX-512 and NEON, with no intrinsics. Wider than the machine's registers would spill them.
#pragma once
#include <cstdint>
#include <utility>

#if defined(__AVX512F__)
constexpr int kLanes = 16, kTileRows = 12;
#elif defined(__AVX__)
constexpr int kLanes = 8, kTileRows = 6;
#else
constexpr int kLanes = 4, kTileRows = 6;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef float LooseVec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint16_t LooseHalves __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

static inline long smaller(long a, long b) { return a < b ? a : b; }

// Starting threads takes microseconds, and longer where others compute: less work than this many
// multiplications is done by one.
static inline int threads_for(long work, int threads) { return work < 1 << 16 ? 1 : threads; }

static inline Vec load(const float* p) { return *(const LooseVec*)p; }

// A bfloat16 is the upper half of a float32, so widening it is a shift, and exact.
static inline Vec load(const uint16_t* p) {
  return (Vec)(__builtin_convertvector(*(const LooseHalves*)p, Words) << 16);
}

static inline void store(float* p, Vec v) { *(LooseVec*)p = v; }

// Makes the compiler keep `v` in a register: GCC may read it from memory again at each use instead.
static inline void keep(Vec& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#else
  (void)v;
#endif
}

static inline void put(float* p, float value) { *p = value; }

// Rounds to nearest even, as torch does; a NaN stays one.
static inline void put(uint16_t* p, float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  *p = value == value ? (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 : 0x7FC0;
}

// Neighbours added: (a0 + a1, a2 + a3, …, b0 + b1, …).
template <int... I>
static inline Vec pairs(Vec a, Vec b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, 2 * I...) + __builtin_shufflevector(a, b, 2 * I + 1 ...);
#else
  return __builtin_shuffle(a, b, Ints{2 * I...}) + __builtin_shuffle(a, b, Ints{2 * I + 1 ...});
#endif
}

// The sums of kLanes vectors, one a lane, as a tree; `v` is used up.
static inline Vec sums(Vec* v) {
#pragma GCC unroll 4
  for (int width = kLanes / 2; width > 0; width /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < width; i++)
      v[i] = pairs(v[2 * i], v[2 * i + 1], std::make_integer_sequence<int, kLanes>{});
  return v[0];
}

static inline float sum(Vec v) {
  float lanes[kLanes], all = 0;
  store(lanes, v);
  for (int i = 0; i < kLanes; i++) all += lanes[i];
  return all;
}

// exp of x <= 88, to 2e-7: 2^n by the exponent's bits, the rest by its Taylor polynomial.
static inline Vec exponential(Vec x) {
  const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const Vec kLeast = Vec{} - 87.0f;
  x = x > kLeast ? x : kLeast;
  Vec shifted = x * 1.44269504f + kRound;
  Vec n = shifted - kRound;
  Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = r * (1.0f / 720) + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * (Vec)(((Ints)shifted - 0x4B400000 + 127) << 23);
}
