/* Kernels of CoT for channels-last tensors on the CPU. `native.py` compiles this file and says what the arguments are.

SCALAR is the type of all tensors, float or (-DBFLOAT16) bfloat16; sums are kept in float. Activations are (B, H * W,
C), filters (B, H * W, G * taps) with tap t of filter g at g * stride_g + t * stride_t. Threads share the images out
among themselves, or the rows of each image where there are more threads than images. Channels and filters come in
`slices`: a channel uses a filter of its own slice. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
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

#define MAX_TAPS 49

typedef struct {
    long batch, channels, groups, slices, height, width, kernel_size, dilation, stride_g, stride_t;
} Shape;

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

/* The same for SCALAR. */
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

/* How filters, (taps, G), go into vectors: the `step` filters of a slice fill `blocks` of them, the last maybe in part,
   or stand side by side in one, `repeats` times, as every `step` channels use the same. Lanes that are left over hold
   anything. What comes of them falls on channels that are written later, or behind the last channel, where memory has
   room for LANES numbers more, as it has behind the last filter. */
typedef struct {
    long step, blocks, repeats;
    Ints repeat; /* the lane that comes into each lane */
} Lanes;

static Lanes lanes_of(const Shape *s) {
    Lanes lanes = {.step = s->groups / s->slices, .repeats = 1};
    lanes.blocks = (lanes.step + LANES - 1) / LANES;
    for (long r = 1; r * lanes.step <= LANES; r++)
        if (s->channels / s->groups % r == 0) lanes.repeats = r;
    for (int l = 0; l < LANES; l++) lanes.repeat[l] = lanes.repeats > 1 ? l % lanes.step : l;
    return lanes;
}

/* out[c] = sum over taps of x[tap][c] * filters[tap][filter of c] for all channels of a pixel, which begins at x_at
   and at filters_at. */
static inline __attribute__((always_inline)) void weighted_sums_of(
        const Shape *s, const Lanes *lanes, long taps, const float *const *x, long x_at, const float *const *filters,
        long filters_at, float *out) {
    long width = s->channels / s->slices, apart = lanes->repeats * lanes->step;
    for (long slice = 0; slice < s->slices; slice++)
        for (long block = lanes->blocks - 1; block >= 0; block--) {
            Floats filter[MAX_TAPS];
            for (long t = 0; t < taps; t++)
                filter[t] = permute(
                    load_floats(filters[t] + filters_at + slice * lanes->step + block * LANES), lanes->repeat);
            for (long c = slice * width + block * LANES; c < (slice + 1) * width; c += apart) {
                Floats sum = {0};
                for (long t = 0; t < taps; t++) sum += load_floats(x[t] + x_at + c) * filter[t];
                store_floats(out + c, sum);
            }
        }
}

/* Room for a row of pixels, in whole cache lines. */
static long row_size(const Shape *s, long numbers) { return (s->width * numbers + LANES + 15) / 16 * 16; }

/* Memory that begins a cache line, as loads across two take twice the time. */
static float *allocate(long numbers) { return aligned_alloc(64, (numbers * sizeof(float) + 63) / 64 * 64); }

/* The rows of an image that filters on one row reach, in float, each between zeros: taps need no checks for borders.
   Of a pixel there are `numbers`. The first row in memory is zero; row y of the image lies behind it, at y % rows. */
typedef struct {
    long numbers, reach, pad, rows, row_size, next;
    float *memory;
} Window;

static Window new_window(const Shape *s, long numbers, long first_row) {
    long reach = s->kernel_size / 2 * s->dilation, rows = 2 * reach + 1, pad = reach < s->width ? reach : s->width;
    rows = rows < s->height ? rows : s->height;
    long row_size = (s->width + 2 * pad) * numbers, size = (rows + 1) * row_size + LANES;
    float *memory = allocate(size);
    memset(memory, 0, size * sizeof(float));
    return (Window){numbers, reach, pad, rows, row_size, first_row > reach ? first_row - reach : 0, memory};
}

/* The first pixel of row y. */
static inline float *window_row(const Shape *s, const Window *window, long y) {
    long row = y < 0 || y >= s->height ? 0 : 1 + y % window->rows;
    return window->memory + row * window->row_size + window->pad * window->numbers;
}

/* The next row to be filled in before the filters of row h can be applied, or -1. */
static inline long next_row(const Shape *s, Window *window, long h) {
    return window->next < s->height && window->next <= h + window->reach ? window->next++ : -1;
}

/* For each tap, what it finds at the first pixel of row h. */
static void window_taps(const Shape *s, const Window *window, long h, const float **taps) {
    long k = s->kernel_size;
    for (long t = 0; t < k * k; t++) {
        long x = (t % k - k / 2) * s->dilation;
        x = x > window->pad ? window->pad : x < -window->pad ? -window->pad : x;
        taps[t] = window_row(s, window, h + (t / k - k / 2) * s->dilation) + x * window->numbers;
    }
}

/* x * scale + bias for pixels of n channels, or only x in float. */
static void normalize(
        const SCALAR *restrict x, long pixels, long n, const float *restrict scale, const float *restrict bias,
        float *restrict out) {
    if (scale == NULL)
        for (long i = 0; i < pixels * n; i++) out[i] = load(x[i]);
    else
        for (long p = 0; p < pixels; p++) {
#pragma omp simd simdlen(LANES)
            for (long c = 0; c < n; c++) out[p * n + c] = load(x[p * n + c]) * scale[c] + bias[c];
        }
}

static inline void fill_window(
        const Shape *s, Window *window, long h, const SCALAR *image, const float *scale, const float *bias) {
    for (long y; (y = next_row(s, window, h)) >= 0;)
        normalize(
            image + y * s->width * window->numbers, s->width, window->numbers, scale, bias, window_row(s, window, y));
}

static inline Floats choose(Ints mask, Floats a, Floats b) { return (Floats)(((Ints)a & mask) | ((Ints)b & ~mask)); }

/* In each lane, what is in vector u goes to vector u + by, modulo 9. */
static inline void rotate9(Floats *x, Ints by) {
    for (int step = 1; step < 9; step *= 2) {
        Floats from[9];
        memcpy(from, x, sizeof(from));
        for (int u = 0; u < 9; u++) x[u] = choose((by & step) != 0, from[(u + 9 - step) % 9], from[u]);
    }
}

