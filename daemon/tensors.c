#include "daemon/tensors.h"

#include "base/checked.h"
#include "base/status.h"

#include <assert.h>
#include <pthread.h>
#include <stdlib.h>
#include <time.h>

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
    pthread_cond_t given_back; /* a reference was */
    uint64_t out, kept;        /* bytes */
    uint64_t buffers;          /* out */
    uint32_t waiters;
    bool closed;
    buffer_t *shelves[CLASSES];
};

attn_status_t
tensors_create(tensors_t **tensors_p)
{
    pthread_condattr_t monotonic;
    tensors_t *tensors = calloc(1, sizeof(*tensors));

    if (tensors == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for the tensors' pool");
    }
    pthread_mutex_init(&tensors->lock, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&tensors->given_back, &monotonic);
    pthread_condattr_destroy(&monotonic);
    *tensors_p = tensors;
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
    pthread_cond_destroy(&tensors->given_back);
    pthread_mutex_destroy(&tensors->lock);
    free(tensors);
}

void
tensors_destroy(tensors_t *tensors)
{
    if (tensors == NULL) {
        return;
    }
    pthread_mutex_lock(&tensors->lock);
    for (uint32_t c = 0; c < CLASSES; c++) {
        for (buffer_t *buffer = tensors->shelves[c], *next; buffer != NULL; buffer = next) {
            next = buffer->next;
            buffer_free(buffer);
        }
    }
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
    if (tensors->out + bytes > TENSORS_OUT_MAX) {
        status = attn_fail(
            ATTN_ERR_EXHAUSTED,
            "tensors of %llu bytes are in flight here, and %llu is the limit: retry later",
            (unsigned long long)tensors->out, (unsigned long long)TENSORS_OUT_MAX);
    } else {
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

    if (size > TENSORS_OUT_MAX) {
        return attn_fail(ATTN_ERR_TOO_LARGE, "tensors of %llu bytes in one run: at most %llu",
                         (unsigned long long)size, (unsigned long long)TENSORS_OUT_MAX);
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
    } else if (tensors->waiters > 0) {
        pthread_cond_broadcast(&tensors->given_back);
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

bool
tensor_wait(tensor_t *tensor, uint32_t n, uint64_t deadline_ns)
{
    buffer_t *buffer      = (buffer_t *)tensor;
    tensors_t *tensors    = buffer->tensors;
    struct timespec until = {.tv_sec  = (time_t)(deadline_ns / 1000000000u),
                             .tv_nsec = (long)(deadline_ns % 1000000000u)};
    int error             = 0;

    pthread_mutex_lock(&tensors->lock);
    tensors->waiters++;
    while (buffer->references > n && error == 0) {
        error = pthread_cond_timedwait(&tensors->given_back, &tensors->lock, &until);
    }
    tensors->waiters--;
    bool enough = buffer->references <= n;
    pthread_mutex_unlock(&tensors->lock);
    return enough;
}
