/* door_int.h: what the files of the thin client share. */
#ifndef ATTN_CLIENT_DOOR_INT_H
#define ATTN_CLIENT_DOOR_INT_H

#include "attn/v1/attn.pb-c.h"
#include "client/door.h"
#include "rpc/rpc.h"

#include <pthread.h>

typedef struct line line_t; /* a stream of the Steps method, of one step at a time */

struct door {
    rpc_client_t *rpc;
    rpc_tls_t *tls; /* NULL: plaintext */
    rpc_channel_t *channel;
    uint32_t client, lease_ms, timeout_ms;
    pthread_mutex_t lock; /* guards what follows */
    pthread_cond_t wake;
    bool stopping;
    line_t *idle;
    pthread_t keeper;
};

struct door_cache {
    door_t *door;
    uint64_t id;
    attn_geometry_t geometry;
    void *table;
};

/** A line for one step: an idle one that still stands, or a new one. */
attn_status_t line_take(door_t *door, line_t **line_p);
void line_give(line_t *line,
               bool clean);     /* clean: nothing is on its way; another step may use it */
void lines_close(door_t *door); /* the idle ones */

void line_send(line_t *line, const Attn__V1__StepRequest *request, const struct iovec *data,
               uint32_t n_data);

/** The next message of the line; free it with rpc_message_free(). @return the failure that it
 * tells, or that ended the line (ATTN_ERR_DEADLINE: none came in time); no message then */
attn_status_t line_next(line_t *line, uint64_t deadline_ns, Attn__V1__StepReply **reply_p,
                        rpc_message_t **message_p);

#endif
