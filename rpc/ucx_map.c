/*
 * ucx_map.c: a context and a worker of UCX's for each node, and memory that one process allocates
 * and another maps. No message is ever sent through it, and so nobody has to make progress: an
 * endpoint exists because a key is unpacked for one. It leads to our own worker. The server's
 * address would do as well, but UCX reads an address as far as it says that it goes on, attaches
 * the segment of its queue, and writes there: too much trust in what a peer sent. Of a key it reads
 * at most KEY_READ_MAX bytes, and we give it so many.
 *
 * Only sysv is used of UCX's transports. posix would do as well, but for a file that its owner may
 * shorten, which kills whoever has it mapped; cma copies through the kernel.
 */
#include "rpc/ucx_int.h"
#include "rpc/ucx_lib.h"

#include "base/checked.h"
#include "base/status.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#define KEY_MAX 4096u /* bytes of a key, as a server may tell it */
/* A key is a map of 64 memory domains, a byte, and for each domain a byte with the size of its
 * part; what a domain reads of its part may be more than that, by some words. */
#define KEY_READ_MAX (8u + 1u + 64u * 256u + 4096u)

struct ucx_node {
    pthread_mutex_t lock; /* round every call that takes the worker */
    ucp_context_h context;
    ucp_worker_h worker;
    ucp_address_t *address;
    size_t address_size;
    ucp_ep_h self; /* what keys are unpacked for; made with the first */
};

struct ucx_memory {
    ucx_node_t *node;
    uint8_t *at;
    uint64_t bytes;
    ucp_mem_h allocated; /* NULL: mapped */
    void *key;
    size_t key_size;
    ucp_rkey_h rkey; /* mapped */
};

/* ---- nodes ---- */

/* Does the user's choice of transports leave us ours? */
static attn_status_t
transports_check(void)
{
    const char *said = secure_getenv("UCX_TLS");
    char list[256];

    if (said == NULL) {
        return ATTN_OK;
    }
    bool without = said[0] == '^', named = false;
    snprintf(list, sizeof(list), "%s", said + without);
    for (char *rest = list, *word; (word = strsep(&rest, ",")) != NULL;) {
        named = named || strcmp(word, "sysv") == 0 || strcmp(word, "shm") == 0 ||
                strcmp(word, "sm") == 0 || strcmp(word, "all") == 0;
    }
    return named != without
               ? ATTN_OK
               : attn_fail(ATTN_ERR_UNSUPPORTED, "UCX_TLS is %.100s: it leaves sysv out", said);
}

static attn_status_t
context_open(ucx_node_t *node)
{
    ucp_params_t params = {.field_mask = UCP_PARAM_FIELD_FEATURES, .features = UCP_FEATURE_RMA};
    ucp_config_t *config;

    ucs_status_t status = ucx_lib.ucp_config_read(NULL, NULL, &config);
    if (status != UCS_OK) {
        return ucx_lib_failed(status, "read its configuration");
    }
    status = ucx_lib.ucp_config_modify(config, "TLS", "sysv");
    if (status == UCS_OK) {
        status =
            ucx_lib.ucp_init_version(UCP_API_MAJOR, UCP_API_MINOR, &params, config, &node->context);
    }
    ucx_lib.ucp_config_release(config);
    return status == UCS_OK ? ATTN_OK : ucx_lib_failed(status, "start with its sysv transport");
}

static attn_status_t
worker_open(ucx_node_t *node)
{
    ucp_worker_params_t params = {.field_mask  = UCP_WORKER_PARAM_FIELD_THREAD_MODE,
                                  .thread_mode = UCS_THREAD_MODE_SERIALIZED};

    ucs_status_t status = ucx_lib.ucp_worker_create(node->context, &params, &node->worker);
    if (status != UCS_OK) {
        return ucx_lib_failed(status, "make a worker of its own kind");
    }
    status = ucx_lib.ucp_worker_get_address(node->worker, &node->address, &node->address_size);
    return status == UCS_OK ? ATTN_OK : ucx_lib_failed(status, "tell its address");
}

