/* memory_shared.c: memory of a GPU by way of the driver's IPC handles. */
#include "kernels/memory_int.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/status.h"

#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define PIECE (UINT64_C(2) << 20) /* that the driver lends whole */
#define CARD_MAX 256u

/* How long a look at what is mapped goes without a pause, and how long its pauses are. */
#define SPIN_NS (100 * ATTN_NS_PER_US)
#define PAUSE_NS 20000

enum { LAZY_ENABLE_PEER_ACCESS = 1, OUT_OF_MEMORY = 2 };

/* What the driver says where memory cannot be mapped for a reason that is worth a word. */
enum {
    INVALID_CONTEXT         = 201,
    PEER_ACCESS_UNSUPPORTED = 217,
    INVALID_HANDLE          = 400,
    NOT_PERMITTED           = 800,
    NOT_SUPPORTED           = 801
};

struct attn_shared {
    atomic_uint references;
    int gpu;
    bool mapped; /* another process' */
    uint64_t at; /* 0: none */
    memory_key_t key;
    attn_errand_t errand; /* to map it, and when it is nobody's */

    /* Of one that is to be mapped: what it is to be, and what it was. */
    uint64_t bytes;
    uint8_t card[CARD_MAX];
    uint64_t card_bytes;
    atomic_bool settled; /* then there is: */
    attn_status_t status;
    char sentence[256];
};

#define SHARED_OF(e) ((attn_shared_t *)(void *)((char *)(e)-offsetof(attn_shared_t, errand)))

static attn_shared_t *
shared_new(int gpu)
{
    attn_shared_t *shared = calloc(1, sizeof(*shared));

    if (shared == NULL) {
        attn_fail(ATTN_ERR_NO_MEMORY, "no memory to share some of GPU %d", gpu);
        return NULL;
    }
    atomic_init(&shared->references, 1);
    shared->gpu = gpu;
    return shared;
}

/* The beginning of it. */
static attn_strided_t
card_of(const attn_shared_t *shared, uint64_t bytes)
{
    return (attn_strided_t){.at         = (uint8_t *)(uintptr_t)shared->at,
                            .rows       = 1,
                            .row_stride = bytes,
                            .heads      = 1,
                            .head_bytes = bytes};
}

/* ---- life ---- */

const uint8_t *
attn_shared_key(const attn_shared_t *shared)
{
    return shared->key.bytes;
}

uint8_t *
attn_shared_at(const attn_shared_t *shared)
{
    return (uint8_t *)(uintptr_t)shared->at;
}

void
attn_shared_ref(attn_shared_t *shared)
{
    atomic_fetch_add(&shared->references, 1);
}

/* Nothing works with it any more. The driver may wait until nothing else works, either. */
static void
give_back(attn_errand_t *errand)
{
    attn_shared_t *shared = SHARED_OF(errand);
    int mode;

    if (memory_enter(shared->gpu, &mode) == ATTN_OK) {
        (shared->mapped ? memory_calls.unmap : memory_calls.give)(shared->at);
        memory_leave(&mode);
    }
    free(shared);
}

void
attn_shared_unref(attn_shared_t *shared)
{
    if (shared == NULL || atomic_fetch_sub(&shared->references, 1) > 1) {
        return;
    }
    if (shared->at == 0) {
        free(shared);
        return;
    }
    shared->errand.run = give_back;
    attn_errand_add(shared->gpu, &shared->errand);
}

/* ---- taking ---- */

static attn_status_t
take(attn_shared_t *shared, uint64_t bytes)
{
    attn_status_t status;
    int mode;

    if ((status = memory_enter(shared->gpu, &mode)) != ATTN_OK) {
        return status;
    }
    int result = memory_calls.take(&shared->at, bytes);
    if (result != 0) {
        shared->at = 0;
        status     = result == OUT_OF_MEMORY
                         ? attn_fail(ATTN_ERR_NO_MEMORY, "GPU %d has no %llu bytes left", shared->gpu,
                                     (unsigned long long)bytes)
                         : memory_check(result, "cuMemAlloc");
    } else if ((result = memory_calls.key(&shared->key, shared->at)) != 0) {
        status = attn_fail(ATTN_ERR_UNSUPPORTED,
                           "the driver lends no memory of GPU %d: cuIpcGetMemHandle: CUDA error %d",
                           shared->gpu, result);
    }
    memory_leave(&mode);
    return status;
}

