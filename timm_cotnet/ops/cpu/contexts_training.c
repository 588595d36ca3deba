/* Training of all of a CoT layer behind its convolutions, float32, forward and backward: in passes over the images, as
the norms of a batch need all of it first. Threads share the images.

n is the number of filters' taps, G * k * k. Sums and moments are (B, 2, C) or (B, 2, n). */
#include "local_conv_backward.h"
#include "norms.h"

/* All tensors; a kernel says which of them it sets. */
typedef struct {
    Shape shape;
    Norm value_norm, filter_norm, norm;
    const float *value, *logits, *key; /* values and filters before their norms, static context */
    float *out;                        /* (B, H * W, C), the local convolution */
    float *pooled, *attn;              /* (B, C), the pooled contexts and the weights of the static one */
    const float *grad, *pool_grad; /* output gradient, and (B, C) that of each pixel which comes from the pooling */
    double *act_sums;              /* (B, 5, C), see `add_act_sums` */
    float *grad_attn, *grad_key, *grad_value, *grad_logits;
} Contexts;

/* A thread's memory in the forward. */
typedef struct {
    Rows rows;
    float *sums;
    double *total;
} Room;

static Room new_room(const Shape *s, Memory *memory) {
    long n = s->groups * count_taps(s), most = n > s->channels ? n : s->channels;
    return (Room){new_rows(s, memory), take_floats(memory, 5 * most), take_doubles(memory, 2 * most)};
}

static void set_group_norm(const Shape *s, const double *moments, const Norm *norm) {
    long taps = count_taps(s), n = taps * s->groups;
    for (long b = 0; b < s->batch; b++, moments += 2 * n)
        for (long g = 0; g < s->groups; g++) {
            double mean, inverse;
            filter_statistics(s, moments, g, norm->eps, &mean, &inverse);
            for (long i = g * taps; i < (g + 1) * taps; i++)
                set_norm(norm, b * n + i, mean, inverse, norm->weight[i], norm->bias[i]);
        }
}

/* The moments of images of n channels. */
static void image_moments(const Shape *s, const float *x, long n, Room *rooms, double *moments, int threads) {
    long pixels = s->height * s->width;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long b = 0; b < s->batch; b++) {
        Room *own = &rooms[this_thread()];
        memset(own->total, 0, 2 * n * sizeof(double));
        add_moments(x + b * pixels * n, n, 0, pixels, own->sums, own->total);
        finish_moments(s, own->total, x + b * pixels * n, n, moments + b * 2 * n);
    }
}

/* Row h of image b of the local convolution of normalized values with normalized filters, into its place in out. */
static void norm_local_conv_row(const Contexts *c, const Lanes *lanes, Rows *rows, long b, long h) {
    const Shape *s = &c->shape;
    long n = s->groups * count_taps(s), channels = s->channels, pixels = s->height * s->width;
    compute_row(
        s, lanes, rows, h, c->value + b * pixels * channels, c->value_norm.scale, c->value_norm.shift,
        c->logits + b * pixels * n, c->filter_norm.scale + b * n, c->filter_norm.shift + b * n,
        c->out + (b * pixels + h * s->width) * channels);
}

/* The local convolution of all images, and its moments. */
static void norm_local_conv(const Contexts *c, Room *rooms, double *moments, int threads) {
    const Shape *s = &c->shape;
    long channels = s->channels, pixels = s->height * s->width;
    const Lanes lanes = lanes_of(s);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long b = 0; b < s->batch; b++) {
        Room *own = &rooms[this_thread()];
        float *image = c->out + b * pixels * channels;
        start_window(&own->rows.values, 0);
        memset(own->total, 0, 2 * channels * sizeof(double));
        for (long h = 0, done = 0; h < s->height; h++) {
            norm_local_conv_row(c, &lanes, &own->rows, b, h);
            long end = (h + 1) * s->width;
            if (end - done >= 64 || end == pixels) { /* while it is in the cache */
                add_moments(image, channels, done, end, own->sums, own->total);
                done = end;
            }
        }
        finish_moments(s, own->total, image, channels, moments + b * 2 * channels);
    }
}

