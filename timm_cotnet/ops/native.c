/* Kernels of CoT for channels-last tensors on the CPU. `native.py` compiles this file and says what the arguments are.

SCALAR is the type of all tensors, float or (-DBFLOAT16) bfloat16; sums are kept in float. Activations are (B, H * W,
C), filters (B, H * W, G * taps) with tap t of filter g at g * stride_g + t * stride_t. Threads share the images out
among themselves, or the rows of each image where there are more threads than images. Channels and filters come in
`slices`: a channel uses a filter of its own slice. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef BFLOAT16
typedef uint16_t SCALAR;
static inline float load(SCALAR value) {
    uint32_t bits = (uint32_t)value << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}
static inline SCALAR store(float value) { /* to the nearest, ties to even; a NaN stays one */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return value != value ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
#else
typedef float SCALAR;
static inline float load(SCALAR value) { return value; }
static inline SCALAR store(float value) { return value; }
#endif

#define MAX_TAPS 49

typedef struct {
    long batch, channels, groups, slices, height, width, kernel_size, dilation, stride_g, stride_t;
} Shape;

/* exp(x) by 2^n * p(r), |r| <= ln(2) / 2, in straight-line code that compilers vectorize; about one ulp. */
static inline float exponential(float x) {
    x = x > 88.0f ? 88.0f : x < -87.0f ? -87.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

/* The taps of a pixel that lie inside the image: their indices and their distances in memory, in pixels. */
static inline int valid_taps(const Shape *s, long h, long w, int *tap, long *offset) {
    int n = 0;
    for (long i = 0; i < s->kernel_size; i++) {
        for (long j = 0; j < s->kernel_size; j++) {
            long y = h + (i - s->kernel_size / 2) * s->dilation, x = w + (j - s->kernel_size / 2) * s->dilation;
            if (y >= 0 && y < s->height && x >= 0 && x < s->width) {
                tap[n] = i * s->kernel_size + j;
                offset[n++] = (y - h) * s->width + x - w;
            }
        }
    }
    return n;
}

/* out[c] = sum over n taps of x[offset of tap][c] * filters[tap][filter of c], for `lanes` filters from `first`
   on. Written in GCC's and Clang's vectors, as neither keeps the sums of plain loops in registers. */
#define DEFINE_WEIGHTED_SUM(lanes) \
    typedef float Floats##lanes __attribute__((vector_size(4 * lanes))); \
    static inline void weighted_sum##lanes( \
            const Shape *s, const SCALAR *x, const float *filters, const int *tap, const long *offset, int n, \
            float *out, long first) { \
        long step = s->groups / s->slices, slice = first / step, width = s->channels / s->slices; \
        for (long c = slice * width + first % step; c < (slice + 1) * width; c += step) { \
            Floats##lanes sum = {0}, filter, in; \
            for (int t = 0; t < n; t++) { \
                const SCALAR *from = x + offset[t] * s->channels + c; \
                for (int l = 0; l < lanes; l++) in[l] = load(from[l]); \
                memcpy(&filter, filters + tap[t] * s->groups + first, sizeof(filter)); \
                sum += in * filter; \
            } \
            memcpy(out + c, &sum, sizeof(sum)); \
        } \
    }
#ifdef __AVX512F__
DEFINE_WEIGHTED_SUM(16)
#endif
#ifdef __AVX__
DEFINE_WEIGHTED_SUM(8)
#endif
DEFINE_WEIGHTED_SUM(4)
DEFINE_WEIGHTED_SUM(1)

/* One pixel of the local convolution; filters is (taps, G) in float. */
static inline void local_conv_pixel(
        const Shape *s, const SCALAR *x, const float *filters, const int *tap, const long *offset, int n, float *out) {
    long step = s->groups / s->slices;
    for (long end = step, g = 0; end <= s->groups; end += step) {
#ifdef __AVX512F__
        for (; g + 16 <= end; g += 16) weighted_sum16(s, x, filters, tap, offset, n, out, g);
#endif
#ifdef __AVX__
        for (; g + 8 <= end; g += 8) weighted_sum8(s, x, filters, tap, offset, n, out, g);
#endif
        for (; g + 4 <= end; g += 4) weighted_sum4(s, x, filters, tap, offset, n, out, g);
        for (; g < end; g++) weighted_sum1(s, x, filters, tap, offset, n, out, g);
    }
}

/* One pixel's filters, (taps, G) in float whatever their order in memory. */
static inline void load_filters(const Shape *s, const SCALAR *weight, float *filters) {
    long taps = s->kernel_size * s->kernel_size;
    for (long t = 0; t < taps; t++)
        for (long g = 0; g < s->groups; g++)
            filters[t * s->groups + g] = load(weight[g * s->stride_g + t * s->stride_t]);
}

