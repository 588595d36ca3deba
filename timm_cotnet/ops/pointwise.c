/* The 1x1 convolutions of a folded CoT layer in bfloat16, by products of pairs of numbers (AVX-512 BF16).
`pointwise.py` compiles this file and says what the arguments are.

Images are (pixels, channels). A block of pixels goes through all four convolutions while it is in the cache:

    hidden = ReLU(query * x + key * static + bias),  logits = attn * hidden + bias,  value = value * x + bias

Filters are panels of WIDTH outputs, (inputs / 2, WIDTH, 2) each; the last panel is filled up with zeros. */
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(__AMX_BF16__)
#include <immintrin.h>
#include <stdint.h>

#define WIDTH 32
#define ROWS 8     /* of pixels, whose sums for a panel fit in the registers */
#define PIXELS 128 /* of a block */
#define INLINE static inline __attribute__((always_inline))

typedef uint16_t Half;

/* A matrix of pixels and the filters that it is multiplied with. */
typedef struct {
    const Half *x, *filters;
    long row; /* numbers of a pixel: inputs */
} Source;

INLINE __m512 load(const Half *from, __mmask16 some) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, from)), 16);
}

INLINE void store(Half *to, __mmask16 some, __m512 value, int relu) {
    if (relu) value = _mm512_max_ps(_mm512_setzero_ps(), value); /* a NaN stays one */
    _mm256_mask_storeu_epi16(to, some, (__m256i)_mm512_cvtneps_pbh(value));
}

/* One panel of outputs for some pixels: out = act(sum over sources of x * filters + bias). `both` is whether there are
   more than 16 outputs left. */
#define EACH_OF_ROWS(use) \
    use(0) \
    if (rows >= 4) { use(1) use(2) use(3) } \
    if (rows == 8) { use(4) use(5) use(6) use(7) }
#define START(r) \
    left##r = load(bias, low); \
    if (both) right##r = load(bias + 16, high);
#define STEP(r) \
    pair = (__m512bh)_mm512_set1_epi32(*(const int *)((r < 4 ? x : x4) + r % 4 * s->row)); \
    left##r = _mm512_dpbf16_ps(left##r, pair, w0); \
    if (both) right##r = _mm512_dpbf16_ps(right##r, pair, w1);
#define FINISH(r) \
    store(out + r * n, low, left##r, relu); \
    if (both) store(out + 16 + r * n, high, right##r, relu);
INLINE void multiply(
        int rows, int both, int sources, const Source *s, long pixel, long panel, const Half *bias, long n, int relu,
        Half *out) {
    long left = n - panel * WIDTH;
    __mmask16 low = left >= 16 ? -1 : (1 << left) - 1;
    __mmask16 high = left >= 32 ? -1 : (1 << (left - 16)) - 1;
    __m512 left0, left1, left2, left3, left4, left5, left6, left7;
    __m512 right0, right1, right2, right3, right4, right5, right6, right7;
    EACH_OF_ROWS(START)
    for (const Source *end = s + sources; s < end; s++) {
        const Half *w = s->filters + panel * WIDTH * s->row, *x = s->x + pixel * s->row, *x4 = x + 4 * s->row;
        for (const Half *stop = x + s->row; x < stop; x += 2, x4 += 2, w += 2 * WIDTH) {
            __m512bh pair, w0 = (__m512bh)_mm512_loadu_si512(w), w1 = (__m512bh)_mm512_loadu_si512(w + WIDTH);
            EACH_OF_ROWS(STEP)
        }
    }
    EACH_OF_ROWS(FINISH)
}

/* n outputs for the pixels [first, end); `out` is where those of the first go. */
INLINE void convolve(
        int sources, const Source *s, long first, long end, const Half *bias, long n, int relu, Half *out) {
    for (long panel = 0; panel * WIDTH < n; panel++, bias += WIDTH) {
        long pixel = first;
#define PIXELS_TOGETHER(rows, both) \
    for (; pixel + rows <= end; pixel += rows) \
        multiply(rows, both, sources, s, pixel, panel, bias, n, relu, out + (pixel - first) * n + panel * WIDTH);
        if (n - panel * WIDTH > 16) { PIXELS_TOGETHER(ROWS, 1) PIXELS_TOGETHER(4, 1) PIXELS_TOGETHER(1, 1) }
        else { PIXELS_TOGETHER(ROWS, 0) PIXELS_TOGETHER(4, 0) PIXELS_TOGETHER(1, 0) }
    }
}

void pointwise(
        long pixels, long channels, long hidden, long logits, const Half *x, const Half *key, const Half *query_filters,
        const Half *query_bias, const Half *key_filters, const Half *attn_filters, const Half *attn_bias,
        const Half *value_filters, const Half *value_bias, Half *attn, Half *value, Half *scratch, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int i = 0; i < threads; i++) {
        Half *own = scratch + i * PIXELS * hidden;
        for (long first = pixels * i / threads, stop = pixels * (i + 1) / threads, end; first < stop; first = end) {
            end = stop - first < PIXELS ? stop : first + PIXELS;
            Source inputs[] = {{x, query_filters, channels}, {key, key_filters, channels}};
            Source embedded = {own - first * hidden, attn_filters, hidden};
            Source values = {x, value_filters, channels};
            convolve(2, inputs, first, end, query_bias, hidden, 1, own);
            convolve(1, &embedded, first, end, attn_bias, logits, 0, attn + first * logits);
            convolve(1, &values, first, end, value_bias, channels, 0, value + first * channels);
        }
    }
}

int has_pointwise(void) { return 1; }
#else
int has_pointwise(void) { return 0; }
#endif
