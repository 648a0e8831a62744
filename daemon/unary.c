#include "daemon/unary.h"

#include "base/status.h"
#include "daemon/meter.h"

#include <stdlib.h>

/* One method: what its rpc handler gets as its service. */
typedef struct row {
    unary_method_t method;
    void *service;
    jobs_t *jobs;
} row_t;

struct unary {
    uint32_t n;
    row_t rows[];
};

/* One call on its way to a thread. */
typedef struct errand {
    job_t job;
    const row_t *row;
    rpc_call_t *call;
    rpc_message_t *message;
} errand_t;

void
unary_fail(rpc_call_t *call, attn_status_t status)
{
    meter_refused(status);
    rpc_call_end(call, status, attn_last_error());
}

static attn_status_t
serve_admitted(const row_t *row, const rpc_call_t *call, rpc_message_t *message,
               wire_block_t *block, ProtobufCMessage **reply_p)
{
    const unary_method_t *method = &row->method;
    ProtobufCMessage *request, *reply;
    attn_status_t status = rpc_message_unpack(message, method->request, &request);

    if (status == ATTN_OK && method->admit_request != NULL) {
        status = method->admit_request(row->service, call, request);
    }
    if (status != ATTN_OK) {
        return status;
    }
    reply = wire_alloc(block, 1, method->reply->sizeof_message);
    if (reply == NULL) {
        return ATTN_ERR_NO_MEMORY;
    }
    method->reply->message_init(reply);
    *reply_p = reply;
    return method->serve(&(unary_call_t){
        .service = row->service, .call = call, .request = request, .reply = reply, .block = block});
}

static void
serve(const row_t *row, rpc_call_t *call, rpc_message_t *message)
{
    ProtobufCMessage *reply = NULL;
    wire_block_t block      = {0};
    attn_status_t status    = ATTN_OK;

    if (row->method.admit != NULL) {
        status = row->method.admit(row->service, call);
    }
    if (status == ATTN_OK) {
        status = serve_admitted(row, call, message, &block, &reply);
    }
    if (status == ATTN_OK) {
        rpc_call_reply(call, &(rpc_outgoing_t){.head = reply});
    } else {
        unary_fail(call, status);
    }
    wire_free(&block);
    rpc_message_free(message);
}

static void
errand_run(job_t *job)
{
    errand_t *errand = JOB_OF(errand_t, job, job);

    serve(errand->row, errand->call, errand->message);
    free(errand);
}

static void
handle(void *service, rpc_call_t *call, rpc_message_t *message)
{
    const row_t *row = service;

    if (row->jobs == NULL || !row->method.blocks) {
        serve(row, call, message);
        return;
    }
    errand_t *errand = malloc(sizeof(*errand));
    if (errand == NULL) {
        unary_fail(call,
                   attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a call of %s", row->method.path));
        rpc_message_free(message);
        return;
    }
    *errand = (errand_t){.job = {.run = errand_run}, .row = row, .call = call, .message = message};
    jobs_add(row->jobs, &errand->job);
}

attn_status_t
unary_add(rpc_server_t *server, jobs_t *jobs, const unary_method_t *methods, uint32_t n,
          void *service, unary_t **unary_p)
{
    unary_t *unary = calloc(1, sizeof(*unary) + n * sizeof(unary->rows[0]));

    if (unary == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for %u methods", n);
    }
    unary->n = n;
    for (uint32_t i = 0; i < n; i++) {
        unary->rows[i]       = (row_t){.method = methods[i], .service = service, .jobs = jobs};
        rpc_method_t method  = {.path = methods[i].path, .handle = handle};
        attn_status_t status = rpc_server_add(server, &method, 1, &unary->rows[i]);
        if (status != ATTN_OK) { /* rows added before stay with the server, so they stay */
            return status;
        }
    }
    *unary_p = unary;
    return ATTN_OK;
}

void
unary_destroy(unary_t *unary)
{
    free(unary);
}
