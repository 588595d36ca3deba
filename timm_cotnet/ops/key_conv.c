/* Grouped 3x3 convolution (stride 1, padding 1) of channels-last floats on the CPU, and its gradients, by Winograd's
algorithm F(2x2, 3x3) (Lavin & Gray, arXiv:1509.09308). `key_conv.py` compiles this file and says what arguments are.

The output is cut into tiles of 2x2 pixels. A tile depends on 4x4 pixels d of the input. With three small matrices

           | 1  0 -1  0 |         |  1   0   0  |
    B^T =  | 0  1  1  0 |    G =  | 1/2 1/2 1/2 |    A^T =  | 1  1  1  0 |
           | 0 -1  1  0 |         | 1/2-1/2 1/2 |           | 0  1 -1 -1 |
           | 0  1  0 -1 |         |  0   0   1  |

a tile of the output for one input channel and one filter w is

    A^T ((G w G^T) * (B^T d B)) A                with * number by number: 16 products, where a direct sum takes 36.

Sums over input channels may be taken before the last step, so that each of the 16 positions becomes a product of two
matrices: (tiles x in) by (in x out). All that a thread needs for a block of tiles and a group stays in its cache:

    inputs     v: [16][tiles][in]      transform_input: B^T d B
    products   m: [16][tiles][out]     multiply
    outputs    :  2x2 pixels           transform_output: A^T m A, bias, ReLU

The input gradient is the same convolution, of the output gradient with filters that are transposed and turned by 180
degrees. The filter gradient is the transpose of the above, where matrices (in x tiles) by (tiles x out) are multiplied:
G^T ((B^T d B) * (A e A^T)) G for the output gradient e of a tile, summed over all tiles before the outer step.

Transformed filters are [group][16][in * out]. Their output channels are cut into panels, whose widths are those of the
multiplication: each is as wide as the rest allows, and is stored as [in][width]. A work item is

    a set of `together` groups, where a group has few channels, or a slab of a group's outputs, where it has many
    filters, for one of `parts` parts of all tiles, block after block.

Whatever an item reads again and again, above all its filters, thus stays in the cache. Channels of groups and slabs are
multiples of 4, blocks of tiles multiples of ROWS. */
#include <string.h>

#include "multiply.h"

#define PAD 16
#define CHUNK 16 /* input channels whose filters are transformed together: a line of the cache */
#define ROOM (CHUNK * 32) /* numbers: a chunk of the widest panel */

typedef struct {
    long batch, groups, in, out, height, width; /* in and out are channels of one group */
    long block, together, slab, parts;          /* tiles, groups, outputs of a group; see above */
} Shape;

/* Where filters are in memory: distances between groups, a group's outputs, inputs, rows and columns; any sign. */
typedef struct {
    long group, out, in, y, x;
} Strides;

/* The top left pixel of a tile of the output. */
typedef struct {
    long image, y, x;
} Tile;

static long count_tiles(const Shape *s) { return s->batch * ((s->height + 1) / 2) * ((s->width + 1) / 2); }

static Tile tile_at(const Shape *s, long index) {
    long rows = (s->height + 1) / 2, columns = (s->width + 1) / 2;
    return (Tile){index / (rows * columns), index / columns % rows * 2, index % columns * 2};
}

INLINE Tile next_tile(const Shape *s, Tile t) {
    t.x += 2;
    if (t.x >= s->width) t.x = 0, t.y += 2;
    if (t.y >= s->height) t.y = 0, t.image++;
    return t;
}

/* Pointers to size x size pixels of images with n channels, the first `margin` above and left of the tile; `outside`
   stands for pixels that do not exist. */
INLINE void find_pixels(
        const Shape *s, Tile t, int size, int margin, long n, const float *image, const float *outside,
        const float **pixels) {
    long first = (t.image * s->height + t.y - margin) * s->width + t.x - margin;
    for (int i = 0; i < size; i++)
        for (int j = 0; j < size; j++) {
            long y = t.y - margin + i, x = t.x - margin + j;
            int inside = (y >= 0) & (y < s->height) & (x >= 0) & (x < s->width);
            pixels[i * size + j] = inside ? image + (first + i * s->width + j) * n : outside;
        }
}

