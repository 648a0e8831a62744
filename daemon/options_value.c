/* options_value.c: between the text of a value and the field it fills. */
#include "base/checked.h"
#include "base/status.h"
#include "daemon/options_int.h"

#include <arpa/inet.h>
#include <assert.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* A suffix and how many of the kind's unit it stands for. */
typedef struct unit {
    const char *suffix;
    uint64_t factor;
} unit_t;

static const unit_t no_units[]   = {{NULL, 0}};
static const unit_t byte_units[] = {{"TiB", UINT64_C(1) << 40},
                                    {"GiB", UINT64_C(1) << 30},
                                    {"MiB", UINT64_C(1) << 20},
                                    {"KiB", UINT64_C(1) << 10},
                                    {"B", 1},
                                    {NULL, 0}};
static const unit_t ms_units[]   = {{"s", 1000}, {"ms", 1}, {NULL, 0}};
static const unit_t us_units[]   = {{"s", 1000000}, {"ms", 1000}, {"us", 1}, {NULL, 0}};

static const unit_t *
units_of(option_kind_t kind)
{
    switch (kind) {
    case OPTION_BYTES:
        return byte_units;
    case OPTION_MS:
        return ms_units;
    case OPTION_US:
        return us_units;
    default:
        return no_units;
    }
}

static bool
is_number(option_kind_t kind)
{
    return kind == OPTION_COUNT || kind == OPTION_BYTES || kind == OPTION_MS || kind == OPTION_US;
}

/* Digits, then a suffix of the kind or none. False: not of this form, or beyond 64 bits. */
static bool
number_from_text(option_kind_t kind, const char *text, uint64_t *number)
{
    const char *at = text;

    *number = 0;
    for (; *at >= '0' && *at <= '9'; at++) {
        if (!attn_mul(*number, 10, number) || !attn_add(*number, (uint64_t)(*at - '0'), number)) {
            return false;
        }
    }
    if (at == text) {
        return false;
    }
    if (*at == '\0') {
        return true;
    }
    for (const unit_t *unit = units_of(kind); unit->suffix != NULL; unit++) {
        if (strcmp(at, unit->suffix) == 0) {
            return attn_mul(*number, unit->factor, number);
        }
    }
    return false;
}

/* Bytes get the largest suffix that divides them; times stay in the unit of the option's name. */
static void
number_to_text(option_kind_t kind, uint64_t number, char *text, size_t room)
{
    for (const unit_t *unit = kind == OPTION_BYTES ? byte_units : no_units; unit->suffix != NULL;
         unit++) {
        if (unit->factor > 1 && number > 0 && number % unit->factor == 0) {
            snprintf(text, room, "%" PRIu64 "%s", number / unit->factor, unit->suffix);
            return;
        }
    }
    snprintf(text, room, "%" PRIu64, number);
}

static const char *
unit_name(option_kind_t kind)
{
    return kind == OPTION_MS ? "ms" : kind == OPTION_US ? "us" : "";
}

void
option_describe_kind(const option_t *row, char text[OPTIONS_VALUE_MAX])
{
    char least[32], most[32];
    int n = 0;

    switch (row->kind) {
    case OPTION_TEXT:
        snprintf(text, OPTIONS_VALUE_MAX, "text, at most %u bytes", OPTIONS_TEXT_MAX - 1);
        return;
    case OPTION_ADDRESS:
        snprintf(text, OPTIONS_VALUE_MAX, "HOST:PORT with a port from 0 to 65535");
        return;
    case OPTION_SWITCH:
        snprintf(text, OPTIONS_VALUE_MAX, "yes or no");
        return;
    case OPTION_CHOICE:
        for (const char *const *choice = row->choices; *choice != NULL; choice++) {
            n += snprintf(text + n, OPTIONS_VALUE_MAX - (size_t)n, "%s%s", n > 0 ? " | " : "",
                          *choice);
            assert(n < OPTIONS_VALUE_MAX);
        }
        return;
    default:
        number_to_text(row->kind, row->least, least, sizeof(least));
        number_to_text(row->kind, row->most, most, sizeof(most));
        snprintf(text, OPTIONS_VALUE_MAX, "%s from %s%s to %s%s",
                 row->kind == OPTION_BYTES ? "bytes (KiB, MiB, GiB, TiB)"
                 : row->kind == OPTION_MS  ? "time (ms, s)"
                 : row->kind == OPTION_US  ? "time (us, ms, s)"
                                           : "integer",
                 least, unit_name(row->kind), most, unit_name(row->kind));
    }
}

