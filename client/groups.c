#include "client/groups.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#define GROUPS_MAX 4u                                 /* of a client: workers have few */
#define IDLE_NS (UINT64_C(10000) * ATTN_NS_PER_MS)    /* unused for so long it is closed */
#define REFUSED_NS (UINT64_C(10000) * ATTN_NS_PER_MS) /* these workers are not asked meanwhile */
#define MAKE_NS (UINT64_C(2000) * ATTN_NS_PER_MS)     /* for making one at most */
#define SHARED_NS (5 * MAKE_NS)                       /* where ranks may take turns on a GPU */
#define CLOSE_NS (UINT64_C(1000) * ATTN_NS_PER_MS)    /* for closing one */
#define UNSUPPORTED_NS (60 * REFUSED_NS)              /* if they cannot, whatever else happens */
#define REFUSALS 16u

/* Workers that could not be made a group. */
typedef struct refusal {
    group_wish_t wish;
    uint64_t until_ns;
    attn_status_t status;
    char sentence[256];
} refusal_t;

struct groups {
    pthread_mutex_t lock;
    group_t *list;
    uint32_t making; /* that are not in the list yet */
    refusal_t refusals[REFUSALS];
    uint32_t n_refusals; /* ever; a ring */
};

attn_status_t
groups_create(groups_t **groups_p)
{
    groups_t *groups = calloc(1, sizeof(*groups));

    if (groups == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for groups");
    }
    pthread_mutex_init(&groups->lock, NULL);
    *groups_p = groups;
    return ATTN_OK;
}

/* ---- closing ---- */

/*
 * All ranks stop writing to others' inboxes before any of these goes. If one does not say that it
 * has, the others keep their inboxes until they have been idle for long.
 */
static void
close_ranks(const group_t *g, uint64_t deadline_ns)
{
    bool all = true;

    for (uint32_t r = 0; r < g->ranks; r++) {
        link_t *link = g->links[r];
        all          = link->ops->group_close(link, g->id, false, deadline_ns) == ATTN_OK && all;
    }
    for (uint32_t r = 0; r < g->ranks && all; r++) {
        g->links[r]->ops->group_close(g->links[r], g->id, true, deadline_ns);
    }
}

/* One that is to be closed, out of the list; or NULL. */
static group_t *
take_dying(groups_t *groups, uint64_t now_ns)
{
    group_t *found = NULL;

    pthread_mutex_lock(&groups->lock);
    for (group_t **at = &groups->list; *at != NULL && found == NULL;) {
        group_t *g = *at;
        if (!g->taken && (g->over || now_ns >= g->used_ns + IDLE_NS)) {
            *at   = g->next;
            found = g;
        } else {
            at = &g->next;
        }
    }
    pthread_mutex_unlock(&groups->lock);
    return found;
}

bool
groups_due(groups_t *groups)
{
    uint64_t now = attn_now_ns();
    bool due     = false;

    pthread_mutex_lock(&groups->lock);
    for (const group_t *g = groups->list; g != NULL; g = g->next) {
        due = due || (!g->taken && (g->over || now >= g->used_ns + IDLE_NS));
    }
    pthread_mutex_unlock(&groups->lock);
    return due;
}

void
groups_sweep(groups_t *groups)
{
    group_t *g;

    while ((g = take_dying(groups, attn_now_ns())) != NULL) {
        close_ranks(g, attn_now_ns() + CLOSE_NS);
        free(g);
    }
}

void
groups_destroy(groups_t *groups, uint64_t deadline_ns)
{
    group_t *g;

    if (groups == NULL) {
        return;
    }
    while ((g = take_dying(groups, UINT64_MAX)) != NULL) {
        close_ranks(g, deadline_ns);
        free(g);
    }
    pthread_mutex_destroy(&groups->lock);
    free(groups);
}

