/* ucx_fixture.h: a server of UCX and two clients of it, for tests: their questions are answered
 * with bytes that are made of those asked. */
#ifndef ATTN_RPC_UCX_FIXTURE_H
#define ATTN_RPC_UCX_FIXTURE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "rpc/ucx_asks_int.h"

#include "base/clock.h"
#include "base/status.h"

#define SLAB (UINT64_C(1) << 20)
#define WAIT_NS (60000 * ATTN_NS_PER_MS) /* for what must come */
#define TAG 77u
#define FLAG_SLOW 1u
#define FLAG_FAIL 2u

typedef struct side {
    rpc_client_t *rpc;
    ucx_asks_t *asks;
    ucx_session_t *session;
    ucx_peer_t *peer;
} side_t;

typedef struct fixture {
    ucx_crew_t *crew;
    side_t sides[2];
    atomic_uint handled, gone;
    atomic_bool hold, held; /* a slow handler waits until it is let go */
} fixture_t;

typedef struct question {
    ucx_ask_t ask;
    ucx_peer_t *peer;
    ucx_slot_t *slot;
    ucx_head_t reply;
    char sentence[UCX_SENTENCE_ROOM];
    uint8_t *data; /* of the answer, copied */
    atomic_bool answered;
    unsigned times;
} question_t;

/* Answers with as many bytes as the slot has room for, made of what was asked. */
typedef struct echo {
    fixture_t *f;
    uint64_t out;
} echo_t;

extern bool messages;        /* in place of shared memory: set it first */
extern atomic_uint n_broken; /* sessions whose users were told so */

uint8_t answer_byte(uint64_t i, uint8_t asked, uint32_t number);
attn_status_t echo(void *arg, const ucx_head_t *head, const uint8_t *data, uint8_t *answer,
                   ucx_head_t *reply);
void gone(void *arg);
/** Of sessions: counts n_broken. */
void broken(void *arg, const char *why);
void side_open(fixture_t *f, side_t *side, uint32_t spin_us);
void side_close(side_t *side);
void fixture_open(fixture_t *f, uint32_t server_spin_us, uint32_t client_spin_us);
void fixture_close(fixture_t *f);
void answered(void *arg, const ucx_head_t *reply, const char *sentence, const uint8_t *data);
bool is_done(void *arg);
void question_open(fixture_t *f, side_t *side, question_t *q, uint64_t in, uint64_t out);
void question_close(question_t *q);
void question_ask(question_t *q, uint32_t number, uint32_t flags, bool waits);
void question_check(const question_t *q, uint32_t number);
void question_round(side_t *side, question_t *q, uint32_t number);
void side_greet(side_t *side);
/** Look until the slow handler has what was asked. */
void await_held(fixture_t *f);
/** A user of a port who takes nothing; *closed: its way is gone. */
ucx_port_user_t nobody(bool *closed);
uint64_t dropped(fixture_t *f); /* requests */
void await_dropped(fixture_t *f, uint64_t n);
/** All of it through a pipe, or the end of this process. */
void pass(int fd, void *bytes, size_t n, bool out);

#endif
