#include "daemon/lender.h"

#include "base/checked.h"
#include "base/log.h"
#include "base/status.h"
#include "client/link.h"
#include "client/slab_card.h"
#include "daemon/meter.h"
#include "daemon/steps_int.h"
#include "daemon/ticket.h"
#include "kernels/memory.h"

#include <pthread.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define GPU_WAIT_NS (5000 * ATTN_NS_PER_MS) /* for what a GPU has still to do, at the end */

struct lender {
    steps_t *steps;
    lender_options_t options;
    ucx_crew_t *crew; /* of shared memory; NULL: none is lent, because ... */
    char reason[256];
    ucx_crew_t *far; /* of messages; NULL: none are taken, because ... */
    char far_reason[256];
    lender_gpu_t *gpu;
    pthread_mutex_t lock;
    struct lending *lendings; /* under the lock */
};

/* A stream that a slab is lent on. */
typedef struct lending {
    lender_t *lender;
    rpc_call_t *call;
    ucx_session_t *session;
    gpu_slab_t *gpu;     /* NULL: none; under the lender's lock, as what follows */
    struct gpu_ask *ask; /* for it, under way */
    struct lending *next, **link;
} lending_t;

/* Memory of the GPU is being taken for a stream. */
typedef struct gpu_ask {
    attn_errand_t errand;
    lender_t *lender;
    lending_t *lending; /* NULL: the stream has ended */
    ucx_offer_t offer;  /* of its slab */
} gpu_ask_t;

/* ---- the streams ---- */

/* The client sleeps: any message wakes it. The session does not call this after it was closed. */
static void
ring(void *arg)
{
    lending_t *lending        = arg;
    Attn__V1__SlabReply reply = ATTN__V1__SLAB_REPLY__INIT;

    rpc_call_send(lending->call, &(rpc_outgoing_t){.head = &reply.base});
}

static attn_status_t
drain_check(const lender_t *lender)
{
    return atomic_load(&lender->steps->draining)
               ? attn_fail(ATTN_ERR_CANCELLED,
                           "draining: this daemon is going down, and lends no more memory")
               : ATTN_OK;
}

/* Among those whose streams lender_end_streams() ends: it comes after steps_drain(), so that what
 * is not listed by then is refused here. */
static attn_status_t
list(lender_t *lender, lending_t *lending)
{
    pthread_mutex_lock(&lender->lock);
    attn_status_t status = drain_check(lender);
    if (status == ATTN_OK) {
        lending->next = lender->lendings;
        lending->link = &lender->lendings;
        if (lending->next != NULL) {
            lending->next->link = &lending->next;
        }
        lender->lendings = lending;
    }
    pthread_mutex_unlock(&lender->lock);
    return status;
}

/* Who serves a client that says it is there: shared memory where both can have it. */
static attn_status_t
choose(const lender_t *lender, const char *client_host, ucx_crew_t **crew_p)
{
    char host[96];

    ucx_host(host);
    bool here = host[0] != '\0' && strcmp(client_host, host) == 0;
    *crew_p   = here && lender->crew != NULL ? lender->crew : lender->far;
    if (*crew_p != NULL) {
        return ATTN_OK;
    }
    return here ? attn_fail(ATTN_ERR_UNSUPPORTED, "%s", lender->reason)
                : attn_fail(ATTN_ERR_UNSUPPORTED,
                            "the client is on another host, or in another IPC namespace, and %s",
                            lender->far_reason);
}

static attn_status_t
lend(lender_t *lender, rpc_call_t *call, const Attn__V1__SlabRequest *request,
     lending_t **lending_p)
{
    ucx_crew_t *crew;

    attn_status_t status = choose(lender, request->host, &crew);
    if (status != ATTN_OK) {
        return status;
    }
    lending_t *lending = calloc(1, sizeof(*lending));
    if (lending == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a session");
    }
    lending->lender = lender;
    lending->call   = call;
    status = ucx_session_open(crew, attn_min(request->bytes, lender->options.slab_bytes), ring,
                              lending, &lending->session);
    if (status != ATTN_OK) {
        free(lending);
        return status;
    }
    if ((status = list(lender, lending)) != ATTN_OK) {
        ucx_session_close(lending->session);
        free(lending);
        return status;
    }
    *lending_p = lending;
    return ATTN_OK;
}

