/*
 * Every message of attn.proto through rpc_message_unpack(), with protobuf-c as the oracle: what
 * we take it takes, and data is the same bytes. Byte 0 picks the message.
 */
#include "tests/fuzz/fake_rpc.h"

#include "attn/v1/attn.pb-c.h"
#include "base/status.h"

#include <stdlib.h>
#include <string.h>

static const ProtobufCMessageDescriptor *const types[] = {
    &attn__v1__geometry__descriptor,
    &attn__v1__open_client_request__descriptor,
    &attn__v1__open_client_reply__descriptor,
    &attn__v1__client_request__descriptor,
    &attn__v1__open_cache_request__descriptor,
    &attn__v1__open_cache_reply__descriptor,
    &attn__v1__close_cache_request__descriptor,
    &attn__v1__create_sequence_request__descriptor,
    &attn__v1__sequence_reply__descriptor,
    &attn__v1__fork_sequence_request__descriptor,
    &attn__v1__truncate_sequence_request__descriptor,
    &attn__v1__sequence_request__descriptor,
    &attn__v1__describe_sequence_reply__descriptor,
    &attn__v1__begin_step_request__descriptor,
    &attn__v1__begin_step_reply__descriptor,
    &attn__v1__run_request__descriptor,
    &attn__v1__run_reply__descriptor,
    &attn__v1__commit_request__descriptor,
    &attn__v1__abort_request__descriptor,
    &attn__v1__step_request__descriptor,
    &attn__v1__step_reply__descriptor,
    &attn__v1__cluster_status_reply__descriptor,
    &attn__v1__layout_request__descriptor,
    &attn__v1__layout_reply__descriptor,
    &attn__v1__join_request__descriptor,
    &attn__v1__join_reply__descriptor,
    &attn__v1__heartbeat_request__descriptor,
    &attn__v1__heartbeat_reply__descriptor,
    &attn__v1__worker_open_cache_request__descriptor,
    &attn__v1__worker_open_cache_reply__descriptor,
    &attn__v1__worker_close_cache_request__descriptor,
    &attn__v1__fork_chunk_request__descriptor,
    &attn__v1__truncate_chunk_request__descriptor,
    &attn__v1__release_chunks_request__descriptor,
    &attn__v1__describe_chunks_request__descriptor,
    &attn__v1__describe_chunks_reply__descriptor,
    &attn__v1__worker_begin_request__descriptor,
    &attn__v1__worker_begin_reply__descriptor,
    &attn__v1__keep_alive_reply__descriptor,
    &attn__v1__export_request__descriptor,
    &attn__v1__export_reply__descriptor,
    &attn__v1__move_sequence_request__descriptor,
    &attn__v1__drain_worker_request__descriptor,
    &attn__v1__move_reply__descriptor,
    &attn__v1__export_chunk_request__descriptor,
    &attn__v1__export_chunk_reply__descriptor,
    &attn__v1__copy_chunk_request__descriptor,
    &attn__v1__copy_chunk_reply__descriptor,
    &attn__v1__leave_chunk_request__descriptor,
    &attn__v1__ping_request__descriptor,
    &attn__v1__ping_reply__descriptor,
    &attn__v1__slab_request__descriptor,
    &attn__v1__slab_reply__descriptor,
};

/* `data` of the oracle's message. */
static const ProtobufCBinaryData *
data_of(const ProtobufCMessage *message)
{
    const ProtobufCFieldDescriptor *field =
        protobuf_c_message_descriptor_get_field(message->descriptor, 15);

    return field != NULL && field->type == PROTOBUF_C_TYPE_BYTES
               ? (const void *)((const char *)message + field->offset)
               : NULL;
}

int
LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n)
{
    ProtobufCMessage *head;

    if (n == 0) {
        return 0;
    }
    const ProtobufCMessageDescriptor *type = types[bytes[0] % (sizeof(types) / sizeof(types[0]))];
    rpc_message_t *message                 = fake_message(bytes + 1, n - 1);

    if (rpc_message_unpack(message, type, &head) == ATTN_OK) {
        ProtobufCMessage *oracle = protobuf_c_message_unpack(type, NULL, n - 1, bytes + 1);
        if (oracle == NULL) {
            abort();
        }
        const ProtobufCBinaryData *data = data_of(oracle);
        uint64_t size                   = rpc_message_data_size(message);
        if (data != NULL) {
            uint8_t *copy = malloc(size + 1);
            if (copy == NULL || size != data->len) {
                abort();
            }
            rpc_message_data_copy(message, 0, copy, size);
            if (size > 0 && memcmp(copy, data->data, size) != 0) {
                abort();
            }
            free(copy);
        }
        protobuf_c_message_free_unpacked(oracle, NULL);
    } else if (*attn_last_error() == 0) {
        abort();
    }
    rpc_message_free(message);
    return 0;
}
