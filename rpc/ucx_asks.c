/*
 * ucx_asks.c: the client's side of ucx.h. What was asked and not answered is one list; whoever
 * waits for the rpc client looks it through (rpc_poller_t), and calls `answered` as any other
 * callback of that client, one after the other and with no lock held.
 *
 * An ask is taken off the list before it is called, so it may be asked again from there. Its memory
 * is its user's: ucx_forget() takes it off, and waits while it is being called.
 *
 * With messages (ucx_asks_far.c) the slab is this process's alone: what is asked is sent from its
 * slot, and an answer that comes is put there before it is looked for.
 */
#include "rpc/ucx_asks_int.h"

#include "base/checked.h"
#include "base/status.h"
#include "rpc/rpc_int.h"

#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>

/* ---- looking ---- */

/* Has this been answered? Then its reply, off the slab. Under the lock. */
static bool
is_answered(const ucx_ask_t *ask, ucx_head_t *reply, char *sentence)
{
    const ucx_head_t *answer = ucx_answer_at(ask->peer->at, &ask->place);
    uint64_t sequence        = atomic_load_explicit(&answer->sequence, memory_order_acquire);

    if (sequence != ask->sequence && ask->peer->broken) {
        *reply = (ucx_head_t){.status = ATTN_ERR_UNAVAILABLE};
        snprintf(sentence, UCX_SENTENCE_ROOM, "the connection to the worker broke, UCX says: %s",
                 ask->peer->why);
        return true;
    }
    if (sequence != ask->sequence) {
        return false;
    }
    memcpy(reply, answer, offsetof(ucx_head_t, sequence));
    atomic_init(&reply->sequence, sequence);
    if (reply->secret != ask->peer->secret || reply->bytes > ask->place.out) {
        *reply = (ucx_head_t){.status = ATTN_ERR_INTERNAL};
        strcpy(sentence, "the worker's answer in shared memory is not one");
    } else if (reply->status != ATTN_OK) {
        memcpy(sentence, ucx_sentence_at(ask->peer->at, &ask->place), UCX_SENTENCE_ROOM);
        sentence[UCX_SENTENCE_ROOM - 1] = '\0';
    }
    return true;
}

static void
unlist(ucx_asks_t *asks, ucx_ask_t *ask)
{
    *ask->link = ask->next;
    if (ask->next != NULL) {
        ask->next->link = ask->link;
    } else {
        asks->end = ask->link;
    }
    ask->link = NULL;
    asks->unattended -= ask->unattended;
    atomic_fetch_sub(&asks->waiting, 1);
}

static bool
look(void *arg)
{
    ucx_asks_t *asks = arg;
    char sentence[UCX_SENTENCE_ROOM];
    ucx_head_t reply;
    bool any = false;

    /* As many as wait now: what is asked again meanwhile is for the next look. */
    unsigned most = atomic_load(&asks->waiting);
    if (most + atomic_load(&asks->greeting) == 0) {
        return false;
    }
    pthread_mutex_lock(&asks->lock);
    any = ucx_asks_far_progress(asks);
    for (ucx_ask_t *ask = asks->first; ask != NULL && most > 0;) {
        sentence[0] = '\0';
        if (!is_answered(ask, &reply, sentence)) {
            ask = ask->next;
            continue;
        }
        unlist(asks, ask);
        most--;
        asks->calling = ask;
        pthread_mutex_unlock(&asks->lock);
        ask->answered(ask->arg, &reply, sentence, ucx_answer_data_at(ask->peer->at, &ask->place));
        any = true;
        pthread_mutex_lock(&asks->lock);
        asks->calling = NULL;
        ask           = asks->first; /* the list is another one by now */
    }
    pthread_mutex_unlock(&asks->lock);
    return any;
}

static bool
awaits(void *arg)
{
    ucx_asks_t *asks = arg;

    return atomic_load(&asks->waiting) + atomic_load(&asks->greeting) > 0;
}

static void
say_sleeping(ucx_asks_t *asks, bool sleeps)
{
    pthread_mutex_lock(&asks->lock);
    asks->dozing = sleeps;
    for (ucx_peer_t *peer = asks->peers; peer != NULL; peer = peer->next) {
        if (peer->card != NULL) {
            atomic_store_explicit(&peer->card->client_sleeps, sleeps, memory_order_relaxed);
        }
    }
    ucx_asks_far_sleeps(asks, sleeps);
    pthread_mutex_unlock(&asks->lock);
    ucx_fence(); /* the server answers, fences, and reads that */
}

static void
doze(void *arg)
{
    say_sleeping(arg, true);
}

static void
rouse(void *arg)
{
    say_sleeping(arg, false);
}

void
ucx_asks_look(ucx_asks_t *asks)
{
    look(asks);
}

uint64_t
ucx_asks_dropped(ucx_asks_t *asks)
{
    pthread_mutex_lock(&asks->lock);
    uint64_t dropped = asks->dropped;
    pthread_mutex_unlock(&asks->lock);
    return dropped;
}