/* Transforms of one vector of channels. A 4x4 tile is d[0] ... d[15]; its rows and columns are transformed in turn. */
#define EACH_ROW(use) use(0, 1, 2, 3) use(4, 5, 6, 7) use(8, 9, 10, 11) use(12, 13, 14, 15)
#define EACH_COLUMN(use) use(0, 4, 8, 12) use(1, 5, 9, 13) use(2, 6, 10, 14) use(3, 7, 11, 15)
#define APPLY_B(i, j, k, l) /* B^T */ \
    second = d[j]; \
    d[i] -= d[k], d[j] += d[k], d[k] -= second, d[l] = second - d[l];
#define APPLY_A(i, j, k, l) /* A^T, into the first two */ \
    d[i] += d[j] + d[k]; \
    d[j] -= d[k] + d[l];
#define SPREAD_A(i, j, k, l) /* A, from the first two */ \
    d[k] = d[i] - d[j], d[l] = -d[j], d[j] += d[i];

#define DEFINE_TRANSFORMS(lanes) \
    INLINE void transform_input##lanes(const float **pixels, long c, float *v, long stride) { \
        typedef Floats##lanes V; \
        V d[16], second; \
        for (int i = 0; i < 16; i++) d[i] = AT(pixels[i] + c); \
        EACH_ROW(APPLY_B) \
        EACH_COLUMN(APPLY_B) \
        for (int i = 0; i < 16; i++) AT(v + i * stride + c) = d[i]; \
    } \
    INLINE void transform_output##lanes( \
            const float *m, long stride, long c, const float *bias, int relu, float **pixels) { \
        typedef Floats##lanes V; \
        V d[16], sum = {0}; \
        for (int i = 0; i < 16; i++) d[i] = AT(m + i * stride + c); \
        EACH_COLUMN(APPLY_A) \
        APPLY_A(0, 1, 2, 3) \
        APPLY_A(4, 5, 6, 7) \
        if (bias) sum = AT(bias + c); \
        for (int i = 0; i < 4; i++) { \
            V y = d[i / 2 * 4 + i % 2] + sum; \
            if (relu) y = (V)((Ints##lanes)y & ~(y < 0.0f)); /* a NaN stays one */ \
            AT(pixels[i] + c) = y; \
        } \
    } \
    INLINE void transform_gradient##lanes(const float **pixels, long c, float *m, long stride) { \
        typedef Floats##lanes V; \
        V d[16]; \
        for (int i = 0; i < 4; i++) d[i / 2 * 4 + i % 2] = AT(pixels[i] + c); \
        SPREAD_A(0, 1, 2, 3) \
        SPREAD_A(4, 5, 6, 7) \
        EACH_COLUMN(SPREAD_A) \
        for (int i = 0; i < 16; i++) AT(m + i * stride + c) = d[i]; \
    }
EACH_LANES(DEFINE_TRANSFORMS)

/* v = B^T d B of a tile, for n channels from x on. */
static void transform_input(
        const Shape *s, Tile tile, const float *x, long n, const float *zeros, float *v, long v_step) {
    const float *pixels[16];
    long c = 0;
    find_pixels(s, tile, 4, 1, s->groups * s->in, x, zeros, pixels);
#define INPUT(lanes) for (; c + lanes <= n; c += lanes) transform_input##lanes(pixels, c, v, v_step);
    EACH_LANES(INPUT)
}

/* The tile's output = A^T m A + bias, with ReLU or without, for n channels from out on. */
static void transform_output(
        const Shape *s, Tile tile, const float *m, long m_step, long n, const float *bias, int relu, float *discarded,
        float *out) {
    float *pixels[4];
    long c = 0;
    find_pixels(s, tile, 2, 0, s->groups * s->out, out, discarded, (const float **)pixels);
#define OUTPUT(lanes) for (; c + lanes <= n; c += lanes) transform_output##lanes(m, m_step, c, bias, relu, pixels);
    EACH_LANES(OUTPUT)
}

/* m = A e A^T of the tile's output gradient e, for n channels from grad on. */
static void transform_gradient(
        const Shape *s, Tile tile, const float *grad, long n, const float *zeros, float *m, long m_step) {
    const float *pixels[4];
    long c = 0;
    find_pixels(s, tile, 2, 0, s->groups * s->out, grad, zeros, pixels);
#define GRADIENT(lanes) for (; c + lanes <= n; c += lanes) transform_gradient##lanes(pixels, c, m, m_step);
    EACH_LANES(GRADIENT)
}

/* A work item. Rows and steps are distances in v and m: between tiles, and between the 16 positions. */
typedef struct {
    long group, first, outs; /* the first group, and which of its outputs */
    long begin, end;         /* tiles */
    long v_row, v_step, m_row, m_step;
} Item;

static long count_items(const Shape *s) {
    return s->groups / s->together * ((s->out + s->slab - 1) / s->slab) * s->parts;
}

/* Items of the same filters follow each other. */
static Item item_at(const Shape *s, long index) {
    long tiles = count_tiles(s), slabs = (s->out + s->slab - 1) / s->slab, part = index % s->parts;
    Item item = {.group = index / s->parts / slabs * s->together, .first = index / s->parts % slabs * s->slab};
    item.outs = s->out - item.first < s->slab ? s->out - item.first : s->slab;
    item.begin = tiles * part / s->parts, item.end = tiles * (part + 1) / s->parts;
    item.v_row = s->together * s->in, item.v_step = s->block * item.v_row + PAD;
    item.m_row = s->together * item.outs, item.m_step = s->block * item.m_row + PAD;
    return item;
}

/* A thread's own memory. */
typedef struct {
    float *v, *m, *filters, *zeros, *discarded;
} Scratch;

static Scratch scratch_of(const Shape *s, float *scratch, int thread) {
    long in = s->together * s->in, out = s->together * s->slab;
    long v = 16 * (s->block * in + PAD), m = 16 * (s->block * out + PAD), filters = 16 * s->in * out, zeros = in + out;
    scratch += thread * (v + m + filters + zeros + out);
    Scratch own = {.v = scratch, .m = scratch + v, .filters = scratch + v + m};
    own.zeros = own.filters + filters, own.discarded = own.zeros + zeros;
    memset(own.zeros, 0, zeros * sizeof(float));
    return own;
}

/* m = v * filters for n tiles, and for what is there beyond them up to a multiple of ROWS. */
static void multiply_filters(
        const Shape *s, const Item *item, long n, const float *v, const float *filters, float *m) {
    long in = s->in, v_row = item->v_row, m_row = item->m_row;
    for (long i = 0; i < s->together * 16; i++, filters += in * item->outs) {
        const float *from = v + i % 16 * item->v_step + i / 16 * in;
        float *to = m + i % 16 * item->m_step + i / 16 * item->outs;
        long o = 0;
#define PANELS(width, lanes) \
    for (; o + width <= item->outs; o += width) \
        for (long t = 0; t < n; t += ROWS) \
            multiply##width( \
                ROWS, 0, in, from + t * v_row, v_row, 1, filters + o * in, width, to + t * m_row + o, m_row);
        EACH_PANEL(PANELS)
    }
}