/* Filters of a row of pixels from (W, G, taps) to (W, taps, G). Of 9 taps, LANES filters at once fill 9 vectors. Lane l
   of vector r holds tap LANES * r + l, modulo 9, and as 9 is odd, no two numbers of a tap lie in the same lane. So
   lanes change vectors, each by its own distance, and then the lanes of each vector are ordered. */
static void order_by_taps(const Shape *s, const float *from, float *to) {
    long taps = s->kernel_size * s->kernel_size, groups = s->groups, count = s->width * groups, i = 0;
    if (taps == 9 && (groups % LANES == 0 || LANES % groups == 0))
        for (; i + LANES <= count; i += LANES) {
            Floats x[9];
            for (int r = 0; r < 9; r++) x[LANES * r % 9] = load_floats(from + 9 * i + LANES * r);
            rotate9(x, LANE % 9);
            for (long first = 0; first < LANES; first += groups) { /* lanes of other pixels are written over later */
                float *pixel = to + (i + first) / groups * 9 * groups + i % groups;
                for (int t = 0; t < 9; t++)
                    store_floats(pixel + t * groups, permute(x[t], (LANE * 9 + (int)first * 9 + t) & (LANES - 1)));
            }
        }
    for (; i < count; i++)
        for (long t = 0; t < taps; t++) to[(i / groups * taps + t) * groups + i % groups] = from[i * taps + t];
}

#ifndef BFLOAT16
/* And back. */
static void order_by_filters(const Shape *s, const float *from, float *to) {
    long taps = s->kernel_size * s->kernel_size, groups = s->groups, count = s->width * groups, i = 0;
    if (taps == 9 && (groups % LANES == 0 || LANES % groups == 0))
        for (; i + LANES <= count; i += LANES) {
            Floats x[9] = {0};
            for (int first = 0; first < LANES; first += groups) {
                const float *pixel = from + (i + first) / groups * 9 * groups + i % groups;
                for (int t = 0; t < 9; t++) {
                    Ints lane = ((LANE - t) * 9) & (LANES - 1); /* 9 * 9 is 1, modulo LANES */
                    Floats tap = permute(load_floats(pixel + t * groups), (lane - first) & (LANES - 1));
                    x[t] = choose(lane >= first, tap, x[t]);
                }
            }
            rotate9(x, 8 - (LANE + 8) % 9);
            for (int r = 0; r < 9; r++) store_floats(to + 9 * i + LANES * r, x[LANES * r % 9]);
        }
    for (; i < count; i++)
        for (long t = 0; t < taps; t++) to[i * taps + t] = from[(i / groups * taps + t) * groups + i % groups];
}
#endif

/* The filters of a row of pixels, normalized, (W, taps, G). */
static void load_filters(
        const Shape *s, const SCALAR *logits, const float *scale, const float *bias, float *scratch, float *filters) {
    long n = s->groups * s->kernel_size * s->kernel_size;
    normalize(logits, s->width, n, scale, bias, s->stride_g == 1 ? filters : scratch);
    if (s->stride_g != 1) order_by_taps(s, scratch, filters);
}

/* A row of the local convolution: `x` is what each tap finds at the first pixel, filters are (W, taps, G). */
static inline __attribute__((always_inline)) void local_conv_row_of(
        const Shape *s, const Lanes *lanes, long taps, const float *const *x, const float *filters, float *out) {
    const float *filter[MAX_TAPS];
    for (long t = 0; t < taps; t++) filter[t] = filters + t * s->groups;
    for (long w = 0; w < s->width; w++)
        weighted_sums_of(
            s, lanes, taps, x, w * s->channels, filter, w * taps * s->groups, out + w * s->channels);
}

/* Compilers unroll the loops over the taps of the usual filters and keep these in registers. */
static void local_conv_row(
        const Shape *s, const Lanes *lanes, const float *const *x, const float *filters, float *out) {
    if (s->kernel_size == 3) local_conv_row_of(s, lanes, 9, x, filters, out);
    else local_conv_row_of(s, lanes, s->kernel_size * s->kernel_size, x, filters, out);
}

/* The local convolution. */
void local_conv(const Shape *s, const SCALAR *x, const SCALAR *weight, SCALAR *out, int threads) {
    long n = s->groups * s->kernel_size * s->kernel_size, pixels = s->height * s->width, rows = s->batch * s->height;
    long size = row_size(s, n);
    const Lanes lanes = lanes_of(s);
#pragma omp parallel for num_threads(threads)
    for (int i = 0; i < threads; i++) {
        float *filters = allocate(2 * size), *sums = allocate(row_size(s, s->channels));
        const float *taps[MAX_TAPS];
        for (long row = i * rows / threads, end = (i + 1) * rows / threads; row < end;) {
            long b = row / s->height;
            Window values = new_window(s, s->channels, row % s->height);
            for (; row < end && row / s->height == b; row++) {
                fill_window(s, &values, row % s->height, x + b * pixels * s->channels, NULL, NULL);
                window_taps(s, &values, row % s->height, taps);
                load_filters(s, weight + row * s->width * n, NULL, NULL, filters + size, filters);
                local_conv_row(s, &lanes, taps, filters, sums);
                SCALAR *to = out + row * s->width * s->channels;
                for (long i = 0; i < s->width * s->channels; i++) to[i] = store(sums[i]);
            }
            free(values.memory);
        }
        free(filters);
        free(sums);
    }
}

#ifndef BFLOAT16
/* Gradients of a pixel's filters, (taps, G): sums over their channels of x[tap][c] * grad[c]. */
static inline __attribute__((always_inline)) void products_of(
        const Shape *s, const Lanes *lanes, long taps, const float *const *x, const float *grad, float *sums) {
    long width = s->channels / s->slices, apart = lanes->repeats * lanes->step;
    long count = s->slices * lanes->blocks * LANES, i = 0;
    float vectors[taps * count];
    for (long slice = 0; slice < s->slices; slice++)
        for (long block = 0; block < lanes->blocks; block++, i++) {
            Floats sum[MAX_TAPS];
            for (long t = 0; t < taps; t++) sum[t] = (Floats){0};
            for (long c = slice * width + block * LANES; c < (slice + 1) * width; c += apart) {
                Floats g = load_floats(grad + c);
                for (long t = 0; t < taps; t++) sum[t] += load_floats(x[t] + c) * g;
            }
            for (long t = 0; t < taps; t++) {
                Floats total = sum[t];
                for (int r = 1; r < lanes->repeats; r++)
                    total += permute(sum[t], (LANE + r * (int)lanes->step) & (LANES - 1));
                store_floats(vectors + t * count + i * LANES, total);
            }
        }
    for (long t = 0; t < taps; t++) { /* in this order, for lanes that are left over */
        const float *from = vectors + t * count;
        for (long slice = 0; slice < s->slices; slice++)
            for (long block = 0; block < lanes->blocks; block++, from += LANES)
                store_floats(sums + t * s->groups + slice * lanes->step + block * LANES, load_floats(from));
    }
}

