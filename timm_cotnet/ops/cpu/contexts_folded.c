/* All of a CoT layer behind its convolutions, where batch norms are folded: group norm of the filters, local
convolution, shift, SiLU, pooling, and the mix of the static and the dynamic context. */
#include "local_conv.h"
#include "moments.h"

typedef struct {
    const SCALAR *filter_weight, *filter_bias; /* group norm */
    const SCALAR *shift;                       /* behind the local convolution */
    const SCALAR *weight1, *bias1, *weight2, *bias2; /* of the mix: C -> hidden -> logits, see `mix_weights` */
    double eps;
    long hidden, logits; /* 2 * C or C */
} Parameters;

/* A thread's memory: for rows, for sums over its part of an image, and for what belongs to a whole image, the affine
   map of its filters and what leads to the weights of its mix. */
typedef struct {
    Rows rows;
    float *row_sums, *room, *scale, *bias, *shift, *pooled, *hidden, *logits, *attn;
    double *moments, *sums; /* of filters (2, n), and of the contexts (C) */
} Part;

static Part new_part(const Shape *s, const Parameters *p, Memory *memory) {
    long n = s->groups * count_taps(s), channels = s->channels;
    return (Part){
        new_rows(s, memory), take_floats(memory, channels + LANES), take_floats(memory, 3 * n), take_floats(memory, n),
        take_floats(memory, n), take_floats(memory, channels), take_floats(memory, channels),
        take_floats(memory, p->hidden), take_floats(memory, p->logits), take_floats(memory, channels),
        take_doubles(memory, 2 * n), take_doubles(memory, channels)};
}

/* Group norm over the taps of each filter, as an affine map of each channel. */
static void norm_affine(const Shape *s, const double *moments, const Parameters *p, float *scale, float *bias) {
    long taps = count_taps(s);
    for (long g = 0; g < s->groups; g++) {
        double mean, inverse;
        filter_statistics(s, moments, g, p->eps, &mean, &inverse);
        for (long t = 0; t < taps; t++) {
            long i = g * taps + t;
            scale[i] = load(p->filter_weight[i]) * inverse;
            bias[i] = load(p->filter_bias[i]) - mean * load(p->filter_weight[i]) * inverse;
        }
    }
}

