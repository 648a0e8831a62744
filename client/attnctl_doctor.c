/*
 * attnctl_doctor.c: `attnctl doctor`: one check after the other, each of which says what it found,
 * and where that is not well, what is wrong and what to do.
 */
#include "client/attnctl_doctor.h"

#include "base/clock.h"
#include "rpc/rpc.h"

#include <openssl/pem.h>
#include <openssl/x509.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define FOUND_MAX 400u
#define HEALTH_MS 2000u
#define EXPIRES_SOON_S (14 * 86400)
#define EPOCH_AHEAD_MS 60000u

typedef enum verdict { FINE, WARN, FAIL } verdict_t;

static const char *const verdicts[] = {"ok", "warn", "fail"};

typedef struct doctor {
    const attnctl_t *ctl;
    attn_client_t *client;
    attn_cluster_info_t info;
    rpc_client_t *rpc; /* to ask workers for their health */
    uint32_t counts[3];
    cJSON *checks; /* NULL: print as it goes */
} doctor_t;

/* One check is done. advice: what to do; NULL when all is well. */
static void found(doctor_t *d, verdict_t verdict, const char *check, const char *advice,
                  const char *format, ...) __attribute__((format(printf, 5, 6)));

static void
found(doctor_t *d, verdict_t verdict, const char *check, const char *advice, const char *format,
      ...)
{
    char text[FOUND_MAX];
    va_list args;

    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    d->counts[verdict]++;
    if (d->checks != NULL) {
        cJSON *object = cJSON_CreateObject();
        cJSON_AddStringToObject(object, "check", check);
        cJSON_AddStringToObject(object, "verdict", verdicts[verdict]);
        cJSON_AddStringToObject(object, "found", text);
        if (advice != NULL) {
            cJSON_AddStringToObject(object, "do", advice);
        }
        cJSON_AddItemToArray(d->checks, object);
        return;
    }
    printf("%-5s %-12s %s\n", verdicts[verdict], check, text);
    if (advice != NULL) {
        printf("%-18s -> %s\n", "", advice);
    }
    fflush(stdout);
}

/* ---- certificates ---- */

/* As libattn: what the flag says, or else the environment. NULL: nothing. */
static const char *
said(const char *option, const char *variable)
{
    const char *value = option != NULL ? option : getenv(variable);

    return value == NULL || value[0] == '\0' ? NULL : value;
}

static void
check_certificate(doctor_t *d, const char *path)
{
    FILE *file = fopen(path, "re");
    X509 *x509 = file != NULL ? PEM_read_X509(file, NULL, NULL, NULL) : NULL;
    int days = 0, seconds = 0;

    if (file != NULL) {
        fclose(file);
    }
    if (x509 == NULL || ASN1_TIME_diff(&days, &seconds, NULL, X509_get0_notAfter(x509)) == 0) {
        found(d, FAIL, "certificate", "name a file with a certificate in PEM", "%s: %s", path,
              x509 == NULL ? "it cannot be read, or holds no certificate" : "no end of validity");
    } else if (days < 0 || seconds < 0) {
        found(d, FAIL, "certificate", "renew it: daemons refuse who shows it",
              "%s expired %d days ago", path, -days);
    } else if ((int64_t)days * 86400 + seconds < EXPIRES_SOON_S) {
        found(d, WARN, "certificate", "renew it soon", "%s expires in %d days", path, days);
    } else {
        found(d, FINE, "certificate", NULL, "%s is valid for %d days more", path, days);
    }
    X509_free(x509);
}

static void
check_certificates(doctor_t *d)
{
    const attn_client_options_t *o = d->ctl->options;
    const char *paths[] = {said(o->tls_ca, "ATTN_TLS_CA"), said(o->tls_cert, "ATTN_TLS_CERT")};

    for (int i = 0; i < 2; i++) {
        if (paths[i] != NULL) {
            check_certificate(d, paths[i]);
        }
    }
}

/* ---- the coordinator ---- */