static void weighted_sums(
        const Shape *s, const Lanes *lanes, const float *const *x, const float *const *filters, float *out) {
    if (s->kernel_size == 3) weighted_sums_of(s, lanes, 9, x, 0, filters, 0, out);
    else weighted_sums_of(s, lanes, s->kernel_size * s->kernel_size, x, 0, filters, 0, out);
}

static void products(const Shape *s, const Lanes *lanes, const float *const *x, const float *grad, float *sums) {
    if (s->kernel_size == 3) products_of(s, lanes, 9, x, grad, sums);
    else products_of(s, lanes, s->kernel_size * s->kernel_size, x, grad, sums);
}

/* Both gradients of the local convolution for row h; those of the filters are (W, G, taps). That of a value is a local
   convolution as well, of the output gradients, each with the filter that stands where the gradient does. */
static void local_conv_backward_row(
        const Shape *s, const Lanes *lanes, const Window *values, const Window *filters, const Window *grads, long h,
        float *scratch, float *grad_x, float *grad_filters) {
    long taps = s->kernel_size * s->kernel_size, n = taps * s->groups, channels = s->channels;
    const float *value[MAX_TAPS], *filter[MAX_TAPS], *grad[MAX_TAPS], *x[MAX_TAPS], *f[MAX_TAPS];
    float sum[channels + LANES];
    window_taps(s, values, h, value);
    window_taps(s, filters, h, filter);
    window_taps(s, grads, h, grad);
    for (long w = 0; w < s->width; w++) {
        for (long t = 0; t < taps; t++) x[t] = value[t] + w * channels;
        products(s, lanes, x, grad[taps / 2] + w * channels, scratch + w * n);
        for (long t = 0; t < taps; t++) {
            x[t] = grad[t] + w * channels;
            f[t] = filter[t] + w * n + (taps - 1 - t) * s->groups;
        }
        weighted_sums(s, lanes, x, f, sum);
        memcpy(grad_x + w * channels, sum, channels * sizeof(float));
    }
    order_by_filters(s, scratch, grad_filters);
}

/* Both gradients of the local convolution. Threads share the images. */
void local_conv_backward(
        const Shape *s, const float *grad, const float *x, const float *weight, float *grad_x, float *grad_weight,
        int threads) {
    long n = s->groups * s->kernel_size * s->kernel_size, pixels = s->height * s->width, channels = s->channels;
    const Lanes lanes = lanes_of(s);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long b = 0; b < s->batch; b++) {
        Window values = new_window(s, channels, 0), grads = new_window(s, channels, 0), filters = new_window(s, n, 0);
        float *scratch = allocate(row_size(s, n));
        for (long h = 0; h < s->height; h++) {
            long at = b * pixels + h * s->width;
            fill_window(s, &values, h, x + b * pixels * channels, NULL, NULL);
            fill_window(s, &grads, h, grad + b * pixels * channels, NULL, NULL);
            for (long y; (y = next_row(s, &filters, h)) >= 0;)
                load_filters(
                    s, weight + (b * pixels + y * s->width) * n, NULL, NULL, scratch, window_row(s, &filters, y));
            local_conv_backward_row(
                s, &lanes, &values, &filters, &grads, h, scratch, grad_x + at * channels, grad_weight + at * n);
        }
        free(values.memory);
        free(grads.memory);
        free(filters.memory);
        free(scratch);
    }
}
#endif

/* Sums over pixels of each of n channels and of its square, both of the difference to the first pixel of the image. */
static void add_moments(const SCALAR *restrict image, long n, long pixel, long end, double *restrict total) {
    float sum[n], square[n], pivot[n];
    for (long i = 0; i < n; i++) pivot[i] = load(image[i]);
    while (pixel < end) { /* short sums in float, long ones in double */
        long stop = pixel + 64 < end ? pixel + 64 : end;
        memset(sum, 0, sizeof(sum));
        memset(square, 0, sizeof(square));
        for (; pixel + 4 <= stop; pixel += 4) {
            const SCALAR *restrict x = image + pixel * n;
#pragma omp simd simdlen(LANES)
            for (long i = 0; i < n; i++) {
                float a = load(x[i]) - pivot[i], b = load(x[n + i]) - pivot[i];
                float c = load(x[2 * n + i]) - pivot[i], d = load(x[3 * n + i]) - pivot[i];
                sum[i] += a + b + (c + d);
                square[i] += a * a + b * b + (c * c + d * d);
            }
        }
        for (; pixel < stop; pixel++) {
            for (long i = 0; i < n; i++) {
                float d = load(image[pixel * n + i]) - pivot[i];
                sum[i] += d;
                square[i] += d * d;
            }
        }
        for (long i = 0; i < n; i++) {
            total[i] += sum[i];
            total[n + i] += square[i];
        }
    }
}

/* Group norm over the taps of each filter, as an affine map of each channel. */
static void norm_affine(
        const Shape *s, const SCALAR *image, const double *moments, const SCALAR *gamma, const SCALAR *beta, double eps,
        float *scale, float *bias) {
    long taps = s->kernel_size * s->kernel_size, n = taps * s->groups, pixels = s->height * s->width;
    for (long g = 0; g < s->groups; g++) {
        double mean = 0, square = 0;
        for (long t = 0; t < taps; t++) {
            long i = g * s->stride_g + t * s->stride_t;
            double d = (double)load(image[i]) - load(image[g * s->stride_g]); /* to the filter's first */
            mean += moments[i] + pixels * d;
            square += moments[n + i] + 2 * d * moments[i] + pixels * d * d;
        }
        mean /= taps * pixels;
        double variance = square / (taps * pixels) - mean * mean;
        double inverse = 1 / sqrt((variance > 0 ? variance : 0) + eps);
        mean += load(image[g * s->stride_g]);
        for (long t = 0; t < taps; t++) {
            long i = g * s->stride_g + t * s->stride_t;
            scale[i] = load(gamma[i]) * inverse;
            bias[i] = load(beta[i]) - mean * load(gamma[i]) * inverse;
        }
    }
}

