/* actor.c: an actor's calls and how they are judged, its sequences, and its life. */
#include "tests/stress/actor.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define COMMON_TOKENS 700u
#define REOPEN_MS 20000u

/* The longest that this process was kept from running lately; client.c measures it. */
extern atomic_uint_fast64_t client_lag_us;

/* ---- words ---- */

void
actor_log(actor_t *a, const char *format, ...)
{
    va_list list;
    char *line = a->log[a->n_log++ % ACTOR_LOG];
    int n      = snprintf(line, sizeof(a->log[0]), "%10.3f  ", (double)attn_now_ns() / 1e9);

    va_start(list, format);
    vsnprintf(line + n, sizeof(a->log[0]) - (size_t)n, format, list);
    va_end(list);
}

void
actor_fail(actor_t *a, const char *format, ...)
{
    static _Thread_local char text[FAILURE_MAX];
    va_list list;
    size_t n;

    va_start(list, format);
    n = (size_t)vsnprintf(text, sizeof(text) / 2, format, list);
    va_end(list);
    n = attn_min(n, sizeof(text) / 2 - 1);
    n += (size_t)snprintf(text + n, sizeof(text) - n,
                          "\n  actor %u (%s client, process %u life %u), geometry %u, call %s, "
                          "%s\n  what it did last:\n",
                          a->number, target_names[a->plan->kind], a->plan->process, a->plan->life,
                          a->plan->geometry, a->call != NULL ? a->call : "none",
                          actor_excused(a) ? "in a disturbance" : "in calm");
    for (uint32_t i = a->n_log > ACTOR_LOG ? a->n_log - ACTOR_LOG : 0;
         i < a->n_log && n < sizeof(text); i++) {
        n += (size_t)snprintf(text + n, sizeof(text) - n, "    %s\n", a->log[i % ACTOR_LOG]);
    }
    stress_fail(a->stress, "%s", text);
}

/* ---- calls ---- */

void
actor_call(actor_t *a, const char *name, uint64_t deadline_ns)
{
    a->call          = name;
    a->call_began_ns = attn_now_ns();
    a->call_ends_ns  = deadline_ns;
    atomic_store(&a->figures->call_name, name);
    atomic_store(&a->figures->call_ends_ns, deadline_ns);
    atomic_store(&a->figures->call_began_ns, a->call_began_ns);
}

attn_status_t
actor_called(actor_t *a, attn_status_t status)
{
    uint64_t now  = attn_now_ns();
    uint64_t late = now > a->call_ends_ns ? (now - a->call_ends_ns) / ATTN_NS_PER_US : 0;
    uint64_t slow = (now - a->call_began_ns) / ATTN_NS_PER_US;
    uint64_t lag  = atomic_load(&client_lag_us);

    atomic_store(&a->figures->call_began_ns, 0);
    atomic_fetch_add(&a->figures->calls, 1);
    atomic_fetch_add(&a->figures->statuses[(uint32_t)-status % STATUSES], 1);
    if (late > atomic_load(&a->figures->late_us)) {
        atomic_store(&a->figures->late_us, late);
    }
    if (slow > atomic_load(&a->figures->slow_us)) {
        atomic_store(&a->figures->slow_us, slow);
    }
    if (late > a->stress->options.late_ms * 1000u + lag) {
        actor_fail(a,
                   "LATE: %s ended %.1f ms behind its deadline (%s: %s; this process was kept "
                   "from running for up to %.1f ms)",
                   a->call, (double)late / 1e3, attn_strerror(status),
                   status == ATTN_OK ? "" : attn_last_error(), (double)lag / 1e3);
    }
    return status;
}

static uint64_t
call_deadline(const actor_t *a)
{
    return attn_now_ns() + a->stress->options.timeout_ms * ATTN_NS_PER_MS;
}

bool
actor_excused(const actor_t *a)
{
    return a->plan->kind != TARGET_INPROC &&
           (atomic_load(&a->stress->disturbing) > 0 ||
            atomic_load(&a->stress->disturbances) != a->disturbances ||
            atomic_load(&a->stress->calm_since_ns) >= a->act_began_ns);
}

