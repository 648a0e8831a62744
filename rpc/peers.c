/*
 * peers.c: how many calls each connection has open, so that one peer does not take them all. C
 * core's own limit of streams has clients wait in silence; this one is answered.
 */
#include "rpc/rpc_int.h"

#include <uthash.h>

struct rpc_peers {
    uint32_t calls;
    UT_hash_handle hh;
    char name[];
};

uint32_t
rpc_peers_began(rpc_peers_t **peers, const char *name)
{
    rpc_peers_t *peer;
    size_t size = strlen(name);

    HASH_FIND(hh, *peers, name, size, peer);
    if (peer == NULL) {
        peer = gpr_zalloc(sizeof(*peer) + size + 1);
        memcpy(peer->name, name, size);
        HASH_ADD_KEYPTR(hh, *peers, peer->name, size, peer);
    }
    return ++peer->calls;
}

void
rpc_peers_ended(rpc_peers_t **peers, const char *name)
{
    rpc_peers_t *peer;

    HASH_FIND(hh, *peers, name, strlen(name), peer);
    if (peer != NULL && --peer->calls == 0) {
        HASH_DELETE(hh, *peers, peer);
        gpr_free(peer);
    }
}

uint32_t
rpc_peers_count(const rpc_peers_t *peers)
{
    return HASH_COUNT(peers);
}