uint32_t
groups_count(groups_t *groups)
{
    uint32_t n = 0;

    pthread_mutex_lock(&groups->lock);
    for (const group_t *g = groups->list; g != NULL; g = g->next) {
        n++;
    }
    pthread_mutex_unlock(&groups->lock);
    return n;
}

/* ---- the proof ---- */

typedef struct prover {
    group_t *group;
    uint32_t rank;
    uint64_t deadline_ns;
    attn_status_t status;
    link_proof_t proof;
    char sentence[512];
} prover_t;

static void *
prove_rank(void *arg)
{
    prover_t *p  = arg;
    link_t *link = p->group->links[p->rank];

    p->status = link->ops->group_prove(link, p->group->id, p->deadline_ns, &p->proof);
    snprintf(p->sentence, sizeof(p->sentence), "%s", p->status == ATTN_OK ? "" : attn_last_error());
    return NULL;
}

/* What the proofs say: the seconds of next to nothing, and bytes that leave a rank. */
static void
measure(group_t *g, const prover_t *provers)
{
    cost_exchange_init(&g->measured);
    for (uint32_t r = 0; r < g->ranks; r++) {
        const link_proof_t *p = &provers[r].proof;
        double bytes          = (double)(p->many - ENGINE_PROOF_FEW) * (8.0 + 4.0 * g->head_dim_v) *
                       (g->ranks - 1) / g->ranks;
        double took = p->many_seconds - p->few_seconds;
        if (r == 0 || p->few_seconds > g->measured.seconds) {
            g->measured.seconds = p->few_seconds > 1e-9 ? p->few_seconds : 1e-9;
        }
        double bandwidth = bytes / (took > 1e-9 ? took : 1e-9);
        if (r == 0 || bandwidth < g->measured.bandwidth) {
            g->measured.bandwidth = bandwidth > 1 ? bandwidth : 1;
        }
    }
}

/* All ranks exchange something at the same time, a thread each: before a step relies on it. */
static attn_status_t
prove(group_t *g, uint64_t deadline_ns)
{
    prover_t provers[ATTN_RANKS_MAX];
    pthread_t threads[ATTN_RANKS_MAX];
    bool started[ATTN_RANKS_MAX] = {false};
    attn_status_t status         = ATTN_OK;

    for (uint32_t r = 0; r < g->ranks; r++) {
        provers[r] = (prover_t){.group = g, .rank = r, .deadline_ns = deadline_ns};
        started[r] = r > 0 && pthread_create(&threads[r], NULL, prove_rank, &provers[r]) == 0;
        if (r > 0 && !started[r]) {
            provers[r].status = ATTN_ERR_NO_MEMORY;
        }
    }
    prove_rank(&provers[0]);
    for (uint32_t r = 0; r < g->ranks; r++) {
        if (started[r]) {
            pthread_join(threads[r], NULL);
        }
        if (status == ATTN_OK && provers[r].status != ATTN_OK) {
            status = attn_fail(provers[r].status, "rank %u: %s", r, provers[r].sentence);
        }
    }
    if (status == ATTN_OK) {
        measure(g, provers);
        attn_log(ATTN_LOG_INFO, "client.group",
                 "ranks=%u apart=%s exchange_us=%.1f bandwidth_gbps=%.2f", g->ranks,
                 g->apart ? "yes" : "no", 1e6 * g->measured.seconds, 1e-9 * g->measured.bandwidth);
    }
    return status;
}

bool
groups_exchange(groups_t *groups, cost_exchange_t *exchange)
{
    bool found = false;

    cost_exchange_init(exchange);
    pthread_mutex_lock(&groups->lock);
    for (const group_t *g = groups->list; g != NULL; g = g->next) {
        if (g->apart && (!found || g->measured.seconds > exchange->seconds)) {
            exchange->seconds = g->measured.seconds;
        }
        if (g->apart && (!found || g->measured.bandwidth < exchange->bandwidth)) {
            exchange->bandwidth = g->measured.bandwidth;
        }
        found = found || g->apart;
    }
    pthread_mutex_unlock(&groups->lock);
    return found;
}

