/*
 * outgoing.c: a message on its way to the wire: head, tag and length of data in one small
 * slice, then the owner's pieces as slices of their own, which C core hands to the socket
 * without a copy and lets go of at a time and on a thread of its choosing.
 */
#include "rpc/rpc_int.h"

#include "base/checked.h"
#include "base/status.h"

#include <assert.h>
#include <stdatomic.h>
#include <string.h>

#define DATA_TAG 0x7a /* field 15, length-delimited */

/* Up to here a copy is cheaper than a slice with a life of its own. */
#define COPY_MAX 2048

/* Of memory for a packet, beside its bytes: a peer that does not read its replies, of a few bytes
 * each, would make us hold millions of them if their bytes alone counted. */
#define PACKET_COST 512

/* `sent` and what it needs, shared by the slices of one message: the last calls it. */
typedef struct token {
    atomic_uint refs;
    void (*sent)(void *arg);
    void *arg;
    rpc_client_t *client;
} token_t;

static void
token_unref(void *arg)
{
    token_t *token = arg;

    if (atomic_fetch_sub(&token->refs, 1) != 1) {
        return;
    }
    token->sent(token->arg);
    if (token->client != NULL) {
        rpc_client_wake(token->client);
        rpc_client_unref(token->client);
    }
    gpr_free(token);
}

static token_t *
token_make(const rpc_outgoing_t *message, rpc_client_t *client)
{
    token_t *token = gpr_zalloc(sizeof(*token));

    atomic_init(&token->refs, 1); /* the maker's, so that it cannot fire half made */
    token->sent   = message->sent;
    token->arg    = message->arg;
    token->client = client;
    if (client != NULL) {
        rpc_client_ref(client);
    }
    return token;
}

/* Bytes of a varint. */
static size_t
varint_size(uint64_t value)
{
    size_t n = 1;

    while (value >= 0x80) {
        value >>= 7;
        n++;
    }
    return n;
}

static uint8_t *
varint_put(uint8_t *p, uint64_t value)
{
    while (value >= 0x80) {
        *p++ = (uint8_t)(value | 0x80);
        value >>= 7;
    }
    *p++ = (uint8_t)value;
    return p;
}

/* Fill the slice of head, tag and length; with `data`, of data too. */
static void
head_fill(const rpc_outgoing_t *message, size_t head_size, uint64_t data_size, bool data,
          uint8_t *p)
{
    size_t packed = protobuf_c_message_pack(message->head, p);
    assert(packed == head_size);
    p += packed;
    if (data_size == 0) {
        return; /* the default value of a proto3 field has no place on the wire */
    }
    *p++ = DATA_TAG;
    p    = varint_put(p, data_size);
    for (uint32_t i = 0; data && i < message->n_data; i++) {
        p = rpc_copy(p, message->data[i].iov_base, message->data[i].iov_len);
    }
}

static void
data_add(const rpc_outgoing_t *message, rpc_client_t *client, grpc_slice_buffer *slices)
{
    token_t *token = token_make(message, client);

    for (uint32_t i = 0; i < message->n_data; i++) {
        const struct iovec *piece = &message->data[i];
        if (piece->iov_len > 0) {
            atomic_fetch_add(&token->refs, 1);
            grpc_slice_buffer_add(slices, grpc_slice_new_with_user_data(
                                              piece->iov_base, piece->iov_len, token_unref, token));
        }
    }
    token_unref(token);
}

static attn_status_t
sizes(const rpc_outgoing_t *message, size_t *head_size, uint64_t *data_size)
{
    uint64_t total = 0;

    for (uint32_t i = 0; i < message->n_data; i++) {
        if (!attn_add(total, message->data[i].iov_len, &total)) {
            total = UINT64_MAX;
            break;
        }
    }
    *data_size = total;
    *head_size = protobuf_c_message_get_packed_size(message->head);
    if (total > RPC_MESSAGE_MAX || *head_size + total + 8 > RPC_MESSAGE_MAX) {
        return attn_fail(ATTN_ERR_TOO_LARGE,
                         "%s: %zu bytes of head and %llu of data are more than the %u of a message",
                         message->head->descriptor->name, *head_size, (unsigned long long)total,
                         RPC_MESSAGE_MAX);
    }
    return ATTN_OK;
}

attn_status_t
rpc_packet_make(const rpc_outgoing_t *message, rpc_client_t *client, rpc_packet_t **packet_p)
{
    size_t head_size;
    uint64_t data_size;
    attn_status_t status = sizes(message, &head_size, &data_size);

    bool copied = message->sent == NULL || data_size <= COPY_MAX || status != ATTN_OK;
    if (status == ATTN_OK) {
        size_t size = head_size + (data_size > 0 ? 1 + varint_size(data_size) : 0) +
                      (copied ? (size_t)data_size : 0);
        grpc_slice head = rpc_slice_malloc(size);
        head_fill(message, head_size, data_size, copied, GRPC_SLICE_START_PTR(head));
        RPC_OP_RELEASE(GRPC_SLICE_START_PTR(head)); /* blocks.c may give it to another thread */

        rpc_packet_t *packet = gpr_zalloc(sizeof(*packet));
        packet->buffer       = grpc_raw_byte_buffer_create(&head, 1);
        grpc_slice_unref(head);
        if (!copied) {
            data_add(message, client, &packet->buffer->data.raw.slice_buffer);
        }
        packet->bytes = head_size + data_size + PACKET_COST;
        packet->held  = PACKET_COST + head_size + (copied ? data_size : 0);
        *packet_p     = packet;
    }
    if (copied && message->sent != NULL) {
        message->sent(message->arg);
        if (client != NULL) {
            rpc_client_wake(client);
        }
    }
    return status;
}

void
rpc_packet_free(rpc_packet_t *packet)
{
    while (packet != NULL) {
        rpc_packet_t *next = packet->next;
        grpc_byte_buffer_destroy(packet->buffer);
        gpr_free(packet);
        packet = next;
    }
}

void
rpc_queue_push(rpc_queue_t *queue, rpc_packet_t *packet)
{
    packet->next = NULL;
    if (queue->tail == NULL) {
        queue->head = packet;
    } else {
        queue->tail->next = packet;
    }
    queue->tail = packet;
    queue->bytes += packet->bytes;
    queue->held += packet->held;
}

rpc_packet_t *
rpc_queue_pop(rpc_queue_t *queue)
{
    rpc_packet_t *packet = queue->head;

    if (packet != NULL) {
        queue->head = packet->next;
        if (queue->head == NULL) {
            queue->tail = NULL;
        }
        queue->bytes -= packet->bytes;
        queue->held -= packet->held;
        packet->next = NULL;
    }
    return packet;
}

rpc_packet_t *
rpc_queue_take(rpc_queue_t *queue)
{
    rpc_packet_t *all = queue->head;

    *queue = (rpc_queue_t){0};
    return all;
}