static void affine_layer(
        const float *x, long inputs, long outputs, const SCALAR *weight, const SCALAR *bias, float *out) {
    for (long o = 0; o < outputs; o += 4) {
        const SCALAR *row[4];
        for (int j = 0; j < 4; j++) row[j] = weight + (o + j < outputs ? o + j : o) * inputs;
        float sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
#pragma omp simd reduction(+ : sum0, sum1, sum2, sum3)
        for (long i = 0; i < inputs; i++) {
            sum0 += x[i] * load(row[0][i]);
            sum1 += x[i] * load(row[1][i]);
            sum2 += x[i] * load(row[2][i]);
            sum3 += x[i] * load(row[3][i]);
        }
        const float sums[4] = {sum0, sum1, sum2, sum3};
        for (int j = 0; j < 4 && o + j < outputs; j++) out[o + j] = sums[j] + load(bias[o + j]);
    }
}

typedef struct {
    const SCALAR *gamma, *beta;              /* group norm */
    double eps;
    const SCALAR *shift;                     /* batch norm behind the local convolution */
    const SCALAR *weight1, *bias1, *weight2, *bias2; /* fusion: C -> hidden -> C */
    long hidden;
} Parameters;

/* The larger and the smaller of two numbers in each lane; y where either is a NaN. */
static inline Floats larger(Floats x, Floats y) {
#ifdef __AVX512F__
    return (Floats)_mm512_max_ps((__m512)x, (__m512)y);
#else
    return choose(x > y, x, y);
#endif
}

static inline Floats smaller(Floats x, Floats y) {
#ifdef __AVX512F__
    return (Floats)_mm512_min_ps((__m512)x, (__m512)y);
#else
    return choose(x < y, x, y);
#endif
}

#define MOST 41.5f /* of |x| in SiLU: more change nothing, and the product of two exponentials stays finite */

/* 1 + exp(-x) for x of at least -MOST. */
static inline Floats one_plus_exponential(Floats x) {
    x = smaller(x, (Floats){0} + MOST);
    Floats shifted = x * -1.44269504f + 12582912.0f; /* powers of two, as in `exponential` */
    Floats r = x * -1.44269504f - (shifted - 12582912.0f);
    Floats p = r * 1.326472875e-3f + 9.671513182e-3f;
    p = p * r + 5.550733745e-2f;
    p = p * r + 2.402224208e-1f;
    p = p * r + 6.931469776e-1f;
    p = p * r + 1.0f;
    return 1.0f + (Floats)((Ints)p + ((Ints)shifted << 23));
}

/* SiLU of two vectors, by one division. */
static inline void silu(Floats *x, Floats *y) {
    *x = larger((Floats){0} - MOST, *x);
    *y = larger((Floats){0} - MOST, *y);
    Floats a = one_plus_exponential(*x), b = one_plus_exponential(*y), inverse = 1.0f / (a * b);
    *x *= b * inverse;
    *y *= a * inverse;
}

/* A row of the dynamic context, and its sums for the pooling. */
static void shift_act(
        const Shape *s, const float *x, const float *shift, const SCALAR *key, SCALAR *out, float *sums) {
    long channels = s->channels, end = s->width * channels, c = 0;
    for (; c + LANES <= channels; c += LANES) {
        Floats sum = {0}, add = load_floats(shift + c);
        for (long i = c; i < end; i += 2 * channels) {
            long next = i + channels < end ? i + channels : i;
            Floats a = load_floats(x + i) + add, b = load_floats(x + next) + add;
            silu(&a, &b);
            sum += a + load_scalars(key + i);
            store_scalars(out + i, a);
            if (next > i) {
                sum += b + load_scalars(key + next);
                store_scalars(out + next, b);
            }
        }
        store_floats(sums + c, sum);
    }
    for (; c < channels; c++) {
        sums[c] = 0;
        for (long i = c; i < end; i += channels) {
            float z = x[i] + shift[c];
            z *= sigmoid(z);
            sums[c] += z + load(key[i]);
            out[i] = store(z);
        }
    }
}

static void blend(const SCALAR *restrict key, const float *restrict attn, long n, SCALAR *restrict out) {
    long c = 0;
    for (; c + LANES <= n; c += LANES) {
        Floats dynamic = load_scalars(out + c);
        store_scalars(out + c, dynamic + load_floats(attn + c) * (load_scalars(key + c) - dynamic));
    }
    for (; c < n; c++) {
        float dynamic = load(out[c]);
        out[c] = store(dynamic + attn[c] * (load(key[c]) - dynamic));
    }
}