attn_status_t
ucx_node_create(ucx_node_t **node_p)
{
    attn_status_t status = transports_check();

    if (status == ATTN_OK) {
        status = ucx_lib_need();
    }
    if (status != ATTN_OK) {
        return status;
    }
    ucx_node_t *node = calloc(1, sizeof(*node));
    if (node == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for UCX");
    }
    pthread_mutex_init(&node->lock, NULL);
    status = context_open(node);
    if (status == ATTN_OK) {
        status = worker_open(node);
    }
    if (status != ATTN_OK) {
        ucx_node_destroy(node);
        return status;
    }
    *node_p = node;
    return ATTN_OK;
}

/* Nothing was sent, so there is nothing to wait for. */
static void
endpoint_close(ucx_node_t *node)
{
    ucp_request_param_t params = {0};
    void *request              = ucx_lib.ucp_ep_close_nbx(node->self, &params);

    for (unsigned i = 0; UCS_PTR_IS_PTR(request) && i < 1000; i++) {
        ucx_lib.ucp_worker_progress(node->worker);
        if (ucx_lib.ucp_request_check_status(request) != UCS_INPROGRESS) {
            break;
        }
    }
    if (UCS_PTR_IS_PTR(request)) {
        ucx_lib.ucp_request_free(request);
    }
}

void
ucx_node_destroy(ucx_node_t *node)
{
    if (node == NULL) {
        return;
    }
    if (node->self != NULL) {
        endpoint_close(node);
    }
    if (node->address != NULL) {
        ucx_lib.ucp_worker_release_address(node->worker, node->address);
    }
    if (node->worker != NULL) {
        ucx_lib.ucp_worker_destroy(node->worker);
    }
    if (node->context != NULL) {
        ucx_lib.ucp_cleanup(node->context);
    }
    pthread_mutex_destroy(&node->lock);
    free(node);
}

/* ---- memory ---- */

static ucx_memory_t *
memory_new(ucx_node_t *node, uint64_t bytes)
{
    ucx_memory_t *memory = calloc(1, sizeof(*memory));

    if (memory == NULL) {
        attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a slab's description");
        return NULL;
    }
    memory->node  = node;
    memory->bytes = bytes;
    return memory;
}

/* Under the node's lock. */
static ucs_status_t
allocate(ucx_memory_t *memory)
{
    ucp_mem_map_params_t params = {
        .field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH |
                      UCP_MEM_MAP_PARAM_FIELD_FLAGS,
        .length = memory->bytes,
        .flags  = UCP_MEM_MAP_ALLOCATE | UCP_MEM_MAP_NONBLOCK,
    };
    ucp_mem_attr_t attr = {.field_mask = UCP_MEM_ATTR_FIELD_ADDRESS | UCP_MEM_ATTR_FIELD_LENGTH};

    ucs_status_t status = ucx_lib.ucp_mem_map(memory->node->context, &params, &memory->allocated);
    if (status != UCS_OK) {
        memory->allocated = NULL;
        return status;
    }
    status     = ucx_lib.ucp_mem_query(memory->allocated, &attr);
    memory->at = attr.address;
    if (status == UCS_OK && attr.length < memory->bytes) {
        status = UCS_ERR_NO_MEMORY;
    }
    return status == UCS_OK ? ucx_lib.ucp_rkey_pack(memory->node->context, memory->allocated,
                                                    &memory->key, &memory->key_size)
                            : status;
}

attn_status_t
ucx_memory_create(ucx_node_t *node, uint64_t bytes, ucx_memory_t **memory_p)
{
    ucx_memory_t *memory = memory_new(node, bytes);

    if (memory == NULL) {
        return ATTN_ERR_NO_MEMORY;
    }
    pthread_mutex_lock(&node->lock);
    ucs_status_t ucs = allocate(memory);
    pthread_mutex_unlock(&node->lock);
    if (ucs != UCS_OK) {
        ucx_memory_free(memory);
        return attn_fail(ATTN_ERR_EXHAUSTED, "UCX has no %llu bytes of shared memory: %s",
                         (unsigned long long)bytes, ucx_lib.ucs_status_string(ucs));
    }
    *memory_p = memory;
    return ATTN_OK;
}

void
ucx_memory_offer(const ucx_memory_t *memory, ucx_offer_t *offer)
{
    offer->address      = (const uint8_t *)memory->node->address;
    offer->address_size = memory->node->address_size;
    offer->key          = memory->key;
    offer->key_size     = memory->key_size;
    offer->base         = (uint64_t)(uintptr_t)memory->at;
    offer->bytes        = memory->bytes;
}

