/* attnctl.h: what the files of attnctl share. It stands on the public header alone. */
#ifndef ATTN_CLIENT_ATTNCTL_H
#define ATTN_CLIENT_ATTNCTL_H

#include <attn.h>
#include <cjson/cJSON.h>
#include <signal.h>

#define ATTNCTL_OK 0
#define ATTNCTL_PROBLEM                                                                            \
    1 /* the cluster does not answer, or something of what was asked is lost                       \
       */
#define ATTNCTL_USAGE 2

typedef struct attnctl {
    attn_client_t *client;
    const char *target;
    const attn_client_options_t *options; /* that client was, or would be, opened with */
    bool json, watch, once, undo;
    uint32_t interval_ms; /* 0: rates are means since start */
    const char *cache;
    uint64_t seq;
    uint32_t worker, from, to; /* 0: not said */
} attnctl_t;

/** Set by SIGINT and SIGTERM: end what goes on. */
extern volatile sig_atomic_t attnctl_stop;

int attnctl_status(const attnctl_t *ctl);
int attnctl_seq(const attnctl_t *ctl);
int attnctl_top(const attnctl_t *ctl);
int attnctl_move(const attnctl_t *ctl);
int attnctl_drain(const attnctl_t *ctl);

/** Opens a client of its own: ctl->client is NULL. */
int attnctl_doctor(const attnctl_t *ctl);

/** Say on stderr what the last call of the library had to say. @return ATTNCTL_PROBLEM */
int attnctl_failed(const attnctl_t *ctl, attn_status_t status);

/** Add an integer without passing through double, which keeps 53 bits only. */
void attnctl_json_u64(cJSON *object, const char *name, uint64_t value);

/** Print on one line, and free. */
void attnctl_json_print(cJSON *object);

/** "1.5 GiB": at most 15 bytes. */
const char *attnctl_bytes(uint64_t bytes, char text[16]);

#endif