static bool
coordinator_changed(const actor_t *a)
{
    return a->plan->kind != TARGET_INPROC &&
           a->connection->coordinator != atomic_load(&a->stress->coordinators);
}

bool
actor_accepts(actor_t *a, const char *what, attn_status_t status)
{
    bool fine = status == ATTN_ERR_EXHAUSTED; /* of pages: refused, and nothing was changed */

    if (actor_excused(a)) {
        fine = fine || status == ATTN_ERR_UNAVAILABLE || status == ATTN_ERR_DEADLINE ||
               status == ATTN_ERR_ABORTED || status == ATTN_ERR_LOST || status == ATTN_ERR_STALE ||
               status == ATTN_ERR_CANCELLED || status == ATTN_ERR_BUSY;
    }
    if (a->plan->kind != TARGET_INPROC && atomic_load(&a->stress->n_gone) > 0) {
        fine = fine || status == ATTN_ERR_LOST; /* perhaps long ago: who resolves it will see */
    }
    if (coordinator_changed(a)) { /* what the old one made is gone */
        fine = fine || status == ATTN_ERR_NOT_FOUND;
    }
    actor_log(a, "%s: %s: %.120s", what, attn_strerror(status), attn_last_error());
    if (!fine) {
        actor_fail(a, "UNPROMISED ERROR: %s: %s: %s", what, attn_strerror(status),
                   attn_last_error());
    }
    if (status == ATTN_ERR_UNAVAILABLE) { /* nobody there: no use in asking all the time */
        nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
    }
    return fine;
}

/* ---- sequences ---- */

void
actor_drop(actor_t *a, uint32_t s)
{
    shadow_t *shadow = &a->seqs[s];

    actor_log(a, "free %llx", (unsigned long long)shadow->seq.id);
    actor_call(a, "free", call_deadline(a));
    attn_status_t status = actor_called(a, target_free(&a->connection->target, shadow->seq));
    if (status == ATTN_ERR_BUSY && attn_now_ns() < a->unsettled_until_ns[s]) {
        return; /* a step of ours that met a disturbance is still open somewhere */
    }
    if (status != ATTN_OK) {
        actor_accepts(a, "free", status);
    }
    atomic_fetch_add(&a->figures->frees, 1);
    shadow_clear(shadow);
}

static void
create(actor_t *a, uint32_t s)
{
    attn_seq_t seq;

    actor_call(a, "create", call_deadline(a));
    attn_status_t status = actor_called(a, target_create(&a->connection->target, &seq));
    if (status != ATTN_OK) {
        actor_accepts(a, "create", status);
        return;
    }
    actor_log(a, "create %llx", (unsigned long long)seq.id);
    atomic_fetch_add(&a->figures->creates, 1);
    a->seqs[s].used          = true;
    a->seqs[s].seq           = seq;
    a->unsettled_until_ns[s] = 0;
}

/* Fork a sequence of ours, or the common one (from NULL). */
static void
fork_into(actor_t *a, shadow_t *from, uint64_t length, uint32_t to)
{
    attn_seq_t fork;

    actor_call(a, "fork", call_deadline(a));
    attn_status_t status =
        actor_called(a, target_fork(&a->connection->target, from->seq, length, &fork));
    actor_log(a, "fork %llx at %llu: %s %llx", (unsigned long long)from->seq.id,
              (unsigned long long)length, attn_strerror(status),
              status == ATTN_OK ? (unsigned long long)fork.id : 0);
    if (status != ATTN_OK) {
        /* The common one may have lost tokens long ago: it is made anew between two acts. */
        if (actor_accepts(a, "fork", status) && status == ATTN_ERR_LOST) {
            if (from == &a->connection->common) {
                atomic_store(&a->connection->common_is_lost, true);
            } else {
                actor_resolve(a, (uint32_t)(from - a->seqs));
            }
        }
        return;
    }
    atomic_fetch_add(&a->figures->forks, 1);
    a->seqs[to].used          = true;
    a->seqs[to].seq           = fork;
    a->unsettled_until_ns[to] = 0;
    shadow_copy(&a->seqs[to], from, length);
}

