/* client.c: opening and closing a client, and its two threads. The housekeeper cancels what is
 * overdue and ticks the engines of inproc://; it never waits for a peer. The keeper does what has
 * to: it renews the lease, aborts steps that completions gave up, and makes and closes groups. */
#include "client/client_int.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"
#include "client/lanes.h"
#include "client/stages.h"
#include "client/target.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define HOUSEKEEPING_MS 50u
#define FIGURES_MS 500u
#define OVERDUE_MAX 64u /* steps looked at under one lock */

#define RENEW_TIMEOUT_MS 2000u
#define GROUPS_LOOK_MS 500u  /* how often the keeper looks for groups to be closed */
#define GROUPS_CLOSE_MS 500u /* for closing what is left of them */
#define ERRANDS_MS 1000u     /* for a GPU to have the memory of others unmapped */

#define STR2(x) #x
#define STR(x) STR2(x)

const char *
attn_version(void)
{
    return STR(ATTN_VERSION_MAJOR) "." STR(ATTN_VERSION_MINOR) "." STR(ATTN_VERSION_PATCH);
}

void
attn_client_options_init(attn_client_options_t *options)
{
    *options = (attn_client_options_t){
        .size            = sizeof(*options),
        .timeout_ms      = 10000,
        .step_timeout_ms = 60000,
        .spin_us         = 50,
        .merging         = ATTN_MERGING_CLIENT,
    };
}

static attn_status_t
options_take(attn_client_t *client, const attn_client_options_t *options)
{
    attn_client_options_t *o = &client->options;

    attn_client_options_init(o);
    if (options != NULL) {
        if (options->size < offsetof(attn_client_options_t, name) || options->size > 4096) {
            return attn_fail(ATTN_ERR_INVALID,
                             "options.size is %zu: use attn_client_options_init()", options->size);
        }
        memcpy(o, options, options->size < sizeof(*o) ? options->size : sizeof(*o));
    }
    if (o->timeout_ms < 1 || o->timeout_ms > 60000 || o->step_timeout_ms < 1 ||
        o->step_timeout_ms > ENGINE_TIMEOUT_MS_MAX) {
        return attn_fail(ATTN_ERR_INVALID,
                         "timeout_ms is %u (1 to 60,000), step_timeout_ms is %u (1 to %u)",
                         o->timeout_ms, o->step_timeout_ms, ENGINE_TIMEOUT_MS_MAX);
    }
    if ((unsigned)o->merging > ATTN_MERGING_GROUP) {
        return attn_fail(ATTN_ERR_INVALID, "merging is %d: 0 (auto), 1 (client) or 2 (group)",
                         (int)o->merging);
    }
    if (o->name != NULL && strlen(o->name) >= sizeof(client->name)) {
        return attn_fail(ATTN_ERR_INVALID, "name has %zu bytes: at most 63", strlen(o->name));
    }
    snprintf(client->name, sizeof(client->name), "%s", o->name != NULL ? o->name : "libattn");
    o->name = client->name;
    return ATTN_OK;
}

uint64_t
client_deadline(const attn_client_t *client)
{
    return attn_now_ns() + client->options.timeout_ms * ATTN_NS_PER_MS;
}

/* ---- the housekeeper ---- */

static void
tick_engines(attn_client_t *client, uint64_t now_ns, bool figures)
{
    for (uint32_t i = 0; i < client->n_engines; i++) {
        engine_info_t info;
        engine_tick(client->engines[i], now_ns);
        if (!figures) {
            continue;
        }
        engine_describe(client->engines[i], &info);
        dir_worker_t told = {.id           = client->worker_of[i],
                             .incarnation  = client->worker_of[i],
                             .region_bytes = info.region_bytes,
                             .used_bytes   = info.used_bytes,
                             .chunks       = info.chunks,
                             .open_steps   = info.open_steps,
                             .runs         = info.runs,
                             .kv_bytes     = info.kv_bytes,
                             .kv_rate      = info.kv_rate,
                             .device_free  = info.device.free_bytes};
        cluster_worker_heartbeat(client->cluster, &told);
    }
}

