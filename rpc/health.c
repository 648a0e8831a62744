/*
 * health.c: grpc.health.v1.Health, as load balancers and the usual probes ask it. Every
 * service of a server has the server's own state; Watch tells each change of it.
 *
 * Nothing is sent with the lock held: a watcher that is being told is marked busy, and its
 * `closed` waits for that, so that its call cannot go away meanwhile.
 */
#include "rpc/rpc_int.h"

#include "base/status.h"
#include "health.pb-c.h"

#define SERVING GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING
#define NOT_SERVING GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__NOT_SERVING
#define UNKNOWN GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVICE_UNKNOWN

typedef struct watcher {
    struct watcher *next;
    rpc_call_t *call;
    bool known, told_serving, busy;
} watcher_t;

struct rpc_health {
    rpc_server_t *server;
    pthread_mutex_t lock;
    pthread_cond_t cond;
    bool serving, stopped;
    watcher_t *watchers;
};

/* The service that a request names, and whether there is one. The name lives in the message. */
static attn_status_t
read_request(const rpc_health_t *health, rpc_message_t *message, const char **name_p, bool *known_p)
{
    ProtobufCMessage *head;
    attn_status_t status =
        rpc_message_unpack(message, &grpc__health__v1__health_check_request__descriptor, &head);

    if (status == ATTN_OK) {
        const char *name = ((Grpc__Health__V1__HealthCheckRequest *)head)->service;
        *name_p          = name;
        *known_p = name[0] == 0 || rpc_server_has_service(health->server, name, strlen(name));
    }
    return status;
}

static void
check(void *service, rpc_call_t *call, rpc_message_t *message)
{
    rpc_health_t *health                           = service;
    Grpc__Health__V1__HealthCheckResponse response = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;
    rpc_outgoing_t outgoing                        = {.head = &response.base};
    const char *name;
    bool known;

    attn_status_t status = read_request(health, message, &name, &known);
    if (status == ATTN_OK && !known) {
        status = attn_fail(ATTN_ERR_NOT_FOUND, "no service %.256s here", name);
    }
    if (status == ATTN_OK) {
        pthread_mutex_lock(&health->lock);
        response.status = health->serving ? SERVING : NOT_SERVING;
        pthread_mutex_unlock(&health->lock);
        rpc_call_reply(call, &outgoing);
    } else {
        rpc_call_end(call, status, attn_last_error());
    }
    rpc_message_free(message);
}

static void
tell(rpc_call_t *call, Grpc__Health__V1__HealthCheckResponse__ServingStatus status)
{
    Grpc__Health__V1__HealthCheckResponse response = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;
    rpc_outgoing_t outgoing                        = {.head = &response.base};

    response.status = status;
    rpc_call_send(call, &outgoing); /* a failure means that the call is over */
}

/* Tell every watcher that knows something else, one after the other. */
static void
tell_all(rpc_health_t *health)
{
    pthread_mutex_lock(&health->lock);
    for (watcher_t *w = health->watchers; w != NULL;) {
        if (!w->known || w->told_serving == health->serving) {
            w = w->next;
            continue;
        }
        if (w->busy) {
            pthread_cond_wait(&health->cond, &health->lock);
        } else {
            w->busy         = true;
            w->told_serving = health->serving;
            bool serving    = health->serving;
            pthread_mutex_unlock(&health->lock);
            tell(w->call, serving ? SERVING : NOT_SERVING);
            pthread_mutex_lock(&health->lock);
            w->busy = false;
            pthread_cond_broadcast(&health->cond);
        }
        w = health->watchers; /* the list may have changed */
    }
    pthread_mutex_unlock(&health->lock);
}

