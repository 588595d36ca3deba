/* Batch norm in training, behind a 1x1 convolution or not, the sum with a residual and ReLU, and their gradients, for
channels-last floats on the CPU. `batch_norm.py` compiles this file and says what the arguments are.

Activations are (pixels, channels). Each thread works on one range of the pixels, the same in every pass over memory,
and sums blocks of pixels in float, ranges in double; ranges are added in order, so that equal numbers of threads give
equal bits. Statistics are (4, channels): the mean, what its rounding to float took from it, the inverse of the standard
deviation, and the unbiased variance.

The convolution saves passes over memory: its outputs are summed block by block while they are in the cache, and the
gradient that the norm passes to it stays there: it is multiplied as soon as a block of it is known. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "multiply.h"

#define BLOCK 32
#define AHEAD 1024 /* numbers between what is worked on and what is asked for */
#define UNROLL 4 /* pixels whose sums are kept in registers before they are added in memory */
#define PIXELS 128 /* that a convolution works on at once */
#define DEPTH 256 /* summands of a product that are added at once */
#define PAD 16 /* so that pixels do not lie a power of two apart, where few of them would fit in the cache */
#define PANEL 32 /* the widest */

/* Asks for n numbers that lie ahead: processors alone do it too late, which can double the time. */
INLINE void prefetch(const float *from, long n) {
    for (long i = 0; i < n; i += 16) __builtin_prefetch(from + AHEAD + i);
}

INLINE void add_row_moments(
        int rows, const float *restrict x, long channels, const float *restrict pivot, float *restrict sum,
        float *restrict square) {
    prefetch(x, rows * channels);
#pragma GCC ivdep
    for (long c = 0; c < channels; c++) {
        float s = 0, q = 0;
        for (int i = 0; i < rows; i++) {
            float d = x[i * channels + c] - pivot[c];
            s += d;
            q += d * d;
        }
        sum[c] += s;
        square[c] += q;
    }
}

/* Sums over pixels [first, end) of the differences to `base`, and of their squares. */
static void add_moments(
        const float *x, const float *base, long first, long end, long channels, double *restrict total) {
    float sum[channels], square[channels];
    for (long row = first; row < end;) {
        long n = end - row < BLOCK ? end - row : BLOCK, stop = row + n;
        const float *pivot = x + row * channels; /* a neighbour: differences to it are small */
        memset(sum, 0, sizeof(sum));
        memset(square, 0, sizeof(square));
        for (; row + UNROLL <= stop; row += UNROLL)
            add_row_moments(UNROLL, x + row * channels, channels, pivot, sum, square);
        for (; row < stop; row++) add_row_moments(1, x + row * channels, channels, pivot, sum, square);
        for (long c = 0; c < channels; c++) {
            double shift = (double)pivot[c] - base[c];
            total[c] += sum[c] + n * shift;
            total[channels + c] += square[c] + shift * (2.0 * sum[c] + n * shift);
        }
    }
}

/* Adds the `threads` results of n numbers into the first one. */
static void add_ranges(double *total, long n, int threads) {
    for (long i = n; i < threads * n; i++) total[i % n] += total[i];
}

/* The affine map of a batch norm: (x - mean) * scale + shift. */
static void norm_affine(
        const float *statistics, const float *weight, const float *bias, long channels, float *scale, float *shift) {
    const float *rest = statistics + channels, *inverse = rest + channels;
    for (long c = 0; c < channels; c++) {
        scale[c] = weight[c] * inverse[c];
        shift[c] = bias[c] - rest[c] * scale[c];
    }
}

/* A 1x1 convolution of one or two inputs: the sum of products of matrices (pixels, inputs) and filters. */
typedef struct {
    long inputs, sources;  /* channels of an input; inputs */
    const float *x[2];     /* (pixels, inputs) */
    const float *filters;  /* (channels, sources * inputs) */
    float *scratch;        /* as many numbers as filters, and in the backward a Room for each thread */
    float *grad_x[2];      /* like x; or NULL */
    float *grad_filters;   /* like filters; or NULL */
    const float *shared;   /* what is added to the gradient of the first input; or NULL */
} Convolution;

