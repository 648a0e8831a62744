#include "client/slab.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define OPEN_MS_MAX 2000u  /* for a worker to answer, before runs go over gRPC */
#define RETRY_MS 10000u    /* after a refusal */
#define RETRY_SOON_MS 500u /* after silence, which the step will meet, too */

struct slabs {
    rpc_client_t *rpc;
    ucx_asks_t *asks;
    rpc_channel_t *channel;
    char address[128];
    uint64_t bytes;
    const char *network;

    pthread_mutex_t lock;
    pthread_cond_t opened;
    uint32_t references; /* the link's, and one of each slab whose stream has not ended */
    slab_t *current;     /* one of its users; NULL: none */
    bool opening;        /* a thread is at it */
    uint64_t retry_ns, tries;
    attn_status_t status; /* of the last try */
    char reason[256];
    uint64_t lost;
};

struct slab {
    slabs_t *slabs;
    rpc_stream_t *stream;
    ucx_peer_t *peer; /* NULL: not mapped */
    uint64_t session, secret;

    pthread_mutex_t lock;
    uint32_t references;  /* the stream's until its end came, and all its users' together */
    uint32_t users;       /* the last of them closes the stream */
    atomic_bool answered; /* the offer came, or the end */
    bool offered, ended;
    attn_status_t status; /* of the end */
    char sentence[256];
    rpc_message_t *message; /* the offer's */
    Attn__V1__SlabReply *offer;
    link_step_t *awaiting; /* steps whose runs wait for answers */
    slab_gpu_t gpu;
    slab_lanes_t lanes;
};

/* ---- life ---- */

static void
slabs_unref(slabs_t *slabs)
{
    pthread_mutex_lock(&slabs->lock);
    bool last = --slabs->references == 0;
    pthread_mutex_unlock(&slabs->lock);
    if (last) {
        pthread_cond_destroy(&slabs->opened);
        pthread_mutex_destroy(&slabs->lock);
        free(slabs);
    }
}

static void
slab_unref(slab_t *slab)
{
    pthread_mutex_lock(&slab->lock);
    bool last = --slab->references == 0;
    pthread_mutex_unlock(&slab->lock);
    if (last) {
        if (slab->peer != NULL) {
            ucx_peer_close(slab->peer);
        }
        slabs_unref(slab->slabs);
        rpc_message_free(slab->message);
        slab_gpu_fini(&slab->gpu);
        slab_lanes_fini(&slab->lanes);
        pthread_mutex_destroy(&slab->lock);
        free(slab);
    }
}

/* With the last user the stream goes, and with that the worker frees the memory. */
void
slab_release(slab_t *slab)
{
    pthread_mutex_lock(&slab->lock);
    bool last = --slab->users == 0;
    pthread_mutex_unlock(&slab->lock);
    if (last) {
        slab_gpu_unmap(&slab->gpu);
        rpc_stream_close(slab->stream); /* its end drops the stream's reference */
        slab_unref(slab);
    }
}

/* Not for later steps, if it is the one that they would get. */
static void
drop_current(slab_t *slab)
{
    slabs_t *slabs = slab->slabs;

    pthread_mutex_lock(&slabs->lock);
    bool was = slabs->current == slab;
    if (was) {
        slabs->current = NULL;
        slabs->lost++;
    }
    pthread_mutex_unlock(&slabs->lock);
    if (was) {
        slab_release(slab);
    }
}

void
slab_spoil(slab_t *slab)
{
    drop_current(slab);
}

/* ---- the stream ---- */

/* The next step whose run will not be answered: its pipe with a reference. Under the lock. */
static pipe_t *
take_awaiting(slab_t *slab, uint64_t *number)
{
    link_step_t *step = slab->awaiting;

    if (step == NULL) {
        return NULL;
    }
    slab->awaiting = step->next;
    if (step->next != NULL) {
        step->next->listed = &slab->awaiting;
    }
    step->listed = NULL;
    *number      = step->number;
    pipe_ref(step->pipe);
    return step->pipe;
}