/* Memory of our GPU is for clients of this host alone: they have a slab that is no messages'. */
static bool
offers_gpu(const lending_t *lending)
{
    ucx_offer_t offered;

    ucx_session_offer(lending->session, &offered);
    return !offered.messages && lender_gpu_lends(lending->lender->gpu);
}

static attn_status_t
offer(const lending_t *lending)
{
    Attn__V1__SlabReply reply = ATTN__V1__SLAB_REPLY__INIT;
    ucx_offer_t offered;

    ucx_session_offer(lending->session, &offered);
    reply.session      = offered.session;
    reply.secret       = offered.secret;
    reply.host         = offered.host;
    reply.address.data = (uint8_t *)offered.address;
    reply.address.len  = offered.address_size;
    reply.key.data     = (uint8_t *)offered.key;
    reply.key.len      = offered.key_size;
    reply.at           = offered.base;
    reply.bytes        = offered.bytes;
    reply.messages     = offered.messages;
    reply.ucx_version  = offered.version;
    reply.gpu          = offers_gpu(lending);
    return rpc_call_send(lending->call, &(rpc_outgoing_t){.head = &reply.base});
}

/* The first message of a stream. */
static attn_status_t
begin_lending(lender_t *lender, rpc_call_t *call, rpc_message_t *message)
{
    ProtobufCMessage *head;
    lending_t *lending = NULL;

    attn_status_t status = steps_admit(lender->steps, rpc_call_metadata(call, TICKET_HEADER));
    if (status == ATTN_OK) {
        status = drain_check(lender);
    }
    if (status == ATTN_OK) {
        status = rpc_message_unpack(message, &attn__v1__slab_request__descriptor, &head);
    }
    if (status == ATTN_OK) {
        status = lend(lender, call, (const Attn__V1__SlabRequest *)head, &lending);
    }
    if (status == ATTN_OK) {
        rpc_call_set_context(call, lending); /* from here on slab_closed() gives it back */
        status = offer(lending);
    }
    return status;
}

/* Messages neither come nor go: the client is told by the stream's end. The session does not call
 * this after it was closed. */
static void
broken(void *arg, const char *why)
{
    lending_t *lending = arg;
    char sentence[160];

    snprintf(sentence, sizeof(sentence), "the connection to the client broke, UCX says: %s", why);
    attn_log(ATTN_LOG_INFO, "worker.ucx_broken", "reason=\"%s\"", why);
    rpc_call_end(lending->call, ATTN_ERR_UNAVAILABLE, sentence);
}

/* What came of an ask: the stream is told, if it is there still. Under the lock, so that it stays.
 * @return whether the memory is the stream's now */
static bool
answer_ask(lending_t *lending, gpu_slab_t *slab, const Attn__V1__GpuSlab *words)
{
    Attn__V1__SlabReply reply = ATTN__V1__SLAB_REPLY__INIT;

    if (lending == NULL) {
        return false;
    }
    reply.gpu_slab       = (Attn__V1__GpuSlab *)words;
    lending->ask         = NULL;
    lending->gpu         = slab;
    attn_status_t status = rpc_call_send(lending->call, &(rpc_outgoing_t){.head = &reply.base});
    if (status != ATTN_OK) {
        rpc_call_end(lending->call, status, attn_last_error());
    }
    return true;
}

/* Memory of our GPU beside the slab. Where there is none the client is told why, and goes on. */
static void
take_gpu(attn_errand_t *errand)
{
    gpu_ask_t *ask          = (gpu_ask_t *)(void *)((char *)errand - offsetof(gpu_ask_t, errand));
    lender_t *lender        = ask->lender;
    Attn__V1__GpuSlab words = ATTN__V1__GPU_SLAB__INIT;
    gpu_slab_t *slab        = NULL;
    attn_status_t status    = gpu_slab_open(lender->gpu, &ask->offer, &slab);

    if (status == ATTN_OK) {
        words.key.data   = (uint8_t *)gpu_slab_key(slab);
        words.key.len    = ATTN_SHARED_KEY;
        words.gpu.data   = (uint8_t *)gpu_slab_uuid(slab);
        words.gpu.len    = ATTN_UUID;
        words.lanes      = SLAB_LANES;
        words.lane_bytes = SLAB_LANE_BYTES;
    } else {
        words.refused = (char *)attn_last_error();
        words.again   = status != ATTN_ERR_UNSUPPORTED;
        attn_log(ATTN_LOG_INFO, "worker.no_gpu_slab", "reason=\"%s\"", attn_last_error());
    }
    pthread_mutex_lock(&lender->lock);
    bool taken = answer_ask(ask->lending, slab, &words);
    pthread_mutex_unlock(&lender->lock);
    if (!taken) {
        gpu_slab_unref(slab);
    }
    free(ask);
}