/* Panels of a matrix (depth, n) with any strides: columns that are multiplied together, each panel (depth, width). */
static void pack(long depth, long n, const float *matrix, long row, long column, float *panels, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long first = 0; first < n; first += PANEL) {
        long o = first, end = n < first + PANEL ? n : first + PANEL;
#define PACK(width, lanes) \
    for (; o + width <= end; o += width) \
        for (long k = 0; k < depth; k++) \
            for (long l = 0; l < width; l++) panels[o * depth + k * width + l] = matrix[k * row + (o + l) * column];
        EACH_PANEL(PACK)
    }
}

/* c (rows, n) = a (rows, depth) * panels, or += with `add`; a_row and c_row lie between rows. */
static void multiply(
        long rows, long depth, long n, const float *a, long a_row, const float *panels, int add, float *c, long c_row) {
    for (long k = 0; k < depth; k += DEPTH, add = 1) {
        long some = depth - k < DEPTH ? depth - k : DEPTH, o = 0;
#define MULTIPLY_ROWS(width, rows_, add) \
    for (; r + rows_ <= rows; r += rows_) \
        multiply##width( \
            rows_, add, some, a + r * a_row + k, a_row, 1, panels + o * depth + k * width, width, c + r * c_row + o, \
            c_row);
#define MULTIPLY_PANELS(width, lanes) \
    for (; o + width <= n; o += width) { \
        long r = 0; \
        if (add) { MULTIPLY_ROWS(width, ROWS, 1) MULTIPLY_ROWS(width, 1, 1) } \
        else { MULTIPLY_ROWS(width, ROWS, 0) MULTIPLY_ROWS(width, 1, 0) } \
    }
        EACH_PANEL(MULTIPLY_PANELS)
    }
}

/* c (m, n) = a^T * b, or += with `add`, for a (depth, m) and b (depth, n); panel: room for depth * PANEL numbers. */
static void multiply_transposed(
        long m, long depth, long n, const float *a, long a_row, const float *b, long b_row, float *panel, int add,
        float *c, long c_row) {
    long o = 0;
#define TRANSPOSED_ROWS(width, rows, add) \
    for (; r + rows <= m; r += rows) \
        multiply##width(rows, add, depth, a + r, 1, a_row, panel, width, c + r * c_row + o, c_row);
#define TRANSPOSED_PANELS(width, lanes) \
    for (; o + width <= n; o += width) { \
        long r = 0; \
        for (long k = 0; k < depth; k++) memcpy(panel + k * width, b + k * b_row + o, width * sizeof(float)); \
        if (add) { TRANSPOSED_ROWS(width, ROWS, 1) TRANSPOSED_ROWS(width, 1, 1) } \
        else { TRANSPOSED_ROWS(width, ROWS, 0) TRANSPOSED_ROWS(width, 1, 0) } \
    }
    EACH_PANEL(TRANSPOSED_PANELS)
}

/* x = the convolution's output for n pixels from `row` on. */
static void convolve(const Convolution *conv, long row, long n, long channels, float *x) {
    for (long i = 0; i < conv->sources; i++)
        multiply(
            n, conv->inputs, channels, conv->x[i] + row * conv->inputs, conv->inputs,
            conv->scratch + i * conv->inputs * channels, i > 0, x, channels);
}

/* What the backward of a thread needs for itself. */
typedef struct {
    float *grad;  /* (PIXELS, channels + PAD): gradient of the convolution's output */
    float *panel; /* (PIXELS, PANEL) */
    float *sums;  /* like filters: their gradient */
} Room;

static long size_of_filters(const Convolution *conv, long channels) { return conv->sources * conv->inputs * channels; }

static Room room_of(const Convolution *conv, long channels, int thread) {
    long filters = size_of_filters(conv, channels), grad = PIXELS * (channels + PAD), panel = PIXELS * PANEL;
    float *first = conv->scratch + filters + thread * (grad + panel + filters);
    return (Room){first, first + grad, first + grad + panel};
}

/* Gradients of inputs and filters for n pixels from `row` on, whose output gradient is in room. */
static void convolve_back(const Convolution *conv, long row, long n, long channels, const Room *room, int add) {
    long inputs = conv->inputs, all = conv->sources * inputs;
    for (long i = 0; i < conv->sources; i++) {
        const float *x = conv->x[i] + row * inputs, *shared = i ? NULL : conv->shared;
        if (conv->grad_x[i]) {
            float *to = conv->grad_x[i] + row * inputs;
            if (shared) memcpy(to, shared + row * inputs, n * inputs * sizeof(float));
            multiply(
                n, channels, inputs, room->grad, channels + PAD, conv->scratch + i * inputs * channels, shared != NULL,
                to, inputs);
        }
        if (conv->grad_filters)
            multiply_transposed(
                channels, n, inputs, room->grad, channels + PAD, x, inputs, room->panel, add,
                room->sums + i * inputs, all);
    }
}

