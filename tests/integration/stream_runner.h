/*
 * stream_runner.h: a runner for tests of steps whose tensors are in a GPU's memory: in this
 * process, on a GPU, or on what fake_cuda.c makes of one, where kernels are played by the host.
 * What is answered is held against the same steps on the CPU, from the host's memory.
 */
#ifndef ATTN_STREAM_RUNNER_H
#define ATTN_STREAM_RUNNER_H

#include "base/clock.h"
#include "client/attn.h"
#include "kernels/cuda/driver.h"

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

#define OK(call) assert_ok_or_tell(call, __LINE__)
#define CU(call) assert_int_equal(cu->call, CUDA_SUCCESS)
#define LAYERS 2u
#define Q_HEADS 4u
#define KV_HEADS 2u
#define DIM 64u
#define ROW_Q (Q_HEADS * DIM)
#define ROW_KV (KV_HEADS * DIM)
#define ROW                                                                                        \
    (ROW_Q + 2 * ROW_KV) /* q, k and v of a token side by side, as a projection leaves them */
#define ROWS_MAX 64u

extern const cuda_driver_t *cu;

/** What the fake driver has for tests; NULL: the driver is a real one. */
typedef struct fake {
    void (*hold)(CUstream stream, int held);
    void (*hold_all)(int held);
    void (*idle)(int now);
    void (*spoil)(const char *call, CUresult with, int n);
    int (*count)(const char *call);
    int (*alive)(int *contexts);
} fake_t;

extern fake_t fake;

/** The same steps on two sides: the GPU, and the CPU to compare with. */
typedef struct runner {
    attn_client_t *gpu, *cpu;
    attn_cache_t *on_gpu, *on_cpu;
    CUstream stream;
    CUdeviceptr rows[LAYERS], o[LAYERS], lse[LAYERS];
    _Float16 host[LAYERS][ROWS_MAX * ROW];
    float cpu_o[LAYERS][ROWS_MAX * ROW_Q], cpu_lse[LAYERS][ROWS_MAX * Q_HEADS];
} runner_t;

typedef struct sequence {
    attn_seq_t gpu, cpu;
    uint64_t length;
} sequence_t;

/** The tensors of a layer: views of rows. o is packed. */
typedef struct views {
    attn_tensor_t q, k, v, o;
} views_t;

/** Open the driver, and make GPU 0's context this thread's. 0, or the exit code of a test that is
 * skipped. */
int runner_driver(void);

void assert_ok_or_tell(attn_status_t status, int line);
void assert_says(attn_status_t status, attn_status_t expected, const char *words);

/** A cache as those of a runner. */
void runner_open_cache(attn_client_t *client, uint32_t page_size, attn_cache_t **cache_p);

runner_t *runner_open(uint32_t page_size);
void runner_close(runner_t *r);
sequence_t sequence_new(runner_t *r);

/** Numbers for n rows of each layer, to be uploaded by send(). */
void draw(runner_t *r, uint32_t n);
void send(runner_t *r);

views_t views_of(void *rows, void *o, attn_memory_t memory);
views_t gpu_views(const runner_t *r, uint32_t l);

attn_status_t begin_with(attn_cache_t *cache, attn_seq_t seq, uint64_t base, uint32_t n_q,
                         uint32_t n, attn_memory_t memory, uint32_t timeout_ms,
                         attn_step_t **step_p);
attn_step_t *begin(runner_t *r, const sequence_t *s, uint32_t n);
attn_status_t enqueue(runner_t *r, attn_step_t *step, uint32_t l, CUstream stream);
void enqueue_all(runner_t *r, attn_step_t *step, CUstream stream);

/** A graph of all layers of the step. */
CUgraphExec capture(runner_t *r, attn_step_t *step);

/** The step of these rows on the CPU; what was answered on the GPU is that. */
void compare(runner_t *r, sequence_t *s, uint32_t n);

/** A prompt that nothing is asked of. */
void prompt(runner_t *r, sequence_t *s, uint32_t n);

/** Until the sequence has no step any more. */
void await_free(runner_t *r, const sequence_t *s);

/** Everything was given back, and the thread's context is what it was. */
void assert_nothing_is_left(void);

#endif