/* ---- asking ---- */

void
ucx_ask(ucx_ask_t *ask, ucx_peer_t *peer, const ucx_head_t *head)
{
    ucx_asks_t *asks    = peer->asks;
    ucx_head_t *request = ucx_request_at(peer->at, &ask->place);

    memcpy(request, head, offsetof(ucx_head_t, sequence));
    request->secret = peer->secret;
    request->offset = ask->place.offset;

    pthread_mutex_lock(&asks->lock);
    if (ask->link != NULL) { /* it was given up without a word */
        unlist(asks, ask);
    }
    ask->peer       = peer;
    ask->sequence   = ++peer->sequence;
    ask->unattended = (head->flags & UCX_RING) != 0;
    asks->unattended += ask->unattended;
    ask->next  = NULL;
    ask->link  = asks->end;
    *asks->end = ask;
    asks->end  = &ask->next;
    atomic_fetch_add(&asks->waiting, 1);
    atomic_store_explicit(&request->sequence, ask->sequence, memory_order_release);
    if (peer->card == NULL) {
        ucx_asks_far_send(peer, request, ucx_data_at(peer->at, &ask->place), ask->unattended);
        pthread_mutex_unlock(&asks->lock);
        return;
    }
    ucx_fence(); /* the server says that it sleeps, fences, looks */
    bool sleeps = atomic_load_explicit(&peer->card->server_sleeps, memory_order_relaxed) != 0 &&
                  atomic_exchange(&peer->card->server_sleeps, 0) != 0;
    pthread_mutex_unlock(&asks->lock);
    if (sleeps) {
        atomic_fetch_add(&peer->card->bell, 1);
        ucx_futex_wake(&peer->card->bell);
    }
}

void
ucx_forget(ucx_ask_t *ask)
{
    if (ask->peer == NULL) {
        return; /* never asked */
    }
    ucx_asks_t *asks = ask->peer->asks;
    pthread_mutex_lock(&asks->lock);
    if (ask->link != NULL) {
        unlist(asks, ask);
    }
    while (asks->calling == ask) {
        pthread_mutex_unlock(&asks->lock);
        sched_yield();
        pthread_mutex_lock(&asks->lock);
    }
    pthread_mutex_unlock(&asks->lock);
}

/* ---- places ---- */

bool
ucx_place_take(ucx_peer_t *peer, uint64_t in, uint64_t out, ucx_place_t *place)
{
    ucx_place_t want = {.offset = UCX_SLOTS_FROM, .in = in, .out = out};
    uint64_t bytes   = ucx_place_bytes(&want);
    bool found       = false;
    uint32_t i       = 0;

    pthread_mutex_lock(&peer->asks->lock);
    for (; bytes != UINT64_MAX && peer->n_places < UCX_SESSION_SLOTS_MAX && !found; i++) {
        uint64_t end = i < peer->n_places ? peer->places[i].offset : peer->bytes;
        found        = end - want.offset >= bytes;
        if (found || i == peer->n_places) {
            break;
        }
        want.offset = end + ucx_place_bytes(&peer->places[i]);
    }
    if (found) {
        memmove(&peer->places[i + 1], &peer->places[i],
                (peer->n_places - i) * sizeof(peer->places[0]));
        peer->places[i] = want;
        peer->n_places++;
        *place = want;
        /* Whatever lay there was no request, and no answer, of this slot. */
        atomic_store(&ucx_request_at(peer->at, place)->sequence, 0);
        atomic_store(&ucx_answer_at(peer->at, place)->sequence, 0);
    }
    pthread_mutex_unlock(&peer->asks->lock);
    return found;
}

void
ucx_place_give(ucx_peer_t *peer, const ucx_place_t *place)
{
    uint32_t i = 0;

    pthread_mutex_lock(&peer->asks->lock);
    while (i < peer->n_places && peer->places[i].offset != place->offset) {
        i++;
    }
    if (i < peer->n_places) {
        peer->n_places--;
        memmove(&peer->places[i], &peer->places[i + 1],
                (peer->n_places - i) * sizeof(peer->places[0]));
    }
    pthread_mutex_unlock(&peer->asks->lock);
}

uint8_t *
ucx_place_data(ucx_peer_t *peer, const ucx_place_t *place)
{
    return ucx_data_at(peer->at, place);
}

/* ---- peers ---- */

static attn_status_t
offer_check(const ucx_offer_t *offer)
{
    char host[sizeof(offer->host)];

    ucx_host(host);
    if (!offer->messages &&
        (host[0] == '\0' || strnlen(offer->host, sizeof(offer->host)) == sizeof(offer->host) ||
         strcmp(offer->host, host) != 0)) {
        return attn_fail(ATTN_ERR_UNSUPPORTED,
                         "the worker is on another host, or in another IPC namespace");
    }
    if (offer->bytes < UCX_SLAB_MIN || offer->bytes > UCX_SLAB_MAX) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "the worker's slab has %llu bytes: %llu to %llu",
                         (unsigned long long)offer->bytes, (unsigned long long)UCX_SLAB_MIN,
                         (unsigned long long)UCX_SLAB_MAX);
    }
    return ATTN_OK;
}