static void fuse_image(
        const Shape *s, const Parameters *p, const SCALAR *value, const SCALAR *logits,
        const SCALAR *key, SCALAR *out, int slices) {
    long taps = s->kernel_size * s->kernel_size, n = taps * s->groups, channels = s->channels;
    long pixels = s->height * s->width;
    const Lanes lanes = lanes_of(s);
    double *moments = calloc(slices * (2 * n + channels), sizeof(double)), *sums = moments + slices * 2 * n;
    float scale[n], bias[n], shift[channels], pooled[channels], hidden[p->hidden], attn[channels];

#pragma omp parallel for num_threads(slices)
    for (int i = 0; i < slices; i++)
        add_moments(logits, n, i * pixels / slices, (i + 1) * pixels / slices, moments + i * 2 * n);
    for (long i = 2 * n; i < slices * 2 * n; i++) moments[i % (2 * n)] += moments[i];
    for (long c = 0; c < channels; c++) shift[c] = load(p->shift[c]);
    norm_affine(s, logits, moments, p->gamma, p->beta, p->eps, scale, bias);

#pragma omp parallel for num_threads(slices)
    for (int i = 0; i < slices; i++) {
        long first = i * s->height / slices, size = row_size(s, n);
        float row_sum[channels], *dynamic = allocate(row_size(s, channels)), *filters = allocate(2 * size);
        const float *row[MAX_TAPS];
        Window values = new_window(s, channels, first);
        for (long h = first; h < (i + 1) * s->height / slices; h++) {
            long at = h * s->width * channels;
            fill_window(s, &values, h, value, NULL, NULL);
            window_taps(s, &values, h, row);
            load_filters(s, logits + h * s->width * n, scale, bias, filters + size, filters);
            local_conv_row(s, &lanes, row, filters, dynamic);
            shift_act(s, dynamic, shift, key + at, out + at, row_sum);
            for (long c = 0; c < channels; c++) sums[i * channels + c] += row_sum[c];
        }
        free(values.memory);
        free(dynamic);
        free(filters);
    }

    for (long c = 0; c < channels; c++) {
        double sum = 0;
        for (int i = 0; i < slices; i++) sum += sums[i * channels + c];
        pooled[c] = sum / pixels;
    }
    affine_layer(pooled, channels, p->hidden, p->weight1, p->bias1, hidden);
    for (long i = 0; i < p->hidden; i++) hidden[i] = hidden[i] < 0 ? 0 : hidden[i];
    affine_layer(hidden, p->hidden, channels, p->weight2, p->bias2, attn);
    for (long c = 0; c < channels; c++) attn[c] = sigmoid(attn[c]);

#pragma omp parallel for num_threads(slices)
    for (int i = 0; i < slices; i++) {
        for (long at = i * pixels / slices; at < (i + 1) * pixels / slices; at++)
            blend(key + at * channels, attn, channels, out + at * channels);
    }
    free(moments);
}

/* All of a folded CoT layer behind its convolutions. out may be value unless there are more threads than images. */
void fuse_contexts(
        const Shape *s, const Parameters *p, const SCALAR *value, const SCALAR *logits, const SCALAR *key, SCALAR *out,
        int threads) {
    long pixels = s->height * s->width, n = s->groups * s->kernel_size * s->kernel_size;
    int slices = s->batch < threads ? threads : 1;
#define FUSE(b) fuse_image( \
        s, p, value + b * pixels * s->channels, logits + b * pixels * n, key + b * pixels * s->channels, \
        out + b * pixels * s->channels, slices)
    if (slices > 1) /* not within a parallel region: nested ones start new threads each time */
        for (long b = 0; b < s->batch; b++) FUSE(b);
    else {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
        for (long b = 0; b < s->batch; b++) FUSE(b);
    }
}

/* 3x3 max-pool with a stride of two and a border of one pixel; out is (batch, (height + 1) / 2, (width + 1) / 2,
   channels). A NaN stays one. */
void max_pool(const SCALAR *x, SCALAR *out, long batch, long height, long width, long channels, int threads) {
    long rows = (height + 1) / 2, columns = (width + 1) / 2;
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < batch * rows; row++) {
        const SCALAR *image = x + row / rows * height * width * channels;
        long first = row % rows * 2, top = first > 0 ? first - 1 : 0, bottom = first + 1 < height ? first + 1 : first;
        for (long column = 0; column < columns; column++) {
            long left = column > 0 ? 2 * column - 1 : 0, right = 2 * column + 1 < width ? 2 * column + 1 : 2 * column;
            SCALAR *restrict to = out + (row * columns + column) * channels;
            memcpy(to, image + (top * width + left) * channels, channels * sizeof(SCALAR));
            for (long h = top; h <= bottom; h++)
                for (long w = left; w <= right; w++) {
                    const SCALAR *restrict from = image + (h * width + w) * channels;
                    for (long c = 0; c < channels; c++) {
                        float a = load(from[c]), b = load(to[c]);
                        to[c] = a > b || a != a ? from[c] : to[c];
                    }
                }
        }
    }
}

#ifndef BFLOAT16
/* Training: the same part of a CoT layer forward and backward, in passes over the images, as the norms of a batch need
   all of it first. Threads share the images.

   Of a norm, scale and bias give what it puts out, x * scale + bias; x_scale and x_bias give that without its own
   weight. Those of the filters are (B, n), the others (C). Sums and moments are (B, 2, channels). */
typedef struct {
    float *scale, *bias, *x_scale, *x_bias;
} Norm;

typedef struct {
    const float *weight, *bias;
    float *running_mean, *running_var; /* of a batch norm */
    double eps, momentum;
} NormParameters;

/* The norms of values, filters and dynamic context, in one table of floats. */
typedef struct {
    Norm value, filters, dynamic;
} Norms;

static Norm norm_at(float *table, long size) {
    return (Norm){table, table + size, table + 2 * size, table + 3 * size};
}

static Norms norms_at(const Shape *s, float *table) {
    long n = s->groups * s->kernel_size * s->kernel_size;
    return (Norms){
        norm_at(table, s->channels), norm_at(table + 8 * s->channels, s->batch * n),
        norm_at(table + 4 * s->channels, s->channels)};
}

static void set_norm(const Norm *norm, long at, double mean, double inverse, double weight, double bias) {
    norm->x_scale[at] = inverse;
    norm->x_bias[at] = -mean * inverse;
    norm->scale[at] = inverse * weight;
    norm->bias[at] = bias - mean * inverse * weight;
}

/* From the moments of the images. */
static void set_batch_norm(const Shape *s, const double *moments, const NormParameters *p, const Norm *norm) {
    long n = s->channels;
    double pixels = s->height * s->width, count = s->batch * pixels;
    for (long c = 0; c < n; c++) {
        double mean = 0, square = 0;
        for (long b = 0; b < s->batch; b++) mean += moments[b * 2 * n + c] / s->batch;
        for (long b = 0; b < s->batch; b++) {
            double d = moments[b * 2 * n + c] - mean;
            square += moments[b * 2 * n + n + c] + pixels * d * d;
        }
        set_norm(norm, c, mean, 1 / sqrt(square / count + p->eps), p->weight[c], p->bias[c]);
        p->running_mean[c] += p->momentum * (mean - p->running_mean[c]);
        p->running_var[c] += p->momentum * (square / (count - 1) - p->running_var[c]);
    }
}

