/*
 * ucx_port.c: messages through UCX, between processes of any two hosts: an active message has a
 * head of 64 bytes and data, and is told to its receiver when the head is there, so that large data
 * goes where it belongs at once. Which transport carries it is UCX's choice, but never shared
 * memory: between peers that may be killed UCX is asked to notice broken connections, which its
 * shared memory does not.
 *
 * A way is closed by force, and without waiting: who has a way open to a process that was stopped
 * or cut off must not stop with it. What UCX still had to send of a closed way's is cancelled;
 * until UCX says so the memory of it stays, which is what closed() is for.
 */
#include "rpc/ucx_int.h"
#include "rpc/ucx_lib.h"

#include "base/status.h"

#include <stdio.h>
#include <stdlib.h>

#define REQUEST_ID 1u          /* of our active messages, both ways */
#define EAGER_MAX (256u << 10) /* bytes that TCP sends without asking for room first */
#define LAST_ROUNDS 10000u     /* of progress for ways that are being closed, at the end */
/* UCX reads an address as far as it says that it goes on. What ends its parts is a bit of their
 * first bytes, so it ends soon in bytes that have all bits. */
#define ADDRESS_READ_MAX (64u << 10)
#define RECEIPTS (UCX_SESSION_SLOTS_MAX + 1)
/* Messages of a way that are not gone yet, a hello and an answer of each slot. An answer may be
 * with its receiver, who asks again, before UCX says here that it went: so there is room for some
 * more, and who passes even that takes none of them. */
#define SENDS_MAX (4 * UCX_SESSION_SLOTS_MAX)

/* Data that is coming for a way. */
typedef struct receipt {
    ucx_way_t *way;
    void *what;
    bool used;
} receipt_t;

struct ucx_way {
    ucx_port_t *port;
    void *whose;
    ucp_ep_h ep;
    ucs_status_t status; /* why it is broken */
    bool told;           /* that it is */
    bool closing;
    void *request; /* of its closing; NULL: that is done */
    bool tcp;
    char name[16];
    uint32_t sends, receives; /* that have not ended */
    receipt_t receipts[RECEIPTS];
    ucx_way_t *next, **link;
};

struct ucx_port {
    ucx_port_user_t user;
    ucp_context_h context;
    ucp_worker_h worker;
    ucp_address_t *address;
    size_t address_size;
    int fd;
    char version[16];
    ucx_way_t *ways;
    bool changed; /* a way is broken, or being closed */
};

/* ---- receiving ---- */

static receipt_t *
receipt_take(const ucx_coming_t *coming)
{
    for (unsigned i = 0; i < RECEIPTS; i++) {
        receipt_t *receipt = &coming->way->receipts[i];
        if (!receipt->used) {
            *receipt = (receipt_t){.way = coming->way, .what = coming->what, .used = true};
            coming->way->receives++;
            return receipt;
        }
    }
    return NULL;
}

static void
receipt_end(receipt_t *receipt, bool whole)
{
    ucx_port_t *port = receipt->way->port;

    receipt->used = false;
    receipt->way->receives--;
    port->user.arrived(port->user.arg, receipt->what, whole);
}

static void
on_received(void *request, ucs_status_t status, size_t length, void *arg)
{
    (void)length;
    receipt_end(arg, status == UCS_OK);
    ucx_lib.ucp_request_free(request);
}

/* Have the data of a large message sent to where it belongs. */
static ucs_status_t
fetch(ucx_port_t *port, void *descriptor, size_t length, const ucx_coming_t *coming)
{
    receipt_t *receipt = receipt_take(coming);

    if (receipt == NULL) {
        port->user.arrived(port->user.arg, coming->what, false);
        return UCS_OK;
    }
    ucp_request_param_t params = {.op_attr_mask =
                                      UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA,
                                  .cb.recv_am = on_received,
                                  .user_data  = receipt};
    void *request =
        ucx_lib.ucp_am_recv_data_nbx(port->worker, descriptor, coming->to, length, &params);
    if (!UCS_PTR_IS_PTR(request)) {
        receipt_end(receipt, UCS_PTR_STATUS(request) == UCS_OK);
    }
    return UCS_PTR_IS_ERR(request) ? UCS_OK : UCS_INPROGRESS;
}