static void
fail_awaiting(slab_t *slab)
{
    uint64_t number;
    pipe_t *pipe;

    do {
        pthread_mutex_lock(&slab->lock);
        pipe = take_awaiting(slab, &number);
        pthread_mutex_unlock(&slab->lock);
        if (pipe != NULL) {
            pipe_run_answered(pipe, number, ATTN_ERR_UNAVAILABLE,
                              "the worker gave up the shared memory of this run", NULL, 0, 0);
            pipe_unref(pipe);
        }
    } while (pipe != NULL);
}

static void
on_end(slab_t *slab, attn_status_t status, const char *sentence)
{
    pthread_mutex_lock(&slab->lock);
    slab->ended  = true;
    slab->status = status != ATTN_OK ? status : ATTN_ERR_UNAVAILABLE;
    snprintf(slab->sentence, sizeof(slab->sentence), "%s",
             status != ATTN_OK ? sentence : "the worker ended the stream");
    pthread_mutex_unlock(&slab->lock);
    atomic_store(&slab->answered, true);
    drop_current(slab);
    slab_lanes_lost(&slab->lanes);
    fail_awaiting(slab);
    slab_unref(slab);
}

static void
on_received(void *arg, attn_status_t status, const char *sentence, rpc_message_t *message)
{
    slab_t *slab = arg;
    ProtobufCMessage *head;

    if (message == NULL) {
        on_end(slab, status, sentence);
        return;
    }
    if (!atomic_load(&slab->answered)) {
        pthread_mutex_lock(&slab->lock);
        slab->offered =
            rpc_message_unpack(message, &attn__v1__slab_reply__descriptor, &head) == ATTN_OK;
        slab->message = message;
        slab->offer   = slab->offered ? (Attn__V1__SlabReply *)head : NULL;
        pthread_mutex_unlock(&slab->lock);
        atomic_store(&slab->answered, true);
        return;
    }
    if (slab_gpu_is_asked(&slab->gpu) &&
        rpc_message_unpack(message, &attn__v1__slab_reply__descriptor, &head) == ATTN_OK &&
        ((const Attn__V1__SlabReply *)head)->gpu_slab != NULL) {
        slab_lanes_offered(&slab->lanes, ((const Attn__V1__SlabReply *)head)->gpu_slab);
        slab_gpu_answered(&slab->gpu, ((const Attn__V1__SlabReply *)head)->gpu_slab);
    }
    rpc_message_free(message); /* else a ring: its coming is all it says */
    ucx_asks_look(slab->slabs->asks);
}

static bool
is_answered(void *arg)
{
    return atomic_load(&((slab_t *)arg)->answered);
}

/* Ask for a slab, and wait for the offer. maps: of shared memory, if we are on one host. */
static attn_status_t
ask(slab_t *slab, bool maps, uint64_t deadline_ns)
{
    Attn__V1__SlabRequest request = ATTN__V1__SLAB_REQUEST__INIT;
    char host[96]                 = "";

    if (maps) {
        ucx_host(host);
    }
    request.bytes = slab->slabs->bytes;
    request.host  = host;
    rpc_stream_send(slab->stream, &(rpc_outgoing_t){.head = &request.base});
    if (!rpc_client_wait(slab->slabs->rpc, is_answered, slab, deadline_ns)) {
        return attn_fail(ATTN_ERR_DEADLINE, "the worker did not answer in time");
    }
    pthread_mutex_lock(&slab->lock);
    attn_status_t status = slab->offered ? ATTN_OK
                           : slab->ended ? attn_fail(slab->status, "%s", slab->sentence)
                                         : attn_fail(ATTN_ERR_INTERNAL, "the offer is none");
    pthread_mutex_unlock(&slab->lock);
    return status;
}

/* If messages were offered: say where answers go, and see that they come through. */
static attn_status_t
greet(slab_t *slab, uint64_t deadline_ns)
{
    Attn__V1__SlabRequest request = ATTN__V1__SLAB_REQUEST__INIT;
    const uint8_t *address;
    uint64_t size;

    if (!ucx_peer_address(slab->peer, &address, &size)) {
        return ATTN_OK;
    }
    request.address.data = (uint8_t *)address;
    request.address.len  = size;
    request.host         = "";
    rpc_stream_send(slab->stream, &(rpc_outgoing_t){.head = &request.base});
    return ucx_peer_greet(slab->peer, deadline_ns);
}