/* out = act(norm(x) + residual). residual may be NULL; with a convolution, x is written first: its output. */
void batch_norm_act(
        const Convolution *conv, long pixels, long channels, float *restrict x, const float *weight, const float *bias,
        const float *restrict residual, float *statistics, float *restrict out, double eps, int relu, int threads) {
    double *moments = calloc(threads * 2 * channels, sizeof(double));
    float *mean = statistics, base[channels], scale[channels], shift[channels], floor = relu ? 0 : -INFINITY;

    if (conv) {
        for (long i = 0, n = conv->inputs; i < conv->sources; i++)
            pack(
                n, channels, conv->filters + i * n, 1, conv->sources * n, conv->scratch + i * n * channels, threads);
        convolve(conv, 0, 1, channels, base);
    } else
        memcpy(base, x, channels * sizeof(float));
#pragma omp parallel for num_threads(threads)
    for (int i = 0; i < threads; i++) {
        long first = pixels * i / threads, end = pixels * (i + 1) / threads, n;
        for (; first < end; first += n) {
            n = conv && end - first > PIXELS ? PIXELS : end - first;
            if (conv) convolve(conv, first, n, channels, x + first * channels);
            add_moments(x, base, first, first + n, channels, moments + i * 2 * channels);
        }
    }
    add_ranges(moments, 2 * channels, threads);
    for (long c = 0; c < channels; c++) {
        double difference = moments[c] / pixels, squares = moments[channels + c] - moments[c] * difference;
        squares = squares < 0 ? 0 : squares;
        mean[c] = base[c] + difference;
        statistics[channels + c] = base[c] + difference - mean[c];
        statistics[2 * channels + c] = 1 / sqrt(squares / pixels + eps);
        statistics[3 * channels + c] = squares / (pixels - 1);
    }
    norm_affine(statistics, weight, bias, channels, scale, shift);

#pragma omp parallel for num_threads(threads)
    for (int i = 0; i < threads; i++) {
        long at = pixels * i / threads * channels, end = pixels * (i + 1) / threads * channels;
        for (; at < end; at += channels) {
            prefetch(x + at, channels);
            if (residual) {
                prefetch(residual + at, channels);
                for (long c = 0; c < channels; c++) {
                    float y = (x[at + c] - mean[c]) * scale[c] + shift[c] + residual[at + c];
                    out[at + c] = y < floor ? floor : y; /* a NaN stays one */
                }
            } else
                for (long c = 0; c < channels; c++) {
                    float y = (x[at + c] - mean[c]) * scale[c] + shift[c];
                    out[at + c] = y < floor ? floor : y;
                }
        }
    }
    free(moments);
}

INLINE void add_row_gradients(
        int rows, long row, long channels, const float *restrict grad, const float *restrict x,
        const float *restrict out, const float *restrict mean, const float *restrict scale,
        const float *restrict shift, float floor, float *restrict sum, float *restrict product) {
    prefetch(grad + row * channels, rows * channels);
    prefetch(x + row * channels, rows * channels);
    if (out) prefetch(out + row * channels, rows * channels);
#pragma GCC ivdep
    for (long c = 0; c < channels; c++) {
        float s = 0, p = 0;
        for (int i = 0; i < rows; i++) {
            long at = (row + i) * channels + c;
            float d = x[at] - mean[c], y = out ? out[at] : d * scale[c] + shift[c], g = y <= floor ? 0 : grad[at];
            s += g;
            p += g * d;
        }
        sum[c] += s;
        product[c] += p;
    }
}