static void affine_layer(
        const float *x, long inputs, long outputs, const SCALAR *weight, const SCALAR *bias, float *out, int threads) {
    if (inputs * outputs < 1 << 14) threads = 1; /* less than what starting the others takes */
#pragma omp parallel for num_threads(threads)
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

/* The larger of two numbers in each lane; y where either is a NaN. */
static inline Floats larger(Floats x, Floats y) {
#ifdef __AVX512F__
    return (Floats)_mm512_max_ps((__m512)x, (__m512)y);
#else
    return choose(x > y, x, y);
#endif
}

#define MOST 41.5f /* of |x| in SiLU: more change nothing, and the product of two exponentials stays finite */

/* 1 + exp(-x) for x of at least -MOST. */
static inline Floats one_plus_exponential(Floats x) {
    x = larger(-x, (Floats){0} - MOST);
    Floats shifted = x * 1.44269504f + 12582912.0f; /* powers of two, as in `exponential` */
    Floats r = x * 1.44269504f - (shifted - 12582912.0f);
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

/* The weights of the static context, (C), from both contexts' sums over the image, by a softmax over each channel's
   logits of the dynamic and of the static context; or by a sigmoid of their difference, if that is the only logit. */
static void mix_weights(const Shape *s, const Parameters *p, const Part *parts, int slices) {
    long channels = s->channels;
    float *pooled = parts->pooled, *hidden = parts->hidden, *logits = parts->logits;
    for (long c = 0; c < channels; c++) {
        double sum = 0;
        for (int i = 0; i < slices; i++) sum += parts[i].sums[c];
        pooled[c] = sum / (s->height * s->width);
    }
    affine_layer(pooled, channels, p->hidden, p->weight1, p->bias1, hidden, slices);
    for (long i = 0; i < p->hidden; i++) hidden[i] = hidden[i] < 0 ? 0 : hidden[i];
    affine_layer(hidden, p->hidden, p->logits, p->weight2, p->bias2, logits, slices);
    int paired = p->logits != channels;
    for (long c = 0; c < channels; c++)
        parts->attn[c] = sigmoid(paired ? logits[2 * c + 1] - logits[2 * c] : logits[c]);
}

/* Writes the mix of the contexts over the dynamic context in out. */
static void mix(const SCALAR *restrict key, const float *restrict attn, long n, SCALAR *restrict out) {
    long c = 0;
    for (; c + LANES <= n; c += LANES)
        store_scalars(out + c, MIX(load_scalars(out + c), load_scalars(key + c), load_floats(attn + c)));
    for (; c < n; c++) out[c] = store(MIX(load(out[c]), load(key[c]), attn[c]));
}

/* One image, of which as many threads as there are parts do a slice each. */
static void compute_image(
        const Shape *s, const Lanes *lanes, const Parameters *p, const SCALAR *value, const SCALAR *logits,
        const SCALAR *key, SCALAR *out, Part *parts, int slices) {
    long n = s->groups * count_taps(s), channels = s->channels, pixels = s->height * s->width;

#pragma omp parallel for num_threads(slices)
    for (int i = 0; i < slices; i++) {
        memset(parts[i].moments, 0, 2 * n * sizeof(double));
        add_moments(logits, n, i * pixels / slices, (i + 1) * pixels / slices, parts[i].room, parts[i].moments);
    }
    for (int i = 1; i < slices; i++)
        for (long j = 0; j < 2 * n; j++) parts->moments[j] += parts[i].moments[j];
    finish_moments(s, parts->moments, logits, n, parts->moments);
    norm_affine(s, parts->moments, p, parts->scale, parts->bias);
    for (long c = 0; c < channels; c++) parts->shift[c] = load(p->shift[c]);

#pragma omp parallel for num_threads(slices)
    for (int i = 0; i < slices; i++) {
        Part *part = &parts[i];
        long first = i * s->height / slices;
        memset(part->sums, 0, channels * sizeof(double));
        start_window(&part->rows.values, first);
        for (long h = first; h < (i + 1) * s->height / slices; h++) {
            long at = h * s->width * channels;
            compute_row(s, lanes, &part->rows, h, value, NULL, NULL, logits, parts->scale, parts->bias, NULL);
            shift_act(s, part->rows.out, parts->shift, key + at, out + at, part->row_sums);
            for (long c = 0; c < channels; c++) part->sums[c] += part->row_sums[c];
        }
    }
    mix_weights(s, p, parts, slices);

#pragma omp parallel for num_threads(slices)
    for (int i = 0; i < slices; i++)
        for (long at = i * pixels / slices; at < (i + 1) * pixels / slices; at++)
            mix(key + at * channels, parts->attn, channels, out + at * channels);
}

/* out is (B, H * W, C), and none of the inputs but value: then each image is for one thread alone. */
int contexts_folded(
        const Shape *s, const Parameters *p, const SCALAR *value, const SCALAR *logits, const SCALAR *key, SCALAR *out,
        int threads) {
    long numbers = s->height * s->width * s->channels, filters = s->height * s->width * s->groups * count_taps(s);
    const Lanes lanes = lanes_of(s);
    Memory memory = {0};
    if (out == value && s->batch < threads) threads = s->batch;
    TAKE_FOR_THREADS(Part, parts, new_part(s, p, &memory))
    if (memory.failed) return release(&memory);
#define COMPUTE(b, parts, slices) compute_image( \
        s, &lanes, p, value + b * numbers, logits + b * filters, key + b * numbers, out + b * numbers, parts, slices)
    if (s->batch < threads) /* not within a parallel region: nested ones start new threads each time */
        for (long b = 0; b < s->batch; b++) COMPUTE(b, parts, threads);
    else {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
        for (long b = 0; b < s->batch; b++) COMPUTE(b, &parts[this_thread()], 1);
    }
    return release(&memory);
}
