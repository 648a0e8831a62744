#include "daemon/monitor/monitor.h"

#include "base/log.h"
#include "base/status.h"
#include "daemon/monitor/page.h"

#include <errno.h>
#include <gnutls/gnutls.h>
#include <gnutls/x509.h>
#include <microhttpd.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define HOST_MAX 256u
#define BACKLOG 64
#define CONNECTIONS_MAX 64u
#define IDLE_S 15u /* a page asks every second */
#define TLS_VERSIONS "NORMAL:-VERS-ALL:+VERS-TLS1.3:+VERS-TLS1.2"

struct monitor {
    monitor_source_t source;
    rpc_tls_t *tls;
    bool ask_certificates;
    struct MHD_Daemon *http;
    rpc_tls_pem_t pem; /* that http uses */
};

/* ---- answers ---- */

static enum MHD_Result
answer(struct MHD_Connection *connection, unsigned code, const char *type,
       struct MHD_Response *response)
{
    if (response == NULL) {
        return MHD_NO; /* no memory: the connection is closed */
    }
    MHD_add_response_header(response, MHD_HTTP_HEADER_CONTENT_TYPE, type);
    MHD_add_response_header(response, MHD_HTTP_HEADER_CACHE_CONTROL, "no-store");
    MHD_add_response_header(response, "X-Content-Type-Options", "nosniff");
    MHD_add_response_header(response, "Content-Security-Policy",
                            "default-src 'none'; style-src 'unsafe-inline'; "
                            "script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
                            "frame-ancestors 'none'");
    if (code == MHD_HTTP_METHOD_NOT_ALLOWED) {
        MHD_add_response_header(response, MHD_HTTP_HEADER_ALLOW, "GET, HEAD");
    }
    enum MHD_Result queued = MHD_queue_response(connection, code, response);
    MHD_destroy_response(response);
    return queued;
}

static enum MHD_Result
answer_words(struct MHD_Connection *connection, unsigned code, const char *words)
{
    return answer(
        connection, code, "text/plain; charset=utf-8",
        MHD_create_response_from_buffer(strlen(words), (void *)words, MHD_RESPMEM_MUST_COPY));
}

static enum MHD_Result
answer_metrics(const monitor_t *m, struct MHD_Connection *connection)
{
    expose_t expose;

    if (!expose_open(&expose)) {
        return MHD_NO;
    }
    m->source.metrics(m->source.service, &expose);
    if (!expose_close(&expose)) {
        free(expose.text);
        return MHD_NO;
    }
    return answer(connection, MHD_HTTP_OK, EXPOSE_TYPE,
                  MHD_create_response_from_buffer(expose.size, expose.text, MHD_RESPMEM_MUST_FREE));
}

static enum MHD_Result
answer_status(const monitor_t *m, struct MHD_Connection *connection)
{
    cJSON *status = m->source.status(m->source.service);
    char *text    = status != NULL ? cJSON_PrintUnformatted(status) : NULL;

    cJSON_Delete(status);
    if (text == NULL) {
        return MHD_NO;
    }
    return answer(connection, MHD_HTTP_OK, "application/json",
                  MHD_create_response_from_buffer(strlen(text), text, MHD_RESPMEM_MUST_FREE));
}

static enum MHD_Result
answer_health(const monitor_t *m, struct MHD_Connection *connection)
{
    const char *ailment = m->source.ailment(m->source.service);

    return ailment == NULL ? answer_words(connection, MHD_HTTP_OK, "ok\n")
                           : answer_words(connection, MHD_HTTP_SERVICE_UNAVAILABLE, ailment);
}

/* ---- requests ---- */

/* Has this client shown a certificate of our CA? */
static bool
is_trusted(const monitor_t *m, struct MHD_Connection *connection)
{
    const union MHD_ConnectionInfo *info;
    gnutls_typed_vdata_st purpose = {.type = GNUTLS_DT_KEY_PURPOSE_OID,
                                     .data = (unsigned char *)GNUTLS_KP_TLS_WWW_CLIENT};
    unsigned wrong                = 1;

    if (!m->ask_certificates) {
        return true;
    }
    info = MHD_get_connection_info(connection, MHD_CONNECTION_INFO_GNUTLS_SESSION);
    return info != NULL &&
           gnutls_certificate_verify_peers(info->tls_session, &purpose, 1, &wrong) == 0 &&
           wrong == 0;
}