static void
truncate_at(actor_t *a, uint32_t s, uint64_t length)
{
    shadow_t *shadow = &a->seqs[s];

    actor_call(a, "truncate", call_deadline(a));
    attn_status_t status =
        actor_called(a, target_truncate(&a->connection->target, shadow->seq, length));
    actor_log(a, "truncate %llx from %llu to %llu: %s", (unsigned long long)shadow->seq.id,
              (unsigned long long)shadow->length, (unsigned long long)length,
              attn_strerror(status));
    if (status == ATTN_OK) {
        atomic_fetch_add(&a->figures->truncates, 1);
        shadow_cut(shadow, length);
    } else if (status == ATTN_ERR_BUSY && attn_now_ns() < a->unsettled_until_ns[s]) {
        shadow->maybe = attn_max(shadow->maybe, shadow->length);
    } else if (actor_accepts(a, "truncate", status) && status != ATTN_ERR_BUSY) {
        /* It may or may not have been done: whoever takes the sequence next asks. */
        shadow->maybe  = attn_max(shadow->maybe, shadow->length);
        shadow->length = attn_min(shadow->length, length);
    }
}

/* ---- what is committed ---- */

/* A failed commit may have been made by some owners: the length is that of before, of after, or
 * where an owner's part ends. */
static bool
length_is_possible(const shadow_t *s, uint32_t chunk_size, uint64_t length)
{
    return length == s->length || length == s->maybe ||
           (length > s->length && length < s->maybe && length % chunk_size == 0);
}

/* Nothing is lost: hold the chunks against the shadow. */
static bool
check_whole(actor_t *a, uint32_t s, const attn_seq_info_t *info)
{
    shadow_t *shadow = &a->seqs[s];
    uint32_t size    = a->geometry->chunk_size;

    if (!length_is_possible(shadow, size, info->length)) {
        actor_fail(a,
                   "WRONG LENGTH: sequence %llx has %llu tokens; %llu are committed, and %llu "
                   "may be",
                   (unsigned long long)shadow->seq.id, (unsigned long long)info->length,
                   (unsigned long long)shadow->length, (unsigned long long)shadow->maybe);
        return false;
    }
    for (uint32_t c = 0; c < info->n_chunks; c++) {
        uint64_t first = (uint64_t)c * size;
        uint64_t want  = info->length > first ? attn_min(info->length - first, size) : 0;
        if (info->chunks[c].first != first ||
            (info->chunks[c].length != want && shadow->maybe == shadow->length)) {
            actor_fail(a,
                       "WRONG CHUNK: sequence %llx of %llu tokens: chunk %u begins at %llu and "
                       "has %u tokens, not %llu",
                       (unsigned long long)shadow->seq.id, (unsigned long long)info->length, c,
                       (unsigned long long)info->chunks[c].first, info->chunks[c].length,
                       (unsigned long long)want);
            return false;
        }
    }
    shadow->length = info->length;
    if (attn_now_ns() >= a->unsettled_until_ns[s]) {
        shadow_cut(shadow, info->length);
    }
    return true;
}

/* Were all these workers killed, or stopped for long? Only a direct client can tell. */
static void
check_gone(actor_t *a, const attn_chunk_info_t *chunk)
{
    attn_cluster_info_t cluster;

    if (a->plan->kind != TARGET_DIRECT ||
        attn_cluster_describe(a->connection->target.client, &cluster) != ATTN_OK) {
        return;
    }
    for (uint32_t w = 0; w < cluster.n_workers; w++) {
        bool gone = false;
        for (uint32_t i = 0; i < atomic_load(&a->stress->n_gone); i++) {
            gone = gone || strcmp(a->stress->gone[i], cluster.workers[w].address) == 0;
        }
        if (cluster.workers[w].id == chunk->worker && !gone && !coordinator_changed(a)) {
            actor_fail(a, "LOST WITHOUT CAUSE: worker %u at %s was neither killed nor stopped",
                       chunk->worker, cluster.workers[w].address);
        }
    }
    attn_cluster_info_free(&cluster);
}

