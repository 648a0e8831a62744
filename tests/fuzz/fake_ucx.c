/* fake_ucx.c: no UCX here: workers lend no memory and take no messages, and clients get neither. */
#include "rpc/ucx.h"

#include "base/status.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

static attn_status_t
refuse(void)
{
    return attn_fail(ATTN_ERR_UNSUPPORTED, "there is no UCX in a fuzzer");
}

void
ucx_copy(void *to, const void *from, uint64_t bytes)
{
    memcpy(to, from, bytes);
}

void
ucx_host(char host[96])
{
    strcpy(host, "a fuzzer");
}

attn_status_t
ucx_crew_create(const ucx_crew_options_t *options, ucx_crew_t **crew_p)
{
    (void)options, (void)crew_p;
    return refuse();
}

void
ucx_crew_destroy(ucx_crew_t *crew)
{
    assert(crew == NULL);
}

void
ucx_crew_describe(ucx_crew_t *crew, ucx_figures_t *figures)
{
    (void)crew;
    memset(figures, 0, sizeof(*figures));
}

attn_status_t
ucx_session_open(ucx_crew_t *crew, uint64_t bytes, void (*ring)(void *arg), void *arg,
                 ucx_session_t **session_p)
{
    (void)crew, (void)bytes, (void)ring, (void)arg, (void)session_p;
    return refuse();
}

attn_status_t
ucx_session_find(ucx_crew_t *crew, uint64_t number, uint64_t secret, ucx_session_t **session_p)
{
    (void)crew, (void)number, (void)secret, (void)session_p;
    return refuse();
}

attn_status_t
ucx_slot_open(ucx_session_t *session, const ucx_place_t *place, uint64_t tag, ucx_handle_fn handle,
              void (*gone)(void *arg), void *arg, ucx_slot_t **slot_p)
{
    (void)session, (void)place, (void)tag, (void)handle, (void)gone, (void)arg, (void)slot_p;
    return refuse();
}

attn_status_t
ucx_asks_create(rpc_client_t *rpc, ucx_asks_t **asks_p)
{
    (void)rpc, (void)asks_p;
    return refuse();
}

void
ucx_asks_destroy(ucx_asks_t *asks)
{
    assert(asks == NULL);
}

attn_status_t
ucx_peer_open(ucx_asks_t *asks, const ucx_offer_t *offer, ucx_peer_t **peer_p)
{
    (void)asks, (void)offer, (void)peer_p;
    return refuse();
}

bool
ucx_place_take(ucx_peer_t *peer, uint64_t in, uint64_t out, ucx_place_t *place)
{
    (void)peer, (void)in, (void)out, (void)place;
    return false;
}

/* What needs a session, a slot or a peer is never called, for there is none. */

void
ucx_session_offer(const ucx_session_t *session, ucx_offer_t *offer)
{
    (void)session, (void)offer;
    abort();
}

attn_status_t
ucx_session_answer(ucx_session_t *session, const uint8_t *address, uint64_t size,
                   void (*broken)(void *arg, const char *why))
{
    (void)session, (void)address, (void)size, (void)broken;
    abort();
}

void
ucx_session_close(ucx_session_t *session)
{
    (void)session;
    abort();
}

void
ucx_session_release(ucx_session_t *session)
{
    (void)session;
    abort();
}

void
ucx_slot_close(ucx_slot_t *slot)
{
    (void)slot;
    abort();
}

uint64_t
ucx_asks_dropped(ucx_asks_t *asks)
{
    (void)asks;
    abort();
}

void
ucx_asks_look(ucx_asks_t *asks)
{
    (void)asks;
    abort();
}

void
ucx_peer_close(ucx_peer_t *peer)
{
    (void)peer;
    abort();
}

bool
ucx_peer_address(ucx_peer_t *peer, const uint8_t **address_p, uint64_t *size_p)
{
    (void)peer, (void)address_p, (void)size_p;
    abort();
}

attn_status_t
ucx_peer_greet(ucx_peer_t *peer, uint64_t deadline_ns)
{
    (void)peer, (void)deadline_ns;
    abort();
}

const char *
ucx_peer_way(ucx_peer_t *peer)
{
    (void)peer;
    abort();
}

bool
ucx_peer_is_broken(ucx_peer_t *peer)
{
    (void)peer;
    abort();
}

void
ucx_place_give(ucx_peer_t *peer, const ucx_place_t *place)
{
    (void)peer, (void)place;
    abort();
}

uint8_t *
ucx_place_data(ucx_peer_t *peer, const ucx_place_t *place)
{
    (void)peer, (void)place;
    abort();
}

void
ucx_ask(ucx_ask_t *ask, ucx_peer_t *peer, const ucx_head_t *head)
{
    (void)ask, (void)peer, (void)head;
    abort();
}

void
ucx_forget(ucx_ask_t *ask)
{
    (void)ask;
    abort();
}