/* The local convolution. */
void local_conv(const Shape *s, const SCALAR *x, const SCALAR *weight, SCALAR *out, int threads) {
    long n = s->groups * s->kernel_size * s->kernel_size;
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < s->batch * s->height; row++) {
        float filters[n], sum[s->channels];
        int tap[MAX_TAPS];
        long offset[MAX_TAPS];
        for (long w = 0; w < s->width; w++) {
            long at = row * s->width + w;
            load_filters(s, weight + at * n, filters);
            int count = valid_taps(s, row % s->height, w, tap, offset);
            local_conv_pixel(s, x + at * s->channels, filters, tap, offset, count, sum);
            for (long c = 0; c < s->channels; c++) out[at * s->channels + c] = store(sum[c]);
        }
    }
}

#ifndef BFLOAT16 /* the input gradient is summed where it is stored */
/* What the output gradient of a pixel adds to the input gradient, and the gradient of its filters, (taps, G). */
#define DEFINE_GRADIENTS(lanes) \
    static inline void gradients##lanes( \
            const Shape *s, const float *grad, const float *x, const float *filters, const int *tap, \
            const long *offset, int n, float *grad_x, float *grad_filters, long first) { \
        long step = s->groups / s->slices, slice = first / step, width = s->channels / s->slices; \
        for (int t = 0; t < n; t++) { \
            Floats##lanes sum = {0}, filter, in, g, out; \
            memcpy(&filter, filters + tap[t] * s->groups + first, sizeof(filter)); \
            for (long c = slice * width + first % step; c < (slice + 1) * width; c += step) { \
                long at = offset[t] * s->channels + c; \
                memcpy(&g, grad + c, sizeof(g)); \
                memcpy(&in, x + at, sizeof(in)); \
                memcpy(&out, grad_x + at, sizeof(out)); \
                sum += g * in; \
                out += g * filter; \
                memcpy(grad_x + at, &out, sizeof(out)); \
            } \
            memcpy(grad_filters + tap[t] * s->groups + first, &sum, sizeof(sum)); \
        } \
    }
#ifdef __AVX512F__
DEFINE_GRADIENTS(16)
#endif
#ifdef __AVX__
DEFINE_GRADIENTS(8)
#endif
DEFINE_GRADIENTS(4)
DEFINE_GRADIENTS(1)

/* The same for all filters of the pixel. */
static inline void add_gradients(
        const Shape *s, const float *grad, const float *x, const float *filters, const int *tap, const long *offset,
        int n, float *grad_x, float *grad_filters) {
    long step = s->groups / s->slices;
#define GRADIENTS(lanes) \
    for (; g + lanes <= end; g += lanes) gradients##lanes(s, grad, x, filters, tap, offset, n, grad_x, grad_filters, g);
    for (long end = step, g = 0; end <= s->groups; end += step) {
#ifdef __AVX512F__
        GRADIENTS(16)
#endif
#ifdef __AVX__
        GRADIENTS(8)
#endif
        GRADIENTS(4)
        GRADIENTS(1)
    }
}

/* Both gradients of the local convolution. Threads share the images. */
void local_conv_backward(
        const Shape *s, const float *grad, const float *x, const float *weight, float *grad_x, float *grad_weight,
        int threads) {
    long n = s->groups * s->kernel_size * s->kernel_size, taps = s->kernel_size * s->kernel_size;
    long pixels = s->height * s->width;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long b = 0; b < s->batch; b++) {
        memset(grad_x + b * pixels * s->channels, 0, pixels * s->channels * sizeof(float));
        float filters[n], grad_filters[n];
        int tap[MAX_TAPS];
        long offset[MAX_TAPS];
        for (long p = 0; p < pixels; p++) {
            long at = b * pixels + p;
            int count = valid_taps(s, p / s->width, p % s->width, tap, offset);
            load_filters(s, weight + at * n, filters);
            memset(grad_filters, 0, sizeof(grad_filters));
            add_gradients(
                s, grad + at * s->channels, x + at * s->channels, filters, tap, offset, count,
                grad_x + at * s->channels, grad_filters);
            for (long t = 0; t < taps; t++)
                for (long g = 0; g < s->groups; g++)
                    grad_weight[at * n + g * s->stride_g + t * s->stride_t] = grad_filters[t * s->groups + g];
        }
    }
}
#endif

