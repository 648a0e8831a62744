#include "daemon/certs.h"

#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"
#include "daemon/process.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#define JOIN_SECRET_LEAST 16u
#define LOOK_NS (UINT64_C(1000) * ATTN_NS_PER_MS)

attn_status_t
certs_open(certs_t *certs, const tls_options_t *options)
{
    if (options->cert[0] == '\0') {
        return ATTN_OK;
    }
    return rpc_tls_open(&(rpc_tls_options_t){.ca               = options->ca,
                                             .cert             = options->cert,
                                             .key              = options->key,
                                             .clients_need_not = !options->client_certs},
                        &certs->tls);
}

void
certs_tick(certs_t *certs)
{
    bool asked   = process_reload();
    uint64_t now = attn_now_ns();

    if (certs->tls == NULL) {
        if (asked) {
            attn_log(ATTN_LOG_INFO, "tls.none", "reason=\"SIGHUP reads certificates again\"");
        }
    } else if (asked || now >= certs->looked_ns + LOOK_NS) {
        certs->looked_ns = now;
        rpc_tls_refresh(certs->tls, asked);
    }
}

attn_status_t
join_secret_read(const char *path, char secret[JOIN_SECRET_MAX])
{
    char line[JOIN_SECRET_MAX + 1] = "";

    secret[0] = '\0';
    if (path[0] == '\0') {
        return ATTN_OK;
    }
    FILE *file = fopen(path, "re");
    if (file == NULL || (fgets(line, sizeof(line), file) == NULL && ferror(file))) {
        attn_status_t status = attn_fail(ATTN_ERR_INVALID, "%s: %s", path, strerror(errno));
        if (file != NULL) {
            fclose(file);
        }
        return status;
    }
    fclose(file);
    size_t n = strcspn(line, "\n");
    for (size_t i = 0; i < n; i++) {
        n = line[i] > ' ' && line[i] < 127 ? n : 0;
    }
    if (n < JOIN_SECRET_LEAST || n >= JOIN_SECRET_MAX) {
        return attn_fail(ATTN_ERR_INVALID,
                         "%s: its first line is to be %u to %u printable ASCII characters without "
                         "blanks",
                         path, JOIN_SECRET_LEAST, JOIN_SECRET_MAX - 1);
    }
    memcpy(secret, line, n);
    secret[n] = '\0';
    return ATTN_OK;
}

void
certs_close(certs_t *certs)
{
    rpc_tls_close(certs->tls);
    certs->tls = NULL;
}