static ucs_status_t
on_message(void *arg, const void *header, size_t header_size, void *data, size_t length,
           const ucp_am_recv_param_t *params)
{
    ucx_port_t *port    = arg;
    ucx_head_t head     = {.secret = 0}; /* which is nobody's */
    ucx_coming_t coming = {.fetched = (params->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) != 0};

    if ((params->recv_attr & UCP_AM_RECV_ATTR_FIELD_REPLY_EP) != 0) {
        coming.from = params->reply_ep;
    }
    if (header_size == sizeof(head)) {
        memcpy(&head, header, sizeof(head));
    }
    if (!port->user.arrive(port->user.arg, &head, length, &coming)) {
        return UCS_OK;
    }
    if (coming.fetched) {
        return fetch(port, data, length, &coming);
    }
    if (length > 0) {
        ucx_copy(coming.to, data, length);
    }
    port->user.arrived(port->user.arg, coming.what, true);
    return UCS_OK;
}

/* ---- ways ---- */

static void
way_break(ucx_way_t *way, ucs_status_t status)
{
    if (way->status == UCS_OK) {
        way->status = status;
    }
    way->port->changed = true;
}

static void
on_broken(void *arg, ucp_ep_h ep, ucs_status_t status)
{
    (void)ep;
    way_break(arg, status);
}

attn_status_t
ucx_way_open(ucx_port_t *port, const uint8_t *address, uint64_t size, void *whose,
             ucx_way_t **way_p)
{
    if (size < 1 || size > UCX_ADDRESS_MAX) {
        return attn_fail(ATTN_ERR_UNSUPPORTED,
                         "the UCX address that was told has %llu bytes: 1 to %u",
                         (unsigned long long)size, UCX_ADDRESS_MAX);
    }
    ucx_way_t *way  = calloc(1, sizeof(*way));
    uint8_t *padded = malloc(ADDRESS_READ_MAX);
    if (way == NULL || padded == NULL) {
        free(way);
        free(padded);
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a connection of UCX's");
    }
    memset(padded, 0xff, ADDRESS_READ_MAX);
    memcpy(padded, address, size);
    ucp_ep_params_t params = {.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS |
                                            UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                                            UCP_EP_PARAM_FIELD_ERR_HANDLER,
                              .address     = (const ucp_address_t *)padded,
                              .err_mode    = UCP_ERR_HANDLING_MODE_PEER,
                              .err_handler = {.cb = on_broken, .arg = way}};
    way->port              = port;
    way->whose             = whose;
    ucs_status_t status    = ucx_lib.ucp_ep_create(port->worker, &params, &way->ep);
    free(padded); /* UCX has copied what it needs */
    if (status != UCS_OK) {
        free(way);
        return ucx_lib_failed(status, "find a network transport to the other side");
    }
    way->next = port->ways;
    way->link = &port->ways;
    if (way->next != NULL) {
        way->next->link = &way->next;
    }
    port->ways = way;
    *way_p     = way;
    return ATTN_OK;
}

void
ucx_way_close(ucx_way_t *way)
{
    ucp_request_param_t params = {.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS,
                                  .flags        = UCP_EP_CLOSE_FLAG_FORCE};

    if (way->closing) {
        return;
    }
    void *request      = ucx_lib.ucp_ep_close_nbx(way->ep, &params);
    way->closing       = true;
    way->request       = UCS_PTR_IS_PTR(request) ? request : NULL;
    way->port->changed = true;
}

bool
ucx_way_is(const ucx_way_t *way, const void *from)
{
    return way->ep == from;
}

static void
on_sent(void *request, ucs_status_t status, void *arg)
{
    ucx_way_t *way = arg;

    way->sends--;
    if (status != UCS_OK) {
        way_break(way, status);
    }
    ucx_lib.ucp_request_free(request);
}

