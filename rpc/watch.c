/*
 * watch.c: peers that keep a server waiting. A message that was begun and does not come, and an
 * answer that is not read, hold memory here for as long as their peer likes: keepalive sees
 * nothing wrong with it, and C core has no timers in C. So a thread looks at the open calls a few
 * times in the time that a peer has, and cuts off those that are overdue.
 *
 * When this process itself did not run for a while (stopped, frozen, starved), what peers sent
 * meanwhile was not read, and what they took not seen: that is nobody's fault but ours. It shows by
 * looks that are far apart, and everybody has the time of a stall again.
 */
#include "rpc/rpc_int.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"

#include <string.h>

#define LOOKS 8u /* in the time that a peer has */
#define LOOK_LEAST_MS 10u

struct rpc_watch {
    uint64_t stall_ns, pause_ns; /* between looks */
    pthread_t thread;
    bool started;

    pthread_mutex_t lock; /* taken before a call's own */
    pthread_cond_t cond;
    bool stopping;
    rpc_call_t *calls;
    uint64_t looked_ns, forgiven_until_ns; /* of the thread */
};

rpc_watch_t *
rpc_watch_create(uint32_t stall_ms)
{
    rpc_watch_t *watch = gpr_zalloc(sizeof(*watch));

    watch->stall_ns = stall_ms * ATTN_NS_PER_MS;
    watch->pause_ns = attn_max(watch->stall_ns / LOOKS, LOOK_LEAST_MS * ATTN_NS_PER_MS);
    pthread_mutex_init(&watch->lock, NULL);
    rpc_cond_init(&watch->cond);
    return watch;
}

void
rpc_watch_add(rpc_watch_t *watch, rpc_call_t *call)
{
    rpc_watched_t *own = rpc_call_watched(call);

    pthread_mutex_lock(&watch->lock);
    own->next = watch->calls;
    own->link = &watch->calls;
    if (own->next != NULL) {
        rpc_call_watched(own->next)->link = &own->next;
    }
    watch->calls = call;
    pthread_mutex_unlock(&watch->lock);
}

void
rpc_watch_remove(rpc_watch_t *watch, rpc_call_t *call)
{
    rpc_watched_t *own = rpc_call_watched(call);

    pthread_mutex_lock(&watch->lock);
    *own->link = own->next;
    if (own->next != NULL) {
        rpc_call_watched(own->next)->link = own->link;
    }
    pthread_mutex_unlock(&watch->lock);
}

/* @return whether peers are to be judged now: we were there to see what they did */
static bool
may_judge(rpc_watch_t *watch, uint64_t now_ns)
{
    uint64_t since = watch->looked_ns == 0 ? 0 : now_ns - watch->looked_ns;

    watch->looked_ns = now_ns;
    if (since > watch->pause_ns + watch->stall_ns / 2) {
        watch->forgiven_until_ns = now_ns + watch->stall_ns;
        attn_log(ATTN_LOG_WARN, "rpc.was_paused", "ms=%llu",
                 (unsigned long long)(since / ATTN_NS_PER_MS));
    }
    return now_ns >= watch->forgiven_until_ns;
}

/* Cut off whoever is overdue; with the lock held before and after. */
static void
look(rpc_watch_t *watch, uint64_t now_ns)
{
    for (rpc_call_t *call = watch->calls; call != NULL;) {
        if (!rpc_call_take_stalled(call, now_ns, watch->stall_ns)) {
            call = rpc_call_watched(call)->next;
            continue;
        }
        pthread_mutex_unlock(&watch->lock);
        rpc_call_cut(call, watch->stall_ns);
        pthread_mutex_lock(&watch->lock);
        call = watch->calls; /* the list may have changed; nobody is taken twice */
    }
}

static void *
watch_thread(void *arg)
{
    rpc_watch_t *watch = arg;

    pthread_mutex_lock(&watch->lock);
    while (!watch->stopping) {
        uint64_t now = attn_now_ns();
        if (may_judge(watch, now)) {
            look(watch, now);
        }
        rpc_cond_wait(&watch->cond, &watch->lock, attn_now_ns() + watch->pause_ns);
    }
    pthread_mutex_unlock(&watch->lock);
    return NULL;
}

attn_status_t
rpc_watch_start(rpc_watch_t *watch)
{
    int error = pthread_create(&watch->thread, NULL, watch_thread, watch);

    if (error != 0) {
        return attn_fail(ATTN_ERR_EXHAUSTED, "no thread to watch slow peers: %s", strerror(error));
    }
    watch->started = true;
    return ATTN_OK;
}

void
rpc_watch_destroy(rpc_watch_t *watch)
{
    if (watch == NULL) {
        return;
    }
    if (watch->started) {
        pthread_mutex_lock(&watch->lock);
        watch->stopping = true;
        pthread_cond_broadcast(&watch->cond);
        pthread_mutex_unlock(&watch->lock);
        pthread_join(watch->thread, NULL);
    }
    pthread_cond_destroy(&watch->cond);
    pthread_mutex_destroy(&watch->lock);
    gpr_free(watch);
}
