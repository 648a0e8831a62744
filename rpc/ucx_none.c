/* ucx_none.c: in place of ucx_lib.c, ucx_map.c and ucx_port.c where attnd is built without UCX's
 * headers (ATTN_UCX=OFF): every node is refused, so the rest is never reached. */
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

attn_status_t
ucx_port_create(const char *devices, const ucx_port_user_t *user, ucx_port_t **port_p)
{
    (void)devices, (void)user, (void)port_p;
    return refuse();
}

void
ucx_port_destroy(ucx_port_t *port)
{
    (void)port;
}

void
ucx_port_offer(const ucx_port_t *port, ucx_offer_t *offer)
{
    (void)port, (void)offer;
}

bool
ucx_port_progress(ucx_port_t *port)
{
    (void)port;
    return false;
}

bool
ucx_port_closes(const ucx_port_t *port)
{
    (void)port;
    return false;
}

int
ucx_port_fd(const ucx_port_t *port)
{
    (void)port;
    return -1;
}

bool
ucx_port_arm(ucx_port_t *port)
{
    (void)port;
    return true;
}

attn_status_t
ucx_way_open(ucx_port_t *port, const uint8_t *address, uint64_t size, void *whose,
             ucx_way_t **way_p)
{
    (void)port, (void)address, (void)size, (void)whose, (void)way_p;
    return refuse();
}

void
ucx_way_close(ucx_way_t *way)
{
    (void)way;
}

bool
ucx_way_is(const ucx_way_t *way, const void *from)
{
    (void)way, (void)from;
    return false;
}

void
ucx_way_send(ucx_way_t *way, const ucx_head_t *head, const uint8_t *data, uint64_t bytes)
{
    (void)way, (void)head, (void)data, (void)bytes;
}

const char *
ucx_way_settle(ucx_way_t *way)
{
    (void)way;
    return "";
}

const char *
ucx_way_name(const ucx_way_t *way)
{
    (void)way;
    return "";
}