static bool
is_without_messages(const slabs_t *slabs)
{
    return slabs->network != NULL && slabs->network[0] == '\0';
}

static attn_status_t
map(slab_t *slab)
{
    const Attn__V1__SlabReply *r = slab->offer;
    ucx_offer_t offer            = {.address      = r->address.data,
                                    .address_size = r->address.len,
                                    .key          = r->key.data,
                                    .key_size     = r->key.len,
                                    .base         = r->at,
                                    .bytes        = r->bytes,
                                    .session      = r->session,
                                    .secret       = r->secret,
                                    .messages     = r->messages,
                                    .reach        = slab->slabs->address,
                                    .devices      = slab->slabs->network};

    if (r->messages && is_without_messages(slab->slabs)) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "messages of UCX's are not taken here");
    }
    snprintf(offer.host, sizeof(offer.host), "%s", r->host);
    snprintf(offer.version, sizeof(offer.version), "%s", r->ucx_version);
    slab->session = r->session;
    slab->secret  = r->secret;
    slab_gpu_offered(&slab->gpu, r);
    return ucx_peer_open(slab->slabs->asks, &offer, &slab->peer);
}

static attn_status_t
slab_open(slabs_t *slabs, bool maps, uint64_t deadline_ns, slab_t **slab_p)
{
    slab_t *slab = calloc(1, sizeof(*slab));

    if (slab == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a slab");
    }
    slab->slabs      = slabs;
    slab->references = 2;
    slab->users      = 1;
    pthread_mutex_init(&slab->lock, NULL);
    slab_gpu_init(&slab->gpu);
    slab_lanes_init(&slab->lanes);
    attn_status_t status = rpc_stream_open(slabs->channel, "/attn.v1.Worker/Slab", UINT64_MAX,
                                           on_received, slab, &slab->stream);
    if (status != ATTN_OK) {
        slab_gpu_fini(&slab->gpu);
        slab_lanes_fini(&slab->lanes);
        pthread_mutex_destroy(&slab->lock);
        free(slab);
        return status;
    }
    pthread_mutex_lock(&slabs->lock);
    slabs->references++;
    pthread_mutex_unlock(&slabs->lock);
    status = ask(slab, maps, deadline_ns);
    if (status == ATTN_OK) {
        status = map(slab);
    }
    if (status == ATTN_OK) {
        status = greet(slab, deadline_ns);
    }
    if (status != ATTN_OK) {
        slab_release(slab);
        return status;
    }
    *slab_p = slab;
    return ATTN_OK;
}

/* Through shared memory; if that is lent and cannot be mapped, as messages. */
static attn_status_t
slab_open_either(slabs_t *slabs, uint64_t deadline_ns, slab_t **slab_p)
{
    char reason[sizeof(slabs->reason)];

    attn_status_t status = slab_open(slabs, true, deadline_ns, slab_p);
    if (status != ATTN_ERR_UNSUPPORTED || is_without_messages(slabs)) {
        return status;
    }
    snprintf(reason, sizeof(reason), "%s", attn_last_error());
    return slab_open(slabs, false, deadline_ns, slab_p) == ATTN_OK
               ? ATTN_OK
               : attn_fail(status, "%s", reason);
}

/* ---- the slab that now is ---- */

/* Keep what came of a try, and say so where it is news. Under the lock. */
static void
note_try(slabs_t *slabs, attn_status_t status, const slab_t *slab)
{
    bool refused = status != ATTN_OK && status != ATTN_ERR_UNAVAILABLE &&
                   status != ATTN_ERR_DEADLINE && status != ATTN_ERR_CANCELLED;
    bool news = refused || status == ATTN_OK;
    char reason[sizeof(slabs->reason)];

    snprintf(reason, sizeof(reason), "%s", status != ATTN_OK ? attn_last_error() : "");
    news = news && (slabs->tries == 0 || strcmp(reason, slabs->reason) != 0);
    slabs->tries++;
    slabs->status   = status;
    slabs->retry_ns = attn_now_ns() + (refused ? RETRY_MS : RETRY_SOON_MS) * ATTN_NS_PER_MS;
    if (status == ATTN_ERR_DENIED) { /* the next try may have another ticket */
        slabs->retry_ns = 0;
    }
    memcpy(slabs->reason, reason, sizeof(reason));
    if (news) {
        attn_log(refused && status != ATTN_ERR_UNSUPPORTED ? ATTN_LOG_WARN : ATTN_LOG_INFO,
                 "client.transport", "worker=%s transport=%s%s reason=\"%s\"", slabs->address,
                 status != ATTN_OK ? "grpc" : "ucx-",
                 status != ATTN_OK ? "" : ucx_peer_way(slab->peer), reason);
    }
}