/* ---- making ---- */

static bool
same_workers(const group_wish_t *wish, uint32_t ranks, link_t *const *links)
{
    return wish->ranks == ranks && memcmp(wish->links, links, ranks * sizeof(*links)) == 0;
}

/* Was this refused a short while ago? Under the lock. */
static const refusal_t *
find_refusal(const groups_t *groups, const group_wish_t *wish, uint64_t now_ns)
{
    for (uint32_t i = 0; i < REFUSALS; i++) {
        const refusal_t *r = &groups->refusals[i];
        if (now_ns < r->until_ns && same_workers(wish, r->wish.ranks, r->wish.links) &&
            r->wish.head_dim_v == wish->head_dim_v && r->wish.shared == wish->shared &&
            r->wish.half_bytes <= wish->half_bytes) {
            return r;
        }
    }
    return NULL;
}

static void
refuse(groups_t *groups, const group_wish_t *wish, attn_status_t status)
{
    pthread_mutex_lock(&groups->lock);
    refusal_t *r = &groups->refusals[groups->n_refusals++ % REFUSALS];
    uint64_t ns  = status == ATTN_ERR_UNSUPPORTED ? UNSUPPORTED_NS : REFUSED_NS;
    *r           = (refusal_t){.wish = *wish, .until_ns = attn_now_ns() + ns, .status = status};
    strncpy(r->sentence, attn_last_error(), sizeof(r->sentence) - 1);
    pthread_mutex_unlock(&groups->lock);
    attn_log(ATTN_LOG_INFO, "client.no_group", "ranks=%u reason=\"%s\"", wish->ranks, r->sentence);
}

/* Two ranks on one GPU take turns: no exchange ends before the device has gone from one to the
 * other and back. */
static attn_status_t
check_devices(group_t *g, const link_inbox_t *inboxes, bool shared)
{
    g->apart = true;
    for (uint32_t a = 0; a < g->ranks; a++) {
        for (uint32_t b = a + 1; b < g->ranks; b++) {
            if (strcmp(inboxes[a].host, inboxes[b].host) != 0) {
                return attn_fail(ATTN_ERR_UNSUPPORTED,
                                 "ranks %u and %u are on different hosts, or in different IPC "
                                 "namespaces",
                                 a, b);
            }
            g->apart = g->apart && strcmp(inboxes[a].device, inboxes[b].device) != 0;
        }
    }
    return g->apart || shared
               ? ATTN_OK
               : attn_fail(ATTN_ERR_UNSUPPORTED, "two of the %u workers share a GPU", g->ranks);
}

static attn_status_t
make_ranks(group_t *g, const group_wish_t *wish, uint64_t deadline_ns)
{
    link_inbox_t inboxes[ATTN_RANKS_MAX];
    attn_status_t status = ATTN_OK;

    for (uint32_t r = 0; r < g->ranks && status == ATTN_OK; r++) {
        engine_group_options_t options = {.id         = g->id,
                                          .ranks      = g->ranks,
                                          .me         = r,
                                          .head_dim_v = g->head_dim_v,
                                          .half_bytes = g->half_bytes};
        status = g->links[r]->ops->group_open(g->links[r], &options, deadline_ns, &inboxes[r]);
    }
    if (status == ATTN_OK) {
        status = check_devices(g, inboxes, wish->shared);
    }
    for (uint32_t r = 0; r < g->ranks && status == ATTN_OK; r++) {
        status = g->links[r]->ops->group_connect(g->links[r], inboxes, g->ranks, deadline_ns);
    }
    return status == ATTN_OK ? prove(g, deadline_ns) : status;
}

