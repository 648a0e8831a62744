/*
 * registrar.c: the worker's membership.
 *
 *          +-- refused, no answer: again, with backoff
 *          v          |
 *     joining --------+--> joined --- heartbeat every interval ---+
 *          ^                 |  ^---------------------------------+
 *          +-- NOT_FOUND ----+
 *              (the coordinator is another one, or gave us up: what it knew is gone, so
 *               the caches are closed and we come back as a new incarnation)
 *
 * A coordinator that does not answer changes nothing here: clients with a layout keep stepping.
 */
#include "daemon/worker/worker_int.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"
#include "daemon/meter.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define BACKOFF_LEAST_MS 50u
#define BACKOFF_MOST_MS 1000u
#define CALL_TIMEOUT_MS 2000u
#define HEARTBEAT_LEAST_MS 10u
#define HEARTBEAT_MOST_MS 60000u

struct registrar {
    worker_t *worker;
    rpc_client_t *rpc;
    rpc_channel_t *channel;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t stopped;
    bool stop; /* under the lock */

    /* Of the thread. */
    uint32_t heartbeat_ms; /* as told; 0: never joined yet */
    uint32_t failures;     /* in a row */
    bool said_joined;      /* to the service manager */
};

/* Sleep. @return false when it is time to stop */
static bool
pause_ms(registrar_t *r, uint32_t ms)
{
    uint64_t end          = attn_now_ns() + ms * ATTN_NS_PER_MS;
    struct timespec until = {.tv_sec  = (time_t)(end / 1000000000u),
                             .tv_nsec = (long)(end % 1000000000u)};

    pthread_mutex_lock(&r->lock);
    while (!r->stop && pthread_cond_timedwait(&r->stopped, &r->lock, &until) == 0) {
    }
    bool go_on = !r->stop;
    pthread_mutex_unlock(&r->lock);
    return go_on;
}

/* Before the next attempt; a worker that has joined is never silent for longer than it was told. */
static uint32_t
backoff_ms(const registrar_t *r)
{
    uint32_t shift = r->failures < 10 ? r->failures : 10;
    uint32_t most  = r->heartbeat_ms > 0 ? r->heartbeat_ms : BACKOFF_MOST_MS;

    return (uint32_t)attn_min(most, (uint64_t)BACKOFF_LEAST_MS << shift);
}

/* One call. On ATTN_OK *message_p is the caller's, and *reply_p lies in it. */
static attn_status_t
ask(registrar_t *r, const char *path, const ProtobufCMessage *request,
    const ProtobufCMessageDescriptor *type, rpc_message_t **message_p, ProtobufCMessage **reply_p)
{
    uint64_t deadline    = attn_now_ns() + CALL_TIMEOUT_MS * ATTN_NS_PER_MS;
    attn_status_t status = rpc_call_unary_wait(r->channel, path, &(rpc_outgoing_t){.head = request},
                                               deadline, message_p);

    if (status == ATTN_OK && (status = rpc_message_unpack(*message_p, type, reply_p)) != ATTN_OK) {
        rpc_message_free(*message_p);
    }
    return status;
}

/* Come as somebody new: whatever a coordinator placed here is gone. */
static void
start_over(registrar_t *r, const char *reason)
{
    worker_t *worker = r->worker;
    engine_info_t info;

    engine_describe(worker->engine, &info);
    attn_log(info.caches > 0 ? ATTN_LOG_WARN : ATTN_LOG_DEBUG, "worker.start_over",
             "caches_dropped=%llu chunks_dropped=%llu reason=\"%s\"",
             (unsigned long long)info.caches, (unsigned long long)info.chunks, reason);
    engine_caches_close(worker->engine);
    atomic_store(&worker->incarnation, process_random());
}

static attn_status_t
join(registrar_t *r)
{
    worker_t *worker = r->worker;
    Attn__V1__WorkerInfo info;
    char ways[WORKER_WAYS_ROOM];
    Attn__V1__JoinRequest request = ATTN__V1__JOIN_REQUEST__INIT;
    rpc_message_t *message;
    ProtobufCMessage *head = NULL;
    engine_info_t engine;

    engine_describe(worker->engine, &engine);
    worker_describe(worker, &info, ways);
    request.worker         = &info;
    request.read_bandwidth = engine.speed.read_bandwidth;
    gate_joining(&worker->gate);
    attn_status_t status             = ask(r, "/attn.v1.Coordinator/Join", &request.base,
                                           &attn__v1__join_reply__descriptor, &message, &head);
    const Attn__V1__JoinReply *reply = (const Attn__V1__JoinReply *)head;
    if (status == ATTN_OK && reply->ticket_secret.len != TICKET_SECRET) {
        status =
            attn_fail(ATTN_ERR_UNSUPPORTED, "the coordinator's ticket_secret has %zu bytes, not %u",
                      reply->ticket_secret.len, TICKET_SECRET);
        rpc_message_free(message);
    }
    if (status != ATTN_OK) {
        gate_joined(&worker->gate, NULL, 0);
        return status;
    }
    atomic_store(&worker->id, reply->worker_id);
    r->heartbeat_ms =
        (uint32_t)attn_max(HEARTBEAT_LEAST_MS, attn_min(reply->heartbeat_ms, HEARTBEAT_MOST_MS));
    engine_set_epoch(worker->engine, reply->epoch);
    attn_log(ATTN_LOG_INFO, "worker.joined", "worker=%u epoch=%llu coordinator=%s instance=%016llx",
             reply->worker_id, (unsigned long long)reply->epoch, worker->options.coordinator,
             (unsigned long long)reply->instance);
    gate_joined(&worker->gate, reply->ticket_secret.data, reply->ticket_period);
    rpc_message_free(message);
    return ATTN_OK;
}