/* Sums over a strip of rows of each of n channels and of its square, both of the difference to the first pixel. */
static void add_moments(const Shape *s, const SCALAR *image, long n, long row, long end, double *total) {
    float sum[n], square[n];
    for (; row < end; row++) { /* short sums in float, long ones in double */
        memset(sum, 0, sizeof(sum));
        memset(square, 0, sizeof(square));
        for (const SCALAR *x = image + row * s->width * n; x < image + (row + 1) * s->width * n; x += n) {
            for (long i = 0; i < n; i++) {
                float d = load(x[i]) - load(image[i]);
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

/* Group norm over the taps of each filter, as an affine map of each channel. */
static void norm_affine(
        const Shape *s, const SCALAR *image, const double *moments, const SCALAR *gamma, const SCALAR *beta, double eps,
        float *scale, float *bias) {
    long taps = s->kernel_size * s->kernel_size, n = taps * s->groups, pixels = s->height * s->width;
    for (long g = 0; g < s->groups; g++) {
        double mean = 0, square = 0;
        for (long t = 0; t < taps; t++) {
            long i = g * s->stride_g + t * s->stride_t;
            double d = (double)load(image[i]) - load(image[g * s->stride_g]); /* to the filter's first */
            mean += moments[i] + pixels * d;
            square += moments[n + i] + 2 * d * moments[i] + pixels * d * d;
        }
        mean /= taps * pixels;
        double variance = square / (taps * pixels) - mean * mean;
        double inverse = 1 / sqrt((variance > 0 ? variance : 0) + eps);
        mean += load(image[g * s->stride_g]);
        for (long t = 0; t < taps; t++) {
            long i = g * s->stride_g + t * s->stride_t;
            scale[i] = load(gamma[i]) * inverse;
            bias[i] = load(beta[i]) - mean * load(gamma[i]) * inverse;
        }
    }
}

static inline void norm_filters(
        const Shape *s, const SCALAR *restrict logits, const float *restrict scale, const float *restrict bias,
        float *restrict filters) {
    long taps = s->kernel_size * s->kernel_size, n = taps * s->groups;
    float normed[n], *restrict out = s->stride_g == 1 ? filters : normed;
    for (long i = 0; i < n; i++) out[i] = load(logits[i]) * scale[i] + bias[i];
    if (s->stride_g != 1)
        for (long g = 0; g < s->groups; g++)
            for (long t = 0; t < taps; t++) filters[t * s->groups + g] = normed[g * taps + t];
}

static void affine_layer(
        const float *x, long inputs, long outputs, const SCALAR *weight, const SCALAR *bias, float *out) {
    for (long o = 0; o < outputs; o++) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < inputs; i++) sum += x[i] * load(weight[o * inputs + i]);
        out[o] = sum + load(bias[o]);
    }
}

typedef struct {
    const SCALAR *gamma, *beta;              /* group norm */
    double eps;
    const SCALAR *shift;                     /* batch norm behind the local convolution */
    const SCALAR *weight1, *bias1, *weight2, *bias2; /* fusion: C -> hidden -> C */
    long hidden;
} Parameters;

static void fuse_image(
        const Shape *s, const Parameters *p, const SCALAR *restrict value, const SCALAR *restrict logits,
        const SCALAR *restrict key, SCALAR *restrict out, int slices) {
    long taps = s->kernel_size * s->kernel_size, n = taps * s->groups, channels = s->channels;
    long pixels = s->height * s->width;
    const SCALAR *restrict shift = p->shift;
    double *moments = calloc(slices * (2 * n + channels), sizeof(double)), *sums = moments + slices * 2 * n;
    float scale[n], bias[n], pooled[channels], hidden[p->hidden], attn[channels];

#pragma omp parallel for num_threads(slices)
    for (int i = 0; i < slices; i++)
        add_moments(s, logits, n, i * s->height / slices, (i + 1) * s->height / slices, moments + i * 2 * n);
    for (long i = 2 * n; i < slices * 2 * n; i++) moments[i % (2 * n)] += moments[i];
    norm_affine(s, logits, moments, p->gamma, p->beta, p->eps, scale, bias);

#pragma omp parallel for num_threads(slices)
    for (int i = 0; i < slices; i++) {
        float filters[n], row_sum[channels], dynamic[channels];
        int tap[MAX_TAPS];
        long offset[MAX_TAPS];
        for (long h = i * s->height / slices; h < (i + 1) * s->height / slices; h++) {
            memset(row_sum, 0, sizeof(row_sum));
            for (long w = 0; w < s->width; w++) {
                long at = h * s->width + w;
                norm_filters(s, logits + at * n, scale, bias, filters);
                int count = valid_taps(s, h, w, tap, offset);
                local_conv_pixel(s, value + at * channels, filters, tap, offset, count, dynamic);
                for (long c = 0; c < channels; c++) {
                    float x = dynamic[c] + load(shift[c]);
                    x *= sigmoid(x);
                    row_sum[c] += x + load(key[at * channels + c]);
                    out[at * channels + c] = store(x);
                }
            }
            for (long c = 0; c < channels; c++) sums[i * channels + c] += row_sum[c];
        }
    }

    for (long c = 0; c < channels; c++) {
        double sum = 0;
        for (int i = 0; i < slices; i++) sum += sums[i * channels + c];
        pooled[c] = sum / pixels;
    }
    affine_layer(pooled, channels, p->hidden, p->weight1, p->bias1, hidden);
    for (long i = 0; i < p->hidden; i++) hidden[i] = hidden[i] < 0 ? 0 : hidden[i];
    affine_layer(hidden, p->hidden, channels, p->weight2, p->bias2, attn);
    for (long c = 0; c < channels; c++) attn[c] = sigmoid(attn[c]);

#pragma omp parallel for num_threads(slices)
    for (int i = 0; i < slices; i++) {
        for (long at = i * pixels / slices; at < (i + 1) * pixels / slices; at++) {
            for (long c = 0; c < channels; c++) {
                float dynamic = load(out[at * channels + c]);
                out[at * channels + c] = store(dynamic + attn[c] * (load(key[at * channels + c]) - dynamic));
            }
        }
    }
    free(moments);
}

/* All of a folded CoT layer behind its convolutions. */
void fuse_contexts(
        const Shape *s, const Parameters *p, const SCALAR *value, const SCALAR *logits, const SCALAR *key, SCALAR *out,
        int threads) {
    long pixels = s->height * s->width, n = s->groups * s->kernel_size * s->kernel_size;
    int slices = s->batch < threads ? threads : 1;
#define FUSE(b) fuse_image( \
        s, p, value + b * pixels * s->channels, logits + b * pixels * n, key + b * pixels * s->channels, \
        out + b * pixels * s->channels, slices)
    if (slices > 1) /* not within a parallel region: nested ones start new threads each time */
        for (long b = 0; b < s->batch; b++) FUSE(b);
    else {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
        for (long b = 0; b < s->batch; b++) FUSE(b);
    }
}

#ifndef BFLOAT16
/* Training: the same part of a CoT layer forward and backward, in passes over the images, as the norms of a batch need
   all of it first. Threads share the images; scratch has room for an image of each.

   Of a norm, scale and bias give what it puts out, x * scale + bias; x_scale and x_bias give that without its own
   weight. Those of the filters are (B, n), the others (C). Sums and moments are (B, 2, channels). */
typedef struct {
    float *scale, *bias, *x_scale, *x_bias;
} Norm;

typedef struct {
    const float *weight, *bias;
    float *running_mean, *running_var; /* of a batch norm */
    double eps, momentum;
} NormParameters;

/* The norms of values, filters and dynamic context, in one table of floats. */
typedef struct {
    Norm value, filters, dynamic;
} Norms;

static Norm norm_at(float *table, long size) {
    return (Norm){table, table + size, table + 2 * size, table + 3 * size};
}

static Norms norms_at(const Shape *s, float *table) {
    long n = s->groups * s->kernel_size * s->kernel_size;
    return (Norms){
        norm_at(table, s->channels), norm_at(table + 8 * s->channels, s->batch * n),
        norm_at(table + 4 * s->channels, s->channels)};
}

static void set_norm(const Norm *norm, long at, double mean, double inverse, double weight, double bias) {
    norm->x_scale[at] = inverse;
    norm->x_bias[at] = -mean * inverse;
    norm->scale[at] = inverse * weight;
    norm->bias[at] = bias - mean * inverse * weight;
}

/* From the moments of the images. */
static void set_batch_norm(const Shape *s, const double *moments, const NormParameters *p, const Norm *norm) {
    long n = s->channels;
    double pixels = s->height * s->width, count = s->batch * pixels;
    for (long c = 0; c < n; c++) {
        double mean = 0, square = 0;
        for (long b = 0; b < s->batch; b++) mean += moments[b * 2 * n + c] / s->batch;
        for (long b = 0; b < s->batch; b++) {
            double d = moments[b * 2 * n + c] - mean;
            square += moments[b * 2 * n + n + c] + pixels * d * d;
        }
        set_norm(norm, c, mean, 1 / sqrt(square / count + p->eps), p->weight[c], p->bias[c]);
        p->running_mean[c] += p->momentum * (mean - p->running_mean[c]);
        p->running_var[c] += p->momentum * (square / (count - 1) - p->running_var[c]);
    }
}

static void set_group_norm(const Shape *s, const double *moments, const NormParameters *p, const Norm *norm) {
    long taps = s->kernel_size * s->kernel_size, n = taps * s->groups;
    double pixels = s->height * s->width;
    for (long b = 0; b < s->batch; b++, moments += 2 * n)
        for (long first = 0; first < n; first += taps) {
            double mean = 0, square = 0;
            for (long i = first; i < first + taps; i++) mean += moments[i] / taps;
            for (long i = first; i < first + taps; i++) {
                double d = moments[i] - mean;
                square += moments[n + i] + pixels * d * d;
            }
            double inverse = 1 / sqrt(square / (taps * pixels) + p->eps);
            for (long i = first; i < first + taps; i++)
                set_norm(norm, b * n + i, mean, inverse, p->weight[i], p->bias[i]);
        }
}

/* Mean of each channel of each image, and its sum of squared differences to that mean. */
static void finish_moments(const Shape *s, const double *total, const float *pivot, long n, double *moments) {
    double pixels = s->height * s->width;
    for (long i = 0; i < n; i++) {
        double square = total[n + i] - total[i] * total[i] / pixels;
        moments[i] = pivot[i] + total[i] / pixels;
        moments[n + i] = square > 0 ? square : 0;
    }
}

static void image_moments(const Shape *s, const float *x, long n, double *moments, int threads) {
    long pixels = s->height * s->width;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long b = 0; b < s->batch; b++) {
        double *total = calloc(2 * n, sizeof(double));
        add_moments(s, x + b * pixels * n, n, 0, s->height, total);
        finish_moments(s, total, x + b * pixels * n, n, moments + b * 2 * n);
        free(total);
    }
}