static const char *
advice_unreachable(const doctor_t *d)
{
    if (strstr(attn_last_error(), "certificate") != NULL ||
        strstr(attn_last_error(), "TLS") != NULL) {
        return "compare --tls-ca, --tls-cert and --tls-key with the coordinator's: both sides' "
               "certificates must be of each other's CA, valid, and name the host asked for";
    }
    return said(d->ctl->options->tls_ca, "ATTN_TLS_CA") != NULL
               ? "is `attnd coordinator` running there, and with certificates? see its log"
               : "is `attnd coordinator` running there? see its log; if it has certificates, say "
                 "--tls-ca, and --tls-cert and --tls-key of your own";
}

static bool
check_coordinator(doctor_t *d)
{
    uint64_t start       = attn_now_ns();
    attn_status_t status = attn_client_open(d->ctl->target, d->ctl->options, &d->client);

    if (status == ATTN_OK) {
        start  = attn_now_ns();
        status = attn_cluster_describe(d->client, &d->info);
    }
    if (status != ATTN_OK) {
        found(d, FAIL, "coordinator",
              status == ATTN_ERR_DEADLINE
                  ? "it is stopped or overloaded: see its log; SIGCONT or restart it"
                  : advice_unreachable(d),
              "%s: %s", d->ctl->target, attn_last_error());
        return false;
    }
    found(d, FINE, "coordinator", NULL, "%s answers in %.1f ms, up %llu s, libattn %s",
          d->ctl->target, (double)(attn_now_ns() - start) / 1e6,
          (unsigned long long)(d->info.uptime_ms / 1000), attn_version());
    return true;
}