/* Some overdue steps that were not looked at in this round: how many. */
static uint32_t
some_overdue(attn_client_t *client, uint64_t now_ns, attn_step_t *overdue[OVERDUE_MAX])
{
    uint32_t n = 0;

    pthread_mutex_lock(&client->lock);
    for (attn_step_t *s = client->steps; s != NULL && n < OVERDUE_MAX; s = step_next(s)) {
        step_end_driven(s, now_ns);
        if (step_is_overdue(s, now_ns) && step_look_at(s, client->round)) {
            step_reference(s);
            overdue[n++] = s;
        }
    }
    pthread_mutex_unlock(&client->lock);
    return n;
}

static void
cancel_overdue(attn_client_t *client, uint64_t now_ns)
{
    attn_step_t *overdue[OVERDUE_MAX];
    uint32_t n;

    client->round++;
    do {
        n = some_overdue(client, now_ns, overdue);
        for (uint32_t i = 0; i < n; i++) {
            step_cancel_overdue(overdue[i], now_ns);
            step_unreference(overdue[i]);
        }
    } while (n == OVERDUE_MAX);
}

/* Wait for a while, or for a signal. Under the lock. */
static void
doze(attn_client_t *client, uint64_t ms)
{
    struct timespec until;

    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += (long)(ms % 1000) * 1000000L;
    until.tv_sec += (time_t)(ms / 1000) + until.tv_nsec / 1000000000L;
    until.tv_nsec %= 1000000000L;
    pthread_cond_timedwait(&client->wake, &client->lock, &until);
}

static void *
housekeeper(void *arg)
{
    attn_client_t *client = arg;
    uint64_t figure_at = 0, tick_at = 0;

    pthread_mutex_lock(&client->lock);
    while (!client->stopping) {
        uint64_t now = attn_now_ns();
        if (now < tick_at) { /* the signal was the keeper's */
            doze(client, attn_div_up(tick_at - now, ATTN_NS_PER_MS));
            continue;
        }
        tick_at = now + HOUSEKEEPING_MS * ATTN_NS_PER_MS;
        pthread_mutex_unlock(&client->lock);
        cancel_overdue(client, now);
        tick_engines(client, now, now >= figure_at);
        if (client->tls != NULL && now >= figure_at) {
            rpc_tls_refresh(client->tls, false);
        }
        figure_at = now >= figure_at ? now + FIGURES_MS * ATTN_NS_PER_MS : figure_at;
        pthread_mutex_lock(&client->lock);
    }
    pthread_mutex_unlock(&client->lock);
    return NULL;
}

/* ---- the keeper ---- */

attn_status_t
client_renew(attn_client_t *client, uint64_t deadline_ns)
{
    cost_link_t told;

    links_meter(client->links, &told);
    return client->control->ops->renew(client->control, &told, deadline_ns);
}

/* Renew the lease: when to do so again. */
static uint64_t
renew(attn_client_t *client)
{
    control_t *control = client->control;
    uint64_t third     = control->lease_ms / 3 * ATTN_NS_PER_MS;

    if (client_renew(client, attn_now_ns() + RENEW_TIMEOUT_MS * ATTN_NS_PER_MS) == ATTN_OK) {
        return attn_now_ns() + third;
    }
    attn_log(ATTN_LOG_WARN, "client.lease", "name=\"%s\" reason=\"%s\"", client->name,
             attn_last_error());
    return attn_now_ns() + attn_min(third, RENEW_TIMEOUT_MS * ATTN_NS_PER_MS);
}

/* A step of the cache (NULL: of any) that a completion gave up. Under the lock. */
static attn_step_t *
a_given_up_step(attn_client_t *client, const attn_cache_t *cache)
{
    attn_step_t *s = client->steps;

    while (s != NULL && !step_is_given_up(s, cache)) {
        s = step_next(s);
    }
    return s;
}

static void *
keeper(void *arg)
{
    attn_client_t *client = arg;
    uint64_t third        = client->control->lease_ms / 3 * ATTN_NS_PER_MS;
    uint64_t renew_at     = third > 0 ? attn_now_ns() + third : UINT64_MAX;

    pthread_mutex_lock(&client->lock);
    while (!client->stopping) {
        uint64_t now      = attn_now_ns();
        attn_step_t *step = a_given_up_step(client, NULL);
        bool due          = client->groups != NULL && groups_due(client->groups);
        if (step == NULL && now < renew_at && !due) {
            uint64_t most =
                client->groups != NULL && groups_count(client->groups) > 0 ? GROUPS_LOOK_MS : 60000;
            doze(client, attn_min(attn_div_up(renew_at - now, ATTN_NS_PER_MS), most));
            continue;
        }
        pthread_mutex_unlock(&client->lock);
        attn_step_abort(step);
        if (due) {
            groups_sweep(client->groups);
        }
        renew_at = now >= renew_at ? renew(client) : renew_at;
        pthread_mutex_lock(&client->lock);
    }
    pthread_mutex_unlock(&client->lock);
    return NULL;
}