static attn_status_t
group_make(groups_t *groups, const group_wish_t *wish, group_t **group_p)
{
    group_t *g           = calloc(1, sizeof(*g));
    uint64_t most_ns     = wish->shared ? SHARED_NS : MAKE_NS;
    uint64_t deadline_ns = attn_min(wish->deadline_ns, attn_now_ns() + most_ns);

    if (g == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a group");
    }
    *g = (group_t){.ranks      = wish->ranks,
                   .head_dim_v = wish->head_dim_v,
                   .half_bytes = ENGINE_HALF_MIN,
                   .taken      = true};
    memcpy(g->links, wish->links, sizeof(g->links));
    while (g->half_bytes < wish->half_bytes) {
        g->half_bytes *= 2;
    }
    while (g->id == 0) {
        if (getrandom(&g->id, sizeof(g->id), 0) != sizeof(g->id)) {
            g->id = attn_now_ns() ^ (uint64_t)(uintptr_t)g << 16;
        }
    }
    attn_status_t status = make_ranks(g, wish, deadline_ns);
    if (status != ATTN_OK) { /* what there is of it is left to the sweep: the step has a deadline */
        refuse(groups, wish, status);
        g->over  = true;
        g->taken = false;
    }
    pthread_mutex_lock(&groups->lock);
    g->next      = groups->list;
    groups->list = g;
    pthread_mutex_unlock(&groups->lock);
    *group_p = status == ATTN_OK ? g : NULL;
    return status;
}

/* How many there are, or of those the ones that are not over. Under the lock. */
static uint32_t
count(const groups_t *groups, bool live)
{
    uint32_t n = groups->making;

    for (const group_t *g = groups->list; g != NULL; g = g->next) {
        n += !live || !g->over;
    }
    return n;
}

/* One that is there and fits; what is too small for its workers, or not used any more, gives way.
 * Under the lock. */
static group_t *
find_free(groups_t *groups, const group_wish_t *wish, uint64_t now_ns)
{
    group_t *oldest = NULL;

    for (group_t *g = groups->list; g != NULL; g = g->next) {
        bool same = same_workers(wish, g->ranks, g->links) && g->head_dim_v == wish->head_dim_v &&
                    (g->apart || wish->shared);
        if (g->taken || g->over) {
            continue;
        }
        if (same && g->half_bytes >= wish->half_bytes && now_ns < g->used_ns + IDLE_NS) {
            return g;
        }
        g->over = g->over || same;
        oldest  = oldest == NULL || g->used_ns < oldest->used_ns ? g : oldest;
    }
    if (count(groups, true) >= GROUPS_MAX && oldest != NULL) {
        oldest->over = true;
    }
    return NULL;
}

attn_status_t
groups_take(groups_t *groups, const group_wish_t *wish, group_t **group_p)
{
    uint64_t now         = attn_now_ns();
    attn_status_t status = ATTN_OK;

    pthread_mutex_lock(&groups->lock);
    const refusal_t *refused = find_refusal(groups, wish, now);
    group_t *g               = refused == NULL ? find_free(groups, wish, now) : NULL;
    if (g != NULL) {
        g->taken = true;
    } else if (refused != NULL) {
        status = attn_fail(refused->status, "%s", refused->sentence);
    } else if (count(groups, true) >= GROUPS_MAX || count(groups, false) >= 2 * GROUPS_MAX) {
        status =
            attn_fail(ATTN_ERR_EXHAUSTED,
                      "steps are in all of the %u groups that a client has, or others were not "
                      "closed yet",
                      GROUPS_MAX);
    }
    groups->making += g == NULL && status == ATTN_OK;
    pthread_mutex_unlock(&groups->lock);
    if (g != NULL || status != ATTN_OK) {
        *group_p = g;
        return status;
    }
    status = group_make(groups, wish, group_p);
    pthread_mutex_lock(&groups->lock);
    groups->making--;
    pthread_mutex_unlock(&groups->lock);
    return status;
}

void
groups_give(groups_t *groups, group_t *g, bool over)
{
    pthread_mutex_lock(&groups->lock);
    g->taken   = false;
    g->over    = g->over || over;
    g->used_ns = attn_now_ns();
    pthread_mutex_unlock(&groups->lock);
}
