/* fake_kernels.h: the kernels that fake_cuda.c plays, by name. */
#ifndef ATTN_FAKE_KERNELS_H
#define ATTN_FAKE_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FAKE_ARGS_MAX 512u /* bytes of an argument */

/** A kernel of the embedded files. */
typedef struct fake_kernel {
    const char *name;
    size_t bytes[2]; /**< of its arguments, by value */
    void (*play)(const struct fake_kernel *kernel, uint32_t grid, void *const *args);
    /** NULL, or may it be played? Asked again and again from begun_ns on: what it does meanwhile
     * for others, which may wait for it as well, comes to the same if it does it again. */
    bool (*ready)(uint64_t begun_ns, void *const *args);
} fake_kernel_t;

/** exchange.cu: fake_exchange.c. */
bool fake_exchange_ready(uint64_t begun_ns, void *const *args);
void fake_exchange_play(const fake_kernel_t *kernel, uint32_t grid, void *const *args);

/** drive.cu: fake_drive.c. */
bool fake_ask_ready(uint64_t begun_ns, void *const *args);
void fake_ask_play(const fake_kernel_t *kernel, uint32_t grid, void *const *args);
bool fake_take_ready(uint64_t begun_ns, void *const *args);
void fake_take_play(const fake_kernel_t *kernel, uint32_t grid, void *const *args);
void fake_answer_play(const fake_kernel_t *kernel, uint32_t grid, void *const *args);

/** Elements are those whose exponents are these: of what is attended to next. */
void fake_kernels_are_of(uint32_t exponent);

/** The kernel of that name; one without arguments that does nothing, if it is none of ours. */
const fake_kernel_t *fake_kernel_find(const char *name);

#endif