void
client_wake(attn_client_t *client)
{
    pthread_mutex_lock(&client->lock);
    pthread_cond_broadcast(&client->wake);
    pthread_mutex_unlock(&client->lock);
}

void
client_await_aborts(attn_client_t *client, const attn_cache_t *cache)
{
    pthread_mutex_lock(&client->lock);
    while (a_given_up_step(client, cache) != NULL) {
        doze(client, HOUSEKEEPING_MS);
    }
    pthread_mutex_unlock(&client->lock);
}

/* ---- the threads ---- */

static void
stop_thread(attn_client_t *client, pthread_t thread)
{
    pthread_mutex_lock(&client->lock);
    client->stopping = true;
    pthread_cond_broadcast(&client->wake);
    pthread_mutex_unlock(&client->lock);
    pthread_join(thread, NULL);
}

static attn_status_t
start_threads(attn_client_t *client)
{
    if (pthread_create(&client->housekeeper, NULL, housekeeper, client) != 0) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no thread for the client's housekeeping");
    }
    if (pthread_create(&client->keeper, NULL, keeper, client) != 0) {
        stop_thread(client, client->housekeeper);
        return attn_fail(ATTN_ERR_NO_MEMORY, "no thread for the client's lease");
    }
    return ATTN_OK;
}

/* ---- open ---- */

static attn_client_t *
client_new(void)
{
    attn_client_t *client = calloc(1, sizeof(*client));

    if (client == NULL) {
        attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a client");
        return NULL;
    }
    pthread_condattr_t clock;
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_cond_init(&client->wake, &clock);
    pthread_condattr_destroy(&clock);
    pthread_mutex_init(&client->lock, NULL);
    return client;
}

static void
client_free(attn_client_t *client)
{
    if (client->control != NULL) {
        client->control->ops->close(client->control);
    }
    groups_destroy(client->groups, attn_now_ns() + GROUPS_CLOSE_MS * ATTN_NS_PER_MS);
    if (client->owns) {
        ucx_asks_t *asks = client->links != NULL ? links_asks(client->links) : NULL;
        cluster_destroy(client->cluster);
        links_destroy(client->links);
        if (client->rpc != NULL) {
            rpc_client_destroy(client->rpc);
            rpc_shutdown();
        }
        ucx_asks_destroy(asks);
        rpc_tls_close(client->tls);
    }
    client_stages_free(client);
    client_lanes_free(client);
    attn_errands_settle(attn_now_ns() + ERRANDS_MS * ATTN_NS_PER_MS);
    pthread_cond_destroy(&client->wake);
    pthread_mutex_destroy(&client->lock);
    free(client);
}

/* One engine of inproc:// joins the cluster as a worker. */
static attn_status_t
add_engine(attn_client_t *client, const target_t *target, uint32_t i)
{
    char name[32];
    engine_options_t options = {.device        = target->device,
                                .threads       = target->threads,
                                .slab_bytes    = target->slab_bytes,
                                .reserve_bytes = ENGINE_RESERVE_BYTES,
                                .name          = name};
    engine_t *engine;
    engine_info_t info;

    snprintf(name, sizeof(name), "local engine %u", i);
    attn_status_t status = engine_create(&options, &engine);
    if (status != ATTN_OK) {
        return status;
    }
    engine_describe(engine, &info);
    dir_worker_t hello = {.incarnation  = i + 1, /* and its id: directory ids count from 1 */
                          .slab_bytes   = info.slab_bytes,
                          .speed        = info.speed,
                          .device_bytes = info.device.total_bytes,
                          .device_free  = info.device.free_bytes};
    snprintf(hello.address, sizeof(hello.address), "inproc:%u", i);
    snprintf(hello.kind, sizeof(hello.kind), "%s", info.kind);
    snprintf(hello.device, sizeof(hello.device), "%s", info.device.name);
    status = cluster_worker_join(client->cluster, &hello, &client->worker_of[i]);
    if (status == ATTN_OK) {
        status = links_add_engine(client->links, hello.address, engine);
    }
    if (status != ATTN_OK) {
        engine_destroy(engine);
        return status;
    }
    client->engines[i] = engine;
    client->n_engines  = i + 1;
    return ATTN_OK;
}

