/* Training of act(norm(x) + residual), where norm is a batch norm and act ReLU or nothing; float32, forward and
backward, each in two passes over memory. Activations are (B, H * W, C). */
#include "norms.h"

#define BLOCK 32 /* pixels that are summed in float */

/* All tensors; a kernel says which of them it sets. */
typedef struct {
    Shape shape;
    Norm norm;
    const float *x, *residual; /* residual may be NULL */
    float *out;                /* in the backward only where ReLU followed the sum with a residual, else NULL */
    const float *grad;
    float *grad_x, *grad_residual; /* grad_x may be NULL, grad_residual is where out is */
    long relu;
} BatchNorm;

/* The images, cut into parts of equal height where threads cannot share them equally. */
static Shape parts_of(const Shape *shape, int threads) {
    Shape s = *shape;
    for (; s.batch % threads != 0 && s.height % 2 == 0; s.height /= 2) s.batch *= 2;
    return s;
}

/* Sets out and the norm. */
int batch_norm_forward(const BatchNorm *b, int threads) {
    const Shape s = parts_of(&b->shape, threads);
    long n = s.channels, pixels = s.height * s.width;
    Memory memory = {0};
    double *moments = take_doubles(&memory, s.batch * 2 * n);
    TAKE_FOR_THREADS(float *, sums, take_floats(&memory, 3 * n))
    TAKE_FOR_THREADS(double *, totals, take_doubles(&memory, 2 * n))
    if (memory.failed) return release(&memory);
#pragma omp parallel for num_threads(threads)
    for (long i = 0; i < s.batch; i++) {
        const float *x = b->x + i * pixels * n;
        double *total = totals[this_thread()];
        memset(total, 0, 2 * n * sizeof(double));
        add_moments(x, n, 0, pixels, sums[this_thread()], total);
        finish_moments(&s, total, x, n, moments + i * 2 * n);
    }
    set_batch_norm(&s, moments, &b->norm);
    const float *restrict scale = b->norm.scale, *restrict shift = b->norm.shift;
    float floor = b->relu ? 0 : -INFINITY;
#pragma omp parallel for num_threads(threads)
    for (long p = 0; p < s.batch * pixels; p++) {
        const float *restrict x = b->x + p * n, *restrict residual = b->residual + p * n;
        float *restrict out = b->out + p * n;
        if (b->residual != NULL)
            for (long c = 0; c < n; c++) {
                float z = x[c] * scale[c] + shift[c] + residual[c];
                out[c] = z < floor ? floor : z; /* a NaN stays one */
            }
        else
            for (long c = 0; c < n; c++) {
                float z = x[c] * scale[c] + shift[c];
                out[c] = z < floor ? floor : z;
            }
    }
    return release(&memory);
}

/* Adds sums over pixels of the gradient that ReLU lets through, which goes to the residual as well, and of its product
   with norm(x) without weight and bias. `sum` is room for 2 * C numbers. */
static void add_gradients(const BatchNorm *b, long first, long pixels, float *restrict sum, double *restrict total) {
    long n = b->shape.channels;
    const float *restrict scale = b->norm.scale, *restrict shift = b->norm.shift;
    const float *restrict x_scale = b->norm.x_scale, *restrict x_shift = b->norm.x_shift;
    float *restrict product = sum + n, floor = b->relu ? 0 : -INFINITY;
    memset(sum, 0, 2 * n * sizeof(float));
    for (long p = first; p < first + pixels; p++) {
        const float *restrict x = b->x + p * n, *restrict grad = b->grad + p * n, *restrict out = b->out + p * n;
        float *restrict grad_residual = b->grad_residual + p * n;
        if (b->out != NULL)
            for (long c = 0; c < n; c++) {
                float g = out[c] <= 0 ? 0 : grad[c];
                grad_residual[c] = g;
                sum[c] += g;
                product[c] += g * (x[c] * x_scale[c] + x_shift[c]);
            }
        else
            for (long c = 0; c < n; c++) {
                float g = x[c] * scale[c] + shift[c] <= floor ? 0 : grad[c];
                sum[c] += g;
                product[c] += g * (x[c] * x_scale[c] + x_shift[c]);
            }
    }
    for (long i = 0; i < 2 * n; i++) total[i] += sum[i];
}

/* Sets the gradients. */
int batch_norm_backward(const BatchNorm *b, int threads) {
    const Shape s = parts_of(&b->shape, threads);
    long n = s.channels, pixels = s.height * s.width;
    Memory memory = {0};
    double *totals = take_doubles(&memory, s.batch * 2 * n);
    Factors factors = {take_floats(&memory, n), take_floats(&memory, n), take_floats(&memory, n)};
    TAKE_FOR_THREADS(float *, sums, take_floats(&memory, 2 * n))
    if (memory.failed) return release(&memory);
#pragma omp parallel for num_threads(threads)
    for (long i = 0; i < s.batch; i++) {
        double *total = totals + i * 2 * n;
        memset(total, 0, 2 * n * sizeof(double));
        for (long p = 0; p < pixels; p += BLOCK)
            add_gradients(
                b, i * pixels + p, pixels - p < BLOCK ? pixels - p : BLOCK, sums[this_thread()], total);
    }
    set_batch_norm_backward(&s, totals, &b->norm, &factors);
    const float *restrict scale = b->norm.scale, *restrict shift = b->norm.shift;
    const float *restrict of_grad = factors.of_grad, *restrict of_x = factors.of_x, *restrict rest = factors.rest;
    float floor = b->relu && b->out == NULL ? 0 : -INFINITY;
#pragma omp parallel for num_threads(threads)
    for (long p = 0; p < (b->grad_x == NULL ? 0 : s.batch * pixels); p++) {
        const float *restrict x = b->x + p * n, *restrict grad = (b->out ? b->grad_residual : b->grad) + p * n;
        float *restrict grad_x = b->grad_x + p * n;
        for (long c = 0; c < n; c++) {
            float g = x[c] * scale[c] + shift[c] <= floor ? 0 : grad[c];
            grad_x[c] = g * of_grad[c] + x[c] * of_x[c] + rest[c];
        }
    }
    return release(&memory);
}