/* The driver may wait for the device, and so may not this handler. */
static attn_status_t
ask_gpu(lending_t *lending)
{
    lender_t *lender = lending->lender;

    if (!offers_gpu(lending)) {
        return attn_fail(ATTN_ERR_INVALID, "no memory of a GPU was offered");
    }
    gpu_ask_t *ask = calloc(1, sizeof(*ask));
    if (ask == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory to lend some of a GPU");
    }
    ask->errand.run = take_gpu;
    ask->lender     = lender;
    ask->lending    = lending;
    ucx_session_offer(lending->session, &ask->offer);
    pthread_mutex_lock(&lender->lock);
    bool first   = lending->gpu == NULL && lending->ask == NULL;
    lending->ask = first ? ask : lending->ask;
    pthread_mutex_unlock(&lender->lock);
    if (!first) {
        free(ask);
        return attn_fail(
            ATTN_ERR_INVALID,
            "memory of the GPU is asked for once a stream, and again if it was refused");
    }
    attn_errand_add(lender_gpu_ordinal(lender->gpu), &ask->errand);
    return ATTN_OK;
}

/* The second message of a stream: where the answers of a session of messages go, or that memory of
 * the GPU is wanted. */
static attn_status_t
take_second(lending_t *lending, rpc_message_t *message)
{
    ProtobufCMessage *head;

    attn_status_t status = rpc_message_unpack(message, &attn__v1__slab_request__descriptor, &head);
    if (status != ATTN_OK) {
        return status;
    }
    if (((const Attn__V1__SlabRequest *)head)->gpu) {
        return ask_gpu(lending);
    }
    const ProtobufCBinaryData *address = &((const Attn__V1__SlabRequest *)head)->address;
    return address->len > 0
               ? ucx_session_answer(lending->session, address->data, address->len, broken)
               : attn_fail(ATTN_ERR_INVALID, "a slab is asked for once a stream");
}

static void
slab_handle(void *service, rpc_call_t *call, rpc_message_t *message)
{
    attn_status_t status;

    if (message == NULL) {
        rpc_call_end(call, ATTN_OK, "");
        return;
    }
    status = rpc_call_context(call) == NULL ? begin_lending(service, call, message)
                                            : take_second(rpc_call_context(call), message);
    rpc_message_free(message);
    if (status == ATTN_OK) {
        rpc_call_next(call, 0); /* none comes: this is to hear of the end */
    } else {
        meter_refused(status);
        rpc_call_end(call, status, attn_last_error());
    }
}

static void
slab_closed(void *service, rpc_call_t *call)
{
    lender_t *lender   = service;
    lending_t *lending = rpc_call_context(call);

    if (lending != NULL) {
        pthread_mutex_lock(&lender->lock); /* so long the call is ended by nobody else */
        *lending->link = lending->next;
        if (lending->next != NULL) {
            lending->next->link = lending->link;
        }
        if (lending->ask != NULL) {
            lending->ask->lending = NULL;
        }
        pthread_mutex_unlock(&lender->lock);
        ucx_session_close(lending->session);
        gpu_slab_unref(lending->gpu);
        free(lending);
    }
}

void
lender_end_streams(lender_t *lender)
{
    pthread_mutex_lock(&lender->lock);
    for (lending_t *l = lender->lendings; l != NULL; l = l->next) {
        rpc_call_end(l->call, ATTN_ERR_CANCELLED, "draining: this daemon is going down");
    }
    pthread_mutex_unlock(&lender->lock);
}

/* ---- the slots of steps ---- */