/* Wait while another thread opens one. Under the lock. @return false: not in time */
static bool
await_opener(slabs_t *slabs, uint64_t deadline_ns)
{
    struct timespec until = {.tv_sec  = (time_t)(deadline_ns / 1000000000u),
                             .tv_nsec = (long)(deadline_ns % 1000000000u)};

    while (slabs->opening) {
        if (pthread_cond_timedwait(&slabs->opened, &slabs->lock, &until) != 0 && slabs->opening) {
            return false;
        }
    }
    return true;
}

static attn_status_t
take_current(slabs_t *slabs, slab_t **slab_p)
{
    *slab_p = slabs->current;
    pthread_mutex_lock(&slabs->current->lock);
    slabs->current->users++;
    pthread_mutex_unlock(&slabs->current->lock);
    return ATTN_OK;
}

/* Nobody else is at it. Under the lock, given up meanwhile. */
static attn_status_t
open_current(slabs_t *slabs, uint64_t deadline_ns, slab_t **slab_p)
{
    slab_t *slab   = NULL;
    slabs->opening = true;
    pthread_mutex_unlock(&slabs->lock);
    attn_status_t status = slab_open_either(slabs, deadline_ns, &slab);
    pthread_mutex_lock(&slabs->lock);
    slabs->opening = false;
    note_try(slabs, status, slab);
    pthread_cond_broadcast(&slabs->opened);
    if (status != ATTN_OK) {
        return status;
    }
    pthread_mutex_lock(&slab->lock);
    if (!slab->ended) { /* if it has by now, who told so did not find it here */
        slabs->current = slab;
        slab->users++;
    }
    pthread_mutex_unlock(&slab->lock);
    *slab_p = slab;
    return ATTN_OK;
}

/* A slab whose messages go nowhere is not for another step. */
static void
drop_broken(slabs_t *slabs)
{
    pthread_mutex_lock(&slabs->lock);
    slab_t *slab = slabs->current;
    if (slab != NULL && ucx_peer_is_broken(slab->peer)) {
        slabs->current = NULL;
        slabs->lost++;
    } else {
        slab = NULL;
    }
    pthread_mutex_unlock(&slabs->lock);
    if (slab != NULL) {
        slab_release(slab);
    }
}

attn_status_t
slabs_take(slabs_t *slabs, uint64_t deadline_ns, slab_t **slab_p)
{
    uint64_t until = attn_min(deadline_ns, attn_now_ns() + OPEN_MS_MAX * ATTN_NS_PER_MS);
    attn_status_t status;

    drop_broken(slabs);
    pthread_mutex_lock(&slabs->lock);
    if (!await_opener(slabs, until)) {
        status = attn_fail(ATTN_ERR_DEADLINE, "the worker did not answer in time");
    } else if (slabs->current != NULL) {
        status = take_current(slabs, slab_p);
    } else if (slabs->status != ATTN_OK && attn_now_ns() < slabs->retry_ns) {
        status = attn_fail(slabs->status, "%s", slabs->reason);
    } else {
        status = open_current(slabs, until, slab_p);
    }
    pthread_mutex_unlock(&slabs->lock);
    return status;
}

/* ---- for steps ---- */

slab_gpu_t *
slab_gpu(slab_t *slab)
{
    return &slab->gpu;
}

slab_lanes_t *
slab_lanes(slab_t *slab)
{
    return &slab->lanes;
}

