/* links.c: the links of a process. By address and not by the worker's id: a coordinator that
 * succeeds another gives ids anew. */
#include "client/link.h"
#include "base/clock.h"
#include "base/table.h"

#include "base/status.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct links_entry {
    char address[64]; /* key */
    link_t *link;
    engine_t *engine; /* owned; NULL for remote ones */
    UT_hash_handle hh;
} links_entry_t;

struct links {
    rpc_client_t *rpc;
    attn_transport_t transport;
    ucx_asks_t *asks; /* NULL: all links are over gRPC alone */
    pthread_mutex_t lock;
    links_entry_t *by_address;
};

attn_status_t
links_create(rpc_client_t *rpc, links_t **links_p)
{
    links_t *links = calloc(1, sizeof(*links));

    if (links == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for links");
    }
    links->rpc = rpc;
    pthread_mutex_init(&links->lock, NULL);
    *links_p = links;
    return ATTN_OK;
}

void
links_destroy(links_t *links)
{
    links_entry_t *entry, *next;

    if (links == NULL) {
        return;
    }
    HASH_ITER(hh, links->by_address, entry, next)
    {
        HASH_DEL(links->by_address, entry);
        entry->link->ops->close(entry->link);
        engine_destroy(entry->engine);
        free(entry);
    }
    pthread_mutex_destroy(&links->lock);
    free(links);
}

/* Under the lock, or before links is shared. Takes link, and engine, over on ATTN_OK. */
static attn_status_t
add(links_t *links, const char *address, link_t *link, engine_t *engine)
{
    links_entry_t *entry = calloc(1, sizeof(*entry));

    if (entry == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a link");
    }
    snprintf(entry->address, sizeof(entry->address), "%s", address);
    entry->link   = link;
    entry->engine = engine;
    HASH_ADD_STR(links->by_address, address, entry);
    if (!table_has(hh, entry)) {
        free(entry);
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a link");
    }
    return ATTN_OK;
}

attn_status_t
links_add_engine(links_t *links, const char *address, engine_t *engine)
{
    link_t *link;
    attn_status_t status = link_engine_open(engine, &link);

    if (status == ATTN_OK) {
        pthread_mutex_lock(&links->lock);
        status = add(links, address, link, engine);
        pthread_mutex_unlock(&links->lock);
        if (status != ATTN_OK) {
            link->ops->close(link);
        }
    }
    return status;
}

link_t *
links_find(links_t *links, const char *address)
{
    links_entry_t *entry;

    pthread_mutex_lock(&links->lock);
    HASH_FIND_STR(links->by_address, address, entry);
    pthread_mutex_unlock(&links->lock);
    return entry != NULL ? entry->link : NULL;
}

attn_status_t
links_get(links_t *links, const char *address, link_t **link_p)
{
    links_entry_t *entry;
    attn_status_t status = ATTN_OK;

    pthread_mutex_lock(&links->lock);
    HASH_FIND_STR(links->by_address, address, entry);
    if (entry != NULL) {
        *link_p = entry->link;
    } else {
        status = links->asks != NULL ? link_ucx_open(links->rpc, links->asks, address,
                                                     links->transport == ATTN_TRANSPORT_UCX, link_p)
                                     : link_grpc_open(links->rpc, address, link_p);
        if (status == ATTN_OK && (status = add(links, address, *link_p, NULL)) != ATTN_OK) {
            (*link_p)->ops->close(*link_p);
        }
    }
    pthread_mutex_unlock(&links->lock);
    return status;
}

/* ---- which way runs go ---- */

static attn_status_t
transport_settle(attn_transport_t transport, attn_transport_t *settled)
{
    static const char *const names[] = {[ATTN_TRANSPORT_AUTO] = "auto",
                                        [ATTN_TRANSPORT_GRPC] = "grpc",
                                        [ATTN_TRANSPORT_UCX]  = "ucx"};
    const char *said                 = secure_getenv("ATTN_TRANSPORT");

    if (transport != ATTN_TRANSPORT_DEFAULT) {
        *settled = transport;
        return transport <= ATTN_TRANSPORT_UCX
                   ? ATTN_OK
                   : attn_fail(ATTN_ERR_INVALID,
                               "transport is %d: 0 (as $ATTN_TRANSPORT says), 1 "
                               "(auto), 2 (grpc) or 3 (ucx)",
                               (int)transport);
    }
    *settled = ATTN_TRANSPORT_AUTO;
    if (said == NULL || said[0] == '\0') {
        return ATTN_OK;
    }
    for (int i = ATTN_TRANSPORT_AUTO; i <= ATTN_TRANSPORT_UCX; i++) {
        if (strcmp(said, names[i]) == 0) {
            *settled = (attn_transport_t)i;
            return ATTN_OK;
        }
    }
    return attn_fail(ATTN_ERR_INVALID, "ATTN_TRANSPORT is \"%.32s\": auto, grpc or ucx", said);
}

attn_status_t
links_set_transport(links_t *links, attn_transport_t transport)
{
    attn_status_t status = transport_settle(transport, &links->transport);

    return status == ATTN_OK && links->rpc != NULL && links->transport != ATTN_TRANSPORT_GRPC
               ? ucx_asks_create(links->rpc, &links->asks)
               : status;
}

ucx_asks_t *
links_asks(const links_t *links)
{
    return links->asks;
}

bool
links_meter(links_t *links, cost_link_t *link)
{
    links_entry_t *entry, *next;
    uint64_t now = attn_now_ns();

    *link = (cost_link_t){0};
    pthread_mutex_lock(&links->lock);
    HASH_ITER(hh, links->by_address, entry, next)
    {
        cost_link_t way;
        if (entry->engine == NULL && way_meter_is_fresh(&entry->link->meter, now) &&
            way_meter_read(&entry->link->meter, &way)) {
            cost_link_slowest(link, &way);
        }
    }
    pthread_mutex_unlock(&links->lock);
    return link->hop_seconds > 0;
}

static pthread_mutex_t notes_lock = PTHREAD_MUTEX_INITIALIZER; /* innermost; of all links' */

void
link_note_gpu(link_t *link, const char *reason)
{
    pthread_mutex_lock(&notes_lock);
    snprintf(link->gpu_reason, sizeof(link->gpu_reason), "%s", reason);
    pthread_mutex_unlock(&notes_lock);
}

uint32_t
links_describe(links_t *links, attn_link_info_t *infos, uint32_t room)
{
    links_entry_t *entry, *next;
    uint32_t n = 0;

    pthread_mutex_lock(&links->lock);
    HASH_ITER(hh, links->by_address, entry, next)
    {
        if (entry->engine != NULL) {
            continue;
        }
        if (n < room) {
            memset(&infos[n], 0, sizeof(infos[n]));
            entry->link->ops->describe(entry->link, &infos[n]);
            pthread_mutex_lock(&notes_lock);
            memcpy(infos[n].gpu_reason, entry->link->gpu_reason, sizeof(infos[n].gpu_reason));
            pthread_mutex_unlock(&notes_lock);
        }
        n++;
    }
    pthread_mutex_unlock(&links->lock);
    return n;
}