static void normalize(
        const float *restrict x, long pixels, long n, const float *restrict scale, const float *restrict bias,
        float *restrict out) {
    for (long p = 0; p < pixels; p++)
        for (long c = 0; c < n; c++) out[p * n + c] = x[p * n + c] * scale[c] + bias[c];
}

/* Local convolution of the normalized values with the normalized filters, and (unless NULL) its moments. */
static void norm_local_conv(
        const Shape *s, const float *value, const Norm *value_norm, const float *logits, const Norm *filter_norm,
        float *scratch, float *out, double *moments, int threads) {
    long taps = s->kernel_size * s->kernel_size, n = taps * s->groups, channels = s->channels;
    long pixels = s->height * s->width;
#pragma omp parallel for num_threads(threads)
    for (int i = 0; i < threads; i++) for (long b = i; b < s->batch; b += threads) {
        float *normalized = scratch + i * pixels * channels, *image = out + b * pixels * channels;
        normalize(
            value + b * pixels * channels, pixels, channels, value_norm->scale, value_norm->bias, normalized);
        float filters[n];
        int tap[MAX_TAPS];
        long offset[MAX_TAPS];
        for (long p = 0; p < pixels; p++) {
            norm_filters(
                s, logits + (b * pixels + p) * n, filter_norm->scale + b * n, filter_norm->bias + b * n, filters);
            int count = valid_taps(s, p / s->width, p % s->width, tap, offset);
            local_conv_pixel(s, normalized + p * channels, filters, tap, offset, count, image + p * channels);
        }
        if (moments != NULL) {
            double *total = calloc(2 * channels, sizeof(double));
            add_moments(s, image, channels, 0, s->height, total);
            finish_moments(s, total, image, channels, moments + b * 2 * channels);
            free(total);
        }
    }
}