/* Sums of silu(norm(x)) + key over a row of pixels, added to total. */
static void add_contexts(
        const float *restrict x, const Norm *norm, const float *restrict key, long pixels, long n, float *restrict sum,
        double *restrict total) {
    const float *restrict scale = norm->scale, *restrict shift = norm->shift;
    memset(sum, 0, n * sizeof(float));
    for (long p = 0; p < pixels; p++)
        for (long c = 0; c < n; c++) {
            float z = x[p * n + c] * scale[c] + shift[c];
            sum[c] += z * sigmoid(z) + key[p * n + c];
        }
    for (long c = 0; c < n; c++) total[c] += sum[c];
}

static void pool(const Contexts *c, Room *rooms, int threads) {
    const Shape *s = &c->shape;
    long channels = s->channels, pixels = s->height * s->width;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long b = 0; b < s->batch; b++) {
        Room *own = &rooms[this_thread()];
        memset(own->total, 0, channels * sizeof(double));
        for (long h = 0; h < s->height; h++) {
            long at = (b * pixels + h * s->width) * channels;
            add_contexts(c->out + at, &c->norm, c->key + at, s->width, channels, own->sums, own->total);
        }
        for (long i = 0; i < channels; i++) c->pooled[b * channels + i] = own->total[i] / pixels;
    }
}

/* Sets out, pooled and the norms. */
int contexts_forward(const Contexts *c, int threads) {
    const Shape *s = &c->shape;
    long n = s->groups * count_taps(s), most = n > s->channels ? n : s->channels;
    Memory memory = {0};
    double *moments = take_doubles(&memory, s->batch * 2 * most);
    TAKE_FOR_THREADS(Room, rooms, new_room(s, &memory))
    if (memory.failed) return release(&memory);
    image_moments(s, c->value, s->channels, rooms, moments, threads);
    set_batch_norm(s, moments, &c->value_norm);
    image_moments(s, c->logits, n, rooms, moments, threads);
    set_group_norm(s, moments, &c->filter_norm);
    norm_local_conv(c, rooms, moments, threads);
    set_batch_norm(s, moments, &c->norm);
    pool(c, rooms, threads);
    return release(&memory);
}

/* Writes lerp(silu(norm(out)), key, attn) over out. */
int contexts_mix(const Contexts *contexts, int threads) {
    long channels = contexts->shape.channels, pixels = contexts->shape.height * contexts->shape.width;
    float *restrict x = contexts->out;
    const float *restrict scale = contexts->norm.scale, *restrict shift = contexts->norm.shift;
    const float *restrict key = contexts->key;
#pragma omp parallel for num_threads(threads)
    for (long p = 0; p < contexts->shape.batch * pixels; p++) {
        const float *restrict a = contexts->attn + p / pixels * channels;
        for (long c = 0; c < channels; c++) {
            float z = x[p * channels + c] * scale[c] + shift[c];
            z *= sigmoid(z);
            x[p * channels + c] = MIX(z, key[p * channels + c], a[c]);
        }
    }
    return 0;
}

/* Sums over pixels that the gradients of attn and of the norm are made of, (5, C): grad * (key - silu(z)), and silu'(z)
   times 1, y, grad and grad * y, where z is norm(x) and y is that without weight and bias. */
static void add_act_sums(
        const float *restrict grad, const float *restrict x, const Norm *norm, const float *restrict key, long pixels,
        long n, float *restrict sums, double *restrict total) {
    const float *restrict scale = norm->scale, *restrict shift = norm->shift;
    const float *restrict x_scale = norm->x_scale, *restrict x_shift = norm->x_shift;
    memset(sums, 0, 5 * n * sizeof(float));
    for (long p = 0; p < pixels; p++)
        for (long c = 0; c < n; c++) {
            float in = x[p * n + c], g = grad[p * n + c], z = in * scale[c] + shift[c], gate = sigmoid(z);
            float slope = gate * (1 + z * (1 - gate)), y = in * x_scale[c] + x_shift[c];
            sums[c] += g * (key[p * n + c] - z * gate);
            sums[n + c] += slope;
            sums[2 * n + c] += slope * y;
            sums[3 * n + c] += slope * g;
            sums[4 * n + c] += slope * g * y;
        }
    for (long i = 0; i < 5 * n; i++) total[i] += sums[i];
}