static attn_status_t
refuse(const option_t *row, const char *text)
{
    char kind[OPTIONS_VALUE_MAX];

    option_describe_kind(row, kind);
    return attn_fail(ATTN_ERR_INVALID, "'%.64s' is not right for %s: %s", text, row->name, kind);
}

/* HOST:PORT, where HOST is a name, an IPv4 address, or an IPv6 address in brackets. */
static bool
address_is_right(const char *text)
{
    const char *colon = strrchr(text, ':');
    uint64_t port;

    if (colon == NULL || colon == text || !number_from_text(OPTION_COUNT, colon + 1, &port) ||
        port > 65535) {
        return false;
    }
    if (text[0] == '[') {
        return colon[-1] == ']' && colon - text > 2;
    }
    return memchr(text, ':', (size_t)(colon - text)) == NULL &&
           memchr(text, ' ', (size_t)(colon - text)) == NULL;
}

static attn_status_t
set_text(const option_t *row, char *field, const char *text)
{
    size_t size = strlen(text) + 1;

    if (size > row->room) {
        return refuse(row, text);
    }
    bool unset = text[0] == '\0' && row->initial[0] == '\0';
    if (row->kind == OPTION_ADDRESS && !unset && !address_is_right(text)) {
        return refuse(row, text);
    }
    memcpy(field, text, size);
    return ATTN_OK;
}

static attn_status_t
set_switch(const option_t *row, bool *field, const char *text)
{
    static const char *const yes[] = {"yes", "true", "on", "1"};
    static const char *const no[]  = {"no", "false", "off", "0"};

    for (size_t i = 0; i < sizeof(yes) / sizeof(yes[0]); i++) {
        if (strcmp(text, yes[i]) == 0 || strcmp(text, no[i]) == 0) {
            *field = strcmp(text, yes[i]) == 0;
            return ATTN_OK;
        }
    }
    return refuse(row, text);
}

static attn_status_t
set_choice(const option_t *row, uint32_t *field, const char *text)
{
    for (uint32_t i = 0; row->choices[i] != NULL; i++) {
        if (strcmp(text, row->choices[i]) == 0) {
            *field = i;
            return ATTN_OK;
        }
    }
    return refuse(row, text);
}

attn_status_t
option_set_value(const option_t *row, void *values, const char *text)
{
    void *field = (char *)values + row->offset;
    uint64_t number;

    if (is_number(row->kind)) {
        assert(row->room == sizeof(uint64_t));
        if (!number_from_text(row->kind, text, &number) || number < row->least ||
            number > row->most) {
            return refuse(row, text);
        }
        memcpy(field, &number, sizeof(number));
        return ATTN_OK;
    }
    if (row->kind == OPTION_SWITCH) {
        assert(row->room == sizeof(bool));
        return set_switch(row, field, text);
    }
    if (row->kind == OPTION_CHOICE) {
        assert(row->room == sizeof(uint32_t));
        return set_choice(row, field, text);
    }
    assert(row->room == OPTIONS_TEXT_MAX);
    return set_text(row, field, text);
}

void
option_get_value(const option_t *row, const void *values, char text[OPTIONS_VALUE_MAX])
{
    const void *field = (const char *)values + row->offset;
    uint64_t number;
    uint32_t choice;

    if (is_number(row->kind)) {
        memcpy(&number, field, sizeof(number));
        number_to_text(row->kind, number, text, OPTIONS_VALUE_MAX);
    } else if (row->kind == OPTION_SWITCH) {
        snprintf(text, OPTIONS_VALUE_MAX, "%s", *(const bool *)field ? "yes" : "no");
    } else if (row->kind == OPTION_CHOICE) {
        memcpy(&choice, field, sizeof(choice));
        snprintf(text, OPTIONS_VALUE_MAX, "%s", row->choices[choice]);
    } else {
        snprintf(text, OPTIONS_VALUE_MAX, "%s", (const char *)field);
    }
}

bool
options_address_is_loopback(const char *address)
{
    char host[OPTIONS_TEXT_MAX];
    const char *colon = strrchr(address, ':');
    struct in_addr ipv4;

    size_t n = colon != NULL ? (size_t)(colon - address) : strlen(address);
    if (n >= sizeof(host)) {
        return false;
    }
    memcpy(host, address, n);
    host[n] = '\0';
    if (strcmp(host, "localhost") == 0 || strcmp(host, "[::1]") == 0) {
        return true;
    }
    return inet_pton(AF_INET, host, &ipv4) == 1 && (ntohl(ipv4.s_addr) >> 24) == 127;
}