/* Zeros, and the card. */
static attn_status_t
fill(attn_shared_t *shared, attn_copies_t *copies, uint64_t bytes, uint8_t *card,
     uint64_t card_bytes)
{
    attn_status_t status;
    int mode;

    if ((status = memory_enter(shared->gpu, &mode)) != ATTN_OK) {
        return status;
    }
    status =
        memory_check(memory_calls.fill(shared->at, 0, bytes, copies->stream), "cuMemsetD8Async");
    memory_leave(&mode);
    if (status == ATTN_OK) {
        attn_strided_t there = card_of(shared, card_bytes);
        status               = attn_copies_send(copies, &(attn_packed_t){.at = card}, &there);
    }
    return status;
}

uint64_t
attn_shared_takes(uint64_t bytes)
{
    return attn_div_up(bytes, PIECE) * PIECE;
}

attn_status_t
attn_shared_create(int gpu, uint64_t bytes, const void *card, uint64_t card_bytes,
                   attn_shared_t **shared_p)
{
    uint64_t whole = attn_shared_takes(bytes);
    uint8_t words[CARD_MAX];
    attn_copies_t *copies;
    attn_status_t status, ended;

    if (bytes == 0 || whole < bytes || card_bytes > CARD_MAX || card_bytes > bytes) {
        return attn_fail(ATTN_ERR_INVALID, "%llu bytes of a GPU to share, with a card of %llu",
                         (unsigned long long)bytes, (unsigned long long)card_bytes);
    }
    attn_shared_t *shared = shared_new(gpu);
    if (shared == NULL) {
        return ATTN_ERR_NO_MEMORY;
    }
    memcpy(words, card, card_bytes);
    status = take(shared, whole);
    if (status == ATTN_OK && (status = attn_copies_open(gpu, &copies)) == ATTN_OK) {
        status = fill(shared, copies, whole, words, card_bytes);
        ended  = attn_copies_wait(copies, UINT64_MAX);
        status = status == ATTN_OK ? ended : status;
        attn_copies_close(copies);
    }
    if (status != ATTN_OK) {
        attn_shared_unref(shared);
        return status;
    }
    *shared_p = shared;
    return ATTN_OK;
}

/* ---- mapping ---- */

/* Processes and GPUs are what they are; memory comes and goes. */
static bool
may_be_later(int result)
{
    return result != PEER_ACCESS_UNSUPPORTED && result != INVALID_CONTEXT &&
           result != NOT_PERMITTED && result != NOT_SUPPORTED;
}

static const char *
why_not(int result)
{
    switch (result) {
    case PEER_ACCESS_UNSUPPORTED:
        return "these GPUs cannot reach each other's memory";
    case INVALID_CONTEXT:
        return "it is memory of this very process, or mapped for another context";
    case INVALID_HANDLE:
        return "its process is gone, or the key is none";
    default:
        return "the driver does not say why";
    }
}

/* And is it as large as was told? */
static attn_status_t
map(attn_shared_t *shared)
{
    uint64_t base = 0;
    size_t size   = 0;
    attn_status_t status;
    int mode;

    if ((status = memory_enter(shared->gpu, &mode)) != ATTN_OK) {
        return status;
    }
    int result = memory_calls.map(&shared->at, shared->key, LAZY_ENABLE_PEER_ACCESS);
    if (result != 0) {
        shared->at = 0;
        status     = attn_fail(may_be_later(result) ? ATTN_ERR_UNAVAILABLE : ATTN_ERR_UNSUPPORTED,
                           "GPU %d cannot map the memory of the worker's GPU: %s "
                           "(cuIpcOpenMemHandle: CUDA error %d)",
                           shared->gpu, why_not(result), result);
    } else {
        status = memory_check(memory_calls.range(&base, &size, shared->at), "cuMemGetAddressRange");
        if (status == ATTN_OK && (base != shared->at || size < shared->bytes)) {
            status = attn_fail(ATTN_ERR_UNSUPPORTED,
                               "what was mapped of the worker's GPU has %llu bytes, not %llu",
                               (unsigned long long)(base == shared->at ? size : 0),
                               (unsigned long long)shared->bytes);
        }
    }
    memory_leave(&mode);
    return status;
}

