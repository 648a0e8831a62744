/*
 * copier.c: life of the copier, the workers that it copies from, and copies as a whole.
 */
#include "daemon/worker/copier_int.h"

#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PEERS_MAX 64u                   /* kept; the one that was unused longest makes room */
#define SLAB_BYTES (UINT64_C(32) << 20) /* of a source's, for all copies from there together */
#define SLAB_KEPT_NS                                                                               \
    (5000 * ATTN_NS_PER_MS) /* after the last copy: others want memory there, too */

/* ---- whom we copy from ---- */

static void
peer_close(copier_t *c, copier_peer_t *peer)
{
    HASH_DEL(c->peers, peer);
    slabs_destroy(peer->slabs);
    rpc_channel_close(peer->channel);
    free(peer);
}

/* Workers that come back with another address would add up. */
static void
make_room(copier_t *c)
{
    copier_peer_t *oldest = NULL;

    for (copier_peer_t *peer = c->peers; peer != NULL; peer = peer->hh.next) {
        if (peer->users == 0 && (oldest == NULL || peer->used_ns < oldest->used_ns)) {
            oldest = peer;
        }
    }
    if (oldest != NULL && HASH_COUNT(c->peers) >= PEERS_MAX) {
        peer_close(c, oldest);
    }
}

static attn_status_t
peer_open(copier_t *c, const char *address, copier_peer_t **peer_p)
{
    copier_peer_t *peer = calloc(1, sizeof(*peer));

    if (peer == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a worker's address");
    }
    snprintf(peer->address, sizeof(peer->address), "%s", address);
    attn_status_t status = rpc_channel_open(c->rpc, address, &peer->channel);
    if (status == ATTN_OK && c->asks != NULL) {
        slabs_options_t options = {.rpc     = c->rpc,
                                   .asks    = c->asks,
                                   .channel = peer->channel,
                                   .address = peer->address,
                                   .bytes   = SLAB_BYTES,
                                   .network = c->options.network};
        status                  = slabs_create(&options, &peer->slabs);
    }
    if (status == ATTN_OK) {
        HASH_ADD_STR(c->peers, address, peer);
        status = table_has(hh, peer)
                     ? ATTN_OK
                     : attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a worker's address");
    }
    if (status != ATTN_OK) {
        slabs_destroy(peer->slabs);
        rpc_channel_close(peer->channel);
        free(peer);
        return status;
    }
    *peer_p = peer;
    return ATTN_OK;
}

/* Where to copy from, with one user more. Under the lock. */
static attn_status_t
peer_use(copier_t *c, const char *address, copier_peer_t **peer_p)
{
    attn_status_t status = ATTN_OK;
    copier_peer_t *peer;

    HASH_FIND_STR(c->peers, address, peer);
    if (peer == NULL) {
        make_room(c);
        status = peer_open(c, address, &peer);
    }
    if (status == ATTN_OK) {
        peer->users++;
        *peer_p = peer;
    }
    return status;
}

/* Be one of those that copy now. */
static attn_status_t
copy_start(copier_t *c, uint32_t worker, const char *source, copier_peer_t **peer_p)
{
    char ticket[TICKET_MAX];
    attn_status_t status = gate_ticket(c->options.gate, worker, ticket);

    if (status == ATTN_OK && (source[0] == '\0' || strlen(source) >= COPIER_ADDRESS_ROOM)) {
        status = attn_fail(ATTN_ERR_INVALID, "source has %zu bytes: 1 to %u", strlen(source),
                           COPIER_ADDRESS_ROOM - 1);
    }
    if (status != ATTN_OK) {
        return status;
    }
    pthread_mutex_lock(&c->lock);
    if (c->n_copies >= COPIER_COPIES_MAX) {
        status = attn_fail(ATTN_ERR_EXHAUSTED, "%u chunks are being copied to here: retry later",
                           c->n_copies);
    }
    if (status == ATTN_OK) {
        status = peer_use(c, source, peer_p);
    }
    if (status == ATTN_OK && strcmp(ticket, c->ticket) != 0) {
        strcpy(c->ticket, ticket);
        rpc_client_set_header(c->rpc, TICKET_HEADER, c->ticket);
    }
    c->n_copies += status == ATTN_OK;
    pthread_mutex_unlock(&c->lock);
    return status;
}