static void set_group_norm(const Shape *s, const double *moments, const NormParameters *p, const Norm *norm) {
    long taps = s->kernel_size * s->kernel_size, n = taps * s->groups;
    double pixels = s->height * s->width;
    for (long b = 0; b < s->batch; b++, moments += 2 * n)
        for (long first = 0; first < n; first += taps) {
            double mean = 0, square = 0;
            for (long i = first; i < first + taps; i++) mean += moments[i] / taps;
            for (long i = first; i < first + taps; i++) {
                double d = moments[i] - mean;
                square += moments[n + i] + pixels * d * d;
            }
            double inverse = 1 / sqrt(square / (taps * pixels) + p->eps);
            for (long i = first; i < first + taps; i++)
                set_norm(norm, b * n + i, mean, inverse, p->weight[i], p->bias[i]);
        }
}

/* Mean of each channel of each image, and its sum of squared differences to that mean. */
static void finish_moments(const Shape *s, const double *total, const float *pivot, long n, double *moments) {
    double pixels = s->height * s->width;
    for (long i = 0; i < n; i++) {
        double square = total[n + i] - total[i] * total[i] / pixels;
        moments[i] = pivot[i] + total[i] / pixels;
        moments[n + i] = square > 0 ? square : 0;
    }
}

static void image_moments(const Shape *s, const float *x, long n, double *moments, int threads) {
    long pixels = s->height * s->width;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long b = 0; b < s->batch; b++) {
        double *total = calloc(2 * n, sizeof(double));
        add_moments(x + b * pixels * n, n, 0, pixels, total);
        finish_moments(s, total, x + b * pixels * n, n, moments + b * 2 * n);
        free(total);
    }
}

/* Row h of image b of the local convolution of normalized values with normalized filters. */
static void norm_local_conv_row(
        const Shape *s, const Lanes *lanes, long b, long h, const float *value, const Norm *value_norm,
        const float *logits, const Norm *filter_norm, Window *values, float *filters, float *out) {
    long n = s->groups * s->kernel_size * s->kernel_size, channels = s->channels, at = (b * s->height + h) * s->width;
    const float *taps[MAX_TAPS];
    fill_window(s, values, h, value + b * s->height * s->width * channels, value_norm->scale, value_norm->bias);
    window_taps(s, values, h, taps);
    load_filters(s, logits + at * n, filter_norm->scale + b * n, filter_norm->bias + b * n,
        filters + row_size(s, n), filters);
    float *row = filters + 2 * row_size(s, n);
    local_conv_row(s, lanes, taps, filters, row);
    memcpy(out + at * channels, row, s->width * channels * sizeof(float));
}

/* That of all images, and its moments. */
static void norm_local_conv(
        const Shape *s, const float *value, const Norm *value_norm, const float *logits, const Norm *filter_norm,
        float *out, double *moments, int threads) {
    long n = s->groups * s->kernel_size * s->kernel_size, channels = s->channels, pixels = s->height * s->width;
    const Lanes lanes = lanes_of(s);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long b = 0; b < s->batch; b++) {
        Window values = new_window(s, channels, 0);
        float *filters = allocate(2 * row_size(s, n) + row_size(s, channels)), *image = out + b * pixels * channels;
        double *total = calloc(2 * channels, sizeof(double));
        for (long h = 0, done = 0; h < s->height; h++) {
            norm_local_conv_row(s, &lanes, b, h, value, value_norm, logits, filter_norm, &values, filters, out);
            long end = (h + 1) * s->width;
            if (end - done >= 64 || end == pixels) { /* while it is in the cache */
                add_moments(image, channels, done, end, total);
                done = end;
            }
        }
        finish_moments(s, total, image, channels, moments + b * 2 * channels);
        free(total);
        free(filters);
        free(values.memory);
    }
}

/* Mean over the pixels of silu(norm(x)) + key. */
static void pool(
        const Shape *s, const float *x, const Norm *norm, const float *key, float *pooled, int threads) {
    long channels = s->channels, pixels = s->height * s->width;
    const float *restrict scale = norm->scale, *restrict bias = norm->bias;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long b = 0; b < s->batch; b++) {
        double total[channels];
        memset(total, 0, sizeof(total));
        for (long h = 0; h < s->height; h++) {
            float sum[channels];
            memset(sum, 0, sizeof(sum));
            for (long w = 0; w < s->width; w++) {
                long at = (b * pixels + h * s->width + w) * channels;
                for (long c = 0; c < channels; c++) {
                    float z = x[at + c] * scale[c] + bias[c];
                    sum[c] += z * sigmoid(z) + key[at + c];
                }
            }
            for (long c = 0; c < channels; c++) total[c] += sum[c];
        }
        for (long c = 0; c < channels; c++) pooled[b * channels + c] = total[c] / pixels;
    }
}

/* Writes lerp(silu(norm(x)), key, attn) over x; attn is (B, C). */
void contexts_blend(
        const Shape *s, float *restrict x, float *table, const float *restrict key, const float *attn, int threads) {
    long channels = s->channels, pixels = s->height * s->width;
    Norm norm = norms_at(s, table).dynamic;
    const float *restrict scale = norm.scale, *restrict bias = norm.bias;
#pragma omp parallel for num_threads(threads)
    for (long p = 0; p < s->batch * pixels; p++) {
        const float *restrict a = attn + p / pixels * channels;
        for (long c = 0; c < channels; c++) {
            float z = x[p * channels + c] * scale[c] + bias[c];
            z *= sigmoid(z);
            x[p * channels + c] = z + a[c] * (key[p * channels + c] - z);
        }
    }
}

/* Sums over pixels that the gradients of attn and of the norm are made of, (5, C): grad * (key - silu(z)), and silu'(z)
   times 1, y, grad and grad * y, where z is norm(x) and y is that without the norm's weight. */
static void add_act_sums(
        const float *restrict grad, const float *restrict x, const Norm *norm, const float *restrict key, long pixels,
        long n, float *restrict sums, double *restrict total) {
    const float *restrict scale = norm->scale, *restrict bias = norm->bias;
    const float *restrict x_scale = norm->x_scale, *restrict x_bias = norm->x_bias;
    memset(sums, 0, 5 * n * sizeof(float));
    for (long p = 0; p < pixels; p++)
        for (long c = 0; c < n; c++) {
            float in = x[p * n + c], g = grad[p * n + c], z = in * scale[c] + bias[c], gate = sigmoid(z);
            float slope = gate * (1 + z * (1 - gate)), y = in * x_scale[c] + x_bias[c];
            sums[c] += g * (key[p * n + c] - z * gate);
            sums[n + c] += slope;
            sums[2 * n + c] += slope * y;
            sums[3 * n + c] += slope * g;
            sums[4 * n + c] += slope * g * y;
        }
    for (long i = 0; i < 5 * n; i++) total[i] += sums[i];
}