/* Sums over pixels [first, end) of the gradient behind ReLU, and of its products with x - mean. */
static void add_gradients(
        long first, long end, long channels, const float *grad, const float *x, const float *out, const float *mean,
        const float *scale, const float *shift, float floor, double *restrict total) {
    float sum[channels], product[channels];
    for (long row = first; row < end;) {
        long stop = end - row < BLOCK ? end : row + BLOCK;
        memset(sum, 0, sizeof(sum));
        memset(product, 0, sizeof(product));
#define ADD_ROWS(rows, out) \
    for (; row + rows <= stop; row += rows) \
        add_row_gradients(rows, row, channels, grad, x, out, mean, scale, shift, floor, sum, product);
        if (out) {
            ADD_ROWS(UNROLL, out)
            ADD_ROWS(1, out)
        } else {
            ADD_ROWS(UNROLL, NULL)
            ADD_ROWS(1, NULL)
        }
        for (long c = 0; c < channels; c++) {
            total[c] += sum[c];
            total[channels + c] += product[c];
        }
    }
}

/* Gradients of batch_norm_act. Where ReLU followed a residual, out is its output, and grad_residual is written, which
   may be x; else both are NULL. grad_x may be NULL if out is, and is with a convolution. */
void batch_norm_act_backward(
        const Convolution *conv, long pixels, long channels, const float *restrict grad, const float *x,
        const float *restrict out, const float *weight, const float *bias, const float *statistics,
        float *restrict grad_x, float *grad_weight, float *grad_bias, float *grad_residual, int relu, int threads) {
    double *total = calloc(threads * 2 * channels, sizeof(double));
    const float *mean = statistics, *rest = mean + channels, *inverse = rest + channels;
    float scale[channels], shift[channels], slope[channels], offset[channels], floor = relu ? 0 : -INFINITY;
    norm_affine(statistics, weight, bias, channels, scale, shift);

#pragma omp parallel for num_threads(threads)
    for (int i = 0; i < threads; i++)
        add_gradients(
            pixels * i / threads, pixels * (i + 1) / threads, channels, grad, x, out, mean, scale, shift, floor,
            total + i * 2 * channels);
    add_ranges(total, 2 * channels, threads);
    for (long c = 0; c < channels; c++) {
        double product = (total[channels + c] - rest[c] * total[c]) * inverse[c];
        grad_weight[c] = product;
        grad_bias[c] = total[c];
        slope[c] = -scale[c] * inverse[c] * product / pixels;
        offset[c] = -scale[c] * total[c] / pixels - (double)slope[c] * rest[c];
    }

    if (conv) {
        for (long i = 0, n = conv->inputs; i < conv->sources; i++)
            pack(
                channels, n, conv->filters + i * n, conv->sources * n, 1, conv->scratch + i * n * channels, threads);
    }
    if (conv || grad_x) {
#pragma omp parallel for num_threads(threads)
        for (int i = 0; i < threads; i++) {
            long begin = pixels * i / threads, end = pixels * (i + 1) / threads, n;
            Room room = conv ? room_of(conv, channels, i) : (Room){0};
            for (long first = begin; first < end; first += n) {
                n = conv && end - first > PIXELS ? PIXELS : end - first;
                float *to = conv ? room.grad : grad_x + first * channels;
                long row = conv ? channels + PAD : channels;
                for (long p = 0, at = first * channels; p < n; p++, at += channels, to += row) {
                    prefetch(grad + at, channels);
                    prefetch(x + at, channels);
                    if (out) {
                        prefetch(out + at, channels);
#pragma GCC ivdep
                        for (long c = 0; c < channels; c++) {
                            float d = x[at + c] - mean[c], g = out[at + c] <= floor ? 0 : grad[at + c];
                            grad_residual[at + c] = g;
                            to[c] = scale[c] * g + slope[c] * d + offset[c];
                        }
                    } else
                        for (long c = 0; c < channels; c++) {
                            float d = x[at + c] - mean[c], g = d * scale[c] + shift[c] <= floor ? 0 : grad[at + c];
                            to[c] = scale[c] * g + slope[c] * d + offset[c];
                        }
                }
                if (conv) convolve_back(conv, first, n, channels, &room, first > begin);
            }
        }
    }
    if (conv && conv->grad_filters) {
#pragma omp parallel for num_threads(threads)
        for (long c = 0; c < channels; c++) {
            long n = conv->sources * conv->inputs;
            float *restrict sum = conv->grad_filters + c * n;
            for (int i = 0; i < threads; i++) {
                const float *restrict part = room_of(conv, channels, i).sums + c * n;
                for (long k = 0; k < n; k++) sum[k] = i ? sum[k] + part[k] : part[k];
            }
        }
    }
    free(total);
}
