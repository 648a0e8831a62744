#include "client/target.h"

#include "base/checked.h"
#include "base/status.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define WORKERS_MAX 64u
#define THREADS_MAX 1024u

/* "64", "512MiB", "1GiB" */
static bool
number_parse(const char *text, uint64_t *value)
{
    static const struct {
        const char *name;
        uint64_t factor;
    } units[] = {{"", 1}, {"KiB", 1u << 10}, {"MiB", 1u << 20}, {"GiB", 1u << 30}};
    char *end;

    if (!isdigit((unsigned char)text[0]) || strlen(text) > 18) {
        return false;
    }
    uint64_t number = strtoull(text, &end, 10);
    for (size_t i = 0; i < sizeof(units) / sizeof(units[0]); i++) {
        if (strcmp(end, units[i].name) == 0) {
            return attn_mul(number, units[i].factor, value);
        }
    }
    return false;
}

static attn_status_t
option_take(target_t *target, const char *name, const char *text)
{
    uint64_t value;

    if (!number_parse(text, &value)) {
        return attn_fail(ATTN_ERR_INVALID,
                         "target option %s=%s: a number, or one with KiB, MiB, GiB", name, text);
    }
    if (strcmp(name, "workers") == 0 && value >= 1 && value <= WORKERS_MAX) {
        target->workers = (uint32_t)value;
    } else if (strcmp(name, "threads") == 0 && value <= THREADS_MAX) {
        target->threads = (uint32_t)value;
    } else if (strcmp(name, "slab") == 0 && (value == 0 || value >= 1u << 16)) {
        target->slab_bytes = value;
    } else {
        return attn_fail(
            ATTN_ERR_INVALID,
            "target option %s=%s: there are workers (1 to %u), threads (0 to %u) and slab "
            "(0, or from 64KiB)",
            name, text, WORKERS_MAX, THREADS_MAX);
    }
    return ATTN_OK;
}

static attn_status_t
inproc_parse(const char *text, target_t *target)
{
    char options[256];
    char *next = options;

    size_t name = strcspn(text, "?");
    if (name == 0 || name >= sizeof(target->device) || strlen(text) >= sizeof(options)) {
        return attn_fail(
            ATTN_ERR_INVALID,
            "target inproc://%s: inproc://cpu or inproc://cuda:N, with options after a '?'", text);
    }
    memcpy(target->device, text, name);
    target->device[name] = 0;
    snprintf(options, sizeof(options), "%s", text[name] == '?' ? text + name + 1 : "");
    while (next != NULL && *next != 0) {
        char *option = strsep(&next, "&");
        char *value  = strchr(option, '=');
        if (value == NULL) {
            return attn_fail(ATTN_ERR_INVALID, "target option \"%s\" has no value", option);
        }
        *value++             = 0;
        attn_status_t status = option_take(target, option, value);
        if (status != ATTN_OK) {
            return status;
        }
    }
    return ATTN_OK;
}

attn_status_t
target_parse(const char *text, target_t *target)
{
    static const char scheme[] = "inproc://";

    if (text == NULL) {
        return attn_fail(ATTN_ERR_INVALID,
                         "target is NULL: \"HOST:PORT\", \"inproc://cpu\" or \"inproc://cuda:N\"");
    }
    *target = (target_t){.workers = 1, .slab_bytes = UINT64_C(1) << 30};
    if (strncmp(text, scheme, strlen(scheme)) == 0) {
        target->inproc = true;
        return inproc_parse(text + strlen(scheme), target);
    }
    const char *port = strrchr(text, ':');
    uint64_t value   = 0;
    bool unix_socket = strncmp(text, "unix:", 5) == 0;
    if (strlen(text) > 127 || port == text || port == NULL ||
        (unix_socket ? text[5] == 0
                     : strspn(port + 1, "0123456789") != strlen(port + 1) ||
                           !number_parse(port + 1, &value) || value < 1 || value > 65535)) {
        return attn_fail(
            ATTN_ERR_INVALID,
            "target \"%.127s\": \"HOST:PORT\", \"inproc://cpu\" or \"inproc://cuda:N\"", text);
    }
    return ATTN_OK;
}