static attn_status_t
heartbeat(registrar_t *r)
{
    Attn__V1__WorkerInfo info;
    char ways[WORKER_WAYS_ROOM];
    Attn__V1__HeartbeatRequest request = ATTN__V1__HEARTBEAT_REQUEST__INIT;
    rpc_message_t *message;
    ProtobufCMessage *head;

    worker_describe(r->worker, &info, ways);
    request.worker       = &info;
    attn_status_t status = ask(r, "/attn.v1.Coordinator/Heartbeat", &request.base,
                               &attn__v1__heartbeat_reply__descriptor, &message, &head);
    if (status == ATTN_OK) {
        const Attn__V1__HeartbeatReply *reply = (const Attn__V1__HeartbeatReply *)head;
        engine_set_epoch(r->worker->engine, reply->epoch);
        gate_period(&r->worker->gate, reply->ticket_period);
        rpc_message_free(message);
    }
    return status;
}

/* Log the first failure in a row, and its end. */
static void
note(registrar_t *r, attn_status_t status)
{
    meter_add(status == ATTN_OK ? &meter.heartbeats : &meter.heartbeats_failed, 1);
    if (status == ATTN_OK) {
        atomic_store(&r->worker->heard_ns, attn_now_ns());
        if (r->failures > 0) {
            attn_log(ATTN_LOG_INFO, "worker.coordinator_back", "coordinator=%s failures=%u",
                     r->worker->options.coordinator, r->failures);
        }
        if (!r->said_joined) {
            process_notify("STATUS=worker %u of %s", atomic_load(&r->worker->id),
                           r->worker->options.coordinator);
        }
        r->said_joined = true;
        r->failures    = 0;
    } else if (r->failures++ == 0) {
        process_notify("STATUS=waiting for the coordinator at %s", r->worker->options.coordinator);
        r->said_joined = false;
        attn_log(ATTN_LOG_WARN, "worker.coordinator_away", "coordinator=%s status=%s reason=\"%s\"",
                 r->worker->options.coordinator, attn_strerror(status), attn_last_error());
    }
}

/* Until joined. @return false when it is time to stop */
static bool
join_until_joined(registrar_t *r)
{
    for (;;) {
        attn_status_t status = join(r);
        note(r, status);
        if (status == ATTN_OK) {
            process_ready(r->worker->address);
            return true;
        }
        /* The coordinator may have heard us without our hearing it: what it opened here since
         * would not be known to the next one. */
        start_over(r, attn_last_error());
        if (!pause_ms(r, backoff_ms(r))) {
            return false;
        }
    }
}

static void *
registrar_thread(void *arg)
{
    registrar_t *r = arg;

    while (join_until_joined(r)) {
        attn_status_t status = ATTN_OK;
        while (status != ATTN_ERR_NOT_FOUND) {
            if (!pause_ms(r, status == ATTN_OK ? r->heartbeat_ms : backoff_ms(r))) {
                return NULL;
            }
            status = heartbeat(r);
            if (status != ATTN_ERR_NOT_FOUND) {
                note(r, status);
            }
        }
        start_over(r, attn_last_error());
        r->failures    = 0;
        r->said_joined = false;
    }
    return NULL;
}

attn_status_t
registrar_start(worker_t *worker, registrar_t **registrar_p)
{
    pthread_condattr_t monotonic;
    registrar_t *r = calloc(1, sizeof(*r));

    if (r == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory to join the coordinator");
    }
    r->worker = worker;
    pthread_mutex_init(&r->lock, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&r->stopped, &monotonic);
    pthread_condattr_destroy(&monotonic);

    attn_status_t status = rpc_client_create(0, &r->rpc);
    if (status == ATTN_OK) {
        rpc_client_set_tls(r->rpc, worker->certs.tls, NULL);
        if (worker->join_secret[0] != '\0') {
            rpc_client_set_header(r->rpc, JOIN_HEADER, worker->join_secret);
        }
        status = rpc_channel_open(r->rpc, worker->options.coordinator, &r->channel);
    }
    if (status == ATTN_OK && pthread_create(&r->thread, NULL, registrar_thread, r) != 0) {
        status = attn_fail(ATTN_ERR_EXHAUSTED, "no thread to join the coordinator");
    }
    if (status != ATTN_OK) {
        rpc_channel_close(r->channel);
        rpc_client_destroy(r->rpc);
        free(r);
        return status;
    }
    *registrar_p = r;
    return ATTN_OK;
}

void
registrar_stop(registrar_t *r)
{
    if (r == NULL) {
        return;
    }
    pthread_mutex_lock(&r->lock);
    r->stop = true;
    pthread_cond_broadcast(&r->stopped);
    pthread_mutex_unlock(&r->lock);
    pthread_join(r->thread, NULL);
    rpc_channel_close(r->channel);
    rpc_client_destroy(r->rpc);
    pthread_cond_destroy(&r->stopped);
    pthread_mutex_destroy(&r->lock);
    free(r);
}