/* products = v^T * m, or += with `add`, for n tiles, in the layout of transformed filters. */
static void multiply_transposed(
        const Shape *s, const Item *item, long n, const float *v, const float *m, int add, float *products) {
    long in = s->in, v_row = item->v_row, m_row = item->m_row;
    for (long i = 0; i < s->together * 16; i++, products += in * item->outs) {
        const float *left = v + i % 16 * item->v_step + i / 16 * in;
        const float *right = m + i % 16 * item->m_step + i / 16 * item->outs;
        long o = 0;
#define ROWS_OF_PANEL(width, rows, add) \
    for (; r + rows <= in; r += rows) \
        multiply##width(rows, add, n, left + r, 1, v_row, right + o, m_row, products + o * in + r * width, width);
#define PANELS_TRANSPOSED(width, lanes) \
    for (; o + width <= item->outs; o += width) { \
        long r = 0; \
        if (add) { ROWS_OF_PANEL(width, 8, 1) ROWS_OF_PANEL(width, 4, 1) } \
        else { ROWS_OF_PANEL(width, 8, 0) ROWS_OF_PANEL(width, 4, 0) } \
    }
        EACH_PANEL(PANELS_TRANSPOSED)
    }
}

static long panel_width(long outputs) {
#define WIDTH_IF_IT_FITS(width, lanes) \
    if (outputs >= width) return width;
    EACH_PANEL(WIDTH_IF_IT_FITS)
    return 0;
}

