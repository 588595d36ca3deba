/* Rows of the local convolution of channels-last images.

Activations are (B, H * W, C), filters (B, H * W, G, taps).
Channels and filters come in `slices`: a channel uses a filter of its own slice. */
#pragma once
#include "memory.h"
#include "vectors.h"

#define MAX_TAPS 49

/* The mix of a layer's contexts, of numbers or of vectors, by the weight of the static one. */
#define MIX(dynamic, key, weight) ((dynamic) + (weight) * ((key) - (dynamic)))

typedef struct {
    long batch, channels, groups, slices, height, width, kernel_size, dilation;
} Shape;

static inline long count_taps(const Shape *s) { return s->kernel_size * s->kernel_size; }

/* How filters, (taps, G), go into vectors: the `step` filters of a slice fill `blocks` of them, the last maybe in part,
   or stand side by side in one, `repeats` times, as every `step` channels use the same. Lanes that are left over hold
   anything. What comes of them falls on channels that are written later, or behind the last channel, where memory has
   room for LANES numbers more, as it has behind the last filter. */
typedef struct {
    long step, blocks, repeats;
    int full;    /* whether no lanes are left over */
    Ints repeat; /* the lane that comes into each lane */
} Lanes;

static Lanes lanes_of(const Shape *s) {
    Lanes lanes = {.step = s->groups / s->slices, .repeats = 1};
    lanes.blocks = (lanes.step + LANES - 1) / LANES;
    for (long r = 1; r * lanes.step <= LANES; r++)
        if (s->channels / s->groups % r == 0) lanes.repeats = r;
    lanes.full = lanes.repeats * lanes.step == lanes.blocks * LANES;
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

/* The rows of an image that filters on one row reach, in float, each between zeros: taps need no checks for borders.
   Of a pixel there are `numbers`. The first row in memory is zero; row y of the image lies behind it, at y % rows. */
typedef struct {
    long numbers, reach, pad, rows, row_size, size, next;
    float *memory;
} Window;

static Window new_window(const Shape *s, long numbers, Memory *memory) {
    long reach = s->kernel_size / 2 * s->dilation, rows = 2 * reach + 1, pad = reach < s->width ? reach : s->width;
    rows = rows < s->height ? rows : s->height;
    long row_size = (s->width + 2 * pad) * numbers, size = (rows + 1) * row_size + LANES;
    return (Window){numbers, reach, pad, rows, row_size, size, 0, take_floats(memory, size)};
}

/* Empties the window for an image whose rows are wanted from first_row on. */
static void start_window(Window *window, long first_row) {
    memset(window->memory, 0, window->size * sizeof(float));
    window->next = first_row > window->reach ? first_row - window->reach : 0;
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
    long taps = count_taps(s), groups = s->groups, count = s->width * groups, i = 0;
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

/* The filters of a row of pixels, normalized, (W, taps, G). */
static void load_filters(
        const Shape *s, const SCALAR *logits, const float *scale, const float *bias, float *scratch, float *filters) {
    normalize(logits, s->width, s->groups * count_taps(s), scale, bias, scratch);
    order_by_taps(s, scratch, filters);
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
    else local_conv_row_of(s, lanes, count_taps(s), x, filters, out);
}

/* What a thread needs for rows of the local convolution. */
typedef struct {
    Window values;
    float *scratch, *filters, *out;
} Rows;

static Rows new_rows(const Shape *s, Memory *memory) {
    long n = s->groups * count_taps(s);
    return (Rows){
        new_window(s, s->channels, memory), take_floats(memory, row_size(s, n)), take_floats(memory, row_size(s, n)),
        take_floats(memory, row_size(s, s->channels))};
}

/* Row h of an image into out, (W, C), or into rows->out if that is NULL. Values and filters are normalized unless their
   scale is NULL. */
static void compute_row(
        const Shape *s, const Lanes *lanes, Rows *rows, long h, const SCALAR *values, const float *value_scale,
        const float *value_bias, const SCALAR *filters, const float *filter_scale, const float *filter_bias,
        SCALAR *out) {
    const float *taps[MAX_TAPS];
    fill_window(s, &rows->values, h, values, value_scale, value_bias);
    window_taps(s, &rows->values, h, taps);
    load_filters(
        s, filters + h * s->width * s->groups * count_taps(s), filter_scale, filter_bias, rows->scratch, rows->filters);
#ifndef BFLOAT16
    if (out != NULL && lanes->full) return local_conv_row(s, lanes, taps, rows->filters, out);
#endif
    local_conv_row(s, lanes, taps, rows->filters, rows->out);
    for (long i = 0; out != NULL && i < s->width * s->channels; i++) out[i] = store(rows->out[i]);
}
