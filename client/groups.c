/*
 * groups.c: groups are made, proved, measured, kept for the next step, and closed. Everything that
 * asks workers is done without the lock.
 */
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
#define REPLACE_NS (UINT64_C(3000) * ATTN_NS_PER_MS)  /* or for so long, where another is wanted */
#define MAKE_NS (UINT64_C(2000) * ATTN_NS_PER_MS)     /* for making one at most */
#define INSISTS_NS (5 * MAKE_NS)                      /* where ranks may take turns on a GPU */
#define CLOSE_NS (UINT64_C(1000) * ATTN_NS_PER_MS)    /* for closing one */
#define AGAIN_NS (UINT64_C(1000) * ATTN_NS_PER_MS)    /* refusals, at first: what may be again */
#define REFUSED_NS (UINT64_C(10000) * ATTN_NS_PER_MS) /* what failed */
#define REFUSED_NS_MAX (60 * REFUSED_NS)              /* at last, and what cannot be */
#define REFUSALS 16u
#define MEASURED 16u

/* Workers that could not be made a group, or one that cannot be in any: no wish that names them,
 * and asks for as much, is granted until then. */
typedef struct refusal {
    group_wish_t wish;
    uint64_t until_ns, for_ns;
    attn_status_t status;
    char sentence[256];
} refusal_t;

/* What exchanges of some workers took. */
typedef struct measured {
    uint32_t ranks;
    link_t *links[ATTN_RANKS_MAX];
    cost_exchange_t exchange;
} measured_t;

