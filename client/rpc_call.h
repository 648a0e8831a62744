/* rpc_call.h: one blocking unary call with typed messages, for the links and the control plane. */
#ifndef ATTN_CLIENT_RPC_CALL_H
#define ATTN_CLIENT_RPC_CALL_H

#include "rpc/rpc.h"

/**
 * Call path with request, and unpack the answer. *reply_p lives in *message_p: rpc_message_free()
 * it. reply_p NULL: the answer is of no interest, and freed.
 */
attn_status_t rpc_call_typed(rpc_channel_t *channel, const char *path, const void *request,
                             uint64_t deadline_ns, const ProtobufCMessageDescriptor *reply_type,
                             void *reply_p, rpc_message_t **message_p);

#endif