/* Sets out once more, act_sums and grad_attn. */
int contexts_recompute(const Contexts *c, int threads) {
    const Shape *s = &c->shape;
    long channels = s->channels, pixels = s->height * s->width;
    const Lanes lanes = lanes_of(s);
    Memory memory = {0};
    TAKE_FOR_THREADS(Room, rooms, new_room(s, &memory))
    if (memory.failed) return release(&memory);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long b = 0; b < s->batch; b++) {
        Room *own = &rooms[this_thread()];
        double *total = c->act_sums + b * 5 * channels;
        start_window(&own->rows.values, 0);
        memset(total, 0, 5 * channels * sizeof(double));
        for (long h = 0; h < s->height; h++) {
            long at = (b * pixels + h * s->width) * channels;
            norm_local_conv_row(c, &lanes, &own->rows, b, h);
            add_act_sums(
                c->grad + at, c->out + at, &c->norm, c->key + at, s->width, channels, own->sums, total);
        }
        for (long i = 0; i < channels; i++) c->grad_attn[b * channels + i] = total[i];
    }
    return release(&memory);
}

/* Sums over the pixels of each image of the gradient of norm(out) and of its product with norm(out) without weight and
   bias. */
static void mix_sums(const Contexts *contexts, double *sums) {
    const double *act_sums = contexts->act_sums;
    long n = contexts->shape.channels;
    for (long b = 0; b < contexts->shape.batch; b++, act_sums += 5 * n, sums += 2 * n)
        for (long c = 0; c < n; c++) {
            double a = 1 - contexts->attn[b * n + c], pool = contexts->pool_grad[b * n + c];
            sums[c] = a * act_sums[3 * n + c] + pool * act_sums[n + c];
            sums[n + c] = a * act_sums[4 * n + c] + pool * act_sums[2 * n + c];
        }
}

static void set_group_norm_backward(const Shape *s, const double *sums, const Norm *norm, const Factors *factors) {
    long taps = count_taps(s), n = taps * s->groups;
    double count = taps * s->height * s->width;
    memset(norm->grad_weight, 0, n * sizeof(float));
    memset(norm->grad_bias, 0, n * sizeof(float));
    for (long b = 0; b < s->batch; b++, sums += 2 * n)
        for (long first = 0; first < n; first += taps) {
            double grad = 0, product = 0;
            for (long i = first; i < first + taps; i++) {
                grad += norm->weight[i] * sums[i] / count;
                product += norm->weight[i] * sums[n + i] / count;
                norm->grad_weight[i] += sums[n + i];
                norm->grad_bias[i] += sums[i];
            }
            for (long i = first; i < first + taps; i++)
                set_factors(factors, norm, b * n + i, norm->weight[i], grad, product);
        }
}

/* Gradients of key and x from those of lerp(silu(norm(x)), key, attn) and of the pooling. */
static void mix_backward(
        const float *restrict grad, const float *restrict x, const Norm *norm, const Factors *factors,
        const float *restrict attn, const float *restrict pool_grad, long pixels, long n, float *restrict grad_key,
        float *restrict grad_x) {
    const float *restrict scale = norm->scale, *restrict shift = norm->shift;
    const float *restrict of_grad = factors->of_grad, *restrict of_x = factors->of_x, *restrict rest = factors->rest;
    for (long p = 0; p < pixels; p++)
        for (long c = 0; c < n; c++) {
            float in = x[p * n + c], g = grad[p * n + c], z = in * scale[c] + shift[c], y = sigmoid(z);
            float grad_z = (g * (1 - attn[c]) + pool_grad[c]) * y * (1 + z * (1 - y));
            grad_key[p * n + c] = g * attn[c] + pool_grad[c];
            grad_x[p * n + c] = grad_z * of_grad[c] + in * of_x[c] + rest[c];
        }
}

/* Adds sums of grad, and of its product with norm(x) without weight and bias; sum and product are room for n numbers
   each. */
static void add_products(
        const float *restrict grad, const float *restrict x, const float *restrict x_scale,
        const float *restrict x_shift, long pixels, long n, float *restrict sum, float *restrict product,
        double *restrict total) {
    memset(sum, 0, n * sizeof(float));
    memset(product, 0, n * sizeof(float));
    for (long p = 0; p < pixels; p++)
        for (long c = 0; c < n; c++) {
            sum[c] += grad[p * n + c];
            product[c] += grad[p * n + c] * (x[p * n + c] * x_scale[c] + x_shift[c]);
        }
    for (long c = 0; c < n; c++) {
        total[c] += sum[c];
        total[n + c] += product[c];
    }
}