/* What runs of a slot need; gone with it. */
typedef struct step_slot {
    steps_t *steps;
    uint64_t step_id;
    steps_sizes_t sizes;
    gpu_slab_t *gpu; /* a reference; NULL: runs have their tensors in the slab */
    uint8_t *gpu_in, *gpu_out;
} step_slot_t;

static void
slot_gone(void *arg)
{
    step_slot_t *slot = arg;

    gpu_slab_unref(slot->gpu);
    free(slot);
}

/* Where the tensors of a run are. */
static attn_status_t
tensors_at(const step_slot_t *slot, uint32_t flags, const uint8_t **data, uint8_t **answer)
{
    if ((flags & LINK_ON_GPU) == 0) {
        return ATTN_OK;
    }
    if (slot->gpu == NULL) {
        return attn_fail(ATTN_ERR_INVALID,
                         "no memory of the GPU goes with the slot of step %016llx",
                         (unsigned long long)slot->step_id);
    }
    gpu_slab_count(slot->gpu);
    *data   = slot->gpu_in;
    *answer = slot->gpu_out;
    return ATTN_OK;
}

static attn_status_t
run(void *arg, const ucx_head_t *head, const uint8_t *data, uint8_t *answer, ucx_head_t *reply)
{
    const step_slot_t *slot = arg;
    const steps_sizes_t *s  = &slot->sizes;
    uint64_t start          = attn_now_ns();
    uint64_t q              = (head->flags & LINK_NO_Q) != 0 ? 0 : s->q;
    uint64_t k              = (head->flags & LINK_NO_KV) != 0 ? 0 : s->k;
    uint64_t v              = k > 0 ? s->v : 0;

    if (head->bytes != q + k + v || q + k == 0) {
        return attn_fail(
            ATTN_ERR_INVALID,
            "data has %llu bytes: this run of step %016llx takes %llu (q %llu, k and v "
            "%llu)",
            (unsigned long long)head->bytes, (unsigned long long)slot->step_id,
            (unsigned long long)(q + k + v), (unsigned long long)q, (unsigned long long)(k + v));
    }
    bool answers         = q > 0 && s->answer > 0;
    attn_status_t status = tensors_at(slot, head->flags, &data, &answer);
    if (status != ATTN_OK) {
        return status;
    }
    status =
        slot->steps->ops->run(slot->steps->service, &(steps_layer_t){
                                                        .step_id = slot->step_id,
                                                        .layer   = head->number,
                                                        .q       = q > 0 ? data : NULL,
                                                        .k       = k > 0 ? data + q : NULL,
                                                        .v       = k > 0 ? data + q + k : NULL,
                                                        .answer  = answers ? answer : NULL,
                                                        .sizes   = s,
                                                        .on_gpu  = (head->flags & LINK_ON_GPU) != 0,
                                                        .compute_ns = &reply->took_ns,
                                                    });
    if (status != ATTN_OK) {
        meter_refused(status);
        return status;
    }
    reply->number = head->number;
    reply->bytes  = answers ? s->answer : 0;
    meter_took(&meter.run, start);
    meter_add(&meter.bytes_in, head->bytes);
    meter_add(&meter.bytes_out, reply->bytes);
    return ATTN_OK;
}

static attn_status_t
room_check(const step_slot_t *slot, const ucx_place_t *place)
{
    const steps_sizes_t *s = &slot->sizes;

    return place->in == s->q + s->k + s->v && place->out == s->answer
               ? ATTN_OK
               : attn_fail(ATTN_ERR_INVALID,
                           "the slot has room for %llu and %llu bytes: runs of this step take %llu "
                           "and %llu",
                           (unsigned long long)place->in, (unsigned long long)place->out,
                           (unsigned long long)(s->q + s->k + s->v), (unsigned long long)s->answer);
}

static attn_status_t
session_find(lender_t *lender, uint64_t number, uint64_t secret, ucx_session_t **session_p)
{
    attn_status_t status = ATTN_ERR_NOT_FOUND;

    if (lender->crew != NULL) {
        status = ucx_session_find(lender->crew, number, secret, session_p);
    }
    if (status != ATTN_OK && lender->far != NULL) {
        status = ucx_session_find(lender->far, number, secret, session_p);
    }
    return status;
}

