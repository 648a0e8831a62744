/* The calls of steps over real rpc, on a service that only counts: with and without jobs. */
#include "daemon/test_talk.h"

#include "base/clock.h"
#include "base/status.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define WAIT_NS TALK_WAIT_NS
#define STEPS_MAX 64u

/* ---- the service: answer[i] = q[i % q] ^ k[i % k] ^ v[i % v] ^ layer ---- */

typedef struct service {
    atomic_uint sleep_ms; /* of a run */
    atomic_uint begun, runs, aborts, running;
    pthread_mutex_t lock; /* of the rest */
    steps_sizes_t sizes;
    bool open[STEPS_MAX];
} service_t;

static steps_sizes_t
sizes_of(service_t *service)
{
    pthread_mutex_lock(&service->lock);
    steps_sizes_t sizes = service->sizes;
    pthread_mutex_unlock(&service->lock);
    return sizes;
}

static void
set_sizes(service_t *service, steps_sizes_t sizes)
{
    pthread_mutex_lock(&service->lock);
    service->sizes = sizes;
    pthread_mutex_unlock(&service->lock);
}

static uint8_t
answer_byte(const steps_sizes_t *s, const uint8_t *data, uint32_t layer, uint64_t i)
{
    return (uint8_t)(data[i % s->q] ^ data[s->q + i % s->k] ^ data[s->q + s->k + i % s->v] ^ layer);
}

static attn_status_t
fake_begin(void *arg, const ProtobufCMessage *request, steps_begun_t *begun)
{
    service_t *service = arg;

    (void)request;
    begun->step_id = atomic_fetch_add(&service->begun, 1) + 1;
    attn__v1__begin_step_reply__init(&begun->reply.thin);
    begun->reply.thin.step_id = begun->step_id;
    pthread_mutex_lock(&service->lock);
    service->open[begun->step_id] = true;
    pthread_mutex_unlock(&service->lock);
    return ATTN_OK;
}

static attn_status_t
fake_sizes(void *arg, uint64_t id, steps_sizes_t *sizes)
{
    service_t *service = arg;

    pthread_mutex_lock(&service->lock);
    bool open = id < STEPS_MAX && service->open[id];
    pthread_mutex_unlock(&service->lock);
    *sizes = sizes_of(service);
    return open ? ATTN_OK : attn_fail(ATTN_ERR_NOT_FOUND, "no step %llu", (unsigned long long)id);
}

static attn_status_t
fake_run(void *arg, const steps_layer_t *l)
{
    service_t *service  = arg;
    steps_sizes_t sizes = sizes_of(service);
    uint8_t *answer     = l->answer;

    atomic_fetch_add(&service->running, 1);
    nanosleep(&(struct timespec){.tv_nsec = (long)atomic_load(&service->sleep_ms) * 1000000}, NULL);
    for (uint64_t i = 0; answer != NULL && i < sizes.answer; i++) {
        const uint8_t *k = l->k, *q = l->q, *v = l->v;
        answer[i] = (uint8_t)(q[i % sizes.q] ^ (k != NULL ? k[i % sizes.k] : 0) ^
                              (v != NULL ? v[i % sizes.v] : 0) ^ l->layer);
    }
    atomic_fetch_add(&service->runs, 1);
    return l->layer < 10 ? ATTN_OK
                         : attn_fail(ATTN_ERR_INVALID, "layer is %u: the cache has 10", l->layer);
}

static attn_status_t
fake_end(service_t *service, uint64_t id)
{
    pthread_mutex_lock(&service->lock);
    bool open                     = id < STEPS_MAX && service->open[id];
    service->open[id % STEPS_MAX] = false;
    pthread_mutex_unlock(&service->lock);
    return open ? ATTN_OK : attn_fail(ATTN_ERR_NOT_FOUND, "no step %llu", (unsigned long long)id);
}

static attn_status_t
fake_commit(void *arg, uint64_t id, const engine_commit_t *commit)
{
    if (commit->accepted != NULL && commit->accepted[0] == 99) {
        return attn_fail(ATTN_ERR_INVALID, "accepted[0] is 99");
    }
    return fake_end(arg, id);
}

static attn_status_t
fake_abort(void *arg, uint64_t id, const char *reason)
{
    service_t *service = arg;

    assert_non_null(reason);
    if (fake_end(service, id) == ATTN_OK) {
        atomic_fetch_add(&service->aborts, 1);
    }
    return ATTN_OK;
}

