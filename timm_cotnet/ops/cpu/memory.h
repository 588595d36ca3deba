/* Memory that kernels work in: taken piece by piece, checked once, given back at once. Nothing that grows with the
number of channels lies on a thread's stack, whose size is the user's choice. */
#pragma once
#include <stdlib.h>

typedef struct Piece {
    struct Piece *next;
} Piece;

typedef struct {
    Piece *pieces;
    int failed; /* whether a piece is missing */
} Memory;

/* So many bytes from the beginning of a cache line on, as loads across two lines take twice the time; or NULL. */
static void *take_bytes(Memory *memory, size_t bytes) {
    Piece *piece = aligned_alloc(64, 64 + (bytes + 63) / 64 * 64);
    if (piece == NULL) {
        memory->failed = 1;
        return NULL;
    }
    piece->next = memory->pieces;
    memory->pieces = piece;
    return (char *)piece + 64;
}

static inline float *take_floats(Memory *memory, long count) { return take_bytes(memory, count * sizeof(float)); }

static inline double *take_doubles(Memory *memory, long count) { return take_bytes(memory, count * sizeof(double)); }

/* Declares `name`, an array of what the expression `make` gives for each thread, in memory of `memory`. */
#define TAKE_FOR_THREADS(type, name, make) \
    type *name = take_bytes(&memory, threads * sizeof(type)); \
    for (int thread = 0; thread < threads && name != NULL; thread++) name[thread] = make;

/* Frees all pieces. Whether one was missing: 0 or 1, which is what kernels return. */
static int release(Memory *memory) {
    while (memory->pieces != NULL) {
        Piece *next = memory->pieces->next;
        free(memory->pieces);
        memory->pieces = next;
    }
    return memory->failed;
}

/* The number of the thread that asks. */
#ifdef _OPENMP
int omp_get_thread_num(void);
static inline int this_thread(void) { return omp_get_thread_num(); }
#else
static inline int this_thread(void) { return 0; }
#endif