static enum MHD_Result
on_request(void *arg, struct MHD_Connection *connection, const char *path, const char *method,
           const char *version, const char *body, size_t *body_size, void **context)
{
    const monitor_t *m = arg;
    static int seen;

    (void)version;
    (void)body;
    if (*context == NULL) { /* the head has come: look again when the body, if any, has too */
        *context = &seen;
        return MHD_YES;
    }
    if (*body_size > 0) { /* nothing here takes one */
        *body_size = 0;
        return MHD_YES;
    }
    if (strcmp(method, MHD_HTTP_METHOD_GET) != 0 && strcmp(method, MHD_HTTP_METHOD_HEAD) != 0) {
        return answer_words(connection, MHD_HTTP_METHOD_NOT_ALLOWED, "only GET is served here\n");
    }
    if (strcmp(path, "/healthz") == 0) {
        return answer_health(m, connection);
    }
    if (!is_trusted(m, connection)) {
        return answer_words(connection, MHD_HTTP_FORBIDDEN,
                            "show a certificate of this cluster's CA\n");
    }
    if (strcmp(path, "/metrics") == 0) {
        return answer_metrics(m, connection);
    }
    if (strcmp(path, "/status.json") == 0) {
        return answer_status(m, connection);
    }
    if (strcmp(path, "/") == 0) {
        return answer(connection, MHD_HTTP_OK, "text/html; charset=utf-8",
                      MHD_create_response_from_buffer(monitor_page_size, (void *)monitor_page,
                                                      MHD_RESPMEM_PERSISTENT));
    }
    return answer_words(connection, MHD_HTTP_NOT_FOUND,
                        "there are /, /status.json, /metrics and /healthz\n");
}

/* ---- the socket ---- */

static attn_status_t
listen_on(const char *address, int *fd_p)
{
    const struct addrinfo hints = {.ai_flags = AI_PASSIVE, .ai_socktype = SOCK_STREAM};
    struct addrinfo *found      = NULL;
    const char *colon           = strrchr(address, ':');
    const char *begin           = address;
    char host[HOST_MAX];
    int on = 1;

    size_t size = colon != NULL ? (size_t)(colon - address) : HOST_MAX;
    if (size > 1 && address[0] == '[' && address[size - 1] == ']') {
        begin++;
        size -= 2;
    }
    if (size >= HOST_MAX) {
        return attn_fail(ATTN_ERR_INVALID, "--metrics-listen %s is not HOST:PORT", address);
    }
    memcpy(host, begin, size);
    host[size]  = '\0';
    bool any    = size == 0 || strcmp(host, "*") == 0;
    int problem = getaddrinfo(any ? NULL : host, colon + 1, &hints, &found);
    if (problem != 0) {
        return attn_fail(ATTN_ERR_UNAVAILABLE, "--metrics-listen %s: %s", address,
                         gai_strerror(problem));
    }
    int fd = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd >= 0) {
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    }
    if (fd < 0 || bind(fd, found->ai_addr, found->ai_addrlen) != 0 || listen(fd, BACKLOG) != 0) {
        attn_status_t status =
            attn_fail(ATTN_ERR_UNAVAILABLE, "--metrics-listen %s: %s", address, strerror(errno));
        freeaddrinfo(found);
        if (fd >= 0) {
            close(fd);
        }
        return status;
    }
    freeaddrinfo(found);
    *fd_p = fd;
    return ATTN_OK;
}

static unsigned
port_of(int fd)
{
    struct sockaddr_storage bound = {0};
    socklen_t size                = sizeof(bound);

    getsockname(fd, (struct sockaddr *)&bound, &size);
    /* The port stands at the same place in both. */
    return ntohs(((const struct sockaddr_in *)(const void *)&bound)->sin_port);
}