/* G times a column (a, b, c), for n channels: four numbers, each `step` behind the one before. */
INLINE void apply_g(const float *a, const float *b, const float *c, float *out, long step, long n) {
#pragma omp simd
    for (long l = 0; l < n; l++) {
        float outer = (a[l] + c[l]) / 2, half = b[l] / 2;
        out[l] = a[l];
        out[step + l] = outer + half;
        out[2 * step + l] = outer - half;
        out[3 * step + l] = c[l];
    }
}

/* G^T times a column of four numbers, for n channels: three numbers. Each has a room of its own; steps are in rooms. */
INLINE void apply_g_transposed(const float *in, long in_step, float *out, long step, long n) {
    in_step *= ROOM, step *= ROOM;
#pragma omp simd
    for (long l = 0; l < n; l++) {
        float b = in[in_step + l] / 2, c = in[2 * in_step + l] / 2;
        out[l] = in[l] + (b + c);
        out[step + l] = b - c;
        out[2 * step + l] = (b + c) + in[3 * in_step + l];
    }
}

/* filters = G w G^T for `outs` outputs of a group and up to CHUNK of its inputs, from input i on. */
static void transform_filters(
        const Shape *s, const float *weight, const Strides *by, long outs, long i, float *filters) {
    float w[9][ROOM], rows[12][ROOM]; /* a room is [in][width] */
    long n = s->in - i < CHUNK ? s->in - i : CHUNK, size = s->in * outs;
    for (long o = 0, width; o < outs; o += width) {
        const float *from = weight + o * by->out + i * by->in;
        width = panel_width(outs - o);
        float *to = filters + o * s->in + i * width;
        for (int tap = 0; tap < 9; tap++)
            for (long k = 0; k < n; k++)
                for (long l = 0; l < width; l++)
                    w[tap][k * width + l] = from[k * by->in + l * by->out + tap / 3 * by->y + tap % 3 * by->x];
        for (int x = 0; x < 3; x++) apply_g(w[x], w[3 + x], w[6 + x], rows[x], 3 * ROOM, n * width);
        for (int y = 0; y < 4; y++)
            apply_g(rows[3 * y], rows[3 * y + 1], rows[3 * y + 2], to + 4 * y * size, size, n * width);
    }
}

/* The gradient of an item's filters = G^T p G for the sum p of its `parts` products, which are `size` numbers apart. */
static void transform_products(
        const Shape *s, const Item *item, const float *products, long parts, long size, const Strides *by,
        float *grad_weight) {
    float sum[16][ROOM], rows[12][ROOM], w[9][ROOM];
    for (long g = 0; g < s->together; g++, products += 16 * s->in * item->outs) {
        for (long o = 0, width; o < item->outs; o += width) {
            width = panel_width(item->outs - o);
            for (long i = 0, n; i < s->in; i += n) {
                float *to = grad_weight + (item->group + g) * by->group + (item->first + o) * by->out + i * by->in;
                n = s->in - i < CHUNK ? s->in - i : CHUNK;
                for (int position = 0; position < 16; position++) {
                    const float *from = products + position * s->in * item->outs + o * s->in + i * width;
                    memcpy(sum[position], from, n * width * sizeof(float));
                    for (long part = 1; part < parts; part++)
                        for (long l = 0; l < n * width; l++) sum[position][l] += from[part * size + l];
                }
                for (int y = 0; y < 4; y++) apply_g_transposed(sum[4 * y], 1, rows[3 * y], 1, n * width);
                for (int x = 0; x < 3; x++) apply_g_transposed(rows[x], 3, w[x], 3, n * width);
                for (int tap = 0; tap < 9; tap++)
                    for (long k = 0; k < n; k++)
                        for (long l = 0; l < width; l++)
                            to[k * by->in + l * by->out + tap / 3 * by->y + tap % 3 * by->x] = w[tap][k * width + l];
            }
        }
    }
}