/* Epochs begin at the coordinator's time in milliseconds. */
static void
check_epoch(doctor_t *d)
{
    struct timespec now;

    clock_gettime(CLOCK_REALTIME, &now);
    uint64_t ms = (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
    if (d->info.epoch > ms + EPOCH_AHEAD_MS) {
        found(d, WARN, "epoch",
              "set both machines' clocks: a coordinator that restarts with an earlier one is "
              "refused by workers",
              "%llu is %llu s ahead of this machine's clock", (unsigned long long)d->info.epoch,
              (unsigned long long)((d->info.epoch - ms) / 1000));
    } else {
        found(d, FINE, "epoch", NULL, "%llu, in step with this machine's clock",
              (unsigned long long)d->info.epoch);
    }
}

/* ---- workers ---- */

static uint32_t
check_members(doctor_t *d)
{
    uint32_t alive = 0;

    for (uint32_t i = 0; i < d->info.n_workers; i++) {
        const attn_worker_info_t *w = &d->info.workers[i];
        alive += w->alive;
        if (!w->alive) {
            found(d, FAIL, "worker",
                  "start a worker in its place; sequences with chunks there have holes, which a "
                  "step refills (attnctl seq shows them)",
                  "%u at %s is lost: no heartbeat came in time", w->id, w->address);
        }
    }
    if (alive == 0) {
        found(d, FAIL, "workers", "start `attnd worker --coordinator` with this coordinator",
              "none is alive");
    } else {
        found(d, FINE, "workers", NULL, "%u of %u alive and heard of in time", alive,
              d->info.n_workers);
    }
    return alive;
}

static const attn_worker_info_t *
first_alive(const doctor_t *d)
{
    for (uint32_t i = 0; i < d->info.n_workers; i++) {
        if (d->info.workers[i].alive) {
            return &d->info.workers[i];
        }
    }
    return NULL;
}

static void
check_kinds(doctor_t *d)
{
    const attn_worker_info_t *first = first_alive(d);

    for (uint32_t i = 0; i < d->info.n_workers; i++) {
        const attn_worker_info_t *w = &d->info.workers[i];
        if (w->alive && strcmp(w->kind, first->kind) != 0) {
            found(d, FAIL, "kinds",
                  "run workers of one version on one instruction set (ATTN_CPU_ISA sets it): a "
                  "cache lives on one kind of arithmetic alone",
                  "worker %u is %s, and worker %u is %s", first->id, first->kind, w->id, w->kind);
            return;
        }
    }
    found(d, FINE, "kinds", NULL, "all are %s", first->kind);
}

static void
check_memory(doctor_t *d)
{
    bool well = true;

    for (uint32_t i = 0; i < d->info.n_workers; i++) {
        const attn_worker_info_t *w = &d->info.workers[i];
        if (!w->alive) {
            continue;
        }
        double slab = (double)w->slab_bytes, region = (double)w->region_bytes;
        char a[16], b[16];
        if (region > 0 && (double)w->used_bytes > 0.95 * region) {
            found(d, FAIL, "memory",
                  "free sequences, or give caches larger regions, or add workers",
                  "worker %u: the caches' pages are full, %s of %s: steps are refused", w->id,
                  attnctl_bytes(w->used_bytes, a), attnctl_bytes(w->region_bytes, b));
            well = false;
        } else if (region > 0.95 * slab) {
            found(d, WARN, "memory",
                  "close caches, give them smaller region_bytes, or the worker a larger --slab",
                  "worker %u: caches took %s of its %s: no other cache can be opened", w->id,
                  attnctl_bytes(w->region_bytes, a), attnctl_bytes(w->slab_bytes, b));
            well = false;
        }
    }
    if (well) {
        found(d, FINE, "memory", NULL, "every worker has free pages and room for caches");
    }
}

/* ---- health ---- */

static attn_status_t
ask_health(doctor_t *d, const char *address, bool *serving_p)
{
    rpc_channel_t *channel;
    attn_status_t status = rpc_channel_open(d->rpc, address, &channel);

    if (status == ATTN_OK) {
        status = rpc_channel_health(channel, attn_now_ns() + HEALTH_MS * ATTN_NS_PER_MS, serving_p);
        rpc_channel_close(channel);
    }
    return status;
}

/* @return whether all that live answer */
static bool
check_health(doctor_t *d)
{
    bool well = true;

    for (uint32_t i = 0; i < d->info.n_workers; i++) {
        const attn_worker_info_t *w = &d->info.workers[i];
        bool serving                = false;
        if (!w->alive) {
            continue;
        }
        attn_status_t status = ask_health(d, w->address, &serving);
        bool silent          = status == ATTN_ERR_DEADLINE ||
                      (status != ATTN_OK && strstr(attn_last_error(), "timed out") != NULL);
        if (silent) {
            found(d, FAIL, "health", "it hangs or is stopped: SIGCONT or kill and restart it",
                  "worker %u at %s does not answer within %u ms", w->id, w->address, HEALTH_MS);
        } else if (status != ATTN_OK) {
            found(d, FAIL, "health",
                  "if it runs, this machine cannot reach it: see its --advertise, firewalls, and "
                  "certificates",
                  "worker %u at %s: %s", w->id, w->address, attn_last_error());
        } else if (!serving) {
            found(d, WARN, "health", "it was told to end; start another one",
                  "worker %u at %s is draining", w->id, w->address);
        }
        well = well && status == ATTN_OK && serving;
    }
    if (well) {
        found(d, FINE, "health", NULL, "every live worker is reachable from here and serves");
    }
    return well;
}

static attn_status_t
open_rpc(doctor_t *d, rpc_tls_t **tls_p)
{
    const attn_client_options_t *o = d->ctl->options;
    rpc_tls_options_t files        = {.ca   = said(o->tls_ca, "ATTN_TLS_CA"),
                                      .cert = said(o->tls_cert, "ATTN_TLS_CERT"),
                                      .key  = said(o->tls_key, "ATTN_TLS_KEY")};
    attn_status_t status           = rpc_client_create(0, &d->rpc);

    if (status == ATTN_OK && files.ca != NULL &&
        (status = rpc_tls_open(&files, tls_p)) == ATTN_OK) {
        rpc_client_set_tls(d->rpc, *tls_p, said(o->tls_server_name, "ATTN_TLS_SERVER_NAME"));
    }
    return status;
}

/* ---- a step ---- */

static void
check_trip(doctor_t *d, uint32_t alive)
{
    uint64_t start       = attn_now_ns();
    uint32_t reached     = 0;
    attn_status_t status = doctor_trip(d->client, alive, &reached);

    if (status == ATTN_OK) {
        found(d, FINE, "step", NULL, "on %u workers, there and back in %.1f ms, and right", reached,
              (double)(attn_now_ns() - start) / 1e6);
    } else if (status == ATTN_ERR_INTERNAL) {
        found(d, FAIL, "step", "report it, with the kinds of the workers and their versions",
              "a wrong answer, or a defect: %s", attn_last_error());
    } else {
        found(d, FAIL, "step",
              status == ATTN_ERR_EXHAUSTED ? "close caches or free sequences, or add workers"
                                           : "see what failed above, and the workers' logs",
              "%s (%s)", attn_last_error(), attn_strerror(status));
    }
}

/* ---- which way runs go ---- */

static const attn_worker_info_t *
worker_at(const doctor_t *d, const char *address)
{
    for (uint32_t i = 0; i < d->info.n_workers; i++) {
        const attn_worker_info_t *w = &d->info.workers[i];
        if (w->alive && strcmp(w->address, address) == 0) {
            return w;
        }
    }
    return NULL;
}

/* Of the step that was taken. A worker of another host that takes no messages is well; UCX on one
 * side alone is not. */
static void
check_transport(doctor_t *d)
{
    uint32_t shared = 0, sent = 0, elsewhere = 0;
    attn_links_info_t info;

    if (attn_client_links(d->client, &info) != ATTN_OK) {
        return;
    }
    for (uint32_t i = 0; i < info.n_links; i++) {
        const attn_link_info_t *l   = &info.links[i];
        const attn_worker_info_t *w = worker_at(d, l->address);
        if (strcmp(l->transport, "ucx shm") == 0) {
            shared++;
        } else if (strncmp(l->transport, "ucx ", 4) == 0) {
            sent++;
        } else if (l->reason[0] == '\0' || strstr(l->reason, "no ucx-net") != NULL) {
            elsewhere++;
        } else {
            found(d, WARN, "transport",
                  w != NULL && w->ucx
                      ? "UCX is on the worker's side only, or does not get through: install "
                        "libucx0 here, run as its user, and see UCX_TLS and UCX_NET_DEVICES; runs "
                        "go over gRPC"
                      : "the worker lends no shared memory: install libucx0 there, "
                        "and see its ucx-memory; runs go over gRPC",
                  "worker at %s: %s", l->address, l->reason);
        }
    }
    if (shared + sent + elsewhere > 0) {
        found(d, FINE, "transport", NULL,
              "shared memory to %u workers, messages of UCX's to %u, gRPC to %u of other hosts, or "
              "by choice",
              shared, sent, elsewhere);
    }
    attn_links_info_free(&info);
}

/* ---- all of it ---- */

static void
examine(doctor_t *d)
{
    rpc_tls_t *tls = NULL;

    check_certificates(d);
    if (!check_coordinator(d)) {
        return;
    }
    check_epoch(d);
    uint32_t alive = check_members(d);
    if (alive == 0) {
        return;
    }
    check_kinds(d);
    check_memory(d);
    attn_status_t status = open_rpc(d, &tls);
    bool well            = status == ATTN_OK && check_health(d);
    if (status != ATTN_OK) {
        found(d, FAIL, "health", "see the certificates above", "%s", attn_last_error());
    }
    if (well) {
        check_trip(d, alive);
        check_transport(d);
    } else {
        found(d, WARN, "step", "mend what failed above, and ask again",
              "not taken: a worker would not answer");
    }
    rpc_client_destroy(d->rpc);
    rpc_tls_close(tls);
}

int
attnctl_doctor(const attnctl_t *ctl)
{
    doctor_t d = {.ctl = ctl, .checks = ctl->json ? cJSON_CreateArray() : NULL};

    rpc_init();
    examine(&d);
    attn_client_close(d.client);
    attn_cluster_info_free(&d.info);
    rpc_shutdown();
    if (d.checks != NULL) {
        cJSON *object = cJSON_CreateObject();
        cJSON_AddStringToObject(object, "target", ctl->target);
        cJSON_AddStringToObject(object, "verdict",
                                verdicts[d.counts[FAIL] > 0   ? FAIL
                                         : d.counts[WARN] > 0 ? WARN
                                                              : FINE]);
        cJSON_AddItemToObject(object, "checks", d.checks);
        attnctl_json_print(object);
    } else {
        printf("\n%u ok, %u warnings, %u failures\n", d.counts[FINE], d.counts[WARN],
               d.counts[FAIL]);
    }
    return d.counts[FAIL] > 0 ? ATTNCTL_PROBLEM : ATTNCTL_OK;
}
