/* Rows of both gradients of the local convolution, in float32; see local_conv.h. */
#pragma once
#include "local_conv.h"

/* Filters of a row of pixels from (W, taps, G) to (W, G, taps): the inverse of `order_by_taps`. */
static void order_by_filters(const Shape *s, const float *from, float *to) {
    long taps = count_taps(s), groups = s->groups, count = s->width * groups, i = 0;
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

/* Numbers of all lanes that a pixel's filters fill, of one tap. */
static inline long count_lanes(const Shape *s, const Lanes *lanes) { return s->slices * lanes->blocks * LANES; }

/* Gradients of a pixel's filters, (taps, G): sums over their channels of x[tap][c] * grad[c]. `vectors` is room for
   taps * count_lanes numbers. */
static inline __attribute__((always_inline)) void products_of(
        const Shape *s, const Lanes *lanes, long taps, const float *const *x, const float *grad, float *vectors,
        float *sums) {
    long width = s->channels / s->slices, apart = lanes->repeats * lanes->step;
    long count = count_lanes(s, lanes), i = 0;
    /* where what is left over is written over by what comes next, or there is none */
    int in_place = lanes->step % LANES == 0 || s->slices * lanes->blocks == 1;
    if (in_place) vectors = sums, count = s->groups;
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
    for (long t = 0; t < taps && !in_place; t++) { /* in this order, for lanes that are left over */
        const float *from = vectors + t * count;
        for (long slice = 0; slice < s->slices; slice++)
            for (long block = 0; block < lanes->blocks; block++, from += LANES)
                store_floats(sums + t * s->groups + slice * lanes->step + block * LANES, load_floats(from));
    }
}

static void weighted_sums(
        const Shape *s, const Lanes *lanes, const float *const *x, const float *const *filters, float *out) {
    if (s->kernel_size == 3) weighted_sums_of(s, lanes, 9, x, 0, filters, 0, out);
    else weighted_sums_of(s, lanes, count_taps(s), x, 0, filters, 0, out);
}

static void products(
        const Shape *s, const Lanes *lanes, const float *const *x, const float *grad, float *vectors, float *sums) {
    if (s->kernel_size == 3) products_of(s, lanes, 9, x, grad, vectors, sums);
    else products_of(s, lanes, count_taps(s), x, grad, vectors, sums);
}

/* What a thread needs for rows of the gradients. */
typedef struct {
    Window values, filters, grads;
    float *scratch, *vectors, *sum, *product; /* sums of a pixel's values, or of its filters' taps */
} BackwardRows;

static BackwardRows new_backward_rows(const Shape *s, const Lanes *lanes, Memory *memory) {
    long n = s->groups * count_taps(s), most = n > s->channels ? n : s->channels;
    return (BackwardRows){
        new_window(s, s->channels, memory), new_window(s, n, memory), new_window(s, s->channels, memory),
        take_floats(memory, row_size(s, n)), take_floats(memory, count_taps(s) * count_lanes(s, lanes)),
        take_floats(memory, most + LANES), take_floats(memory, most)};
}

static void start_backward_rows(BackwardRows *rows) {
    start_window(&rows->values, 0);
    start_window(&rows->filters, 0);
    start_window(&rows->grads, 0);
}

/* Filters, normalized unless their scale is NULL, into their window. */
static void fill_filters(
        const Shape *s, BackwardRows *rows, long h, const float *image, const float *scale, const float *bias) {
    for (long y; (y = next_row(s, &rows->filters, h)) >= 0;)
        load_filters(
            s, image + y * s->width * rows->filters.numbers, scale, bias, rows->scratch,
            window_row(s, &rows->filters, y));
}

/* Row h of the gradients, from windows that are filled; those of the filters are (W, G, taps). That of a value is a
   local convolution as well, of the output gradients, each with the filter that stands where the gradient does. */
static void compute_backward_row(
        const Shape *s, const Lanes *lanes, const BackwardRows *rows, long h, float *grad_x, float *grad_filters) {
    long taps = count_taps(s), n = taps * s->groups, channels = s->channels;
    const float *value[MAX_TAPS], *filter[MAX_TAPS], *grad[MAX_TAPS], *x[MAX_TAPS], *f[MAX_TAPS];
    window_taps(s, &rows->values, h, value);
    window_taps(s, &rows->filters, h, filter);
    window_taps(s, &rows->grads, h, grad);
    for (long w = 0; w < s->width; w++) {
        for (long t = 0; t < taps; t++) x[t] = value[t] + w * channels;
        products(s, lanes, x, grad[taps / 2] + w * channels, rows->vectors, rows->scratch + w * n);
        for (long t = 0; t < taps; t++) {
            x[t] = grad[t] + w * channels;
            f[t] = filter[t] + w * n + (taps - 1 - t) * s->groups;
        }
        float *sum = lanes->full ? grad_x + w * channels : rows->sum;
        weighted_sums(s, lanes, x, f, sum);
        if (!lanes->full) memcpy(grad_x + w * channels, sum, channels * sizeof(float));
    }
    order_by_filters(s, rows->scratch, grad_filters);
}
