/* memory_shared.c: memory of a GPU by way of the driver's IPC handles. */
#include "kernels/memory_int.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/status.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define PIECE (UINT64_C(2) << 20) /* that the driver lends whole */
#define CARD_MAX 256u
#define FILL_WAIT_NS (5000 * ATTN_NS_PER_MS)

enum { LAZY_ENABLE_PEER_ACCESS = 1, OUT_OF_MEMORY = 2 };

/* What the driver says where memory cannot be mapped for a reason that is worth a word. */
enum { INVALID_CONTEXT = 201, PEER_ACCESS_UNSUPPORTED = 217, INVALID_HANDLE = 400 };

struct attn_shared {
    atomic_uint references;
    int gpu;
    bool mapped; /* another process' */
    uint64_t at; /* 0: none yet */
    memory_key_t key;

    /* Until it is known what was mapped. */
    attn_copies_t *reading; /* NULL: nothing is read */
    uint8_t *found;         /* pinned: the card */
    uint8_t card[CARD_MAX]; /* as it is to be */
    uint64_t card_bytes;
    attn_shared_t *next; /* among those left */
};

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

/* Nothing works with it any more. */
static void
shared_free(attn_shared_t *shared)
{
    int mode;

    attn_copies_close(shared->reading);
    attn_memory_unpin(shared->gpu, shared->found);
    if (shared->at != 0 && memory_enter(shared->gpu, &mode) == ATTN_OK) {
        (shared->mapped ? memory_calls.unmap : memory_calls.give)(shared->at);
        memory_leave(&mode);
    }
    free(shared);
}

static bool
is_read(const attn_shared_t *shared)
{
    return shared->reading == NULL || attn_copies_wait(shared->reading, 0) == ATTN_OK;
}

/* Those whose card a GPU reads still: whoever maps something after it has answered frees them. */
static pthread_mutex_t left_lock = PTHREAD_MUTEX_INITIALIZER;
static attn_shared_t *left;

static void
free_left(void)
{
    pthread_mutex_lock(&left_lock);
    for (attn_shared_t **at = &left; *at != NULL;) {
        attn_shared_t *shared = *at;
        if (is_read(shared)) {
            *at = shared->next;
            shared_free(shared);
        } else {
            at = &shared->next;
        }
    }
    pthread_mutex_unlock(&left_lock);
}

void
attn_shared_unref(attn_shared_t *shared)
{
    if (shared == NULL || atomic_fetch_sub(&shared->references, 1) > 1) {
        return;
    }
    if (is_read(shared)) {
        shared_free(shared);
        return;
    }
    pthread_mutex_lock(&left_lock);
    shared->next = left;
    left         = shared;
    pthread_mutex_unlock(&left_lock);
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

/* What was queued has to end before what it works with goes. Where it does not the device does not
 * answer: then it stays. */
static attn_status_t
end(attn_copies_t *copies, uint64_t until_ns, attn_status_t status)
{
    attn_status_t ended = attn_copies_wait(copies, until_ns);

    if (ended == ATTN_OK) {
        attn_copies_close(copies);
    }
    return status != ATTN_OK ? status : ended;
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
    attn_status_t status;

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
        status = end(copies, attn_now_ns() + FILL_WAIT_NS, status);
    }
    if (status != ATTN_OK) {
        attn_shared_unref(shared);
        return status;
    }
    *shared_p = shared;
    return ATTN_OK;
}

/* ---- mapping ---- */

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
map(attn_shared_t *shared, uint64_t bytes)
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
        status     = attn_fail(ATTN_ERR_UNSUPPORTED,
                               "GPU %d cannot map the memory of the worker's GPU: %s "
                                   "(cuIpcOpenMemHandle: CUDA error %d)",
                               shared->gpu, why_not(result), result);
    } else {
        status = memory_check(memory_calls.range(&base, &size, shared->at), "cuMemGetAddressRange");
        if (status == ATTN_OK && (base != shared->at || size < bytes)) {
            status = attn_fail(ATTN_ERR_UNSUPPORTED,
                               "what was mapped of the worker's GPU has %llu bytes, not %llu",
                               (unsigned long long)(base == shared->at ? size : 0),
                               (unsigned long long)bytes);
        }
    }
    memory_leave(&mode);
    return status;
}

/* Have the card brought, to pinned memory: a copy to any other is waited for by the call that
 * queues it. */
static attn_status_t
read_card(attn_shared_t *shared)
{
    attn_strided_t there = card_of(shared, shared->card_bytes);

    shared->found = attn_memory_pin(shared->gpu, CARD_MAX);
    if (shared->found == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no pinned memory for what is lent of a GPU");
    }
    attn_status_t status = attn_copies_open(shared->gpu, &shared->reading);
    return status == ATTN_OK
               ? attn_copies_fetch(shared->reading, &there, &(attn_packed_t){.at = shared->found})
               : status;
}

attn_status_t
attn_shared_map(int gpu, const uint8_t key[ATTN_SHARED_KEY], uint64_t bytes, const void *card,
                uint64_t card_bytes, attn_shared_t **shared_p)
{
    attn_status_t status;

    if (card_bytes > CARD_MAX || card_bytes > bytes) {
        return attn_fail(ATTN_ERR_INVALID, "%llu bytes of a GPU to map, with a card of %llu",
                         (unsigned long long)bytes, (unsigned long long)card_bytes);
    }
    if ((status = memory_can_share()) != ATTN_OK) {
        return status;
    }
    free_left();
    attn_shared_t *shared = shared_new(gpu);
    if (shared == NULL) {
        return ATTN_ERR_NO_MEMORY;
    }
    shared->mapped     = true;
    shared->card_bytes = card_bytes;
    memcpy(shared->card, card, card_bytes);
    memcpy(shared->key.bytes, key, sizeof(shared->key.bytes));
    status = map(shared, bytes);
    if (status == ATTN_OK) {
        status = read_card(shared);
    }
    if (status != ATTN_OK) {
        attn_shared_unref(shared);
        return status;
    }
    *shared_p = shared;
    return ATTN_OK;
}

attn_status_t
attn_shared_check(attn_shared_t *shared, uint64_t until_ns)
{
    attn_status_t status =
        shared->reading != NULL ? attn_copies_wait(shared->reading, until_ns) : ATTN_OK;

    if (status != ATTN_OK || shared->found == NULL) {
        return status;
    }
    bool same = memcmp(shared->found, shared->card, shared->card_bytes) == 0;
    attn_copies_close(shared->reading);
    attn_memory_unpin(shared->gpu, shared->found);
    shared->reading = NULL;
    shared->found   = NULL;
    return same ? ATTN_OK
                : attn_fail(ATTN_ERR_UNSUPPORTED,
                            "what was mapped of the worker's GPU is not the memory that it lent");
}