static void
watch(void *service, rpc_call_t *call, rpc_message_t *message)
{
    rpc_health_t *health = service;
    const char *name     = "";
    bool known           = false;

    attn_status_t status = message == NULL ? attn_fail(ATTN_ERR_INVALID, "Watch without a request")
                                           : read_request(health, message, &name, &known);
    rpc_message_free(message);
    pthread_mutex_lock(&health->lock);
    if (status == ATTN_OK && health->stopped) {
        status = attn_fail(ATTN_ERR_CANCELLED, "the server stops");
    }
    if (status != ATTN_OK) {
        pthread_mutex_unlock(&health->lock);
        rpc_call_end(call, status, attn_last_error());
        return;
    }
    watcher_t *w     = gpr_zalloc(sizeof(*w));
    w->call          = call;
    w->known         = known;
    w->told_serving  = !health->serving; /* so that tell_all() has something to say */
    w->next          = health->watchers;
    health->watchers = w;
    rpc_call_set_context(call, w);
    pthread_mutex_unlock(&health->lock);
    if (known) {
        tell_all(health);
    } else {
        tell(call, UNKNOWN);
    }
}

static void
watch_closed(void *service, rpc_call_t *call)
{
    rpc_health_t *health = service;
    watcher_t *w         = rpc_call_context(call);

    if (w == NULL) {
        return; /* it was refused */
    }
    pthread_mutex_lock(&health->lock);
    while (w->busy) {
        pthread_cond_wait(&health->cond, &health->lock);
    }
    watcher_t **link = &health->watchers;
    while (*link != w) {
        link = &(*link)->next;
    }
    *link = w->next;
    pthread_mutex_unlock(&health->lock);
    gpr_free(w);
}

attn_status_t
rpc_health_create(rpc_server_t *server, rpc_health_t **health_p)
{
    static const rpc_method_t methods[] = {
        {.path = "/grpc.health.v1.Health/Check", .handle = check},
        {.path      = "/grpc.health.v1.Health/Watch",
         .streaming = true,
         .handle    = watch,
         .closed    = watch_closed},
    };
    rpc_health_t *health = gpr_zalloc(sizeof(*health));

    health->server  = server;
    health->serving = true;
    pthread_mutex_init(&health->lock, NULL);
    rpc_cond_init(&health->cond);
    *health_p = health;
    return rpc_server_add(server, methods, 2, health);
}

void
rpc_health_set(rpc_health_t *health, bool serving)
{
    pthread_mutex_lock(&health->lock);
    health->serving = serving && !health->stopped;
    pthread_mutex_unlock(&health->lock);
    tell_all(health);
}

void
rpc_health_stop(rpc_health_t *health)
{
    pthread_mutex_lock(&health->lock);
    health->stopped = true;
    pthread_mutex_unlock(&health->lock);
    rpc_health_set(health, false);

    /* All are told; now end them, each once: a watch never ends by itself. */
    pthread_mutex_lock(&health->lock);
    for (watcher_t *w = health->watchers; w != NULL;) {
        if (w->busy) {
            pthread_cond_wait(&health->cond, &health->lock);
            w = health->watchers;
            continue;
        }
        if (w->call == NULL) {
            w = w->next;
            continue;
        }
        rpc_call_t *call = w->call;
        w->busy          = true;
        w->call          = NULL;
        pthread_mutex_unlock(&health->lock);
        rpc_call_end(call, ATTN_ERR_CANCELLED, "the server stops");
        pthread_mutex_lock(&health->lock);
        w->busy = false;
        pthread_cond_broadcast(&health->cond);
        w = health->watchers;
    }
    pthread_mutex_unlock(&health->lock);
}

void
rpc_health_destroy(rpc_health_t *health)
{
    if (health == NULL) {
        return;
    }
    pthread_cond_destroy(&health->cond);
    pthread_mutex_destroy(&health->lock);
    gpr_free(health);
}

/* ---- asking ---- */

attn_status_t
rpc_channel_health(rpc_channel_t *channel, uint64_t deadline_ns, bool *serving_p)
{
    Grpc__Health__V1__HealthCheckRequest request = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    rpc_message_t *message;
    ProtobufCMessage *head;

    attn_status_t status =
        rpc_call_unary_wait(channel, "/grpc.health.v1.Health/Check",
                            &(rpc_outgoing_t){.head = &request.base}, deadline_ns, &message);
    if (status != ATTN_OK) {
        return status;
    }
    status =
        rpc_message_unpack(message, &grpc__health__v1__health_check_response__descriptor, &head);
    if (status == ATTN_OK) {
        *serving_p = ((Grpc__Health__V1__HealthCheckResponse *)head)->status == SERVING;
    }
    rpc_message_free(message);
    return status;
}
