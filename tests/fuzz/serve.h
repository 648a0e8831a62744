/*
 * serve.h: a fuzzer's input as calls of a server. Records follow one another:
 *
 *     byte 0  % 4: 0, 1, 2 a message for the method of byte 1; 3 end the stream of byte 1, of
 *             which bit 7 breaks it off
 *     byte 1  the method (fake_method_of())
 *     then    two bytes of length and the message
 *
 * A message for a streaming method goes to its one open stream, which it opens.
 */
#ifndef ATTN_TESTS_SERVE_H
#define ATTN_TESTS_SERVE_H

#include "tests/fuzz/fake_rpc.h"

#include "base/table.h"
#include "engine/engine_int.h"

#define RECORDS_MAX 64u /* of one input: the rest adds time, and no new state */

/* Leave nothing of an input in an engine that goes on to the next. Its caches, and the steps that
 * ended: their ids are refused for a while, and every input has those of the seeds. */
static inline void
serve_forget(engine_t *engine)
{
    engine_caches_close(engine);
    HASH_CLEAR(hh, engine->ended_by_id);
    for (uint64_t i = 0; i < engine->n_ended && i < ENDED_STEPS; i++) {
        engine->ended[i] = (ended_step_t){0};
    }
    engine->n_ended = 0;
}

static inline void
serve_input(rpc_server_t *server, input_t *in)
{
    fake_stream_t *streams[64] = {0};
    uint32_t n                 = fake_methods(server);
    size_t size;

    for (uint32_t i = 0; i < RECORDS_MAX && in->at < in->end; i++) {
        uint8_t how     = input_byte(in);
        uint8_t what    = input_byte(in);
        uint32_t method = fake_method_of(server, what);
        if (how % 4 == 3) {
            if (streams[method] != NULL) {
                fake_stream_close(streams[method], how & 0x80);
                streams[method] = NULL;
            }
            continue;
        }
        const uint8_t *bytes = input_bytes(in, &size);
        if (!fake_method_streams(server, method)) {
            fake_call(server, method, bytes, size);
            continue;
        }
        if (streams[method] == NULL) {
            streams[method] = fake_stream_open(server, method);
        }
        if (!fake_stream_message(streams[method], bytes, size)) {
            fake_stream_close(streams[method], true);
            streams[method] = NULL;
        }
    }
    for (uint32_t m = 0; m < n; m++) {
        if (streams[m] != NULL) {
            fake_stream_close(streams[m], m % 2 == 0);
        }
    }
}

#endif
