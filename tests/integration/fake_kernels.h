/* fake_kernels.h: the kernels that fake_cuda.c plays, by name. */
#ifndef ATTN_FAKE_KERNELS_H
#define ATTN_FAKE_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#define FAKE_ARGS_MAX 512u /* bytes of an argument */

/** A kernel of the embedded files. */
typedef struct fake_kernel {
    const char *name;
    size_t bytes[2]; /**< of its arguments, by value */
    void (*play)(const struct fake_kernel *kernel, uint32_t grid, void *const *args);
} fake_kernel_t;

/** The kernel of that name; one without arguments that does nothing, if it is none of ours. */
const fake_kernel_t *fake_kernel_find(const char *name);

#endif
