#include "client/rpc_call.h"

#include <stddef.h>

attn_status_t
rpc_call_typed(rpc_channel_t *channel, const char *path, const void *request, uint64_t deadline_ns,
               const ProtobufCMessageDescriptor *reply_type, void *reply_p,
               rpc_message_t **message_p)
{
    rpc_outgoing_t outgoing = {.head = request};
    rpc_message_t *message  = NULL;

    attn_status_t status = rpc_call_unary_wait(channel, path, &outgoing, deadline_ns, &message);
    if (status == ATTN_OK && reply_p != NULL) {
        status = rpc_message_unpack(message, reply_type, reply_p);
        if (status == ATTN_OK) {
            *message_p = message;
            return ATTN_OK;
        }
    }
    rpc_message_free(message);
    return status;
}