/* The memory of the GPU that goes with a session, with a reference; NULL: none. */
static gpu_slab_t *
gpu_of(lender_t *lender, const ucx_session_t *session)
{
    gpu_slab_t *slab = NULL;

    pthread_mutex_lock(&lender->lock);
    for (lending_t *l = lender->lendings; l != NULL; l = l->next) {
        slab = l->session == session ? l->gpu : slab;
    }
    if (slab != NULL) {
        gpu_slab_ref(slab);
    }
    pthread_mutex_unlock(&lender->lock);
    return slab;
}

/* The place in the GPU's memory that goes with the slot's, if the step can have its tensors there.
 */
static bool
find_gpu(lender_t *lender, const ucx_session_t *session, const ucx_place_t *place,
         step_slot_t *slot)
{
    const steps_ops_t *ops = lender->steps->ops;
    gpu_slab_t *slab       = gpu_of(lender, session);

    if (slab == NULL) {
        attn_fail(ATTN_ERR_NOT_FOUND, "no memory of the GPU was lent with this slab");
        return false;
    }
    if (ops->lend(lender->steps->service, slot->step_id) != ATTN_OK) {
        gpu_slab_unref(slab);
        return false;
    }
    slot->gpu     = slab;
    slot->gpu_in  = gpu_slab_in(slab, place);
    slot->gpu_out = gpu_slab_out(slab, place);
    return true;
}

static void
lane_gone(void *arg)
{
    gpu_slab_unref(arg);
}

attn_status_t
lender_drive(lender_t *lender, uint64_t step_id, const Attn__V1__Slot *asked)
{
    const steps_ops_t *ops = lender->steps->ops;
    ucx_session_t *session;

    if (asked->lane > SLAB_LANES) {
        return attn_fail(ATTN_ERR_INVALID, "lane is %u: 1 to %u", asked->lane, SLAB_LANES);
    }
    attn_status_t status = session_find(lender, asked->session, asked->secret, &session);
    if (status != ATTN_OK) {
        return status;
    }
    gpu_slab_t *slab = gpu_of(lender, session);
    ucx_session_release(session);
    if (slab == NULL) {
        return attn_fail(ATTN_ERR_NOT_FOUND, "no memory of the GPU was lent with this slab");
    }
    status = ops->drive(lender->steps->service, step_id,
                        &(engine_lane_t){.at    = gpu_slab_lane(slab, asked->lane - 1),
                                         .bytes = SLAB_LANE_BYTES,
                                         .first = asked->first,
                                         .gone  = lane_gone,
                                         .arg   = slab});
    if (status != ATTN_OK && status != ATTN_ERR_INTERNAL) {
        gpu_slab_unref(slab);
    }
    return status;
}

attn_status_t
lender_slot_open(lender_t *lender, uint64_t step_id, const Attn__V1__Slot *asked,
                 ucx_slot_t **slot_p, bool *gpu_p)
{
    ucx_place_t place = {.offset = asked->offset, .in = asked->in, .out = asked->out};
    ucx_session_t *session;

    if (lender == NULL || !lender_lends(lender)) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "there is no UCX here");
    }
    step_slot_t *slot = calloc(1, sizeof(*slot));
    if (slot == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a slot");
    }
    slot->steps          = lender->steps;
    slot->step_id        = step_id;
    attn_status_t status = lender->steps->ops->sizes(lender->steps->service, step_id, &slot->sizes);
    if (status == ATTN_OK) {
        status = room_check(slot, &place);
    }
    if (status == ATTN_OK) {
        status = session_find(lender, asked->session, asked->secret, &session);
    }
    if (status == ATTN_OK) { /* which checks the place: before it nobody uses what is found */
        *gpu_p = asked->gpu && find_gpu(lender, session, &place, slot);
        status = ucx_slot_open(session, &place, step_id, run, slot_gone, slot, slot_p);
        ucx_session_release(session);
    }
    if (status != ATTN_OK) {
        *gpu_p = false;
        slot_gone(slot);
    }
    return status;
}

attn_status_t
lender_part_slot_open(lender_t *lender, const Attn__V1__Slot *asked, uint64_t tag,
                      ucx_handle_fn handle, void (*gone)(void *arg), void *arg, ucx_slot_t **slot_p)
{
    ucx_place_t place = {.offset = asked->offset, .in = asked->in, .out = asked->out};
    ucx_session_t *session;

    if (lender == NULL || !lender_lends(lender)) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "there is no UCX here");
    }
    attn_status_t status = session_find(lender, asked->session, asked->secret, &session);
    if (status == ATTN_OK) {
        status = ucx_slot_open(session, &place, tag, handle, gone, arg, slot_p);
        ucx_session_release(session);
    }
    return status;
}