/* Mean over the pixels of silu(norm(x)) + key. */
static void pool(
        const Shape *s, const float *x, const Norm *norm, const float *key, float *pooled, int threads) {
    long channels = s->channels, pixels = s->height * s->width;
    const float *restrict scale = norm->scale, *restrict bias = norm->bias;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long b = 0; b < s->batch; b++) {
        double total[channels];
        memset(total, 0, sizeof(total));
        for (long h = 0; h < s->height; h++) {
            float sum[channels];
            memset(sum, 0, sizeof(sum));
            for (long w = 0; w < s->width; w++) {
                long at = (b * pixels + h * s->width + w) * channels;
                for (long c = 0; c < channels; c++) {
                    float z = x[at + c] * scale[c] + bias[c];
                    sum[c] += z * sigmoid(z) + key[at + c];
                }
            }
            for (long c = 0; c < channels; c++) total[c] += sum[c];
        }
        for (long c = 0; c < channels; c++) pooled[b * channels + c] = total[c] / pixels;
    }
}

/* Writes lerp(silu(norm(x)), key, attn) over x; attn is (B, C). */
void contexts_blend(
        const Shape *s, float *restrict x, float *table, const float *restrict key, const float *attn, int threads) {
    long channels = s->channels, pixels = s->height * s->width;
    Norm norm = norms_at(s, table).dynamic;
    const float *restrict scale = norm.scale, *restrict bias = norm.bias;
#pragma omp parallel for num_threads(threads)
    for (long p = 0; p < s->batch * pixels; p++) {
        const float *restrict a = attn + p / pixels * channels;
        for (long c = 0; c < channels; c++) {
            float z = x[p * channels + c] * scale[c] + bias[c];
            z *= sigmoid(z);
            x[p * channels + c] = z + a[c] * (key[p * channels + c] - z);
        }
    }
}