/* Under the node's lock. */
static ucs_status_t
endpoint_need(ucx_node_t *node)
{
    ucp_ep_params_t params = {.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS,
                              .address    = node->address};

    ucs_status_t status =
        node->self != NULL ? UCS_OK : ucx_lib.ucp_ep_create(node->worker, &params, &node->self);
    if (status != UCS_OK) {
        node->self = NULL;
    }
    return status;
}

/* key has KEY_READ_MAX bytes. Under the node's lock. */
static ucs_status_t
map(ucx_memory_t *memory, const uint8_t *key, uint64_t base)
{
    void *at;

    ucs_status_t status = endpoint_need(memory->node);
    if (status != UCS_OK) {
        return status;
    }
    status = ucx_lib.ucp_ep_rkey_unpack(memory->node->self, key, &memory->rkey);
    if (status != UCS_OK) {
        memory->rkey = NULL;
        return status;
    }
    status     = ucx_lib.ucp_rkey_ptr(memory->rkey, base, &at);
    memory->at = status == UCS_OK ? at : NULL;
    return status;
}

/* Is all of it one System V segment that we may write? Where it lies is made of what the peer said,
 * and the segment may be shorter than that. */
static attn_status_t
mapping_check(const ucx_memory_t *memory)
{
    uintptr_t at = (uintptr_t)memory->at, start, end;
    FILE *file   = fopen("/proc/self/maps", "re");
    char line[512], rights[5], name[8];
    bool good = false;

    while (file != NULL && !good && fgets(line, sizeof(line), file) != NULL) {
        good = sscanf(line, "%" SCNxPTR "-%" SCNxPTR " %4s %*s %*s %*s %7s", &start, &end, rights,
                      name) == 4 &&
               start <= at && at < end && end - at >= memory->bytes &&
               strncmp(rights, "rw", 2) == 0 && strncmp(name, "/SYSV", 5) == 0;
    }
    if (file != NULL) {
        fclose(file);
    }
    return good && at % UCX_LINE == 0
               ? ATTN_OK
               : attn_fail(ATTN_ERR_UNSUPPORTED,
                           "what the worker offered is not %llu bytes of shared memory",
                           (unsigned long long)memory->bytes);
}

static attn_status_t
map_with(ucx_memory_t *memory, const uint8_t *key, uint64_t base)
{
    pthread_mutex_lock(&memory->node->lock);
    ucs_status_t ucs = map(memory, key, base);
    pthread_mutex_unlock(&memory->node->lock);
    return ucs == UCS_OK ? mapping_check(memory)
                         : attn_fail(ATTN_ERR_UNSUPPORTED,
                                     "UCX cannot map the server's memory (%s): it is of another "
                                     "user, or of another IPC namespace",
                                     ucx_lib.ucs_status_string(ucs));
}

attn_status_t
ucx_memory_map(ucx_node_t *node, const ucx_offer_t *offer, ucx_memory_t **memory_p)
{
    if (offer->key_size < 1 || offer->key_size > KEY_MAX || offer->base == 0) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "the slab that was offered has a key of %llu bytes",
                         (unsigned long long)offer->key_size);
    }
    ucx_memory_t *memory = memory_new(node, offer->bytes);
    uint8_t *key         = calloc(1, KEY_READ_MAX);
    attn_status_t status = memory == NULL || key == NULL
                               ? attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a slab's description")
                               : ATTN_OK;
    if (status == ATTN_OK) {
        memcpy(key, offer->key, offer->key_size);
        status = map_with(memory, key, offer->base);
    }
    free(key);
    if (status != ATTN_OK) {
        ucx_memory_free(memory);
        return status;
    }
    *memory_p = memory;
    return ATTN_OK;
}

uint8_t *
ucx_memory_at(const ucx_memory_t *memory)
{
    return memory->at;
}

void
ucx_memory_free(ucx_memory_t *memory)
{
    if (memory == NULL) {
        return;
    }
    ucx_node_t *node = memory->node;
    pthread_mutex_lock(&node->lock);
    if (memory->key != NULL) {
        ucx_lib.ucp_rkey_buffer_release(memory->key);
    }
    if (memory->allocated != NULL) {
        ucx_lib.ucp_mem_unmap(node->context, memory->allocated);
    }
    if (memory->rkey != NULL) {
        ucx_lib.ucp_rkey_destroy(memory->rkey);
    }
    pthread_mutex_unlock(&node->lock);
    free(memory);
}
