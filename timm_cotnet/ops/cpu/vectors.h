/* Numbers and vectors of them. SCALAR is the type of all tensors, float or (-DBFLOAT16) bfloat16; sums are floats. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#if !defined(__SSE2__) && !defined(__ARM_NEON) && !defined(__VSX__)
#error "the processor has no vectors of numbers: plain PyTorch is as fast"
#endif

#ifdef BFLOAT16
typedef uint16_t SCALAR;
static inline float load(SCALAR value) {
    uint32_t bits = (uint32_t)value << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}
static inline SCALAR store(float value) { /* to the nearest, ties to even; a NaN, whose last bits are zero, stays one */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
#else
typedef float SCALAR;
static inline float load(SCALAR value) { return value; }
static inline SCALAR store(float value) { return value; }
#endif

/* exp(x) by 2^n * p(r), |r| <= ln(2) / 2, in straight-line code that compilers vectorize; about one ulp. */
static inline float exponential(float x) {
    x = x > 88.0f ? 88.0f : x;
    x = x < -87.0f ? -87.0f : x;
    float shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23, which leaves n in the lowest bits */
    float n = shifted - 12582912.0f;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.3813133008e-3f;
    p = p * r + 8.3694243348e-3f;
    p = p * r + 4.1668457333e-2f;
    p = p * r + 1.6666514745e-1f;
    p = p * r + 4.9999993048e-1f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    uint32_t bits, exponent;
    memcpy(&bits, &p, 4);
    memcpy(&exponent, &shifted, 4);
    bits += exponent << 23;
    memcpy(&p, &bits, 4);
    return p;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
/* GCC's and Clang's vectors, as neither keeps the sums of plain loops in registers. */
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Scalars __attribute__((vector_size(2 * LANES))); /* of bfloat16 */

/* The number of each lane. */
static const Ints LANE = {
    0, 1, 2, 3,
#if LANES > 4
    4, 5, 6, 7,
#endif
#if LANES > 8
    8, 9, 10, 11, 12, 13, 14, 15,
#endif
};

static inline Floats load_floats(const float *from) {
    Floats out;
    memcpy(&out, from, sizeof(out));
    return out;
}

static inline void store_floats(float *to, Floats value) { memcpy(to, &value, sizeof(value)); }

static inline Floats load_scalars(const SCALAR *from) {
#if !defined(BFLOAT16)
    return load_floats(from);
#elif defined(__AVX512BF16__)
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)from)), 16);
#else
    Scalars value;
    memcpy(&value, from, sizeof(value));
    return (Floats)(__builtin_convertvector(value, Ints) << 16);
#endif
}

static inline void store_scalars(SCALAR *to, Floats value) {
#if !defined(BFLOAT16)
    store_floats(to, value);
#elif defined(__AVX512BF16__)
    __m256bh out = _mm512_cvtneps_pbh((__m512)value);
    memcpy(to, &out, sizeof(out));
#else
    Scalars out = __builtin_convertvector(((Ints)value + 0x7fff + ((Ints)value >> 16 & 1)) >> 16, Scalars);
    memcpy(to, &out, sizeof(out));
#endif
}

/* Lane l of the result is lane from[l] of x. */
static inline Floats permute(Floats x, Ints from) {
#ifdef __clang__
    Floats out;
    for (int l = 0; l < LANES; l++) out[l] = x[from[l]];
    return out;
#else
    return __builtin_shuffle(x, from);
#endif
}

static inline Floats choose(Ints mask, Floats a, Floats b) { return (Floats)(((Ints)a & mask) | ((Ints)b & ~mask)); }