/* All transformed filters, from filters with strides. */
void key_conv_filters(const Shape *s, const float *weight, const Strides *by, float *filters, int threads) {
    long chunks = (s->in + CHUNK - 1) / CHUNK;
#pragma omp parallel for num_threads(threads)
    for (long i = 0; i < s->groups * chunks; i++) {
        long g = i / chunks;
        transform_filters(
            s, weight + g * by->group, by, s->out, i % chunks * CHUNK, filters + g * 16 * s->in * s->out);
    }
}

/* out = act(conv(x) + bias); bias, (groups * out), may be NULL. Either weight, which has strides, or filters is NULL:
   they are transformed already, for slabs of all outputs. */
void key_conv(
        const Shape *s, const float *x, const float *filters, const float *weight, const Strides *by, const float *bias,
        int relu, float *out, float *scratch, int threads) {
    long items = count_items(s);
#pragma omp parallel for num_threads(threads)
    for (int thread = 0; thread < threads; thread++) {
        Scratch own = scratch_of(s, scratch, thread);
        long first_item = items * thread / threads;
        for (long i = first_item; i < items * (thread + 1) / threads; i++) {
            Item item = item_at(s, i);
            long first_output = item.group * s->out + item.first;
            const float *prepared = own.filters, *shift = bias ? bias + first_output : NULL;
            long size = 16 * s->in * item.outs;
            if (filters)
                prepared = filters + item.group * size;
            else if (i == first_item || i % s->parts == 0)
                for (long g = 0; g < s->together; g++)
                    for (long c = 0; c < s->in; c += CHUNK)
                        transform_filters(
                            s, weight + (item.group + g) * by->group + item.first * by->out, by, item.outs, c,
                            own.filters + g * size);
            Tile next = tile_at(s, item.begin);
            for (long first = item.begin; first < item.end; first += s->block) {
                long n = item.end - first < s->block ? item.end - first : s->block;
                Tile tile = next;
                for (long t = 0; t < n; t++, next = next_tile(s, next))
                    transform_input(
                        s, next, x + item.group * s->in, item.v_row, own.zeros, own.v + t * item.v_row, item.v_step);
                multiply_filters(s, &item, n, own.v, prepared, own.m);
                for (long t = 0; t < n; t++, tile = next_tile(s, tile))
                    transform_output(
                        s, tile, own.m + t * item.m_row, item.m_step, item.m_row, shift, relu, own.discarded,
                        out + first_output);
            }
        }
    }
}

/* The gradient of filters with strides, from x and the output gradient. products is room for the filters of as many
   items as there are threads, or with several parts as there are items: parts are summed in order in the end. */
void key_conv_filter_gradient(
        const Shape *s, const float *x, const float *grad, const Strides *by, float *grad_weight, float *products,
        float *scratch, int threads) {
    long items = count_items(s), size = s->together * 16 * s->in * s->slab;
#pragma omp parallel for num_threads(threads)
    for (int thread = 0; thread < threads; thread++) {
        Scratch own = scratch_of(s, scratch, thread);
        for (long i = items * thread / threads; i < items * (thread + 1) / threads; i++) {
            Item item = item_at(s, i);
            float *sums = products + (s->parts == 1 ? thread : i) * size;
            Tile tile = tile_at(s, item.begin);
            for (long first = item.begin; first < item.end; first += s->block) {
                long n = item.end - first < s->block ? item.end - first : s->block;
                for (long t = 0; t < n; t++, tile = next_tile(s, tile)) {
                    transform_input(
                        s, tile, x + item.group * s->in, item.v_row, own.zeros, own.v + t * item.v_row, item.v_step);
                    transform_gradient(
                        s, tile, grad + item.group * s->out + item.first, item.m_row, own.zeros, own.m + t * item.m_row,
                        item.m_step);
                }
                multiply_transposed(s, &item, n, own.v, own.m, first > item.begin, sums);
            }
            if (s->parts == 1) transform_products(s, &item, sums, 1, size, by, grad_weight);
        }
    }
    if (s->parts > 1) {
#pragma omp parallel for num_threads(threads)
        for (long i = 0; i < items; i += s->parts) {
            Item item = item_at(s, i);
            transform_products(s, &item, products + i * size, s->parts, size, by, grad_weight);
        }
    }
}