/* Where the first lost token is, or UINT64_MAX. What is elsewhere must be there. */
static uint64_t
check_lost(actor_t *a, uint32_t s, const attn_seq_info_t *info)
{
    shadow_t *shadow = &a->seqs[s];
    uint32_t size    = a->geometry->chunk_size;
    uint64_t lost    = UINT64_MAX;

    for (uint32_t c = 0; c < info->n_chunks; c++) {
        const attn_chunk_info_t *chunk = &info->chunks[c];
        uint64_t first                 = (uint64_t)c * size;
        uint64_t want = shadow->length > first ? attn_min(shadow->length - first, size) : 0;
        if (chunk->lost && first <= shadow->maybe) {
            lost = attn_min(lost, first);
            check_gone(a, chunk);
        } else if (chunk->sealed && chunk->length < want) { /* a fork's owner refills it */
            lost = attn_min(lost, first);
        } else if (!chunk->lost && chunk->length < want) {
            actor_fail(a,
                       "LOST MORE THAN A WORKER'S: sequence %llx, chunk %u on worker %u, which "
                       "lives, has %u tokens of %llu",
                       (unsigned long long)shadow->seq.id, c, chunk->worker, chunk->length,
                       (unsigned long long)want);
        }
    }
    return lost;
}

/* Fill all holes with what was there. Others, whose forks share them, may do so at the same time,
 * or may have left one filled in part. */
static bool
refill(actor_t *a, uint32_t s, const attn_seq_info_t *info)
{
    const shadow_t *shadow = &a->seqs[s];
    attn_status_t status   = ATTN_OK;

    if (shadow->maybe != shadow->length || info->n_holes == 0) {
        return false;
    }
    for (uint32_t h = 0; h < info->n_holes && status == ATTN_OK; h++) {
        uint64_t end = info->holes[h].open ? shadow->length : info->holes[h].end;
        status = actor_write(a, &a->connection->target, shadow->seq, shadow, info->holes[h].first,
                             attn_min(end, shadow->length));
        actor_log(a, "refill %llx from %llu to %llu%s: %s: %.80s",
                  (unsigned long long)shadow->seq.id, (unsigned long long)info->holes[h].first,
                  (unsigned long long)end, info->holes[h].open ? ", open" : "",
                  attn_strerror(status), status == ATTN_OK ? "" : attn_last_error());
    }
    atomic_fetch_add(&a->figures->refilled, status == ATTN_OK);
    return status == ATTN_OK;
}

/* Tokens were lost: fill them in, or go on with what is before them, or not at all. */
static bool
recover(actor_t *a, uint32_t s, const attn_seq_info_t *info, uint64_t lost)
{
    atomic_fetch_add(&a->figures->lost, 1);
    if (chance_one_in(&a->chance, 2) && refill(a, s, info)) {
        return true;
    }
    if (lost == 0 || lost > a->seqs[s].length || chance_one_in(&a->chance, 3)) {
        actor_drop(a, s);
        return false;
    }
    truncate_at(a, s, lost);
    if (a->seqs[s].length == lost && a->seqs[s].maybe == lost) {
        atomic_fetch_add(&a->figures->recovered, 1);
        return true;
    }
    return false;
}

bool
actor_resolve(actor_t *a, uint32_t s)
{
    shadow_t *shadow = &a->seqs[s];
    attn_seq_info_t info;
    bool any = false;

    actor_call(a, "describe", call_deadline(a));
    attn_status_t status =
        actor_called(a, target_describe(&a->connection->target, shadow->seq, &info));
    if (status != ATTN_OK) {
        actor_accepts(a, "describe", status);
        return false;
    }
    for (uint32_t c = 0; c < info.n_chunks; c++) {
        any = any || info.chunks[c].lost ||
              (info.chunks[c].sealed && info.chunks[c].length < a->geometry->chunk_size);
    }
    actor_log(a, "describe %llx: %llu tokens in %u chunks%s; %llu to %llu are known",
              (unsigned long long)shadow->seq.id, (unsigned long long)info.length, info.n_chunks,
              any ? ", some lost" : "", (unsigned long long)shadow->length,
              (unsigned long long)shadow->maybe);
    uint64_t lost = any ? check_lost(a, s, &info) : UINT64_MAX;
    bool usable = lost != UINT64_MAX ? recover(a, s, &info, lost) : any || check_whole(a, s, &info);
    attn_seq_info_free(&info);
    return usable;
}

