/* ucx_none.c: in place of ucx_map.c where attnd is built without UCX's headers (ATTN_UCX=OFF):
 * every node is refused, so the rest is never reached. */
#include "rpc/ucx_int.h"

#include "base/status.h"

static attn_status_t
refuse(void)
{
    return attn_fail(ATTN_ERR_UNSUPPORTED, "this program was built without UCX");
}

void
ucx_environment(void)
{
}

attn_status_t
ucx_node_create(ucx_node_t **node_p)
{
    (void)node_p;
    return refuse();
}

void
ucx_node_destroy(ucx_node_t *node)
{
    (void)node;
}

attn_status_t
ucx_memory_create(ucx_node_t *node, uint64_t bytes, ucx_memory_t **memory_p)
{
    (void)node, (void)bytes, (void)memory_p;
    return refuse();
}

void
ucx_memory_offer(const ucx_memory_t *memory, ucx_offer_t *offer)
{
    (void)memory, (void)offer;
}

attn_status_t
ucx_memory_map(ucx_node_t *node, const ucx_offer_t *offer, ucx_memory_t **memory_p)
{
    (void)node, (void)offer, (void)memory_p;
    return refuse();
}

uint8_t *
ucx_memory_at(const ucx_memory_t *memory)
{
    (void)memory;
    return NULL;
}

void
ucx_memory_free(ucx_memory_t *memory)
{
    (void)memory;
}
