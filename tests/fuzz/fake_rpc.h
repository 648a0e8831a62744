/*
 * fake_rpc.h: rpc.h without a network, for fuzzing. The daemons' and libattn's own code runs on
 * it unchanged; what would come from a peer comes from the fuzzer's input.
 *
 *     server  fake_call(), fake_stream_*(): what a client would do
 *     client  every request takes its answer from the input (fake_answers())
 *
 * Each message is one heap block of exactly its size, so that a sanitizer sees a byte read
 * beyond it. A call that does not end within FAKE_PATIENCE_MS ends the process: a finding. With
 * FAKE_TRACE in the environment every answer of a server is printed.
 */
#ifndef ATTN_TESTS_FAKE_RPC_H
#define ATTN_TESTS_FAKE_RPC_H

#include "rpc/rpc.h"

#define FAKE_PATIENCE_MS 20000u

/**
 * What a peer or a test allocates is not refused when memory runs out for the code under test
 * (alloc_sweep.c): between these two calls, which nest, this thread is such a one.
 */
void fake_spared_begin(void);
void fake_spared_end(void);
bool fake_spared(void);

/** Set while allocations may fail: a constructor that then answers ATTN_ERR_NO_MEMORY is right. */
extern bool fake_short_of_memory;

/** What the fuzzer gave, taken from the front. */
typedef struct input {
    const uint8_t *at, *end;
} input_t;

static inline uint8_t
input_byte(input_t *in)
{
    return in->at < in->end ? *in->at++ : 0;
}

/** A length of two bytes, cut to what is left, and so many bytes. */
static inline const uint8_t *
input_bytes(input_t *in, size_t *n)
{
    size_t asked = (size_t)input_byte(in) | (size_t)input_byte(in) << 8;
    size_t left  = (size_t)(in->end - in->at);

    *n = asked < left ? asked : left;
    in->at += *n;
    return in->at - *n;
}

/** A message of these bytes, in one slice or two. */
rpc_message_t *fake_message(const uint8_t *bytes, size_t n);

/* ---- a server's peers ---- */

uint32_t fake_methods(const rpc_server_t *server);

/** The method that a byte names: by a hash of its path (fake_path_byte), so that seeds outlive new
 * methods; for other bytes the remainder. */
uint32_t fake_method_of(const rpc_server_t *server, uint8_t byte);
bool fake_method_streams(const rpc_server_t *server, uint32_t i);

/** Headers that calls carry from now on; one, or key NULL for none. Both live for ever. */
void fake_header(const char *key, const char *value);

/** A unary call, to its end. */
void fake_call(rpc_server_t *server, uint32_t method, const uint8_t *bytes, size_t n);

typedef struct rpc_call fake_stream_t;
fake_stream_t *fake_stream_open(rpc_server_t *server, uint32_t method);
/** @return false: the stream has ended, close it */
bool fake_stream_message(fake_stream_t *stream, const uint8_t *bytes, size_t n);
/** Half-close and wait for the end, or (broken) just go. Frees it. */
void fake_stream_close(fake_stream_t *stream, bool broken);

/* ---- a client's peers ---- */

/** Answers of all clients come from here: a byte that says how (fake_rpc.c), a length, bytes. */
void fake_answers(input_t *in);

#endif