static attn_status_t
open_inproc(attn_client_t *client, const target_t *target)
{
    directory_options_t options;
    attn_status_t status = links_create(NULL, &client->links);

    directory_options_init(&options);
    options.lost_ns = UINT64_MAX / 4; /* engines in the process are not lost */
    if (status == ATTN_OK) {
        status = cluster_create(&options, client->links, &client->cluster);
    }
    for (uint32_t i = 0; i < target->workers && status == ATTN_OK; i++) {
        status = add_engine(client, target, i);
    }
    return status == ATTN_OK ? control_cluster_open(client->cluster, client->name, &client->control)
                             : status;
}

static attn_status_t
open_remote(attn_client_t *client, const char *address)
{
    attn_status_t status;

    rpc_init();
    status = rpc_client_create(client->options.spin_us, &client->rpc);
    if (status != ATTN_OK) {
        rpc_shutdown();
        return status;
    }
    status = client_tls_open(client->rpc, &client->options, &client->tls);
    if (status == ATTN_OK) {
        status = links_create(client->rpc, &client->links);
    }
    if (status == ATTN_OK) {
        status = links_set_transport(client->links, client->options.transport);
    }
    if (status == ATTN_OK) {
        status = groups_create(&client->groups);
    }
    return status == ATTN_OK ? control_grpc_open(client->rpc, address, client->name,
                                                 client_deadline(client), &client->control)
                             : status;
}

/* Which way tensors of a GPU go. */
static attn_status_t
settle_gpu_way(attn_client_t *client)
{
    static const char *const names[] = {
        [ATTN_GPU_AUTO] = "auto", [ATTN_GPU_STAGED] = "staged", [ATTN_GPU_MAPPED] = "mapped"};
    const char *said = secure_getenv("ATTN_GPU_WAY");

    client->gpu_way = client->options.gpu_way;
    if ((unsigned)client->gpu_way > ATTN_GPU_MAPPED) {
        return attn_fail(ATTN_ERR_INVALID,
                         "gpu_way is %d: 0 (as $ATTN_GPU_WAY says), 1 (auto), 2 (staged) or 3 "
                         "(mapped)",
                         (int)client->gpu_way);
    }
    if (client->gpu_way != ATTN_GPU_DEFAULT) {
        return ATTN_OK;
    }
    client->gpu_way = ATTN_GPU_AUTO;
    for (int i = ATTN_GPU_AUTO; said != NULL && said[0] != '\0'; i++) {
        if (i > ATTN_GPU_MAPPED) {
            return attn_fail(ATTN_ERR_INVALID, "ATTN_GPU_WAY is \"%.32s\": auto, staged or mapped",
                             said);
        }
        if (strcmp(said, names[i]) == 0) {
            client->gpu_way = (attn_gpu_way_t)i;
            break;
        }
    }
    return ATTN_OK;
}

/* Which steps two GPUs may drive: with "shared", for tests, also where they are one. */
static attn_status_t
settle_driven(attn_client_t *client)
{
    static const char *const names[] = {
        [DRIVEN_AUTO] = "auto", [DRIVEN_SHARED] = "shared", [DRIVEN_OFF] = "off"};
    const char *said = secure_getenv("ATTN_DRIVEN");

    for (int i = DRIVEN_AUTO; said != NULL && said[0] != '\0'; i++) {
        if (i > DRIVEN_OFF) {
            return attn_fail(ATTN_ERR_INVALID, "ATTN_DRIVEN is \"%.32s\": auto, shared or off",
                             said);
        }
        if (strcmp(said, names[i]) == 0) {
            client->driven = i;
            break;
        }
    }
    return ATTN_OK;
}