/* ---- life ---- */

bool
lender_lends(const lender_t *lender)
{
    return lender->crew != NULL || lender->far != NULL;
}

static void
crew_describe(ucx_crew_t *crew, ucx_figures_t *figures)
{
    if (crew != NULL) {
        ucx_crew_describe(crew, figures);
    } else {
        *figures = (ucx_figures_t){0};
    }
}

void
lender_describe(lender_t *lender, ucx_figures_t *near, ucx_figures_t *far)
{
    crew_describe(lender->crew, near);
    crew_describe(lender->far, far);
}

void
lender_describe_gpu(lender_t *lender, lender_gpu_figures_t *figures)
{
    lender_gpu_describe(lender->gpu, figures);
}

/* One of the two crews. If it is not to be, or cannot be: why. */
static ucx_crew_t *
crew_start(const lender_options_t *options, const char *network, const char *unwanted, char *reason,
           size_t room)
{
    ucx_crew_options_t crew_options = {
        .network    = network,
        .threads    = options->waiting > 0 ? UCX_CREW_THREADS + options->waiting : 0,
        .spin_us    = options->spin_us,
        .memory_max = options->memory};
    ucx_crew_t *crew = NULL;

    if (unwanted != NULL) {
        snprintf(reason, room, "%s", unwanted);
        attn_log(ATTN_LOG_INFO, "worker.no_ucx", "reason=\"%s\"", reason);
    } else if (ucx_crew_create(&crew_options, &crew) != ATTN_OK) {
        crew = NULL;
        snprintf(reason, room, "%s%s", network != NULL ? "messages cannot be taken: " : "",
                 attn_last_error());
        attn_log(ATTN_LOG_WARN, "worker.no_ucx", "reason=\"%s\"", reason);
    }
    return crew;
}

static void
crews_start(lender_t *lender)
{
    const lender_options_t *options = &lender->options;
    const char *network             = options->network != NULL ? options->network : "";

    lender->crew = crew_start(
        options, NULL,
        options->memory == 0 ? "this worker lends no shared memory: ucx-memory is 0" : NULL,
        lender->reason, sizeof(lender->reason));
    if (network[0] == '\0' || options->memory == 0) { /* as ever, and not worth a line */
        snprintf(lender->far_reason, sizeof(lender->far_reason),
                 "this worker takes no messages of UCX's: %s",
                 options->memory == 0 ? "ucx-memory is 0" : "it has no ucx-net");
        return;
    }
    lender->far =
        crew_start(options, network, NULL, lender->far_reason, sizeof(lender->far_reason));
}

attn_status_t
lender_create(rpc_server_t *server, steps_t *steps, const lender_options_t *options,
              lender_t **lender_p)
{
    static const rpc_method_t method = {.path      = "/attn.v1.Worker/Slab",
                                        .streaming = true,
                                        .handle    = slab_handle,
                                        .closed    = slab_closed};
    lender_t *lender                 = calloc(1, sizeof(*lender));

    if (lender == NULL ||
        lender_gpu_create(options->gpu, options->gpu_memory, &lender->gpu) != ATTN_OK) {
        free(lender);
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for the Slab method");
    }
    lender->steps   = steps;
    lender->options = *options;
    pthread_mutex_init(&lender->lock, NULL);
    *lender_p = lender; /* also when it fails: the server may know of it, so destroy it after */
    crews_start(lender);
    steps_set_lender(steps, lender);
    return rpc_server_add(server, &method, 1, lender);
}

void
lender_destroy(lender_t *lender)
{
    if (lender != NULL) {
        ucx_crew_destroy(lender->crew);
        ucx_crew_destroy(lender->far);
        if (!attn_errands_settle(attn_now_ns() + GPU_WAIT_NS)) {
            return; /* a GPU stands still: what its errands work with stays until the process ends
                     */
        }
        lender_gpu_destroy(lender->gpu);
        pthread_mutex_destroy(&lender->lock);
        free(lender);
    }
}