/* Image b: gradients of key, and of the normalized values and filters, whose sums are as those of `mix_sums`. */
static void image_backward(
        const Contexts *c, const Lanes *lanes, BackwardRows *rows, const Factors *factors, long b, double *value_sums,
        double *filter_sums) {
    const Shape *s = &c->shape;
    long n = s->groups * count_taps(s), channels = s->channels, first = b * s->height * s->width;
    const Norm *values = &c->value_norm, *filters = &c->filter_norm;
    const float *value = c->value + first * channels, *logits = c->logits + first * n;
    memset(value_sums, 0, 2 * channels * sizeof(double));
    memset(filter_sums, 0, 2 * n * sizeof(double));
    start_backward_rows(rows);
    for (long h = 0; h < s->height; h++) {
        float *grad_value = c->grad_value + (first + h * s->width) * channels;
        float *grad_logits = c->grad_logits + (first + h * s->width) * n;
        fill_window(s, &rows->values, h, value, values->scale, values->shift);
        for (long y; (y = next_row(s, &rows->grads, h)) >= 0;) {
            long at = (first + y * s->width) * channels;
            mix_backward(
                c->grad + at, c->out + at, &c->norm, factors, c->attn + b * channels, c->pool_grad + b * channels,
                s->width, channels, c->grad_key + at, window_row(s, &rows->grads, y));
        }
        fill_filters(s, rows, h, logits, filters->scale + b * n, filters->shift + b * n);
        compute_backward_row(s, lanes, rows, h, grad_value, grad_logits);
        add_products(
            grad_value, value + h * s->width * channels, values->x_scale, values->x_shift, s->width, channels,
            rows->sum, rows->product, value_sums);
        add_products(
            grad_logits, logits + h * s->width * n, filters->x_scale + b * n, filters->x_shift + b * n, s->width, n,
            rows->sum, rows->product, filter_sums);
    }
}

/* Turns the gradient of what a norm puts out into that of its input, in place; factors are (n), or (B, n). */
static void norm_backward(
        const Shape *s, float *restrict grad, const float *restrict x, long n, const Factors *factors,
        int of_each_image, int threads) {
    long pixels = s->height * s->width;
#pragma omp parallel for num_threads(threads)
    for (long p = 0; p < s->batch * pixels; p++) {
        long first = of_each_image ? p / pixels * n : 0;
        const float *restrict of_grad = factors->of_grad + first, *restrict of_x = factors->of_x + first;
        const float *restrict rest = factors->rest + first;
        for (long i = 0; i < n; i++) grad[p * n + i] = grad[p * n + i] * of_grad[i] + x[p * n + i] * of_x[i] + rest[i];
    }
}

/* Sets grad_key, grad_value, grad_logits and those of the norms, from all others. */
int contexts_backward(const Contexts *c, int threads) {
    const Shape *s = &c->shape;
    long channels = s->channels, n = s->groups * count_taps(s);
    long size = s->batch * n > channels ? s->batch * n : channels;
    const Lanes lanes = lanes_of(s);
    Memory memory = {0};
    double *sums = take_doubles(&memory, s->batch * 2 * channels);
    double *filter_sums = take_doubles(&memory, s->batch * 2 * n);
    Factors factors = {take_floats(&memory, size), take_floats(&memory, size), take_floats(&memory, size)};
    TAKE_FOR_THREADS(BackwardRows, rows, new_backward_rows(s, &lanes, &memory))
    if (memory.failed) return release(&memory);

    mix_sums(c, sums);
    set_batch_norm_backward(s, sums, &c->norm, &factors);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long b = 0; b < s->batch; b++)
        image_backward(
            c, &lanes, &rows[this_thread()], &factors, b, sums + b * 2 * channels, filter_sums + b * 2 * n);
    set_batch_norm_backward(s, sums, &c->value_norm, &factors);
    norm_backward(s, c->grad_value, c->value, channels, &factors, 0, threads);
    set_group_norm_backward(s, filter_sums, &c->filter_norm, &factors);
    norm_backward(s, c->grad_logits, c->logits, n, &factors, 1, threads);
    return release(&memory);
}