attn_status_t
copier_copy(copier_t *c, uint32_t worker, const char *source, const engine_copy_t *copy,
            const copier_asker_t *asker, uint64_t *bytes_p)
{
    engine_arrival_t *arrival = NULL;
    copier_peer_t *peer       = NULL;
    attn_status_t status      = copier_check_wanted(c, asker);

    *bytes_p = 0;
    if (status == ATTN_OK) {
        status = copy_start(c, worker, source, &peer);
    }
    if (status != ATTN_OK) {
        atomic_fetch_add(&c->failed, 1);
        return status;
    }
    status = engine_arrival_begin(c->options.engine, copy, &arrival);
    if (status == ATTN_OK) {
        status = copier_pull(c, peer, copy, arrival, asker, bytes_p);
        if (status != ATTN_OK) {
            attn_fail_in(status, "from worker %s: ", source);
            engine_arrival_drop(arrival);
        } else {
            status = engine_arrival_publish(arrival);
        }
    }
    pthread_mutex_lock(&c->lock);
    c->n_copies--;
    peer->users--;
    peer->used_ns = attn_now_ns();
    pthread_mutex_unlock(&c->lock);
    atomic_fetch_add(status == ATTN_OK ? &c->chunks_in : &c->failed, 1);
    atomic_fetch_add(&c->bytes_in, status == ATTN_OK ? *bytes_p : 0);
    atomic_fetch_add(&c->corrupt, status == ATTN_ERR_CORRUPT);
    return status;
}

/* ---- life ---- */

/* Without UCX copies come over gRPC, as they do from a worker that has none. */
static void
ucx_start(copier_t *c)
{
    if (c->options.ucx && ucx_asks_create(c->rpc, &c->asks) != ATTN_OK) {
        c->asks = NULL;
        attn_log(ATTN_LOG_WARN, "worker.copies", "transport=grpc reason=\"%s\"", attn_last_error());
    }
}

attn_status_t
copier_create(rpc_server_t *server, const copier_options_t *options, copier_t **copier_p)
{
    copier_t *c = calloc(1, sizeof(*c));

    if (c == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for copies of chunks");
    }
    c->options    = *options;
    c->waiter.run = copier_serve_waiting;
    pthread_mutex_init(&c->lock, NULL);
    pthread_cond_init(&c->let_go, NULL);
    attn_status_t status = rpc_client_create(0, &c->rpc);
    if (status == ATTN_OK) {
        rpc_client_set_tls(c->rpc, options->tls, NULL);
        ucx_start(c);
        status = tensors_create(options->out_max != 0 ? options->out_max : COPIER_OUT_MAX, &c->out);
    }
    if (status == ATTN_OK) {
        status = tensors_create(COPIER_IN_MAX, &c->in);
    }
    if (status == ATTN_OK) {
        status = rpc_server_add(server, &copier_method, 1, c);
    }
    if (status != ATTN_OK) {
        copier_destroy(c);
        return status;
    }
    *copier_p = c;
    return ATTN_OK;
}

void
copier_destroy(copier_t *c)
{
    copier_peer_t *peer, *next;

    if (c == NULL) {
        return;
    }
    HASH_ITER(hh, c->peers, peer, next)
    {
        peer_close(c, peer);
    }
    rpc_client_destroy(c->rpc);
    ucx_asks_destroy(c->asks);
    tensors_destroy(c->in);
    tensors_destroy(c->out);
    pthread_cond_destroy(&c->let_go);
    pthread_mutex_destroy(&c->lock);
    free(c);
}

void
copier_tick(copier_t *c, uint64_t now_ns)
{
    tensors_sweep(c->in, now_ns);
    tensors_sweep(c->out, now_ns);
    pthread_mutex_lock(&c->lock);
    for (copier_peer_t *peer = c->peers; peer != NULL; peer = peer->hh.next) {
        if (peer->slabs != NULL && peer->users == 0 && now_ns >= peer->used_ns + SLAB_KEPT_NS) {
            slabs_rest(peer->slabs);
        }
    }
    pthread_mutex_unlock(&c->lock);
}

void
copier_drain(copier_t *c)
{
    atomic_store(&c->draining, true);
    rpc_client_wake(c->rpc);
}

void
copier_describe(copier_t *c, copier_figures_t *figures)
{
    *figures = (copier_figures_t){
        .chunks_in    = atomic_load(&c->chunks_in),
        .bytes_in     = atomic_load(&c->bytes_in),
        .bytes_in_ucx = atomic_load(&c->bytes_in_ucx),
        .failed       = atomic_load(&c->failed),
        .corrupt      = atomic_load(&c->corrupt),
        .parts_out    = atomic_load(&c->parts_out),
        .bytes_out    = atomic_load(&c->bytes_out),
    };
}