static const steps_ops_t ops = {
    .begin  = fake_begin,
    .sizes  = fake_sizes,
    .run    = fake_run,
    .commit = fake_commit,
    .abort  = fake_abort,
};

/* ---- server and client of a test ---- */

typedef struct fixture {
    service_t service;
    jobs_t *jobs;
    rpc_server_t *server;
    steps_t *steps;
    rpc_client_t *rpc;
    rpc_channel_t *channel;
} fixture_t;

static int
setup_with(void **state, uint32_t threads)
{
    fixture_t *f = calloc(1, sizeof(*f));
    char address[32];

    assert_non_null(f);
    rpc_init();
    pthread_mutex_init(&f->service.lock, NULL);
    f->service.sizes = (steps_sizes_t){.q = 64, .k = 32, .v = 48, .answer = 80};
    assert_int_equal(
        rpc_server_create(&(rpc_server_options_t){.address = "127.0.0.1:0"}, &f->server), ATTN_OK);
    if (threads > 0) {
        assert_int_equal(jobs_create(threads, &f->jobs), ATTN_OK);
    }
    assert_int_equal(
        steps_create(f->server, "/attn.v1.Attention", &ops, &f->service, f->jobs,
                     &(steps_limits_t){.part_ms = 3000, .buffer_bytes = UINT64_C(1) << 30},
                     &f->steps),
        ATTN_OK);
    assert_int_equal(rpc_server_start(f->server), ATTN_OK);
    assert_int_equal(rpc_client_create(0, &f->rpc), ATTN_OK);
    snprintf(address, sizeof(address), "127.0.0.1:%u", rpc_server_port(f->server));
    assert_int_equal(rpc_channel_open(f->rpc, address, &f->channel), ATTN_OK);
    *state = f;
    return 0;
}

static int
setup(void **state)
{
    return setup_with(state, 0);
}

static int
setup_jobs(void **state)
{
    return setup_with(state, 2);
}

static int
teardown(void **state)
{
    fixture_t *f = *state;

    rpc_channel_close(f->channel);
    rpc_client_destroy(f->rpc);
    rpc_server_stop(f->server, 1000);
    jobs_destroy(f->jobs);
    rpc_server_destroy(f->server);
    steps_destroy(f->steps);
    pthread_mutex_destroy(&f->service.lock);
    free(f);
    rpc_shutdown();
    return 0;
}

static uint8_t *
make_data(uint64_t size)
{
    uint8_t *data = malloc(size);

    assert_non_null(data);
    for (uint64_t i = 0; i < size; i++) {
        data[i] = (uint8_t)(i * 2654435761u >> 7);
    }
    return data;
}

/* The answer of a run, whole; checks its parts and every byte. */
static void
check_answer(const fixture_t *f, talk_t *talk, const uint8_t *data, uint32_t layer)
{
    const steps_sizes_t *s = &f->service.sizes;
    uint64_t at            = 0;

    while (at < s->answer) {
        reply_t *reply = talk_reply(talk);
        assert_int_equal(reply->status, ATTN_OK);
        assert_int_equal(reply->op, ATTN__V1__STEP_REPLY__OP_RUN);
        assert_int_equal(reply->offset, at);
        assert_int_equal(reply->total, s->answer);
        assert_true(reply->size > 0 && reply->size <= RPC_DATA_PART_MAX);
        for (uint64_t i = 0; i < reply->size; i++) {
            if (reply->data[i] != answer_byte(s, data, layer, at + i)) {
                fail_msg("byte %llu of the answer", (unsigned long long)(at + i));
            }
        }
        at += reply->size;
    }
}

