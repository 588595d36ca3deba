/* The local convolution and its gradients. */
#include "local_conv.h"
#ifndef BFLOAT16
#include "local_conv_backward.h"
#endif

/* out is (B, H * W, C) like x. Threads share all rows. */
int local_conv(const Shape *s, const SCALAR *x, const SCALAR *weight, SCALAR *out, int threads) {
    long n = s->groups * count_taps(s), pixels = s->height * s->width, count = s->batch * s->height;
    const Lanes lanes = lanes_of(s);
    Memory memory = {0};
    TAKE_FOR_THREADS(Rows, rows, new_rows(s, &memory))
    if (memory.failed) return release(&memory);
#pragma omp parallel for num_threads(threads)
    for (int i = 0; i < threads; i++)
        for (long row = i * count / threads, end = (i + 1) * count / threads; row < end;) {
            long b = row / s->height;
            start_window(&rows[i].values, row % s->height);
            for (; row < end && row / s->height == b; row++)
                compute_row(
                    s, &lanes, &rows[i], row % s->height, x + b * pixels * s->channels, NULL, NULL,
                    weight + b * pixels * n, NULL, NULL, out + row * s->width * s->channels);
        }
    return release(&memory);
}

#ifndef BFLOAT16
/* Gradients of x and weight, in their layouts. Threads share the images. */
int local_conv_backward(
        const Shape *s, const float *grad, const float *x, const float *weight, float *grad_x, float *grad_weight,
        int threads) {
    long n = s->groups * count_taps(s), pixels = s->height * s->width, channels = s->channels;
    const Lanes lanes = lanes_of(s);
    Memory memory = {0};
    TAKE_FOR_THREADS(BackwardRows, all_rows, new_backward_rows(s, &lanes, &memory))
    if (memory.failed) return release(&memory);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long b = 0; b < s->batch; b++) {
        BackwardRows *rows = &all_rows[this_thread()];
        start_backward_rows(rows);
        for (long h = 0; h < s->height; h++) {
            long at = b * pixels + h * s->width;
            fill_window(s, &rows->values, h, x + b * pixels * channels, NULL, NULL);
            fill_window(s, &rows->grads, h, grad + b * pixels * channels, NULL, NULL);
            fill_filters(s, rows, h, weight + b * pixels * n, NULL, NULL);
            compute_backward_row(s, &lanes, rows, h, grad_x + at * channels, grad_weight + at * n);
        }
    }
    return release(&memory);
}
#endif