/* ---- the connection ---- */

static void
common_make(actor_t *a)
{
    connection_t *c  = a->connection;
    uint64_t content = a->next_content++;

    if (c->common.used) {
        target_free(&c->target, c->common.seq);
    }
    shadow_clear(&c->common);
    atomic_store(&c->common_is_lost, false);
    if (target_create(&c->target, &c->common.seq) == ATTN_OK &&
        actor_ingest(a, &c->target, &c->common, COMMON_TOKENS, content) == ATTN_OK) {
        c->common.used = true;
    }
}

void
connection_close(connection_t *c, stress_t *stress)
{
    uint64_t ucx, grpc;

    if (c->open) {
        target_runs(&c->target, &ucx, &grpc);
        atomic_fetch_add(&stress->runs_ucx, ucx);
        atomic_fetch_add(&stress->runs_grpc, grpc);
        target_close(&c->target);
        c->open = false;
    }
}

/* Every other connection is over gRPC alone, unless $ATTN_TRANSPORT is for all of them. */
static attn_transport_t
transport_of(const actor_t *a)
{
    const char *said = getenv("ATTN_TRANSPORT");
    uint32_t turn    = a->plan->process + a->connection->index + a->connection->number;

    return said != NULL && said[0] != '\0' ? ATTN_TRANSPORT_DEFAULT
           : turn % 2 == 0                 ? ATTN_TRANSPORT_AUTO
                                           : ATTN_TRANSPORT_GRPC;
}

/* Alone with the connection. */
static void
reopen(actor_t *a)
{
    connection_t *c           = a->connection;
    const client_plan_t *plan = a->plan;
    uint64_t end              = attn_now_ns() + REOPEN_MS * ATTN_NS_PER_MS;
    attn_status_t status;
    char name[64], cache[32];

    snprintf(name, sizeof(name), "stress-%s-%u-%u", target_names[plan->kind], plan->process,
             plan->life);
    snprintf(cache, sizeof(cache), "stress-%u", plan->geometry);
    connection_close(c, a->stress);
    do {
        c->coordinator = atomic_load(&a->stress->coordinators);
        status =
            target_open(&c->target, plan->kind,
                        plan->kind == TARGET_INPROC ? "inproc://cpu?workers=3&threads=1&slab=64MiB"
                                                    : a->stress->address,
                        name, a->stress->options.timeout_ms, transport_of(a), cache, a->geometry);
        if (status != ATTN_OK) {
            actor_log(a, "open: %s: %.120s", attn_strerror(status), attn_last_error());
            nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
        }
    } while (status != ATTN_OK && attn_now_ns() < end && !atomic_load(&a->stress->stop));
    if (status != ATTN_OK) {
        if (!atomic_load(&a->stress->stop)) {
            actor_fail(a, "NO WAY IN: %s for 20 s: %s: %s", a->stress->address,
                       attn_strerror(status), attn_last_error());
        }
        return;
    }
    c->open        = true;
    c->common.used = false; /* it went with the old one */
    c->number++;
    actor_log(a, "opened, for the %uth time", c->number);
    common_make(a);
}

/* The connection is up to date; what belongs to an older one is forgotten. */
static void
connect_again(actor_t *a)
{
    connection_t *c = a->connection;

    pthread_rwlock_wrlock(&c->lock);
    if (!c->open || coordinator_changed(a)) {
        reopen(a);
    } else if (atomic_load(&c->common_is_lost) || !c->common.used) {
        common_make(a);
    }
    pthread_rwlock_unlock(&c->lock);
}

static void
forget_old(actor_t *a)
{
    if (a->opened != a->connection->number) {
        for (uint32_t s = 0; s < ACTOR_SEQS; s++) {
            shadow_clear(&a->seqs[s]);
        }
        a->opened = a->connection->number;
    }
}

/* ---- life ---- */