/* ---- life ---- */

/* Serve on this socket, which is then its. */
static attn_status_t
serve(monitor_t *m, int fd)
{
    unsigned flags = MHD_USE_AUTO_INTERNAL_THREAD | MHD_USE_ITC;
    struct MHD_OptionItem tls[5];
    size_t n = 0;

    if (m->tls != NULL) {
        rpc_tls_pem_free(&m->pem);
        rpc_tls_pem(m->tls, &m->pem);
        flags |= MHD_USE_TLS;
        tls[n++] = (struct MHD_OptionItem){MHD_OPTION_HTTPS_MEM_CERT, 0, m->pem.cert};
        tls[n++] = (struct MHD_OptionItem){MHD_OPTION_HTTPS_MEM_KEY, 0, m->pem.key};
        tls[n++] = (struct MHD_OptionItem){MHD_OPTION_HTTPS_PRIORITIES, 0, (void *)TLS_VERSIONS};
    }
    if (m->ask_certificates) {
        tls[n++] = (struct MHD_OptionItem){MHD_OPTION_HTTPS_MEM_TRUST, 0, m->pem.ca};
    }
    tls[n]  = (struct MHD_OptionItem){MHD_OPTION_END, 0, NULL};
    m->http = MHD_start_daemon(
        flags, 0, NULL, NULL, on_request, m, MHD_OPTION_LISTEN_SOCKET, fd,
        MHD_OPTION_CONNECTION_LIMIT, CONNECTIONS_MAX, MHD_OPTION_CONNECTION_TIMEOUT, IDLE_S,
        MHD_OPTION_SIGPIPE_HANDLED_BY_APP, 1, MHD_OPTION_ARRAY, tls, MHD_OPTION_END);
    if (m->http == NULL) {
        close(fd);
        return attn_fail(ATTN_ERR_UNAVAILABLE, "the metrics' port cannot be served%s",
                         m->tls != NULL ? ": its certificate or the system's limits" : "");
    }
    return ATTN_OK;
}

attn_status_t
monitor_start(const monitor_options_t *options, const monitor_source_t *source,
              monitor_t **monitor_p)
{
    monitor_t *m = calloc(1, sizeof(*m));
    int fd       = -1;

    if (m == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for the metrics' port");
    }
    m->source            = *source;
    m->tls               = options->tls;
    m->ask_certificates  = options->tls != NULL && !options->clients_need_not;
    attn_status_t status = listen_on(options->listen, &fd);
    unsigned port        = status == ATTN_OK ? port_of(fd) : 0;
    if (status == ATTN_OK) {
        status = serve(m, fd);
    }
    if (status != ATTN_OK) {
        monitor_stop(m);
        return status;
    }
    int host = (int)(strrchr(options->listen, ':') - options->listen);
    attn_log(ATTN_LOG_INFO, "monitor.serving", "url=%s://%.*s:%u/",
             m->tls != NULL ? "https" : "http", host, options->listen, port);
    *monitor_p = m;
    return ATTN_OK;
}

void
monitor_tick(monitor_t *m)
{
    if (m == NULL || m->tls == NULL || m->http == NULL ||
        rpc_tls_version(m->tls) == m->pem.version) {
        return;
    }
    /* The library reads certificates at its start only, so it is started again on its socket. */
    int fd = MHD_quiesce_daemon(m->http);
    MHD_stop_daemon(m->http);
    m->http = NULL;
    if (fd < 0 || serve(m, fd) != ATTN_OK) {
        attn_log(ATTN_LOG_ERROR, "monitor.ended", "reason=\"%s\"",
                 fd < 0 ? "its socket is gone" : attn_last_error());
    }
}

void
monitor_stop(monitor_t *m)
{
    if (m == NULL) {
        return;
    }
    if (m->http != NULL) {
        MHD_stop_daemon(m->http);
    }
    rpc_tls_pem_free(&m->pem);
    free(m);
}
