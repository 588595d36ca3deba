/* Norms in training: what their statistics make of x, and what the sums of their backward make of gradients. */
#pragma once
#include "moments.h"

/* A norm with its parameters. scale and shift give what it puts out, x * scale + shift; x_scale and x_shift give that
   without its weight and bias. Of a batch norm these four are (C), of the filters' group norm (B, n). */
typedef struct {
    const float *weight, *bias;
    float *scale, *shift, *x_scale, *x_shift;
    float *running_mean, *running_var; /* of a batch norm, in the forward */
    float *grad_weight, *grad_bias;    /* in the backward */
    double eps, momentum;
} Norm;

static void set_norm(const Norm *norm, long at, double mean, double inverse, double weight, double bias) {
    norm->x_scale[at] = inverse;
    norm->x_shift[at] = -mean * inverse;
    norm->scale[at] = inverse * weight;
    norm->shift[at] = bias - mean * inverse * weight;
}

/* From the moments of the images; also moves the running statistics. */
static void set_batch_norm(const Shape *s, const double *moments, const Norm *norm) {
    long n = s->channels;
    double pixels = s->height * s->width, count = s->batch * pixels;
    for (long c = 0; c < n; c++) {
        double mean = 0, square = 0;
        for (long b = 0; b < s->batch; b++) mean += moments[b * 2 * n + c] / s->batch;
        for (long b = 0; b < s->batch; b++) {
            double d = moments[b * 2 * n + c] - mean;
            square += moments[b * 2 * n + n + c] + pixels * d * d;
        }
        set_norm(norm, c, mean, 1 / sqrt(square / count + norm->eps), norm->weight[c], norm->bias[c]);
        norm->running_mean[c] += norm->momentum * (mean - norm->running_mean[c]);
        norm->running_var[c] += norm->momentum * (square / (count - 1) - norm->running_var[c]);
    }
}

/* The gradient of a norm's input, by factors of each channel: grad * of_grad + x * of_x + rest. */
typedef struct {
    float *of_grad, *of_x, *rest;
} Factors;

/* From the means over all that is normed together of the weighted gradient, and of its product with x. */
static void set_factors(
        const Factors *factors, const Norm *norm, long at, double weight, double grad, double product) {
    double inverse = norm->x_scale[at];
    factors->of_grad[at] = inverse * weight;
    factors->of_x[at] = -inverse * product * inverse;
    factors->rest[at] = -inverse * (grad + norm->x_shift[at] * product);
}

/* From the sums of the images; also the gradients of weight and bias. */
static void set_batch_norm_backward(const Shape *s, const double *sums, const Norm *norm, const Factors *factors) {
    long n = s->channels;
    double count = (double)s->batch * s->height * s->width;
    for (long c = 0; c < n; c++) {
        double grad = 0, product = 0, weight = norm->weight[c];
        for (long b = 0; b < s->batch; b++) {
            grad += sums[b * 2 * n + c];
            product += sums[b * 2 * n + n + c];
        }
        norm->grad_weight[c] = product;
        norm->grad_bias[c] = grad;
        set_factors(factors, norm, c, weight, weight * grad / count, weight * product / count);
    }
}
