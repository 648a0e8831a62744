/*
 * groups.c: the calls that make a group of workers whose GPUs are in one host (engine.h). A client
 * has each of them open an inbox, and carries what stands for it to the others. That is signed with
 * the secret that the coordinator gave its workers, and has the card that lies in the inbox: so
 * what a worker maps, and writes to, is an inbox that another worker has for this group, whatever a
 * client says.
 *
 * What makes and ends groups may wait for the device, and an exchange there: it has threads of its
 * own, and neither copies of chunks nor ticks wait for it.
 */
#include "daemon/worker/worker_int.h"

#include "base/clock.h"
#include "base/status.h"
#include "rpc/ucx.h"

#include <openssl/crypto.h>
#include <stdio.h>
#include <string.h>

#define PROVE_MS_MAX 10000u

/* What an inbox is signed as: no ticket begins so. */
static attn_status_t
inbox_mac(worker_t *worker, const Attn__V1__Inbox *inbox, uint8_t mac[TICKET_MAC])
{
    uint8_t text[512 + ATTN_INBOX_HANDLE];
    int n = snprintf((char *)text, 512, "inbox %016llx %u of %u, %llu, %.95s, %.31s: ",
                     (unsigned long long)inbox->group, inbox->rank, inbox->ranks,
                     (unsigned long long)inbox->half_bytes, inbox->host, inbox->device);

    memcpy(text + n, inbox->handle.data, ATTN_INBOX_HANDLE);
    return gate_sign(&worker->gate, text, (size_t)n + ATTN_INBOX_HANDLE, mac);
}

static attn_status_t
check_allowed(const worker_t *worker)
{
    return worker->options.groups
               ? ATTN_OK
               : attn_fail(ATTN_ERR_UNSUPPORTED,
                           "worker %s is in no groups: it was started without --groups",
                           worker->name);
}

static attn_status_t
serve_open_group(const unary_call_t *u)
{
    const Attn__V1__OpenGroupRequest *r = u->request;
    worker_t *worker                    = u->service;
    Attn__V1__OpenGroupReply *reply     = u->reply;
    Attn__V1__Inbox *inbox              = wire_alloc(u->block, 1, sizeof(*inbox));
    uint8_t *handle                     = wire_alloc(u->block, ATTN_INBOX_HANDLE, 1);
    uint8_t *mac                        = wire_alloc(u->block, TICKET_MAC, 1);
    char *host                          = wire_alloc(u->block, 96, 1);
    char *device                        = wire_alloc(u->block, ATTN_GROUP_DEVICE, 1);
    engine_group_options_t options      = {.id         = r->group,
                                           .ranks      = r->ranks,
                                           .me         = r->rank,
                                           .head_dim_v = r->head_dim_v,
                                           .half_bytes = r->half_bytes};

    if (inbox == NULL || handle == NULL || mac == NULL || host == NULL || device == NULL) {
        return ATTN_ERR_NO_MEMORY;
    }
    attn_status_t status = check_allowed(worker);
    if (status != ATTN_OK) {
        return status;
    }
    ucx_host(host);
    if (host[0] == '\0') {
        return attn_fail(ATTN_ERR_UNSUPPORTED,
                         "the kernel does not tell which host worker %s is on", worker->name);
    }
    status = engine_group_open(worker->engine, &options, handle, device);
    if (status != ATTN_OK) {
        return status;
    }
    attn__v1__inbox__init(inbox);
    inbox->group       = r->group;
    inbox->ranks       = r->ranks;
    inbox->rank        = r->rank;
    inbox->half_bytes  = r->half_bytes;
    inbox->host        = host;
    inbox->device      = device;
    inbox->handle.data = handle;
    inbox->handle.len  = ATTN_INBOX_HANDLE;
    status             = inbox_mac(worker, inbox, mac);
    inbox->mac.data    = mac;
    inbox->mac.len     = TICKET_MAC;
    reply->inbox       = inbox;
    if (status != ATTN_OK) {
        engine_group_close(worker->engine, r->group);
    }
    return status;
}

/* Inbox i of a group is what a worker of ours offered for it, here on this host. */
static attn_status_t
check_inbox(worker_t *worker, const Attn__V1__ConnectGroupRequest *r, size_t i)
{
    const Attn__V1__Inbox *inbox = r->inboxes[i], *first = r->inboxes[0];
    uint8_t mac[TICKET_MAC];
    char host[96];

    if (inbox->group != r->group || inbox->rank != i || inbox->ranks != r->n_inboxes ||
        inbox->half_bytes != first->half_bytes || inbox->handle.len != ATTN_INBOX_HANDLE ||
        inbox->mac.len != TICKET_MAC) {
        return attn_fail(ATTN_ERR_INVALID,
                         "inboxes[%zu] is of rank %u of %u in group %016llx: it is to be of rank "
                         "%zu of %zu in %016llx, as large as the others, and as it was offered",
                         i, inbox->rank, inbox->ranks, (unsigned long long)inbox->group, i,
                         r->n_inboxes, (unsigned long long)r->group);
    }
    attn_status_t status = inbox_mac(worker, inbox, mac);
    if (status == ATTN_OK && CRYPTO_memcmp(mac, inbox->mac.data, TICKET_MAC) != 0) {
        status = attn_fail(ATTN_ERR_DENIED,
                           "inboxes[%zu] was not signed by a worker of this coordinator", i);
    }
    ucx_host(host);
    if (status == ATTN_OK && strcmp(host, inbox->host) != 0) {
        status =
            attn_fail(ATTN_ERR_UNSUPPORTED,
                      "rank %zu is on another host than worker %s, or in another IPC namespace", i,
                      worker->name);
    }
    return status;
}