/* The node, made when first needed. */
static attn_status_t
node_need(ucx_asks_t *asks)
{
    pthread_mutex_lock(&asks->lock);
    bool there = asks->node != NULL;
    pthread_mutex_unlock(&asks->lock);
    if (there) {
        return ATTN_OK;
    }
    ucx_node_t *node     = NULL;
    attn_status_t status = ucx_node_create(&node);
    if (status != ATTN_OK) {
        return status;
    }
    pthread_mutex_lock(&asks->lock);
    if (asks->node == NULL) {
        asks->node = node;
        node       = NULL;
    }
    pthread_mutex_unlock(&asks->lock);
    ucx_node_destroy(node); /* another thread was faster */
    return ATTN_OK;
}

static attn_status_t
card_check(const ucx_peer_t *peer, const ucx_offer_t *offer)
{
    return peer->card->magic == UCX_MAGIC && peer->card->secret == offer->secret &&
                   peer->card->bytes == offer->bytes
               ? ATTN_OK
               : attn_fail(ATTN_ERR_UNSUPPORTED,
                           "what was mapped is not the worker's slab, or of another version");
}

static attn_status_t
near_open(ucx_asks_t *asks, const ucx_offer_t *offer, ucx_peer_t *peer)
{
    attn_status_t status = node_need(asks);

    if (status == ATTN_OK) {
        status = ucx_memory_map(asks->node, offer, &peer->memory);
    }
    if (status == ATTN_OK) {
        peer->at   = ucx_memory_at(peer->memory);
        peer->card = (ucx_card_t *)(void *)peer->at;
        status     = card_check(peer, offer);
    }
    if (status != ATTN_OK) {
        ucx_memory_free(peer->memory);
    }
    return status;
}

attn_status_t
ucx_peer_open(ucx_asks_t *asks, const ucx_offer_t *offer, ucx_peer_t **peer_p)
{
    attn_status_t status = offer_check(offer);

    if (status != ATTN_OK) {
        return status;
    }
    ucx_peer_t *peer = calloc(1, sizeof(*peer));
    if (peer == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a slab's description");
    }
    peer->asks   = asks;
    peer->bytes  = offer->bytes;
    peer->secret = offer->secret;
    status       = offer->messages ? ucx_asks_far_open(peer, offer) : near_open(asks, offer, peer);
    if (status != ATTN_OK) {
        free(peer);
        return status;
    }
    pthread_mutex_lock(&asks->lock);
    if (peer->card != NULL) {
        atomic_store(&peer->card->client_sleeps, asks->dozing);
    }
    peer->next = asks->peers;
    peer->link = &asks->peers;
    if (peer->next != NULL) {
        peer->next->link = &peer->next;
    }
    asks->peers = peer;
    pthread_mutex_unlock(&asks->lock);
    *peer_p = peer;
    return ATTN_OK;
}

void
ucx_peer_close(ucx_peer_t *peer)
{
    ucx_asks_t *asks = peer->asks;

    pthread_mutex_lock(&asks->lock);
    *peer->link = peer->next;
    if (peer->next != NULL) {
        peer->next->link = peer->link;
    }
    pthread_mutex_unlock(&asks->lock);
    if (peer->card == NULL) {
        ucx_asks_far_close(peer);
    } else {
        ucx_memory_free(peer->memory);
        free(peer);
    }
}

bool
ucx_peer_is_broken(ucx_peer_t *peer)
{
    pthread_mutex_lock(&peer->asks->lock);
    bool broken = peer->broken;
    pthread_mutex_unlock(&peer->asks->lock);
    return broken;
}

/* ---- life ---- */

attn_status_t
ucx_asks_create(rpc_client_t *rpc, ucx_asks_t **asks_p)
{
    ucx_asks_t *asks = calloc(1, sizeof(*asks));

    if (asks == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for what is asked of workers");
    }
    ucx_environment(); /* not when the first step wants a node, amid the program's other threads */
    asks->rpc = rpc;
    asks->end = &asks->first;
    pthread_mutex_init(&asks->lock, NULL);
    rpc_client_set_poller(
        rpc,
        &(rpc_poller_t){.awaits = awaits, .look = look, .doze = doze, .rouse = rouse, .arg = asks});
    *asks_p = asks;
    return ATTN_OK;
}

void
ucx_asks_destroy(ucx_asks_t *asks)
{
    if (asks != NULL) {
        ucx_asks_far_destroy(asks);
        ucx_node_destroy(asks->node);
        pthread_mutex_destroy(&asks->lock);
        free(asks);
    }
}
