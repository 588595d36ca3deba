/* Batch norm in training, the sum with a residual and ReLU, and their gradients, for channels-last floats on the CPU.
`batch_norm.py` compiles this file and says what the arguments are.

Activations are (pixels, channels). Each thread works on one range of the pixels, the same in every pass over memory,
and sums blocks of pixels in float, ranges in double; ranges are added in order, so that equal numbers of threads give
equal bits. Statistics are (4, channels): the mean, what its rounding to float took from it, the inverse of the standard
deviation, and the unbiased variance. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 32
#define AHEAD 1024 /* numbers between what is worked on and what is asked for */
#define ROWS 4 /* pixels whose sums are kept in registers before they are added in memory */
#define INLINE static inline __attribute__((always_inline)) /* constants of the calls make the loops simple */

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

/* Sums over pixels [first, end) of the differences to the first pixel of all, and of their squares. */
static void add_moments(const float *x, long first, long end, long channels, double *restrict total) {
    float sum[channels], square[channels];
    for (long row = first; row < end;) {
        long n = end - row < BLOCK ? end - row : BLOCK, stop = row + n;
        const float *pivot = x + row * channels; /* a neighbour: differences to it are small */
        memset(sum, 0, sizeof(sum));
        memset(square, 0, sizeof(square));
        for (; row + ROWS <= stop; row += ROWS) add_row_moments(ROWS, x + row * channels, channels, pivot, sum, square);
        for (; row < stop; row++) add_row_moments(1, x + row * channels, channels, pivot, sum, square);
        for (long c = 0; c < channels; c++) {
            double shift = (double)pivot[c] - x[c];
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

/* out = act(norm(x) + residual); residual may be NULL. */
void batch_norm_act(
        long pixels, long channels, const float *restrict x, const float *weight, const float *bias,
        const float *restrict residual, float *statistics, float *restrict out, double eps, int relu, int threads) {
    double *moments = calloc(threads * 2 * channels, sizeof(double));
    float *mean = statistics, scale[channels], shift[channels], floor = relu ? 0 : -INFINITY;

#pragma omp parallel for num_threads(threads)
    for (int i = 0; i < threads; i++)
        add_moments(x, pixels * i / threads, pixels * (i + 1) / threads, channels, moments + i * 2 * channels);
    add_ranges(moments, 2 * channels, threads);
    for (long c = 0; c < channels; c++) {
        double difference = moments[c] / pixels, squares = moments[channels + c] - moments[c] * difference;
        squares = squares < 0 ? 0 : squares;
        mean[c] = x[c] + difference;
        statistics[channels + c] = x[c] + difference - mean[c];
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
        const float *restrict shift, float floor, float *restrict grad_residual, float *restrict sum,
        float *restrict product) {
    prefetch(grad + row * channels, rows * channels);
    prefetch(x + row * channels, rows * channels);
    if (out) prefetch(out + row * channels, rows * channels);
#pragma GCC ivdep
    for (long c = 0; c < channels; c++) {
        float s = 0, p = 0;
        for (int i = 0; i < rows; i++) {
            long at = (row + i) * channels + c;
            float d = x[at] - mean[c], y = out ? out[at] : d * scale[c] + shift[c], g = y <= floor ? 0 : grad[at];
            if (out) grad_residual[at] = g;
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
        const float *scale, const float *shift, float floor, float *grad_residual, double *restrict total) {
    float sum[channels], product[channels];
    for (long row = first; row < end;) {
        long stop = end - row < BLOCK ? end : row + BLOCK;
        memset(sum, 0, sizeof(sum));
        memset(product, 0, sizeof(product));
#define ADD_ROWS(rows, out) \
    for (; row + rows <= stop; row += rows) \
        add_row_gradients( \
            rows, row, channels, grad, x, out, mean, scale, shift, floor, grad_residual, sum, product);
        if (out) {
            ADD_ROWS(ROWS, out)
            ADD_ROWS(1, out)
        } else {
            ADD_ROWS(ROWS, NULL)
            ADD_ROWS(1, NULL)
        }
        for (long c = 0; c < channels; c++) {
            total[c] += sum[c];
            total[channels + c] += product[c];
        }
    }
}

/* Gradients of batch_norm_act. Where ReLU followed a residual, out is its output, and grad_residual is written; else
   both are NULL. grad_x may be NULL. */
void batch_norm_act_backward(
        long pixels, long channels, const float *restrict grad, const float *restrict x, const float *restrict out,
        const float *weight, const float *bias, const float *statistics, float *restrict grad_x, float *grad_weight,
        float *grad_bias, float *restrict grad_residual, int relu, int threads) {
    double *total = calloc(threads * 2 * channels, sizeof(double));
    const float *mean = statistics, *rest = mean + channels, *inverse = rest + channels;
    float scale[channels], shift[channels], slope[channels], offset[channels], floor = relu ? 0 : -INFINITY;
    norm_affine(statistics, weight, bias, channels, scale, shift);

#pragma omp parallel for num_threads(threads)
    for (int i = 0; i < threads; i++)
        add_gradients(
            pixels * i / threads, pixels * (i + 1) / threads, channels, grad, x, out, mean, scale, shift, floor,
            grad_residual, total + i * 2 * channels);
    add_ranges(total, 2 * channels, threads);
    for (long c = 0; c < channels; c++) {
        double product = (total[channels + c] - rest[c] * total[c]) * inverse[c];
        grad_weight[c] = product;
        grad_bias[c] = total[c];
        slope[c] = -scale[c] * inverse[c] * product / pixels;
        offset[c] = -scale[c] * total[c] / pixels - (double)slope[c] * rest[c];
    }

    if (grad_x) {
#pragma omp parallel for num_threads(threads)
        for (int i = 0; i < threads; i++) {
            long at = pixels * i / threads * channels, end = pixels * (i + 1) / threads * channels;
            for (; at < end; at += channels) {
                prefetch(x + at, channels);
                prefetch((out ? grad_residual : grad) + at, channels);
                if (out)
                    for (long c = 0; c < channels; c++)
                        grad_x[at + c] =
                            scale[c] * grad_residual[at + c] + slope[c] * (x[at + c] - mean[c]) + offset[c];
                else
                    for (long c = 0; c < channels; c++) {
                        float d = x[at + c] - mean[c], g = d * scale[c] + shift[c] <= floor ? 0 : grad[at + c];
                        grad_x[at + c] = scale[c] * g + slope[c] * d + offset[c];
                    }
            }
        }
    }
    free(total);
}