/* Sums over the pixels of each image of the gradient of norm(x) and of its product with x without norm's weight. */
static void blend_sums(
        const Shape *s, const double *act_sums, const float *attn, const float *pool_grad, double *sums) {
    long n = s->channels;
    for (long b = 0; b < s->batch; b++, act_sums += 5 * n, sums += 2 * n)
        for (long c = 0; c < n; c++) {
            double a = 1 - attn[b * n + c], pool = pool_grad[b * n + c];
            sums[c] = a * act_sums[3 * n + c] + pool * act_sums[n + c];
            sums[n + c] = a * act_sums[4 * n + c] + pool * act_sums[2 * n + c];
        }
}

/* The gradient of a norm's input, by factors of each channel: grad * of_grad + x * of_x + rest. */
typedef struct {
    float *of_grad, *of_x, *rest;
} NormBackward;

/* These factors, from the means over all that is normed together of the weighted gradient, and of its product. */
static void set_norm_backward(
        const NormBackward *back, const Norm *norm, long at, double weight, double grad, double product) {
    double inverse = norm->x_scale[at];
    back->of_grad[at] = inverse * weight;
    back->of_x[at] = -inverse * product * inverse;
    back->rest[at] = -inverse * (grad + norm->x_bias[at] * product);
}

/* From the sums of the images; also the gradients of weight and bias. */
static void set_batch_norm_backward(
        const Shape *s, const double *sums, const float *weight, const Norm *norm, const NormBackward *back,
        float *grad_weight, float *grad_bias) {
    long n = s->channels;
    double count = (double)s->batch * s->height * s->width;
    for (long c = 0; c < n; c++) {
        double grad = 0, product = 0;
        for (long b = 0; b < s->batch; b++) {
            grad += sums[b * 2 * n + c];
            product += sums[b * 2 * n + n + c];
        }
        grad_weight[c] = product;
        grad_bias[c] = grad;
        set_norm_backward(back, norm, c, weight[c], weight[c] * grad / count, weight[c] * product / count);
    }
}

static void set_group_norm_backward(
        const Shape *s, const double *sums, const float *weight, const Norm *norm, const NormBackward *back,
        float *grad_weight, float *grad_bias) {
    long taps = s->kernel_size * s->kernel_size, n = taps * s->groups;
    double count = taps * s->height * s->width;
    memset(grad_weight, 0, n * sizeof(float));
    memset(grad_bias, 0, n * sizeof(float));
    for (long b = 0; b < s->batch; b++, sums += 2 * n)
        for (long first = 0; first < n; first += taps) {
            double grad = 0, product = 0;
            for (long i = first; i < first + taps; i++) {
                grad += weight[i] * sums[i] / count;
                product += weight[i] * sums[n + i] / count;
                grad_weight[i] += sums[n + i];
                grad_bias[i] += sums[i];
            }
            for (long i = first; i < first + taps; i++)
                set_norm_backward(back, norm, b * n + i, weight[i], grad, product);
        }
}

/* Gradients of key and x from those of lerp(silu(norm(x)), key, attn) and of the pooling. */
static void blend_backward(
        const float *restrict grad, const float *restrict x, const Norm *norm, const NormBackward *back,
        const float *restrict attn, const float *restrict pool_grad, long pixels, long n, float *restrict grad_key,
        float *restrict grad_x) {
    const float *restrict scale = norm->scale, *restrict bias = norm->bias;
    const float *restrict of_grad = back->of_grad, *restrict of_x = back->of_x, *restrict rest = back->rest;
    for (long p = 0; p < pixels; p++)
        for (long c = 0; c < n; c++) {
            float in = x[p * n + c], g = grad[p * n + c], z = in * scale[c] + bias[c], y = sigmoid(z);
            float grad_z = (g * (1 - attn[c]) + pool_grad[c]) * y * (1 + z * (1 - y));
            grad_key[p * n + c] = g * attn[c] + pool_grad[c];
            grad_x[p * n + c] = grad_z * of_grad[c] + in * of_x[c] + rest[c];
        }
}

/* Adds sums of grad, and of its product with x without norm's weight. */
static void add_products(
        const float *restrict grad, const float *restrict x, const float *restrict x_scale,
        const float *restrict x_bias, long pixels, long n, double *restrict total) {
    float sum[n], product[n];
    memset(sum, 0, sizeof(sum));
    memset(product, 0, sizeof(product));
    for (long p = 0; p < pixels; p++)
        for (long c = 0; c < n; c++) {
            sum[c] += grad[p * n + c];
            product[c] += grad[p * n + c] * (x[p * n + c] * x_scale[c] + x_bias[c]);
        }
    for (long c = 0; c < n; c++) {
        total[c] += sum[c];
        total[n + c] += product[c];
    }
}