/* Gradient of attn, (B, C). */
static void attn_backward(
        const Shape *s, const float *restrict grad, const float *restrict x, const Norm *norm,
        const float *restrict key, float *grad_attn, int threads) {
    long channels = s->channels, pixels = s->height * s->width;
    const float *restrict scale = norm->scale, *restrict bias = norm->bias;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long b = 0; b < s->batch; b++) {
        double total[channels];
        memset(total, 0, sizeof(total));
        for (long h = 0; h < s->height; h++) {
            float sum[channels];
            memset(sum, 0, sizeof(sum));
            for (long w = 0; w < s->width; w++) {
                long at = (b * pixels + h * s->width + w) * channels;
                for (long c = 0; c < channels; c++) {
                    float z = x[at + c] * scale[c] + bias[c];
                    sum[c] += grad[at + c] * (key[at + c] - z * sigmoid(z));
                }
            }
            for (long c = 0; c < channels; c++) total[c] += sum[c];
        }
        for (long c = 0; c < channels; c++) grad_attn[b * channels + c] = total[c];
    }
}

/* Gradients of n channels of norm(x) at one pixel, from those of lerp(silu(norm(x)), key, attn) and of the pooling. */
static inline void act_backward(
        const float *restrict grad, const float *restrict x, const Norm *norm, const float *restrict attn,
        const float *restrict pool_grad, long n, float *restrict out) {
    const float *restrict scale = norm->scale, *restrict bias = norm->bias;
    for (long c = 0; c < n; c++) {
        float z = x[c] * scale[c] + bias[c], y = sigmoid(z);
        out[c] = (grad[c] * (1 - attn[c]) + pool_grad[c]) * y * (1 + z * (1 - y));
    }
}

/* Gradient of the key, and the sums of that of norm(x) and of its product with x without norm's weight. attn and
   pool_grad (of each pixel) are (B, C). */
static void blend_backward(
        const Shape *s, const float *restrict grad, const float *restrict x, const Norm *norm, const float *attn,
        const float *pool_grad, float *restrict grad_key, double *sums, int threads) {
    long channels = s->channels, pixels = s->height * s->width;
    const float *restrict x_scale = norm->x_scale, *restrict x_bias = norm->x_bias;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long b = 0; b < s->batch; b++) {
        const float *restrict a = attn + b * channels, *restrict pool = pool_grad + b * channels;
        double *total = sums + b * 2 * channels;
        memset(total, 0, 2 * channels * sizeof(double));
        for (long h = 0; h < s->height; h++) {
            float sum[channels], product[channels], grad_z[channels];
            memset(sum, 0, sizeof(sum));
            memset(product, 0, sizeof(product));
            for (long w = 0; w < s->width; w++) {
                long at = (b * pixels + h * s->width + w) * channels;
                act_backward(grad + at, x + at, norm, a, pool, channels, grad_z);
                for (long c = 0; c < channels; c++) {
                    grad_key[at + c] = grad[at + c] * a[c] + pool[c];
                    sum[c] += grad_z[c];
                    product[c] += grad_z[c] * (x[at + c] * x_scale[c] + x_bias[c]);
                }
            }
            for (long c = 0; c < channels; c++) {
                total[c] += sum[c];
                total[channels + c] += product[c];
            }
        }
    }
}

/* The gradient of a norm's input, by factors of each channel: grad * of_grad + x * of_x + rest. */
typedef struct {
    float *of_grad, *of_x, *rest;
} NormBackward;

/* These factors, from the means over all that is normed together of the weighted gradient, and of its product. */
static void set_norm_backward(
        const NormBackward *back, const Norm *norm, long at, double weight, double grad, double product) {
    double inverse = norm->x_scale[at];
    back->of_grad[at] = inverse * weight;
    back->of_x[at] = -inverse * product * inverse;
    back->rest[at] = -inverse * (grad + norm->x_bias[at] * product);
}

/* From the sums of the images; also the gradients of weight and bias. */
static void set_batch_norm_backward(
        const Shape *s, const double *sums, const float *weight, const Norm *norm, const NormBackward *back,
        float *grad_weight, float *grad_bias) {
    long n = s->channels;
    double count = (double)s->batch * s->height * s->width;
    for (long c = 0; c < n; c++) {
        double grad = 0, product = 0;
        for (long b = 0; b < s->batch; b++) {
            grad += sums[b * 2 * n + c];
            product += sums[b * 2 * n + n + c];
        }
        grad_weight[c] = product;
        grad_bias[c] = grad;
        set_norm_backward(back, norm, c, weight[c], weight[c] * grad / count, weight[c] * product / count);
    }
}