/* Its card, brought to pinned memory: a copy to any other is waited for by the call that queues it.
 */
static attn_status_t
read_card(attn_shared_t *shared, uint8_t *found)
{
    attn_strided_t there = card_of(shared, shared->card_bytes);
    attn_copies_t *copies;
    attn_status_t status, ended;

    if ((status = attn_copies_open(shared->gpu, &copies)) != ATTN_OK) {
        return status;
    }
    status = attn_copies_fetch(copies, &there, &(attn_packed_t){.at = found});
    ended  = attn_copies_wait(copies, UINT64_MAX);
    attn_copies_close(copies);
    return status == ATTN_OK ? ended : status;
}

static attn_status_t
look_at_card(attn_shared_t *shared)
{
    uint8_t *found = attn_memory_pin(shared->gpu, CARD_MAX);
    attn_status_t status =
        found != NULL
            ? read_card(shared, found)
            : attn_fail(ATTN_ERR_NO_MEMORY, "no pinned memory to look at what is lent of a GPU");

    if (status == ATTN_OK && memcmp(found, shared->card, shared->card_bytes) != 0) {
        status = attn_fail(ATTN_ERR_UNSUPPORTED,
                           "what was mapped of the worker's GPU is not the memory that it lent");
    }
    attn_memory_unpin(shared->gpu, found);
    return status;
}

/* Nobody else looks at it before it is settled, and then nothing changes. */
static void
settle(attn_errand_t *errand)
{
    attn_shared_t *shared = SHARED_OF(errand);
    bool wanted           = atomic_load(&shared->references) > 1;

    shared->status = wanted ? map(shared) : ATTN_ERR_CANCELLED;
    if (shared->status == ATTN_OK) {
        shared->status = look_at_card(shared);
    }
    if (shared->status != ATTN_OK && wanted) {
        snprintf(shared->sentence, sizeof(shared->sentence), "%s", attn_last_error());
    }
    atomic_store(&shared->settled, true);
    attn_shared_unref(shared);
}

attn_status_t
attn_shared_map(int gpu, const uint8_t key[ATTN_SHARED_KEY], uint64_t bytes, const void *card,
                uint64_t card_bytes, attn_shared_t **shared_p)
{
    attn_status_t status;

    if (gpu < 0 || gpu >= MEMORY_GPUS || card_bytes > CARD_MAX || card_bytes > bytes) {
        return attn_fail(ATTN_ERR_INVALID,
                         "%llu bytes of a GPU to map for GPU %d, with a card of %llu",
                         (unsigned long long)bytes, gpu, (unsigned long long)card_bytes);
    }
    if ((status = memory_can_share()) != ATTN_OK) {
        return status;
    }
    attn_shared_t *shared = shared_new(gpu);
    if (shared == NULL) {
        return ATTN_ERR_NO_MEMORY;
    }
    shared->mapped     = true;
    shared->bytes      = bytes;
    shared->card_bytes = card_bytes;
    shared->errand.run = settle;
    memcpy(shared->card, card, card_bytes);
    memcpy(shared->key.bytes, key, sizeof(shared->key.bytes));
    attn_shared_ref(shared); /* the errand's */
    attn_errand_add(gpu, &shared->errand);
    *shared_p = shared;
    return ATTN_OK;
}

attn_status_t
attn_shared_check(attn_shared_t *shared, uint64_t until_ns)
{
    uint64_t start = attn_now_ns(), now = start;

    while (!atomic_load(&shared->settled) && now < until_ns) {
        if (now - start < SPIN_NS) {
            sched_yield();
        } else {
            nanosleep(&(struct timespec){.tv_nsec = PAUSE_NS}, NULL);
        }
        now = attn_now_ns();
    }
    if (!atomic_load(&shared->settled)) {
        return attn_fail(ATTN_ERR_DEADLINE,
                         "the memory of the worker's GPU is not mapped for GPU %d yet",
                         shared->gpu);
    }
    return shared->status == ATTN_OK ? ATTN_OK : attn_fail(shared->status, "%s", shared->sentence);
}
