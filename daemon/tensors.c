#include "daemon/tensors.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/status.h"

#include <assert.h>
#include <pthread.h>
#include <stdlib.h>

#define CLASS_LEAST 12 /* buffers are powers of two of bytes, from 4 KiB on */
#define CLASSES (64 - CLASS_LEAST)

typedef struct buffer {
    tensor_t tensor; /* first: a tensor_t * is a buffer_t * */
    tensors_t *tensors;
    struct buffer *next; /* while kept */
    uint64_t bytes;
    uint32_t shelf;
    uint32_t references;
} buffer_t;

struct tensors {
    pthread_mutex_t lock;
    uint64_t out_max;
    uint64_t out, kept;                 /* bytes */
    uint64_t buffers;                   /* out */
    uint64_t turns;                     /* buffers taken so far */
    uint64_t turns_seen, idle_since_ns; /* tensors_sweep's */
    bool closed;
    buffer_t *shelves[CLASSES];
};

attn_status_t
tensors_create(uint64_t out_max, tensors_t **tensors_p)
{
    tensors_t *tensors = calloc(1, sizeof(*tensors));

    if (tensors == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for the tensors' pool");
    }
    pthread_mutex_init(&tensors->lock, NULL);
    tensors->out_max = out_max;
    *tensors_p       = tensors;
    return ATTN_OK;
}

static void
buffer_free(buffer_t *buffer)
{
    free(buffer->tensor.data);
    free(buffer);
}

static void
tensors_free(tensors_t *tensors)
{
    pthread_mutex_destroy(&tensors->lock);
    free(tensors);
}

/* Under the lock. */
static void
clear_shelves(tensors_t *tensors)
{
    for (uint32_t c = 0; c < CLASSES; c++) {
        for (buffer_t *buffer = tensors->shelves[c], *next; buffer != NULL; buffer = next) {
            next = buffer->next;
            buffer_free(buffer);
        }
        tensors->shelves[c] = NULL;
    }
    tensors->kept = 0;
}

void
tensors_sweep(tensors_t *tensors, uint64_t now_ns)
{
    pthread_mutex_lock(&tensors->lock);
    if (tensors->turns != tensors->turns_seen || tensors->buffers > 0) {
        tensors->turns_seen    = tensors->turns;
        tensors->idle_since_ns = now_ns;
    } else if (tensors->kept > 0 &&
               now_ns >= tensors->idle_since_ns + TENSORS_KEPT_MS * ATTN_NS_PER_MS) {
        clear_shelves(tensors);
    }
    pthread_mutex_unlock(&tensors->lock);
}

uint64_t
tensors_kept(tensors_t *tensors)
{
    pthread_mutex_lock(&tensors->lock);
    uint64_t kept = tensors->kept;
    pthread_mutex_unlock(&tensors->lock);
    return kept;
}

void
tensors_destroy(tensors_t *tensors)
{
    if (tensors == NULL) {
        return;
    }
    pthread_mutex_lock(&tensors->lock);
    clear_shelves(tensors);
    tensors->closed = true;
    bool last       = tensors->buffers == 0;
    pthread_mutex_unlock(&tensors->lock);
    if (last) {
        tensors_free(tensors);
    }
}

/* Room for a buffer within the cap, and one from its shelf if there is one. */
static attn_status_t
tensors_admit(tensors_t *tensors, uint32_t shelf, uint64_t bytes, buffer_t **kept_p)
{
    attn_status_t status = ATTN_OK;

    pthread_mutex_lock(&tensors->lock);
    if (bytes > tensors->out_max - tensors->out) {
        status = attn_fail(
            ATTN_ERR_EXHAUSTED,
            "tensors of %llu bytes are in flight here, and %llu is the limit: retry later",
            (unsigned long long)tensors->out, (unsigned long long)tensors->out_max);
    } else {
        tensors->turns++;
        tensors->out += bytes;
        tensors->buffers++;
        *kept_p = tensors->shelves[shelf];
        if (*kept_p != NULL) {
            tensors->shelves[shelf] = (*kept_p)->next;
            tensors->kept -= bytes;
        }
    }
    pthread_mutex_unlock(&tensors->lock);
    return status;
}

static buffer_t *
buffer_new(uint64_t bytes)
{
    buffer_t *buffer = calloc(1, sizeof(*buffer));

    if (buffer == NULL || (buffer->tensor.data = aligned_alloc(64, bytes)) == NULL) {
        free(buffer);
        return NULL;
    }
    return buffer;
}

attn_status_t
tensor_take(tensors_t *tensors, uint64_t size, tensor_t **tensor_p)
{
    buffer_t *buffer = NULL;
    uint32_t shelf   = 0;

    if (size > tensors->out_max) {
        return attn_fail(ATTN_ERR_TOO_LARGE, "tensors of %llu bytes in one run: at most %llu",
                         (unsigned long long)size, (unsigned long long)tensors->out_max);
    }
    while (UINT64_C(1) << (shelf + CLASS_LEAST) < size) {
        shelf++;
    }
    uint64_t bytes       = UINT64_C(1) << (shelf + CLASS_LEAST);
    attn_status_t status = tensors_admit(tensors, shelf, bytes, &buffer);
    if (status != ATTN_OK) {
        return status;
    }
    if (buffer == NULL) {
        buffer = buffer_new(bytes);
    }
    if (buffer == NULL) {
        pthread_mutex_lock(&tensors->lock);
        tensors->out -= bytes;
        tensors->buffers--;
        pthread_mutex_unlock(&tensors->lock);
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for tensors of %llu bytes",
                         (unsigned long long)size);
    }
    buffer->tensors     = tensors;
    buffer->bytes       = bytes;
    buffer->shelf       = shelf;
    buffer->references  = 1;
    buffer->tensor.size = size;
    *tensor_p           = &buffer->tensor;
    return ATTN_OK;
}

void
tensor_ref(tensor_t *tensor)
{
    buffer_t *buffer = (buffer_t *)tensor;

    pthread_mutex_lock(&buffer->tensors->lock);
    buffer->references++;
    pthread_mutex_unlock(&buffer->tensors->lock);
}

/* The last reference is gone. Under the lock; @return a buffer to free, or NULL */
static buffer_t *
tensors_put(tensors_t *tensors, buffer_t *buffer)
{
    tensors->out -= buffer->bytes;
    tensors->buffers--;
    if (tensors->closed || tensors->kept + buffer->bytes > TENSORS_KEPT_MAX) {
        return buffer;
    }
    tensors->kept += buffer->bytes;
    buffer->next                    = tensors->shelves[buffer->shelf];
    tensors->shelves[buffer->shelf] = buffer;
    return NULL;
}

void
tensor_unref(void *tensor)
{
    buffer_t *buffer = tensor, *unwanted = NULL;

    if (tensor == NULL) {
        return;
    }
    tensors_t *tensors = buffer->tensors;
    pthread_mutex_lock(&tensors->lock);
    assert(buffer->references > 0);
    if (--buffer->references == 0) {
        unwanted = tensors_put(tensors, buffer);
    }
    bool last = tensors->closed && tensors->buffers == 0;
    pthread_mutex_unlock(&tensors->lock);
    if (unwanted != NULL) {
        buffer_free(unwanted);
    }
    if (last) {
        tensors_free(tensors);
    }
}
