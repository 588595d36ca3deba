/* Launches of recorded kernels, one after the other: `launch.py` says which. */
#include <stdint.h>

enum { MOST_ARGUMENTS = 64 };

/* A kernel as the CUDA driver launches it, followed by its arguments. */
struct launch {
    int64_t function, grid, threads, shared, arguments;
};

/* begins[base] + number, or number where base is negative. */
struct argument {
    int64_t base, number;
};

typedef int start_kernel(
    void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
    unsigned block_z, unsigned shared, void *stream, void **arguments, void **extra); /* cuLaunchKernel */

/* The driver's error code, which ends it: below zero where something was launched before. */
int launch_kernels(start_kernel *start, const int64_t *launches, const int64_t *begins, void *stream, int count)
{
    for (int i = 0; i < count; i++) {
        const struct launch *launch = (const struct launch *)launches;
        const struct argument *argument = (const struct argument *)(launch + 1);
        /* eight bytes each, of which the driver reads what the kernel has; behind them zeros: pointers to memory for
           the kernel to work in, of which none is needed */
        int64_t values[MOST_ARGUMENTS] = {0};
        void *addresses[MOST_ARGUMENTS];
        for (int k = 0; k < MOST_ARGUMENTS; k++) {
            if (k < launch->arguments)
                values[k] = argument[k].number + (argument[k].base < 0 ? 0 : begins[argument[k].base]);
            addresses[k] = values + k;
        }
        int code = start(
            (void *)launch->function, (unsigned)launch->grid, 1, 1, (unsigned)launch->threads, 1, 1,
            (unsigned)launch->shared, stream, addresses, 0);
        if (code != 0)
            return i == 0 ? code : -code;
        launches = (const int64_t *)(argument + launch->arguments);
    }
    return 0;
}