static attn_status_t
serve_connect_group(const unary_call_t *u)
{
    const Attn__V1__ConnectGroupRequest *r = u->request;
    worker_t *worker                       = u->service;
    uint8_t handles[ATTN_RANKS_MAX][ATTN_INBOX_HANDLE];
    attn_status_t status = check_allowed(worker);

    if (status != ATTN_OK) {
        return status;
    }
    if (r->n_inboxes < 2 || r->n_inboxes > ATTN_RANKS_MAX) {
        return attn_fail(ATTN_ERR_INVALID, "%zu inboxes: 2 to %u", r->n_inboxes, ATTN_RANKS_MAX);
    }
    for (size_t i = 0; i < r->n_inboxes && status == ATTN_OK; i++) {
        status = check_inbox(worker, r, i);
        if (status == ATTN_OK) {
            memcpy(handles[i], r->inboxes[i]->handle.data, ATTN_INBOX_HANDLE);
        }
    }
    if (status != ATTN_OK) {
        return status;
    }
    return engine_group_connect(worker->engine,
                                &(engine_inboxes_t){.group      = r->group,
                                                    .ranks      = (uint32_t)r->n_inboxes,
                                                    .half_bytes = r->inboxes[0]->half_bytes,
                                                    .handles    = handles});
}

static attn_status_t
serve_prove_group(const unary_call_t *u)
{
    const Attn__V1__ProveGroupRequest *r = u->request;
    worker_t *worker                     = u->service;
    Attn__V1__ProveGroupReply *reply     = u->reply;
    double seconds[2]                    = {0};

    attn_status_t status = check_allowed(worker);

    if (status != ATTN_OK) {
        return status;
    }
    if (r->timeout_ms < 1 || r->timeout_ms > PROVE_MS_MAX) {
        return attn_fail(ATTN_ERR_INVALID, "timeout_ms is %u: 1 to %u", r->timeout_ms,
                         PROVE_MS_MAX);
    }
    status =
        engine_group_prove(worker->engine, r->group, attn_now_ns() + r->timeout_ms * ATTN_NS_PER_MS,
                           seconds, &reply->many);
    reply->few_seconds  = seconds[0];
    reply->many_seconds = seconds[1];
    return status;
}

static attn_status_t
serve_close_group(const unary_call_t *u)
{
    const Attn__V1__CloseGroupRequest *r = u->request;
    worker_t *worker                     = u->service;

    return engine_group_close(worker->engine, r->group);
}

/* ---- the service ---- */

static const unary_method_t methods[] = {
    {.path    = "/attn.v1.Worker/OpenGroup",
     .serve   = serve_open_group,
     .reply   = &attn__v1__open_group_reply__descriptor,
     .admit   = worker_admit_introduced,
     .request = &attn__v1__open_group_request__descriptor,
     .blocks  = true},
    {.path    = "/attn.v1.Worker/ConnectGroup",
     .serve   = serve_connect_group,
     .reply   = &attn__v1__empty__descriptor,
     .admit   = worker_admit_introduced,
     .request = &attn__v1__connect_group_request__descriptor,
     .blocks  = true},
    {.path    = "/attn.v1.Worker/ProveGroup",
     .serve   = serve_prove_group,
     .reply   = &attn__v1__prove_group_reply__descriptor,
     .admit   = worker_admit_introduced,
     .request = &attn__v1__prove_group_request__descriptor,
     .blocks  = true},
    {.path    = "/attn.v1.Worker/CloseGroup",
     .serve   = serve_close_group,
     .reply   = &attn__v1__empty__descriptor,
     .admit   = worker_admit_introduced,
     .request = &attn__v1__close_group_request__descriptor,
     .blocks  = true},
};

static void
sweep(job_t *job)
{
    worker_t *worker = JOB_OF(worker_t, group_sweep, job);

    engine_groups_sweep(worker->engine, attn_now_ns());
    atomic_store(&worker->sweeping, false);
}

void
worker_groups_tick(worker_t *worker)
{
    if (worker->group_jobs != NULL && engine_groups_due(worker->engine, attn_now_ns()) &&
        !atomic_exchange(&worker->sweeping, true)) {
        worker->group_sweep.run = sweep;
        jobs_add(worker->group_jobs, &worker->group_sweep);
    }
}

attn_status_t
worker_serve_groups(worker_t *worker)
{
    attn_status_t status = ATTN_OK;

    if (worker->options.groups) { /* each may be proved for long, while others are made and end */
        status = jobs_create(ATTN_GROUPS_MAX + 4, &worker->group_jobs);
    }
    return status == ATTN_OK
               ? unary_add(worker->server, worker->group_jobs, methods,
                           sizeof(methods) / sizeof(methods[0]), worker, &worker->group_unary)
               : status;
}
