/* What norms take their statistics from. */
#pragma once
#include "local_conv.h"

/* Adds sums over pixels of each of n channels and of its square, both of the difference to the first pixel of the
   image. `room` is for 3 * n numbers. */
static void add_moments(
        const SCALAR *restrict image, long n, long pixel, long end, float *restrict room, double *restrict total) {
    float *restrict sum = room, *restrict square = room + n, *restrict pivot = room + 2 * n;
    for (long i = 0; i < n; i++) pivot[i] = load(image[i]);
    while (pixel < end) { /* short sums in float, long ones in double */
        long stop = pixel + 64 < end ? pixel + 64 : end;
        memset(room, 0, 2 * n * sizeof(float));
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

/* From these sums over an image: means, and sums of squared differences to the mean. */
static void finish_moments(const Shape *s, const double *total, const SCALAR *image, long n, double *moments) {
    double pixels = s->height * s->width;
    for (long i = 0; i < n; i++) {
        double square = total[n + i] - total[i] * total[i] / pixels;
        moments[i] = load(image[i]) + total[i] / pixels;
        moments[n + i] = square > 0 ? square : 0;
    }
}

/* Mean of filter g of an image over its taps, and the inverse of its deviation. */
static void filter_statistics(
        const Shape *s, const double *moments, long g, double eps, double *mean, double *inverse) {
    long taps = count_taps(s), n = taps * s->groups, first = g * taps;
    double pixels = s->height * s->width, square = 0;
    *mean = 0;
    for (long t = 0; t < taps; t++) *mean += moments[first + t] / taps;
    for (long t = 0; t < taps; t++) {
        double d = moments[first + t] - *mean;
        square += moments[n + first + t] + pixels * d * d;
    }
    *inverse = 1 / sqrt(square / (taps * pixels) + eps);
}