static void set_group_norm_backward(
        const Shape *s, const double *sums, const float *weight, const Norm *norm, const NormBackward *back,
        float *grad_weight, float *grad_bias) {
    long taps = s->kernel_size * s->kernel_size, n = taps * s->groups;
    double count = taps * s->height * s->width;
    memset(grad_weight, 0, n * sizeof(float));
    memset(grad_bias, 0, n * sizeof(float));
    for (long b = 0; b < s->batch; b++, sums += 2 * n)
        for (long first = 0; first < n; first += taps) {
            double grad = 0, product = 0;
            for (long i = first; i < first + taps; i++) {
                grad += weight[i] * sums[i] / count;
                product += weight[i] * sums[n + i] / count;
                grad_weight[i] += sums[n + i];
                grad_bias[i] += sums[i];
            }
            for (long i = first; i < first + taps; i++)
                set_norm_backward(back, norm, b * n + i, weight[i], grad, product);
        }
}

/* Sums of grad, and of its product with x without norm's weight. */
static void add_products(
        const Shape *s, const float *restrict grad, const float *restrict x, const Norm *norm, double *sums) {
    long channels = s->channels;
    const float *restrict x_scale = norm->x_scale, *restrict x_bias = norm->x_bias;
    memset(sums, 0, 2 * channels * sizeof(double));
    for (long h = 0; h < s->height; h++) {
        float sum[channels], product[channels];
        memset(sum, 0, sizeof(sum));
        memset(product, 0, sizeof(product));
        for (long at = h * s->width * channels; at < (h + 1) * s->width * channels; at += channels)
            for (long c = 0; c < channels; c++) {
                sum[c] += grad[at + c];
                product[c] += grad[at + c] * (x[at + c] * x_scale[c] + x_bias[c]);
            }
        for (long c = 0; c < channels; c++) {
            sums[c] += sum[c];
            sums[channels + c] += product[c];
        }
    }
}

/* Gradients of the normalized values and filters, and their sums as above. */
static void norm_local_conv_backward(
        const Shape *s, const float *grad, const float *x, const Norm *norm, const NormBackward *back,
        const float *attn, const float *pool_grad, const float *value, const Norm *value_norm, const float *logits,
        const Norm *filter_norm, float *scratch, float *grad_value, float *grad_logits, double *value_sums,
        double *filter_sums, int threads) {
    long taps = s->kernel_size * s->kernel_size, n = taps * s->groups, channels = s->channels;
    long pixels = s->height * s->width;
#pragma omp parallel for num_threads(threads)
    for (int i = 0; i < threads; i++) for (long b = i; b < s->batch; b += threads) {
        float *normalized = scratch + i * pixels * channels;
        const float *restrict of_grad = back->of_grad, *restrict of_x = back->of_x, *restrict rest = back->rest;
        const float *restrict x_scale = filter_norm->x_scale + b * n, *restrict x_bias = filter_norm->x_bias + b * n;
        normalize(value + b * pixels * channels, pixels, channels, value_norm->scale, value_norm->bias, normalized);
        memset(grad_value + b * pixels * channels, 0, pixels * channels * sizeof(float));
        float filters[n], grad_filters[n], grad_x[channels];
        int tap[MAX_TAPS];
        long offset[MAX_TAPS];
        double *total = filter_sums + b * 2 * n;
        memset(total, 0, 2 * n * sizeof(double));
        for (long h = 0; h < s->height; h++) {
            float sum[n], product[n];
            memset(sum, 0, sizeof(sum));
            memset(product, 0, sizeof(product));
            for (long w = 0; w < s->width; w++) {
                long p = h * s->width + w, at = b * pixels + p;
                act_backward(
                    grad + at * channels, x + at * channels, norm, attn + b * channels, pool_grad + b * channels,
                    channels, grad_x);
                for (long c = 0; c < channels; c++)
                    grad_x[c] = grad_x[c] * of_grad[c] + x[at * channels + c] * of_x[c] + rest[c];
                norm_filters(s, logits + at * n, filter_norm->scale + b * n, filter_norm->bias + b * n, filters);
                int count = valid_taps(s, h, w, tap, offset);
                memset(grad_filters, 0, sizeof(grad_filters));
                add_gradients(
                    s, grad_x, normalized + p * channels, filters, tap, offset, count, grad_value + at * channels,
                    grad_filters);
                float *restrict to = grad_logits + at * n;
                for (long t = 0; t < taps; t++)
                    for (long g = 0; g < s->groups; g++)
                        to[g * s->stride_g + t * s->stride_t] = grad_filters[t * s->groups + g];
                const float *restrict from = logits + at * n;
                for (long i = 0; i < n; i++) {
                    sum[i] += to[i];
                    product[i] += to[i] * (from[i] * x_scale[i] + x_bias[i]);
                }
            }
            for (long i = 0; i < n; i++) {
                total[i] += sum[i];
                total[n + i] += product[i];
            }
        }
        add_products(s, grad_value + b * pixels * channels, value + b * pixels * channels, value_norm,
                     value_sums + b * 2 * channels);
    }
}