static void
one_act(actor_t *a)
{
    uint32_t s       = (uint32_t)chance_below(&a->chance, ACTOR_SEQS);
    uint32_t to      = (uint32_t)chance_below(&a->chance, ACTOR_SEQS);
    uint64_t kind    = chance_below(&a->chance, 40);
    shadow_t *shadow = &a->seqs[s], *common = &a->connection->common;

    a->disturbances = atomic_load(&a->stress->disturbances);
    a->act_began_ns = attn_now_ns();
    if (shadow->used && shadow->length > 0 &&
        stress_sabotage(a->stress, a->number, SABOTAGE_TOKENS)) {
        target_truncate(&a->connection->target, shadow->seq, shadow->length - 1);
    }
    if (!shadow->used && common->used && kind % 3 == 0) {
        fork_into(a, common, chance_in(&a->chance, 1, common->length), s);
    } else if (!shadow->used && kind < 24) {
        create(a, s);
    } else if (shadow->used && shadow->maybe != shadow->length) {
        actor_resolve(a, s);
    } else if (shadow->used && (kind == 0 || shadow->length > ACTOR_LENGTH)) {
        truncate_at(a, s, chance_below(&a->chance, shadow->length + 1));
    } else if (shadow->used && kind == 1 && !a->seqs[to].used) {
        fork_into(a, shadow, chance_below(&a->chance, shadow->length + 1), to);
    } else if (shadow->used && kind == 2 && chance_one_in(&a->chance, 3)) {
        actor_drop(a, s);
    } else if (shadow->used && kind == 3) {
        actor_resolve(a, s);
    } else if (shadow->used && kind == 4 && shadow->length > 0) {
        actor_export(a, s);
    } else {
        actor_step(a);
    }
}

void *
actor_thread(void *arg)
{
    actor_t *a = arg;

    while (!atomic_load(&a->stress->stop)) {
        pthread_rwlock_rdlock(&a->connection->lock);
        bool fresh =
            a->connection->open && !coordinator_changed(a) &&
            ((a->connection->common.used && !atomic_load(&a->connection->common_is_lost)) ||
             !chance_one_in(&a->chance, 20));
        if (fresh) {
            forget_old(a);
            one_act(a);
        }
        pthread_rwlock_unlock(&a->connection->lock);
        if (!fresh) {
            connect_again(a);
        }
    }
    return NULL;
}

bool
actor_init(actor_t *a, const client_plan_t *plan, uint32_t number, connection_t *connection)
{
    uint64_t rows = ACTOR_ROWS;

    memset(a, 0, sizeof(*a));
    a->plan         = plan;
    a->stress       = plan->stress;
    a->figures      = &plan->stress->actors[number];
    a->connection   = connection;
    a->number       = number;
    a->geometry     = truth_geometry(plan->geometry);
    a->chance.state = plan->stress->options.seed * 1000003 + number * 7919 + plan->life * 104729;
    a->next_content = chance(&a->chance);
    a->q            = malloc(rows * a->geometry->q_heads * a->geometry->head_dim_k * 4);
    a->k            = malloc(rows * a->geometry->kv_heads * a->geometry->head_dim_k * 4);
    a->v            = malloc(rows * a->geometry->kv_heads * a->geometry->head_dim_v * 4);
    a->o            = malloc(rows * a->geometry->q_heads * a->geometry->head_dim_v * 4);
    a->lse          = malloc(rows * a->geometry->q_heads * 4);
    a->twin_o       = malloc((uint64_t)ACTOR_LAYERS * ACTOR_TWIN_ROWS * a->geometry->q_heads *
                             a->geometry->head_dim_v * 4);
    a->twin_lse     = malloc((uint64_t)ACTOR_LAYERS * ACTOR_TWIN_ROWS * a->geometry->q_heads * 4);
    return a->q && a->k && a->v && a->o && a->lse && a->twin_o && a->twin_lse;
}

void
actor_fini(actor_t *a)
{
    for (uint32_t s = 0; s < ACTOR_SEQS; s++) {
        shadow_clear(&a->seqs[s]);
    }
    if (a->twin_open) {
        target_close(&a->twin);
    }
    free(a->q);
    free(a->k);
    free(a->v);
    free(a->o);
    free(a->lse);
    free(a->twin_o);
    free(a->twin_lse);
}