static bool
has_said_of_gpu(void *arg)
{
    slab_t *slab = arg;

    pthread_mutex_lock(&slab->lock);
    bool ended = slab->ended;
    pthread_mutex_unlock(&slab->lock);
    return ended || !slab_gpu_is_asked(&slab->gpu);
}

bool
slab_ask_gpu(slab_t *slab, uint64_t until_ns)
{
    Attn__V1__SlabRequest request = ATTN__V1__SLAB_REQUEST__INIT;
    uint64_t most                 = attn_now_ns() + OPEN_MS_MAX * ATTN_NS_PER_MS;

    if (slab_gpu_is_to_ask(&slab->gpu)) {
        request.host = "";
        request.gpu  = true;
        rpc_stream_send(slab->stream, &(rpc_outgoing_t){.head = &request.base});
    }
    if (until_ns > 0) {
        rpc_client_wait(slab->slabs->rpc, has_said_of_gpu, slab, attn_min(until_ns, most));
    }
    return slab_gpu_is_lent(&slab->gpu);
}

ucx_peer_t *
slab_peer(slab_t *slab)
{
    return slab->peer;
}

void
slab_slot(const slab_t *slab, const ucx_place_t *place, Attn__V1__Slot *slot)
{
    attn__v1__slot__init(slot);
    slot->session = slab->session;
    slot->secret  = slab->secret;
    slot->offset  = place->offset;
    slot->in      = place->in;
    slot->out     = place->out;
}

void
slab_await(slab_t *slab, link_step_t *step, uint64_t number)
{
    pthread_mutex_lock(&slab->lock);
    step->number = number;
    if (step->listed == NULL) {
        step->next   = slab->awaiting;
        step->listed = &slab->awaiting;
        if (step->next != NULL) {
            step->next->listed = &step->next;
        }
        slab->awaiting = step;
    }
    bool ended = slab->ended;
    pthread_mutex_unlock(&slab->lock);
    if (ended) {
        fail_awaiting(slab);
    }
}

void
slab_await_no_more(link_step_t *step)
{
    slab_t *slab = step->slab;

    pthread_mutex_lock(&slab->lock);
    if (step->listed != NULL) {
        *step->listed = step->next;
        if (step->next != NULL) {
            step->next->listed = step->listed;
        }
        step->listed = NULL;
    }
    pthread_mutex_unlock(&slab->lock);
}

/* ---- life ---- */

void
slabs_describe(slabs_t *slabs, attn_link_info_t *info)
{
    pthread_mutex_lock(&slabs->lock);
    if (slabs->current != NULL) {
        snprintf(info->transport, sizeof(info->transport), "ucx %.11s",
                 ucx_peer_way(slabs->current->peer));
    } else {
        snprintf(info->transport, sizeof(info->transport), "grpc");
    }
    snprintf(info->reason, sizeof(info->reason), "%s", slabs->reason);
    info->slabs_lost = slabs->lost;
    pthread_mutex_unlock(&slabs->lock);
}

attn_status_t
slabs_create(const slabs_options_t *options, slabs_t **slabs_p)
{
    slabs_t *slabs = calloc(1, sizeof(*slabs));
    pthread_condattr_t clock;

    if (slabs == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a link");
    }
    slabs->rpc        = options->rpc;
    slabs->asks       = options->asks;
    slabs->channel    = options->channel;
    slabs->bytes      = options->bytes;
    slabs->network    = options->network;
    slabs->references = 1;
    snprintf(slabs->address, sizeof(slabs->address), "%s", options->address);
    pthread_mutex_init(&slabs->lock, NULL);
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_cond_init(&slabs->opened, &clock);
    pthread_condattr_destroy(&clock);
    *slabs_p = slabs;
    return ATTN_OK;
}

void
slabs_rest(slabs_t *slabs)
{
    pthread_mutex_lock(&slabs->lock);
    slab_t *slab   = slabs->current;
    slabs->current = NULL;
    pthread_mutex_unlock(&slabs->lock);
    if (slab != NULL) {
        slab_release(slab);
    }
}

void
slabs_destroy(slabs_t *slabs)
{
    if (slabs != NULL) {
        slabs_rest(slabs);
        slabs_unref(slabs);
    }
}