void
ucx_way_send(ucx_way_t *way, const ucx_head_t *head, const uint8_t *data, uint64_t bytes)
{
    ucp_request_param_t params = {.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK |
                                                  UCP_OP_ATTR_FIELD_USER_DATA |
                                                  UCP_OP_ATTR_FIELD_FLAGS,
                                  .cb.send   = on_sent,
                                  .user_data = way};

    if (way->closing || way->status != UCS_OK) {
        return;
    }
    if (way->sends >= SENDS_MAX) {
        way_break(way, UCS_ERR_EXCEEDS_LIMIT);
        return;
    }
    /* Over TCP asking for room costs a round trip, and more than it saves. What may be fetched
     * tells its endpoint, and so do hellos, before which it is not known that it is TCP. */
    params.flags = way->tcp && bytes <= EAGER_MAX ? UCP_AM_SEND_FLAG_EAGER : UCP_AM_SEND_FLAG_REPLY;
    void *request =
        ucx_lib.ucp_am_send_nbx(way->ep, REQUEST_ID, head, sizeof(*head), data, bytes, &params);
    if (UCS_PTR_IS_ERR(request)) {
        way_break(way, UCS_PTR_STATUS(request));
    } else if (request != NULL) {
        way->sends++;
    }
}

/* UCX 1.13 tells a way's transports in print alone: "lane[0]:  1:tcp/eth0.0 md[1] ...". */
const char *
ucx_way_settle(ucx_way_t *way)
{
    char *text  = NULL;
    size_t size = 0;
    FILE *file  = open_memstream(&text, &size);

    if (file != NULL) {
        ucx_lib.ucp_ep_print_info(way->ep, file);
        fclose(file);
    }
    const char *lane = text != NULL ? strstr(text, "lane[0]:") : NULL;
    if (lane == NULL || sscanf(lane, "lane[0]: %*u:%15[a-z0-9_]", way->name) != 1) {
        snprintf(way->name, sizeof(way->name), "network");
    }
    free(text);
    way->tcp = strcmp(way->name, "tcp") == 0;
    return way->name;
}

const char *
ucx_way_name(const ucx_way_t *way)
{
    return way->name;
}

static void
way_free(ucx_way_t *way)
{
    ucx_port_t *port = way->port;

    *way->link = way->next;
    if (way->next != NULL) {
        way->next->link = way->link;
    }
    port->user.closed(port->user.arg, way->whose);
    free(way);
}

/* ---- ports ---- */

/* Is the endpoint closed, and has UCX let all memory go? */
static bool
is_closed(ucx_way_t *way)
{
    if (way->request != NULL && ucx_lib.ucp_request_check_status(way->request) != UCS_INPROGRESS) {
        ucx_lib.ucp_request_free(way->request);
        way->request = NULL;
    }
    return way->request == NULL && way->sends == 0 && way->receives == 0;
}

/* Tell of what changed with the ways. */
static void
attend(ucx_port_t *port)
{
    ucx_way_t *next;

    port->changed = false;
    for (ucx_way_t *way = port->ways; way != NULL; way = next) {
        next = way->next;
        if (way->closing && is_closed(way)) {
            way_free(way);
        } else if (way->closing) {
            port->changed = true;
        } else if (way->status != UCS_OK && !way->told) {
            way->told = true;
            port->user.broken(port->user.arg, way->whose, ucx_lib.ucs_status_string(way->status));
        }
    }
}

bool
ucx_port_progress(ucx_port_t *port)
{
    bool any = ucx_lib.ucp_worker_progress(port->worker) > 0;

    if (port->changed) {
        attend(port);
    }
    return any;
}

bool
ucx_port_closes(const ucx_port_t *port)
{
    return port->changed;
}

int
ucx_port_fd(const ucx_port_t *port)
{
    return port->fd;
}

bool
ucx_port_arm(ucx_port_t *port)
{
    return ucx_lib.ucp_worker_arm(port->worker) == UCS_OK;
}

void
ucx_port_offer(const ucx_port_t *port, ucx_offer_t *offer)
{
    offer->address      = (const uint8_t *)port->address;
    offer->address_size = port->address_size;
    snprintf(offer->version, sizeof(offer->version), "%s", port->version);
}