/* Gradients of the normalized values and filters, and their sums as above. */
static void norm_local_conv_backward(
        const Shape *s, const float *grad, const float *x, const Norm *norm, const NormBackward *back,
        const float *attn, const float *pool_grad, const float *value, const Norm *value_norm, const float *logits,
        const Norm *filter_norm, float *grad_key, float *grad_value, float *grad_logits, double *value_sums,
        double *filter_sums, int threads) {
    long n = s->groups * s->kernel_size * s->kernel_size, channels = s->channels, pixels = s->height * s->width;
    const Lanes lanes = lanes_of(s);
    memset(value_sums, 0, s->batch * 2 * channels * sizeof(double));
    memset(filter_sums, 0, s->batch * 2 * n * sizeof(double));
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long b = 0; b < s->batch; b++) {
        Window values = new_window(s, channels, 0), grads = new_window(s, channels, 0), filters = new_window(s, n, 0);
        float *scratch = allocate(row_size(s, n));
        for (long h = 0; h < s->height; h++) {
            long at = b * pixels + h * s->width;
            fill_window(s, &values, h, value + b * pixels * channels, value_norm->scale, value_norm->bias);
            for (long y; (y = next_row(s, &grads, h)) >= 0;) {
                long from = (b * pixels + y * s->width) * channels;
                blend_backward(
                    grad + from, x + from, norm, back, attn + b * channels, pool_grad + b * channels, s->width,
                    channels, grad_key + from, window_row(s, &grads, y));
            }
            for (long y; (y = next_row(s, &filters, h)) >= 0;)
                load_filters(
                    s, logits + (b * pixels + y * s->width) * n, filter_norm->scale + b * n, filter_norm->bias + b * n,
                    scratch, window_row(s, &filters, y));
            local_conv_backward_row(
                s, &lanes, &values, &filters, &grads, h, scratch, grad_value + at * channels, grad_logits + at * n);
            add_products(
                grad_value + at * channels, value + at * channels, value_norm->x_scale, value_norm->x_bias, s->width,
                channels, value_sums + b * 2 * channels);
            add_products(
                grad_logits + at * n, logits + at * n, filter_norm->x_scale + b * n, filter_norm->x_bias + b * n,
                s->width, n, filter_sums + b * 2 * n);
        }
        free(values.memory);
        free(grads.memory);
        free(filters.memory);
        free(scratch);
    }
}

/* Turns the gradient of what a norm puts out into that of its input, in place; factors are (n), or (B, n). */
static void norm_backward(
        const Shape *s, float *restrict grad, const float *restrict x, long n, const NormBackward *back,
        long of_each_image, int threads) {
    long pixels = s->height * s->width;
#pragma omp parallel for num_threads(threads)
    for (long p = 0; p < s->batch * pixels; p++) {
        long first = of_each_image ? p / pixels * n : 0;
        const float *restrict of_grad = back->of_grad + first, *restrict of_x = back->of_x + first;
        const float *restrict rest = back->rest + first;
        for (long i = 0; i < n; i++) grad[p * n + i] = grad[p * n + i] * of_grad[i] + x[p * n + i] * of_x[i] + rest[i];
    }
}

/* What lies behind the convolutions, up to the pooled contexts: out is the local convolution. */
void contexts_forward(
        const Shape *s, const float *value, const float *logits, const float *key, const NormParameters *of_value,
        const NormParameters *of_filters, const NormParameters *of_dynamic, float *table, float *out, float *pooled,
        int threads) {
    long n = s->groups * s->kernel_size * s->kernel_size, most = n > s->channels ? n : s->channels;
    Norms norms = norms_at(s, table);
    double *moments = malloc(s->batch * 2 * most * sizeof(double));
    image_moments(s, value, s->channels, moments, threads);
    set_batch_norm(s, moments, of_value, &norms.value);
    image_moments(s, logits, n, moments, threads);
    set_group_norm(s, moments, of_filters, &norms.filters);
    norm_local_conv(s, value, &norms.value, logits, &norms.filters, out, moments, threads);
    set_batch_norm(s, moments, of_dynamic, &norms.dynamic);
    pool(s, out, &norms.dynamic, key, pooled, threads);
    free(moments);
}

/* The local convolution once more, the gradient of attn, and the sums that the other gradients begin with. */
void contexts_recompute(
        const Shape *s, const float *value, const float *logits, const float *key, float *table, const float *grad,
        float *x, double *act_sums, float *grad_attn, int threads) {
    long n = s->groups * s->kernel_size * s->kernel_size, channels = s->channels, pixels = s->height * s->width;
    const Lanes lanes = lanes_of(s);
    Norms norms = norms_at(s, table);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long b = 0; b < s->batch; b++) {
        Window values = new_window(s, channels, 0);
        float *filters = allocate(2 * row_size(s, n) + row_size(s, channels)), sums[5 * channels];
        double *total = act_sums + b * 5 * channels;
        memset(total, 0, 5 * channels * sizeof(double));
        for (long h = 0; h < s->height; h++) {
            long at = (b * pixels + h * s->width) * channels;
            norm_local_conv_row(s, &lanes, b, h, value, &norms.value, logits, &norms.filters, &values, filters, x);
            add_act_sums(grad + at, x + at, &norms.dynamic, key + at, s->width, channels, sums, total);
        }
        for (long c = 0; c < channels; c++) grad_attn[b * channels + c] = total[c];
        free(filters);
        free(values.memory);
    }
}

/* All other gradients; those of weights and biases of the norms in the order of `Norms`. */
void contexts_backward(
        const Shape *s, const float *value, const float *logits, float *table, const float *weight_of_value,
        const float *weight_of_filters, const float *weight_of_dynamic, const float *grad, const float *x,
        const double *act_sums, const float *attn, const float *pool_grad, float *grad_key, float *grad_value,
        float *grad_logits, float *grad_parameters, int threads) {
    long channels = s->channels, n = s->groups * s->kernel_size * s->kernel_size, size = s->batch * n;
    size = size > channels ? size : channels;
    Norms norms = norms_at(s, table);
    double *sums = malloc(s->batch * 2 * (channels + n) * sizeof(double));
    double *filter_sums = sums + s->batch * 2 * channels;
    float *factors = malloc(3 * size * sizeof(float)), *grads = grad_parameters;
    NormBackward back = {factors, factors + size, factors + 2 * size};

    blend_sums(s, act_sums, attn, pool_grad, sums);
    set_batch_norm_backward(
        s, sums, weight_of_dynamic, &norms.dynamic, &back, grads + 2 * (channels + n), grads + 3 * channels + 2 * n);
    norm_local_conv_backward(
        s, grad, x, &norms.dynamic, &back, attn, pool_grad, value, &norms.value, logits, &norms.filters,
        grad_key, grad_value, grad_logits, sums, filter_sums, threads);
    set_batch_norm_backward(s, sums, weight_of_value, &norms.value, &back, grads, grads + channels);
    norm_backward(s, grad_value, value, channels, &back, 0, threads);
    set_group_norm_backward(
        s, filter_sums, weight_of_filters, &norms.filters, &back, grads + 2 * channels, grads + 2 * channels + n);
    norm_backward(s, grad_logits, logits, n, &back, 1, threads);
    free(sums);
    free(factors);
}
#endif
