/*
 * memory.h: tensors of callers that lie in a GPU's memory, in any build and on any machine. The
 * driver is only looked for among what the process has opened already: without it no pointer can be
 * of a GPU, and no machine needs it. What is copied goes by streams that wait for no others, and no
 * call here breaks off a capture, whoever captures what.
 */
#ifndef ATTN_KERNELS_MEMORY_H
#define ATTN_KERNELS_MEMORY_H

#include "base/attn_types.h"

/** Has the process opened the driver, so that there may be pointers to GPU memory? Any thread. */
bool attn_memory_has_cuda(void);

/** The GPU in whose memory it lies; -1: none, or it is not known. Any thread. */
int attn_memory_gpu(const void *at);

#define ATTN_UUID 16u

/** Which GPU it is, of all there are: the same for all processes, whatever their numbers. Any
 * thread.
 * @return as attn_copies_open() */
attn_status_t attn_memory_uuid(int gpu, uint8_t uuid[ATTN_UUID]);

/** Rows of a tensor; strides in bytes. */
typedef struct attn_strided {
    uint8_t *at;
    uint64_t rows, row_stride;
    uint64_t heads, head_stride, head_bytes;
} attn_strided_t;

/** Where its rows lie side by side. */
typedef struct attn_packed {
    uint8_t *at;
    bool on_gpu; /**< mapped there (attn_shared_map()); else pinned memory of the host */
} attn_packed_t;

/** Copies between tensors in a GPU's memory and packed ones, on a stream of their own. Calls for
 * one are made one at a time, by any thread. */
typedef struct attn_copies attn_copies_t;

/** @return ATTN_ERR_UNSUPPORTED  the process has opened no driver
 *  @return ATTN_ERR_INTERNAL     the driver failed; the sentence names the call; likewise below */
attn_status_t attn_copies_open(int gpu, attn_copies_t **copies_p);

/** After attn_copies_wait() with ATTN_OK. NULL is allowed. */
void attn_copies_close(attn_copies_t *copies);

/** Queue rows of a tensor in the GPU's memory to packed ones, and back. Nothing waits: both sides
 * are the copy's until attn_copies_wait() is ATTN_OK. */
attn_status_t attn_copies_fetch(attn_copies_t *copies, const attn_strided_t *from,
                                const attn_packed_t *to);
attn_status_t attn_copies_send(attn_copies_t *copies, const attn_packed_t *from,
                               const attn_strided_t *to);

/** Have all that were queued ended? Waits until until_ns; 0 looks. @return ATTN_ERR_DEADLINE no */
attn_status_t attn_copies_wait(attn_copies_t *copies, uint64_t until_ns);

/** Pinned memory of the host, or NULL. */
void *attn_memory_pin(int gpu, uint64_t bytes);
void attn_memory_unpin(int gpu, void *pinned);

/* ---- calls of the driver that may wait for a GPU ---- */

/** Something that a thread of the GPU's does, in the order in which it was added: nobody else waits
 * where a device stands still. A member of what it works on, so that adding needs no memory. */
typedef struct attn_errand attn_errand_t;
struct attn_errand {
    void (*run)(attn_errand_t *errand); /**< may free what it is a member of */
    attn_errand_t *next;
};

/** Any thread. Where no thread can be had the caller does it, right here. */
void attn_errand_add(int gpu, attn_errand_t *errand);

/** Wait until there are none to do in this process, for any GPU. Not from an errand.
 * @return false: not by until_ns */
bool attn_errands_settle(uint64_t until_ns);

/* ---- memory of a GPU that two processes of a host have ---- */

#define ATTN_SHARED_KEY 64u /* bytes of what a process is told to map it by */

/**
 * Memory of a GPU that this process took for others to map, or has mapped. What the driver's rules
 * leave open is settled so: it is the taker's in whole pieces of 2 MiB, for the driver lends pieces
 * of that size whatever was asked; it is zeroed; and it begins with a card, by which who maps it
 * knows that it is what was meant, and not what came to lie there since. Who maps it may keep it
 * for longer than its taker: the driver keeps the memory itself for as long as anybody has it.
 */
typedef struct attn_shared attn_shared_t;

/** Waits for the GPU, however long: for errands.
 * @return ATTN_ERR_NO_MEMORY
 * @return ATTN_ERR_UNSUPPORTED  the driver does not lend memory of this GPU */
attn_status_t attn_shared_create(int gpu, uint64_t bytes, const void *card, uint64_t card_bytes,
                                 attn_shared_t **shared_p);

/** Another process' memory, for this GPU: its own, or one that can reach it. That is an errand: it
 * is nothing to work with before attn_shared_check() was ATTN_OK.
 * @param key  as that process told: it may be anything
 * @return ATTN_ERR_NO_MEMORY; ATTN_ERR_UNSUPPORTED  the driver cannot */
attn_status_t attn_shared_map(int gpu, const uint8_t key[ATTN_SHARED_KEY], uint64_t bytes,
                              const void *card, uint64_t card_bytes, attn_shared_t **shared_p);

/** Is it mapped, and what was meant? Waits until until_ns; 0 looks. Any thread.
 * @return ATTN_ERR_UNSUPPORTED  it is not, and would not be another time: GPUs that cannot reach
 * each other, another card, fewer bytes
 * @return ATTN_ERR_DEADLINE     not yet: ask again
 * @return ATTN_ERR_UNAVAILABLE and others: it is not, this time */
attn_status_t attn_shared_check(attn_shared_t *shared, uint64_t until_ns);

/** What so many bytes take of the GPU. */
uint64_t attn_shared_takes(uint64_t bytes);

const uint8_t *attn_shared_key(const attn_shared_t *shared);
uint8_t *attn_shared_at(const attn_shared_t *shared);

/** Any thread, and nothing waits; with the last one it is given back, which is an errand: what
 * works with it has ended by then. */
void attn_shared_ref(attn_shared_t *shared);
void attn_shared_unref(attn_shared_t *shared); /* NULL is allowed */

#endif
