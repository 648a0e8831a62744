/* direct.c: see direct.h. The step's id and the client's connection are libattn's own, so this
 * looks into them. */
#include "bench/direct.h"

#include "attn/v1/attn.pb-c.h"
#include "base/status.h"
#include "bench/result.h"
#include "client/step_int.h"

#include <stdlib.h>

struct direct {
    rpc_channel_t *channel;
};

direct_t *
direct_open(const attn_client_t *client, const char *address)
{
    direct_t *direct = calloc(1, sizeof(*direct));

    result_must(direct != NULL ? ATTN_OK : attn_fail(ATTN_ERR_NO_MEMORY, "no memory"));
    result_must(rpc_channel_open(client->rpc, address, &direct->channel));
    return direct;
}

void
direct_close(direct_t *direct)
{
    rpc_channel_close(direct->channel);
    free(direct);
}

uint64_t
direct_run(direct_t *direct, const attn_step_t *step, uint32_t layer, const struct iovec tensors[3],
           void *answer, uint64_t answer_bytes)
{
    Attn__V1__RunRequest request = ATTN__V1__RUN_REQUEST__INIT;
    Attn__V1__RunReply *reply    = NULL;
    rpc_message_t *message;

    request.step_id = step->id;
    request.layer   = layer;
    result_must(
        rpc_call_unary_wait(direct->channel, "/attn.v1.Worker/Run",
                            &(rpc_outgoing_t){.head = &request.base, .data = tensors, .n_data = 3},
                            step->deadline_ns, &message));
    result_must(
        rpc_message_unpack(message, &attn__v1__run_reply__descriptor, (ProtobufCMessage **)&reply));
    uint64_t compute_ns = reply->compute_ns;
    result_must(rpc_message_data_size(message) == answer_bytes
                    ? ATTN_OK
                    : attn_fail(ATTN_ERR_INTERNAL, "an answer of another size"));
    rpc_message_data_copy(message, 0, answer, answer_bytes);
    rpc_message_free(message);
    return compute_ns;
}