static void
wait_until(atomic_uint *counter, uint32_t value)
{
    uint64_t end = attn_now_ns() + WAIT_NS;

    while (atomic_load(counter) < value && attn_now_ns() < end) {
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
    assert_int_equal(atomic_load(counter), value);
}

/* ---- streams ---- */

static void
test_a_run_in_one_message_and_in_parts(void **state)
{
    fixture_t *f  = *state;
    talk_t *talk  = talk_open(f->rpc, f->channel);
    uint64_t id   = talk_begin(talk);
    uint8_t *data = make_data(144);

    talk_part(talk, id, 1, 0, 0, data, 144);
    check_answer(f, talk, data, 1);
    talk_part(talk, id, 2, 0, 144, data, 100);
    talk_part(talk, id, 2, 100, 144, data + 100, 0);
    talk_part(talk, id, 2, 100, 144, data + 100, 44);
    check_answer(f, talk, data, 2);
    talk_commit(talk, id);
    assert_int_equal(talk_reply(talk)->op, ATTN__V1__STEP_REPLY__OP_COMMIT);
    talk_close(talk);
    assert_int_equal(atomic_load(&f->service.aborts), 0);
    free(data);
}

/* Answers above what may wait for a peer at once, so that sending has to pause. */
static void
test_a_large_answer(void **state)
{
    fixture_t *f = *state;
    set_sizes(&f->service, (steps_sizes_t){.q = 5000001, .k = 300000, .v = 7, .answer = 20000003});
    talk_t *talk   = talk_open(f->rpc, f->channel);
    uint64_t id    = talk_begin(talk);
    uint64_t total = 5300008;
    uint8_t *data  = make_data(total);

    for (uint64_t at = 0; at < total; at += RPC_DATA_PART_MAX) {
        uint64_t left = total - at;
        talk_part(talk, id, 3, at, total, data + at,
                  left < RPC_DATA_PART_MAX ? left : RPC_DATA_PART_MAX);
    }
    check_answer(f, talk, data, 3);
    talk_close(talk);
    wait_until(&f->service.aborts, 1);
    free(data);
}

static void
refused(talk_t *talk, attn_status_t status, const char *word)
{
    reply_t *reply = talk_reply(talk);

    assert_int_equal(reply->status, status);
    assert_int_equal(reply->op, ATTN__V1__STEP_REPLY__OP__NOT_SET);
    if (strstr(reply->sentence, word) == NULL) {
        fail_msg("no \"%s\" in: %s", word, reply->sentence);
    }
}

/* Each wrong run has one reply, however many of its parts are on their way. */
static void
test_wrong_parts_have_one_reply_a_run(void **state)
{
    fixture_t *f  = *state;
    talk_t *talk  = talk_open(f->rpc, f->channel);
    uint64_t id   = talk_begin(talk);
    uint8_t *data = make_data(144);

    talk_part(talk, id, 0, 0, 144, data, 50); /* a gap, and two parts after it */
    talk_part(talk, id, 0, 60, 144, data, 10);
    talk_part(talk, id, 0, 70, 144, data, 10);
    talk_part(talk, id, 0, 80, 144, data, 64);
    talk_part(talk, id, 0, 20, 144, data, 124); /* from the middle */
    talk_part(talk, 63, 0, 0, 144, data, 100);  /* no such step, with a rest */
    talk_part(talk, 63, 0, 100, 144, data, 44);
    talk_part(talk, id, 0, 0, 144, data, 100); /* too much */
    talk_part(talk, id, 0, 100, 144, data, 45);
    talk_part(talk, id, 0, 0, 144, data, 100); /* another layer between */
    talk_part(talk, id, 1, 100, 144, data + 100, 44);
    talk_part(talk, id, 0, 0, UINT64_MAX, data, 1); /* a total of nobody's */
    talk_part(talk, id, 0, UINT64_MAX, UINT64_MAX, data, 1);
    talk_part(talk, id, 0, 0, 144, data, 100); /* broken off by another run */
    talk_part(talk, id, 4, 0, 144, data, 144);
    talk_part(talk, id, 10, 0, 144, data, 144); /* the service refuses */
    refused(talk, ATTN_ERR_INVALID, "offset");
    refused(talk, ATTN_ERR_INVALID, "offset");
    refused(talk, ATTN_ERR_NOT_FOUND, "step");
    refused(talk, ATTN_ERR_INVALID, "total");
    refused(talk, ATTN_ERR_INVALID, "layer 1");
    refused(talk, ATTN_ERR_INVALID, "total");
    refused(talk, ATTN_ERR_INVALID, "broke off");
    check_answer(f, talk, data, 4);
    refused(talk, ATTN_ERR_INVALID, "layer is 10");
    talk_part(talk, id, 5, 0, 0, data, 144);
    check_answer(f, talk, data, 5);
    talk_commit(talk, id);
    assert_int_equal(talk_reply(talk)->status, ATTN_OK);
    talk_commit(talk, id);
    refused(talk, ATTN_ERR_NOT_FOUND, "step");
    pthread_mutex_lock(&talk->lock);
    assert_int_equal(talk->n, talk->read);
    pthread_mutex_unlock(&talk->lock);
    talk_close(talk);
    free(data);
}

/* A stream that goes away aborts its open steps, also amid a run. */
static void
test_steps_abort_with_their_stream(void **state)
{
    fixture_t *f = *state;
    atomic_store(&f->service.sleep_ms, 100);
    talk_t *talk   = talk_open(f->rpc, f->channel);
    uint8_t *data  = make_data(144);
    uint64_t first = talk_begin(talk);

    talk_begin(talk);
    uint64_t third = talk_begin(talk);
    talk_commit(talk, first);
    assert_int_equal(talk_reply(talk)->status, ATTN_OK);
    talk_part(talk, third, 0, 0, 144, data, 144);
    wait_until(&f->service.running, 1);
    talk_close(talk);
    wait_until(&f->service.aborts, 2);
    free(data);
}

static void
test_a_message_of_another_kind_ends_the_stream(void **state)
{
    talk_t *talk = talk_open(((fixture_t *)*state)->rpc, ((fixture_t *)*state)->channel);
    Attn__V1__OpenClientRequest request = ATTN__V1__OPEN_CLIENT_REQUEST__INIT;
    Attn__V1__StepRequest nothing       = ATTN__V1__STEP_REQUEST__INIT;
    char name[]                         = "\x08"; /* as a begin: a varint that breaks off */

    rpc_stream_send(talk->stream, &(rpc_outgoing_t){.head = &nothing.base});
    refused(talk, ATTN_ERR_INVALID, "op is not set");
    request.name = name;
    rpc_stream_send(talk->stream, &(rpc_outgoing_t){.head = &request.base});
    assert_int_equal(talk_end(talk), ATTN_ERR_INVALID);
    talk_close(talk);
}

static void
test_draining(void **state)
{
    fixture_t *f                     = *state;
    talk_t *talk                     = talk_open(f->rpc, f->channel);
    uint64_t id                      = talk_begin(talk);
    uint8_t *data                    = make_data(144);
    Attn__V1__BeginStepRequest begin = ATTN__V1__BEGIN_STEP_REQUEST__INIT;
    Attn__V1__StepRequest request    = ATTN__V1__STEP_REQUEST__INIT;

    steps_drain(f->steps);
    request.op_case = ATTN__V1__STEP_REQUEST__OP_BEGIN;
    request.begin   = &begin;
    rpc_stream_send(talk->stream, &(rpc_outgoing_t){.head = &request.base});
    refused(talk, ATTN_ERR_CANCELLED, "draining");
    talk_t *late = talk_open(f->rpc, f->channel);
    rpc_stream_send(late->stream, &(rpc_outgoing_t){.head = &request.base});
    assert_int_equal(talk_end(late), ATTN_ERR_CANCELLED);
    talk_close(late);
    talk_part(talk, id, 1, 0, 0, data, 144); /* what is open goes on */
    check_answer(f, talk, data, 1);
    steps_end_streams(f->steps);
    assert_int_equal(talk_end(talk), ATTN_ERR_CANCELLED);
    wait_until(&f->service.aborts, 1);
    talk_close(talk);
    free(data);
}

/* ---- unary calls ---- */

static attn_status_t
call(fixture_t *f, const char *path, const void *request, const uint8_t *data, uint64_t size,
     rpc_message_t **message_p)
{
    struct iovec piece = {.iov_base = (void *)data, .iov_len = size};

    return rpc_call_unary_wait(
        f->channel, path, &(rpc_outgoing_t){.head = request, .data = &piece, .n_data = size > 0},
        attn_now_ns() + WAIT_NS, message_p);
}

static attn_status_t
unary_run(fixture_t *f, uint64_t id, uint64_t offset, uint64_t total, const uint8_t *data,
          uint64_t size)
{
    Attn__V1__RunRequest run = ATTN__V1__RUN_REQUEST__INIT;
    rpc_message_t *message;
    ProtobufCMessage *head;

    run.step_id          = id;
    run.offset           = offset;
    run.total            = total;
    attn_status_t status = call(f, "/attn.v1.Attention/Run", &run, data, size, &message);
    if (status != ATTN_OK) {
        return status;
    }
    assert_int_equal(rpc_message_unpack(message, &attn__v1__run_reply__descriptor, &head), ATTN_OK);
    assert_int_equal(((Attn__V1__RunReply *)head)->total, f->service.sizes.answer);
    assert_int_equal(rpc_message_data_size(message), f->service.sizes.answer);
    uint8_t *answer = malloc(f->service.sizes.answer);
    rpc_message_data_copy(message, 0, answer, f->service.sizes.answer);
    for (uint64_t i = 0; i < f->service.sizes.answer; i++) {
        assert_int_equal(answer[i], answer_byte(&f->service.sizes, data, 0, i));
    }
    free(answer);
    rpc_message_free(message);
    return ATTN_OK;
}

static void
test_unary_calls(void **state)
{
    fixture_t *f                     = *state;
    Attn__V1__BeginStepRequest begin = ATTN__V1__BEGIN_STEP_REQUEST__INIT;
    Attn__V1__CommitRequest commit   = ATTN__V1__COMMIT_REQUEST__INIT;
    uint32_t wrong                   = 99;
    uint8_t *data                    = make_data(144);
    rpc_message_t *message;
    ProtobufCMessage *head;

    assert_int_equal(call(f, "/attn.v1.Attention/Begin", &begin, NULL, 0, &message), ATTN_OK);
    assert_int_equal(rpc_message_unpack(message, &attn__v1__begin_step_reply__descriptor, &head),
                     ATTN_OK);
    uint64_t id = ((Attn__V1__BeginStepReply *)head)->step_id;
    rpc_message_free(message);

    assert_int_equal(unary_run(f, id, 0, 0, data, 144), ATTN_OK);
    assert_int_equal(unary_run(f, id, 0, 144, data, 144), ATTN_OK);
    assert_int_equal(unary_run(f, id, 0, 145, data, 144), ATTN_ERR_INVALID);
    assert_int_equal(unary_run(f, id, 4, 144, data, 140), ATTN_ERR_INVALID);
    assert_int_equal(unary_run(f, id, 0, 0, data, 143), ATTN_ERR_INVALID);
    assert_non_null(strstr(attn_last_error(), "144"));
    assert_int_equal(unary_run(f, id + 1, 0, 0, data, 144), ATTN_ERR_NOT_FOUND);
    set_sizes(&f->service, (steps_sizes_t){.q = 64, .k = 32, .v = 48, .answer = RPC_MESSAGE_MAX});
    assert_int_equal(unary_run(f, id, 0, 0, data, 144), ATTN_ERR_TOO_LARGE);
    assert_non_null(strstr(attn_last_error(), "stream"));
    set_sizes(&f->service,
              (steps_sizes_t){.q = 64, .k = 32, .v = 48, .answer = RPC_MESSAGE_MAX - 256});
    assert_int_equal(unary_run(f, id, 0, 0, data, 144), ATTN_OK);
    set_sizes(&f->service,
              (steps_sizes_t){.q = 64, .k = 32, .v = 48, .answer = 80, .grouped = true});
    assert_int_equal(unary_run(f, id, 0, 0, data, 144), ATTN_ERR_INVALID);
    assert_non_null(strstr(attn_last_error(), "on its stream"));

    commit.step_id    = id;
    commit.accepted   = &wrong;
    commit.n_accepted = 1;
    assert_int_equal(call(f, "/attn.v1.Attention/Commit", &commit, NULL, 0, &message),
                     ATTN_ERR_INVALID);
    assert_non_null(strstr(attn_last_error(), "accepted[0]"));
    commit.n_accepted = 0;
    assert_int_equal(call(f, "/attn.v1.Attention/Commit", &commit, NULL, 0, &message), ATTN_OK);
    rpc_message_free(message);
    assert_int_equal(call(f, "/attn.v1.Attention/Abort", &commit, NULL, 0, &message), ATTN_OK);
    rpc_message_free(message);
    free(data);
}

#define BOTH(test)                                                                                 \
    cmocka_unit_test_setup_teardown(test, setup, teardown),                                        \
        cmocka_unit_test_setup_teardown(test, setup_jobs, teardown)

int
main(void)
{
    const struct CMUnitTest tests[] = {
        BOTH(test_a_run_in_one_message_and_in_parts),
        BOTH(test_a_large_answer),
        BOTH(test_wrong_parts_have_one_reply_a_run),
        BOTH(test_steps_abort_with_their_stream),
        BOTH(test_a_message_of_another_kind_ends_the_stream),
        BOTH(test_draining),
        BOTH(test_unary_calls),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