attn_status_t
attn_client_open(const char *target_text, const attn_client_options_t *options,
                 attn_client_t **client_p)
{
    target_t target;
    attn_status_t status = target_parse(target_text, &target);

    if (status != ATTN_OK) {
        return status;
    }
    attn_client_t *client = client_new();
    if (client == NULL) {
        return ATTN_ERR_NO_MEMORY;
    }
    client->owns = true;
    status       = options_take(client, options);
    if (status == ATTN_OK) {
        status = settle_gpu_way(client);
    }
    if (status == ATTN_OK) {
        status = settle_driven(client);
    }
    if (status == ATTN_OK) {
        status = target.inproc ? open_inproc(client, &target) : open_remote(client, target_text);
    }
    if (status == ATTN_OK) {
        status = start_threads(client);
    }
    if (status != ATTN_OK) {
        client_free(client);
        return status;
    }
    *client_p = client;
    return ATTN_OK;
}

attn_status_t
client_open_on(rpc_client_t *rpc, cluster_t *cluster, links_t *links,
               const attn_client_options_t *options, attn_client_t **client_p)
{
    attn_client_t *client = client_new();

    if (client == NULL) {
        return ATTN_ERR_NO_MEMORY;
    }
    client->rpc          = rpc;
    client->links        = links;
    client->cluster      = cluster;
    attn_status_t status = options_take(client, options);
    if (status == ATTN_OK) {
        status = control_cluster_open(cluster, client->name, &client->control);
    }
    if (status == ATTN_OK) {
        status = groups_create(&client->groups);
    }
    if (status == ATTN_OK) {
        status = start_threads(client);
    }
    if (status != ATTN_OK) {
        client_free(client);
        return status;
    }
    *client_p = client;
    return ATTN_OK;
}

void
attn_client_close(attn_client_t *client)
{
    if (client == NULL) {
        return;
    }
    stop_thread(client, client->keeper);
    stop_thread(client, client->housekeeper);
    while (client->steps != NULL) {
        attn_step_abort(client->steps);
    }
    client_carrier_stop(client);
    client_free(client);
}

/* ---- the cluster ---- */

attn_status_t
attn_cluster_describe(attn_client_t *client, attn_cluster_info_t *info)
{
    return client->control->ops->describe(client->control, client_deadline(client), info);
}

void
client_moved(const cluster_moved_t *from, attn_moved_t *to)
{
    *to = (attn_moved_t){.chunks = from->chunks,
                         .bytes  = from->bytes,
                         .left   = from->left,
                         .failed = from->failed,
                         .why    = from->why};
    memcpy(to->reason, from->reason, sizeof(to->reason));
}

attn_status_t
attn_worker_drain(attn_client_t *client, uint32_t worker, uint32_t to, bool stay,
                  attn_moved_t *moved)
{
    uint64_t deadline     = attn_now_ns() + CLIENT_MOVE_MS * ATTN_NS_PER_MS;
    cluster_moved_t there = {0};
    attn_status_t status =
        client->control->ops->worker_drain(client->control, worker, to, stay, deadline, &there);

    client_moved(&there, moved);
    return status;
}

void
attn_cluster_info_free(attn_cluster_info_t *info)
{
    if (info != NULL) {
        free(info->workers);
        info->workers   = NULL;
        info->n_workers = 0;
    }
}

/* ---- the ways to workers ---- */

attn_status_t
attn_client_links(attn_client_t *client, attn_links_info_t *info)
{
    uint32_t room           = links_describe(client->links, NULL, 0) + 8; /* others may come */
    attn_link_info_t *links = calloc(room, sizeof(*links));

    if (links == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for %u links", room);
    }
    uint32_t n    = links_describe(client->links, links, room);
    info->n_links = n < room ? n : room;
    info->links   = links;
    info->dropped =
        links_asks(client->links) != NULL ? ucx_asks_dropped(links_asks(client->links)) : 0;
    info->runs_cuda     = atomic_load(&client->runs_cuda);
    info->runs_staged   = atomic_load(&client->runs_staged);
    info->runs_mapped   = atomic_load(&client->runs_mapped);
    info->steps_grouped = atomic_load(&client->steps_grouped);
    info->steps_driven  = atomic_load(&client->steps_driven);
    return ATTN_OK;
}

void
attn_links_info_free(attn_links_info_t *info)
{
    if (info != NULL) {
        free(info->links);
        info->links   = NULL;
        info->n_links = 0;
    }
}