/* Turns the gradient of what a norm puts out into that of its input, in place; factors are (n), or (B, n). */
static void norm_backward(
        const Shape *s, float *restrict grad, const float *restrict x, long n, const NormBackward *back,
        long of_each_image, int threads) {
    long pixels = s->height * s->width;
#pragma omp parallel for num_threads(threads)
    for (long p = 0; p < s->batch * pixels; p++) {
        long first = of_each_image ? p / pixels * n : 0;
        const float *restrict of_grad = back->of_grad + first, *restrict of_x = back->of_x + first;
        const float *restrict rest = back->rest + first;
        for (long i = 0; i < n; i++) grad[p * n + i] = grad[p * n + i] * of_grad[i] + x[p * n + i] * of_x[i] + rest[i];
    }
}

/* What lies behind the convolutions, up to the pooled contexts: out is the local convolution. */
void contexts_forward(
        const Shape *s, const float *value, const float *logits, const float *key, const NormParameters *of_value,
        const NormParameters *of_filters, const NormParameters *of_dynamic, float *table, float *scratch, float *out,
        float *pooled, int threads) {
    long n = s->groups * s->kernel_size * s->kernel_size, most = n > s->channels ? n : s->channels;
    Norms norms = norms_at(s, table);
    double *moments = malloc(s->batch * 2 * most * sizeof(double));
    image_moments(s, value, s->channels, moments, threads);
    set_batch_norm(s, moments, of_value, &norms.value);
    image_moments(s, logits, n, moments, threads);
    set_group_norm(s, moments, of_filters, &norms.filters);
    norm_local_conv(s, value, &norms.value, logits, &norms.filters, scratch, out, moments, threads);
    set_batch_norm(s, moments, of_dynamic, &norms.dynamic);
    pool(s, out, &norms.dynamic, key, pooled, threads);
    free(moments);
}

/* The local convolution once more, and the gradient of attn. */
void contexts_recompute(
        const Shape *s, const float *value, const float *logits, const float *key, float *table, const float *grad,
        float *scratch, float *x, float *grad_attn, int threads) {
    Norms norms = norms_at(s, table);
    norm_local_conv(s, value, &norms.value, logits, &norms.filters, scratch, x, NULL, threads);
    attn_backward(s, grad, x, &norms.dynamic, key, grad_attn, threads);
}

/* All other gradients; those of weights and biases of the norms in the order of `Norms`. */
void contexts_backward(
        const Shape *s, const float *value, const float *logits, float *table, const float *weight_of_value,
        const float *weight_of_filters, const float *weight_of_dynamic, const float *grad, const float *x,
        const float *attn, const float *pool_grad, float *scratch, float *grad_key, float *grad_value,
        float *grad_logits, float *grad_parameters, int threads) {
    long channels = s->channels, n = s->groups * s->kernel_size * s->kernel_size, size = s->batch * n;
    size = size > channels ? size : channels;
    Norms norms = norms_at(s, table);
    double *sums = malloc(s->batch * 2 * (channels + n) * sizeof(double));
    double *filter_sums = sums + s->batch * 2 * channels;
    float *factors = malloc(3 * size * sizeof(float)), *grads = grad_parameters;
    NormBackward back = {factors, factors + size, factors + 2 * size};

    blend_backward(s, grad, x, &norms.dynamic, attn, pool_grad, grad_key, sums, threads);
    set_batch_norm_backward(
        s, sums, weight_of_dynamic, &norms.dynamic, &back, grads + 2 * (channels + n), grads + 3 * channels + 2 * n);
    norm_local_conv_backward(
        s, grad, x, &norms.dynamic, &back, attn, pool_grad, value, &norms.value, logits, &norms.filters, scratch,
        grad_value, grad_logits, sums, filter_sums, threads);
    set_batch_norm_backward(s, sums, weight_of_value, &norms.value, &back, grads, grads + channels);
    norm_backward(s, grad_value, value, channels, &back, 0, threads);
    set_group_norm_backward(
        s, filter_sums, weight_of_filters, &norms.filters, &back, grads + 2 * channels, grads + 2 * channels + n);
    norm_backward(s, grad_logits, logits, n, &back, 1, threads);
    free(sums);
    free(factors);
}
#endif
