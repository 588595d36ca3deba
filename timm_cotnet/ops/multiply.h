/* Products of small matrices of floats, with vectors of whatever length the processor has; constants of the calls make
the loops simple. */

#define ROWS 8 /* of a matrix, which are multiplied together */
#define INLINE static inline __attribute__((always_inline))

/* The panels' widths and their vectors: sums of ROWS rows of the widest panel must fit in the registers. */
#if defined(__AVX512F__)
#define EACH_PANEL(use) use(32, 16) use(16, 16) use(8, 8) use(4, 4)
#define EACH_LANES(use) use(16) use(8) use(4)
#elif defined(__AVX__)
#define EACH_PANEL(use) use(8, 8) use(4, 4)
#define EACH_LANES(use) use(8) use(4)
#else
#define EACH_PANEL(use) use(8, 4) use(4, 4)
#define EACH_LANES(use) use(4)
#endif

/* Numbers that the processor works on at once, as far as the compiler was told. */
int vector_lanes(void) {
#if defined(__AVX512F__)
    return 16;
#elif defined(__AVX__)
    return 8;
#elif defined(__SSE__) || defined(__ARM_NEON) || defined(__VSX__)
    return 4;
#else
    return 1;
#endif
}

/* Vectors of GCC and Clang, at any address of floats. In what follows V is the one at hand, AT(p) the one at p. */
#define DEFINE_VECTOR(lanes) \
    typedef float Floats##lanes __attribute__((vector_size(4 * lanes), aligned(4), may_alias)); \
    typedef int Ints##lanes __attribute__((vector_size(4 * lanes), aligned(4), may_alias));
EACH_LANES(DEFINE_VECTOR)
#define AT(p) (*(V *)(p))

/* c[r * c_row + l] = sum over k < depth of x[r * x_row + k * x_step] * w[k * w_step + l], for r < rows, 1, 4 or 8,
   and l < width; with `add` it is added to what is there. Sums have names, as compilers may keep arrays in memory. */
#define EACH_OF_ROWS(use) \
    use(0) \
    if (rows >= 4) { use(1) use(2) use(3) } \
    if (rows == 8) { use(4) use(5) use(6) use(7) }
#define START(r) left##r = AT(c + r * c_row), right##r = AT(c + r * c_row + second);
#define STEP(r) left##r += (r < 4 ? x : x4)[r % 4 * x_row] * w0, right##r += (r < 4 ? x : x4)[r % 4 * x_row] * w1;
#define FINISH(r) AT(c + r * c_row) = left##r, AT(c + r * c_row + second) = right##r;
#define DEFINE_MULTIPLY(width, lanes) \
    INLINE void multiply##width( \
            int rows, int add, long depth, const float *x, long x_row, long x_step, const float *w, long w_step, \
            float *c, long c_row) { \
        typedef Floats##lanes V; \
        enum { second = width - lanes }; /* where the second vector is; if there is but one, it is that */ \
        V left0 = {0}, left1 = {0}, left2 = {0}, left3 = {0}, left4 = {0}, left5 = {0}, left6 = {0}, left7 = {0}; \
        V right0 = left0, right1 = left0, right2 = left0, right3 = left0; \
        V right4 = left0, right5 = left0, right6 = left0, right7 = left0; \
        if (add) { EACH_OF_ROWS(START) } \
        const float *x4 = x + 4 * x_row; /* so that a few registers hold all distances */ \
        for (long k = 0; k < depth; k++, x += x_step, x4 += x_step, w += w_step) { \
            V w0 = AT(w), w1 = AT(w + second); \
            EACH_OF_ROWS(STEP) \
        } \
        EACH_OF_ROWS(FINISH) \
    }
EACH_PANEL(DEFINE_MULTIPLY)