static ucs_status_t
configure(ucp_config_t *config, const char *devices)
{
    ucs_status_t status = UCS_OK;

    if (getenv("UCX_TLS") == NULL) {
        status = ucx_lib.ucp_config_modify(config, "TLS", "^sm,self");
    }
    return status == UCS_OK && strcmp(devices, "all") != 0
               ? ucx_lib.ucp_config_modify(config, "NET_DEVICES", devices)
               : status;
}

static attn_status_t
context_open(ucx_port_t *port, const char *devices)
{
    ucp_params_t params = {.field_mask = UCP_PARAM_FIELD_FEATURES,
                           .features   = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP};
    unsigned major, minor, release;
    ucp_config_t *config;

    ucx_lib.ucp_get_version(&major, &minor, &release);
    snprintf(port->version, sizeof(port->version), "%u.%u", major, minor);
    ucs_status_t status = ucx_lib.ucp_config_read(NULL, NULL, &config);
    if (status != UCS_OK) {
        return ucx_lib_failed(status, "read its configuration");
    }
    status = configure(config, devices);
    if (status == UCS_OK) {
        status =
            ucx_lib.ucp_init_version(UCP_API_MAJOR, UCP_API_MINOR, &params, config, &port->context);
    }
    ucx_lib.ucp_config_release(config);
    return status == UCS_OK ? ATTN_OK : ucx_lib_failed(status, "start with a network transport");
}

static attn_status_t
worker_open(ucx_port_t *port)
{
    ucp_worker_params_t params     = {.field_mask  = UCP_WORKER_PARAM_FIELD_THREAD_MODE,
                                      .thread_mode = UCS_THREAD_MODE_SERIALIZED};
    ucp_am_handler_param_t handler = {.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID |
                                                    UCP_AM_HANDLER_PARAM_FIELD_CB |
                                                    UCP_AM_HANDLER_PARAM_FIELD_ARG,
                                      .id  = REQUEST_ID,
                                      .cb  = on_message,
                                      .arg = port};

    ucs_status_t status = ucx_lib.ucp_worker_create(port->context, &params, &port->worker);
    if (status != UCS_OK) {
        port->worker = NULL;
        return ucx_lib_failed(status, "make a worker of its own kind");
    }
    status = ucx_lib.ucp_worker_set_am_recv_handler(port->worker, &handler);
    if (status == UCS_OK) {
        status = ucx_lib.ucp_worker_get_efd(port->worker, &port->fd);
    }
    if (status == UCS_OK) {
        status = ucx_lib.ucp_worker_get_address(port->worker, &port->address, &port->address_size);
    }
    return status == UCS_OK ? ATTN_OK : ucx_lib_failed(status, "receive messages");
}

attn_status_t
ucx_port_create(const char *devices, const ucx_port_user_t *user, ucx_port_t **port_p)
{
    attn_status_t status = ucx_lib_need();

    if (status != ATTN_OK) {
        return status;
    }
    ucx_port_t *port = calloc(1, sizeof(*port));
    if (port == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for UCX");
    }
    port->user = *user;
    status     = context_open(port, devices);
    if (status == ATTN_OK) {
        status = worker_open(port);
    }
    if (status != ATTN_OK) {
        ucx_port_destroy(port);
        return status;
    }
    *port_p = port;
    return ATTN_OK;
}

void
ucx_port_destroy(ucx_port_t *port)
{
    if (port == NULL) {
        return;
    }
    for (ucx_way_t *way = port->ways; way != NULL; way = way->next) {
        ucx_way_close(way);
    }
    for (unsigned i = 0; port->ways != NULL && i < LAST_ROUNDS; i++) {
        ucx_port_progress(port);
    }
    if (port->address != NULL) {
        ucx_lib.ucp_worker_release_address(port->worker, port->address);
    }
    if (port->worker != NULL) {
        ucx_lib.ucp_worker_destroy(port->worker);
    }
    if (port->context != NULL) {
        ucx_lib.ucp_cleanup(port->context);
    }
    while (port->ways != NULL) { /* UCX has let them go by now */
        for (unsigned i = 0; i < RECEIPTS; i++) {
            if (port->ways->receipts[i].used) {
                receipt_end(&port->ways->receipts[i], false);
            }
        }
        way_free(port->ways);
    }
    free(port);
}