struct groups {
    pthread_mutex_t lock;
    group_t *list;
    uint32_t making;                 /* by who insists: not in the list yet */
    group_wish_t wanted[GROUPS_MAX]; /* by who does not: the first is being made, or will be */
    uint32_t n_wanted;
    refusal_t refusals[REFUSALS];
    uint32_t n_refusals; /* ever; a ring */
    measured_t measured[MEASURED];
    uint32_t n_measured; /* likewise */
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

/* A rank that does not hear of it ends when it was idle for long. */
static void
close_ranks(const group_t *g, uint64_t deadline_ns)
{
    for (uint32_t r = 0; r < g->of.ranks; r++) {
        g->of.links[r]->ops->group_close(g->of.links[r], g->id, deadline_ns);
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

    pthread_mutex_lock(&groups->lock);
    bool due = groups->n_wanted > 0;
    for (const group_t *g = groups->list; g != NULL; g = g->next) {
        due = due || (!g->taken && (g->over || now >= g->used_ns + IDLE_NS));
    }
    pthread_mutex_unlock(&groups->lock);
    return due;
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
    link_t *link = p->group->of.links[p->rank];

    p->status = link->ops->group_prove(link, p->group->id, p->deadline_ns, &p->proof);
    snprintf(p->sentence, sizeof(p->sentence), "%s", p->status == ATTN_OK ? "" : attn_last_error());
    return NULL;
}

static bool
same_workers(uint32_t ranks, link_t *const *links, uint32_t n, link_t *const *others)
{
    return ranks == n && memcmp(links, others, n * sizeof(*links)) == 0;
}

/* What the proofs say of these workers. */
static void
note_measured(groups_t *groups, const group_t *g, const cost_exchange_t *exchange)
{
    measured_t *into = NULL;

    pthread_mutex_lock(&groups->lock);
    for (uint32_t i = 0; i < MEASURED && into == NULL; i++) {
        measured_t *m = &groups->measured[i];
        into          = same_workers(m->ranks, m->links, g->of.ranks, g->of.links) ? m : NULL;
    }
    into  = into != NULL ? into : &groups->measured[groups->n_measured++ % MEASURED];
    *into = (measured_t){.ranks = g->of.ranks, .exchange = *exchange};
    memcpy(into->links, g->of.links, sizeof(into->links));
    pthread_mutex_unlock(&groups->lock);
}

static void
measure(groups_t *groups, const group_t *g, const prover_t *provers)
{
    cost_exchange_t slowest = {0};

    for (uint32_t r = 0; r < g->of.ranks; r++) {
        const link_proof_t *p = &provers[r].proof;
        cost_exchange_t one;
        if (p->many > ENGINE_PROOF_FEW) {
            cost_exchange_measured(&(cost_proof_t){.ranks        = g->of.ranks,
                                                   .head_dim_v   = g->of.head_dim_v,
                                                   .few          = ENGINE_PROOF_FEW,
                                                   .many         = p->many,
                                                   .few_seconds  = p->few_seconds,
                                                   .many_seconds = p->many_seconds},
                                   &one);
            cost_exchange_slowest(&slowest, &one);
        }
    }
    if (slowest.seconds > 0) {
        note_measured(groups, g, &slowest);
    }
    attn_log(ATTN_LOG_INFO, "client.group", "ranks=%u exchange_us=%.1f bandwidth_gbps=%.2f",
             g->of.ranks, 1e6 * slowest.seconds, 1e-9 * slowest.bandwidth);
}

/* All ranks exchange something at the same time, a thread each: before a step relies on it. */
static attn_status_t
prove(groups_t *groups, group_t *g, uint64_t deadline_ns)
{
    prover_t provers[ATTN_RANKS_MAX];
    pthread_t threads[ATTN_RANKS_MAX];
    bool started[ATTN_RANKS_MAX] = {false};
    attn_status_t status         = ATTN_OK;

    for (uint32_t r = 0; r < g->of.ranks; r++) {
        provers[r] = (prover_t){.group = g, .rank = r, .deadline_ns = deadline_ns};
        started[r] = r > 0 && pthread_create(&threads[r], NULL, prove_rank, &provers[r]) == 0;
        if (r > 0 && !started[r]) {
            provers[r].status = ATTN_ERR_NO_MEMORY;
        }
    }
    prove_rank(&provers[0]);
    for (uint32_t r = 0; r < g->of.ranks; r++) {
        if (started[r]) {
            pthread_join(threads[r], NULL);
        }
        if (status == ATTN_OK && provers[r].status != ATTN_OK) {
            status = attn_fail(provers[r].status, "rank %u: %s", r, provers[r].sentence);
        }
    }
    if (status == ATTN_OK) {
        measure(groups, g, provers);
    }
    return status;
}

bool
groups_exchange(groups_t *groups, link_t *const *links, uint32_t n, cost_exchange_t *exchange)
{
    cost_exchange_t slowest  = {0};
    const measured_t *theirs = NULL;

    pthread_mutex_lock(&groups->lock);
    for (uint32_t i = 0; i < MEASURED && theirs == NULL; i++) {
        const measured_t *m = &groups->measured[i];
        theirs              = n > 0 && same_workers(m->ranks, m->links, n, links) ? m : NULL;
        cost_exchange_slowest(&slowest, &m->exchange);
    }
    slowest = theirs != NULL ? theirs->exchange : slowest;
    pthread_mutex_unlock(&groups->lock);
    cost_exchange_init(exchange);
    if (slowest.seconds > 0) {
        *exchange = slowest;
    }
    return slowest.seconds > 0;
}

/* ---- refusals ---- */

/* Is all that the wish wants refused? */
static bool
refuses(const refusal_t *r, const group_wish_t *wish)
{
    bool theirs = same_workers(r->wish.ranks, r->wish.links, wish->ranks, wish->links);

    for (uint32_t i = 0; i < wish->ranks && r->wish.ranks == 1; i++) {
        theirs = theirs || wish->links[i] == r->wish.links[0];
    }
    return theirs && r->wish.head_dim_v == wish->head_dim_v &&
           r->wish.half_bytes <= wish->half_bytes;
}

/* Was this refused a short while ago? Under the lock. */
static const refusal_t *
find_refusal(const groups_t *groups, const group_wish_t *wish, uint64_t now_ns)
{
    for (uint32_t i = 0; i < REFUSALS; i++) {
        const refusal_t *r = &groups->refusals[i];
        if (now_ns < r->until_ns && refuses(r, wish)) {
            return r;
        }
    }
    return NULL;
}

bool
groups_refused(groups_t *groups, const group_wish_t *wish, char sentence[256])
{
    pthread_mutex_lock(&groups->lock);
    const refusal_t *r = find_refusal(groups, wish, attn_now_ns());
    if (r != NULL) {
        memcpy(sentence, r->sentence, 256);
    }
    pthread_mutex_unlock(&groups->lock);
    return r != NULL;
}

static uint64_t
refused_at_first(attn_status_t status)
{
    return status == ATTN_ERR_BUSY          ? AGAIN_NS
           : status == ATTN_ERR_UNSUPPORTED ? REFUSED_NS_MAX
                                            : REFUSED_NS;
}

void
groups_refuse(groups_t *groups, const group_wish_t *wish, attn_status_t status,
              const char *sentence)
{
    uint64_t now = attn_now_ns(), ns = refused_at_first(status);
    uint64_t half = wish->half_bytes;
    refusal_t *r  = NULL;

    pthread_mutex_lock(&groups->lock);
    for (uint32_t i = 0; i < REFUSALS && r == NULL; i++) {
        refusal_t *old = &groups->refusals[i];
        bool theirs    = same_workers(old->wish.ranks, old->wish.links, wish->ranks, wish->links) &&
                      old->wish.head_dim_v == wish->head_dim_v;
        r = theirs ? old : NULL;
    }
    if (r != NULL && now < r->until_ns + r->for_ns) { /* it is in force, or was for as long */
        ns   = attn_max(ns, now < r->until_ns ? r->for_ns : 2 * r->for_ns);
        half = attn_min(half, r->wish.half_bytes);
    }
    r  = r != NULL ? r : &groups->refusals[groups->n_refusals++ % REFUSALS];
    ns = attn_min(ns, REFUSED_NS_MAX);
    *r = (refusal_t){.wish = *wish, .until_ns = now + ns, .for_ns = ns, .status = status};
    r->wish.half_bytes = half;
    snprintf(r->sentence, sizeof(r->sentence), "%s", sentence);
    pthread_mutex_unlock(&groups->lock);
    attn_log(ATTN_LOG_INFO, "client.no_group", "ranks=%u for_ms=%llu reason=\"%.255s\"",
             wish->ranks, (unsigned long long)(ns / ATTN_NS_PER_MS), sentence);
}

/* ---- making ---- */

attn_status_t
groups_check(const group_member_t *members, uint32_t n, bool shared)
{
    if (n < 2 || n > ATTN_RANKS_MAX) {
        return attn_fail(ATTN_ERR_UNSUPPORTED,
                         "partials are on %u workers of a cluster: 2 to %u may be a group", n,
                         ATTN_RANKS_MAX);
    }
    for (uint32_t a = 0; a < n; a++) {
        if (members[a].place.host[0] == '\0') {
            return attn_fail(ATTN_ERR_UNSUPPORTED,
                             "worker %u is in no groups: it has no GPU for that, or was started "
                             "without --groups",
                             members[a].worker);
        }
    }
    for (uint32_t a = 0; a < n; a++) {
        for (uint32_t b = a + 1; b < n; b++) {
            if (strcmp(members[a].place.host, members[b].place.host) != 0) {
                return attn_fail(ATTN_ERR_UNSUPPORTED,
                                 "workers %u and %u are on different hosts, or in different IPC "
                                 "namespaces",
                                 members[a].worker, members[b].worker);
            }
            /* They would take turns: no exchange ends before the device has gone from one to the
             * other and back. */
            if (!shared && strcmp(members[a].place.device, members[b].place.device) == 0) {
                return attn_fail(ATTN_ERR_UNSUPPORTED, "workers %u and %u share a GPU",
                                 members[a].worker, members[b].worker);
            }
        }
    }
    return ATTN_OK;
}

/* failed: the rank that could not be opened, where the others have no part in that. */
static attn_status_t
make_ranks(groups_t *groups, group_t *g, uint64_t deadline_ns, link_t **failed)
{
    link_inbox_t inboxes[ATTN_RANKS_MAX];
    attn_status_t status = ATTN_OK;
    uint32_t ranks       = g->of.ranks;

    for (uint32_t r = 0; r < ranks && status == ATTN_OK; r++) {
        link_t *link                   = g->of.links[r];
        engine_group_options_t options = {.id         = g->id,
                                          .ranks      = ranks,
                                          .me         = r,
                                          .head_dim_v = g->of.head_dim_v,
                                          .half_bytes = g->of.half_bytes};
        status  = link->ops->group_open(link, &options, deadline_ns, &inboxes[r]);
        *failed = status != ATTN_OK ? link : NULL;
    }
    for (uint32_t r = 0; r < ranks && status == ATTN_OK; r++) {
        link_t *link = g->of.links[r];
        status       = link->ops->group_connect(link, inboxes, ranks, deadline_ns);
    }
    return status == ATTN_OK ? prove(groups, g, deadline_ns) : status;
}

/* What there is of one that fails is left to the sweep. */
static attn_status_t
group_make(groups_t *groups, const group_wish_t *wish, group_t **group_p)
{
    group_t *g       = calloc(1, sizeof(*g));
    uint64_t most_ns = wish->insists ? INSISTS_NS : MAKE_NS;
    link_t *failed   = NULL;

    if (g == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a group");
    }
    *g               = (group_t){.of = *wish, .taken = true};
    g->of.half_bytes = ENGINE_HALF_MIN;
    while (g->of.half_bytes < wish->half_bytes) {
        g->of.half_bytes *= 2;
    }
    while (g->id == 0) {
        if (getrandom(&g->id, sizeof(g->id), 0) != sizeof(g->id)) {
            g->id = attn_now_ns() ^ (uint64_t)(uintptr_t)g << 16;
        }
    }
    uint64_t until_ns    = attn_min(wish->deadline_ns, attn_now_ns() + most_ns);
    attn_status_t status = make_ranks(groups, g, until_ns, &failed);
    if (status != ATTN_OK) {
        group_wish_t of = *wish;
        if (failed != NULL) { /* true of all groups with it */
            of.ranks    = 1;
            of.links[0] = failed;
        }
        groups_refuse(groups, &of, status, attn_last_error());
        g->over  = true;
        g->taken = false;
    }
    g->used_ns = attn_now_ns();
    pthread_mutex_lock(&groups->lock);
    g->next      = groups->list;
    groups->list = g;
    pthread_mutex_unlock(&groups->lock);
    *group_p = status == ATTN_OK ? g : NULL;
    return status;
}

/* The first of what is wanted, which stays so until it is there: nobody is to want it twice. */
static void
make_wanted(groups_t *groups)
{
    group_wish_t wish = {0};
    group_t *g;

    pthread_mutex_lock(&groups->lock);
    if (groups->n_wanted > 0) {
        wish = groups->wanted[0];
    }
    pthread_mutex_unlock(&groups->lock);
    if (wish.ranks == 0) {
        return;
    }
    wish.deadline_ns = UINT64_MAX;
    if (group_make(groups, &wish, &g) == ATTN_OK) {
        groups_give(groups, g, false);
    }
    pthread_mutex_lock(&groups->lock);
    groups->n_wanted--;
    memmove(&groups->wanted[0], &groups->wanted[1], groups->n_wanted * sizeof(groups->wanted[0]));
    pthread_mutex_unlock(&groups->lock);
}

void
groups_sweep(groups_t *groups)
{
    group_t *g;

    while ((g = take_dying(groups, attn_now_ns())) != NULL) {
        close_ranks(g, attn_now_ns() + CLOSE_NS);
        free(g);
    }
    make_wanted(groups);
}

/* ---- taking ---- */

static bool
same_kind(const group_wish_t *a, const group_wish_t *b)
{
    return same_workers(a->ranks, a->links, b->ranks, b->links) && a->head_dim_v == b->head_dim_v;
}

/* One that is there and fits; what is too small for its workers gives way. Under the lock. */
static group_t *
find_free(groups_t *groups, const group_wish_t *wish, uint64_t now_ns)
{
    for (group_t *g = groups->list; g != NULL; g = g->next) {
        if (g->taken || g->over || !same_kind(wish, &g->of)) {
            continue;
        }
        if (g->of.half_bytes >= wish->half_bytes && now_ns < g->used_ns + IDLE_NS) {
            return g;
        }
        g->over = true;
    }
    return NULL;
}

/* Is it wanted already? Under the lock. */
static bool
is_wanted(groups_t *groups, const group_wish_t *wish)
{
    for (uint32_t i = 0; i < groups->n_wanted; i++) {
        if (same_kind(wish, &groups->wanted[i])) {
            return true;
        }
    }
    return false;
}

/* May there be one more? One that was not used of late gives way: else steps that take turns with
 * more workers than there may be groups would make one each. Under the lock. */
static bool
has_room(groups_t *groups, const group_wish_t *wish, uint64_t now_ns)
{
    uint32_t all = groups->making + groups->n_wanted, live = all;
    group_t *oldest = NULL;

    for (group_t *g = groups->list; g != NULL; g = g->next) {
        all++;
        live += !g->over;
        if (!g->taken && !g->over && (oldest == NULL || g->used_ns < oldest->used_ns)) {
            oldest = g;
        }
    }
    if (live >= GROUPS_MAX && oldest != NULL &&
        (wish->insists || now_ns >= oldest->used_ns + REPLACE_NS)) {
        oldest->over = true;
        live--;
    }
    return live < GROUPS_MAX && all < 2 * GROUPS_MAX;
}

attn_status_t
groups_take(groups_t *groups, const group_wish_t *wish, group_t **group_p)
{
    uint64_t now         = attn_now_ns();
    attn_status_t status = ATTN_OK;

    pthread_mutex_lock(&groups->lock);
    const refusal_t *refused = wish->insists ? NULL : find_refusal(groups, wish, now);
    group_t *g               = refused == NULL ? find_free(groups, wish, now) : NULL;
    bool wanted              = !wish->insists && is_wanted(groups, wish);
    if (g != NULL) {
        g->taken = true;
    } else if (refused != NULL) {
        status = attn_fail(refused->status, "%s", refused->sentence);
    } else if (!wanted && !has_room(groups, wish, now)) {
        status = attn_fail(ATTN_ERR_EXHAUSTED,
                           "all of the %u groups that a client has are in use, or were a moment "
                           "ago, or others were not closed yet",
                           GROUPS_MAX);
    } else if (!wish->insists) {
        if (!wanted) {
            groups->wanted[groups->n_wanted++] = *wish;
        }
        status = attn_fail(ATTN_ERR_BUSY, "%u workers are being made a group", wish->ranks);
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
