/* options.c: the command line. The config file is options_file.c, --help options_print.c. */
#include "daemon/options.h"

#include "base/checked.h"
#include "base/status.h"
#include "daemon/options_int.h"

#include <assert.h>
#include <string.h>

#define NAME_MAX_BYTES 64
#define ROWS_MAX 64

void
options_init(const option_set_t *set, void *values)
{
    for (size_t i = 0; i < set->n; i++) {
        attn_status_t status = option_set_value(&set->table[i], values, set->table[i].initial);
        assert(status == ATTN_OK); /* a default keeps its own bounds */
    }
}

/* ---- what was meant ---- */

/* Insertions, deletions and replacements that turn a into b, both cut at NAME_MAX_BYTES. */
static size_t
edit_distance(const char *a, const char *b)
{
    size_t row[NAME_MAX_BYTES + 1];
    size_t n_a = strnlen(a, NAME_MAX_BYTES), n_b = strnlen(b, NAME_MAX_BYTES);

    for (size_t j = 0; j <= n_b; j++) {
        row[j] = j;
    }
    for (size_t i = 1; i <= n_a; i++) {
        size_t diagonal = row[0];
        row[0]          = i;
        for (size_t j = 1; j <= n_b; j++) {
            size_t replace = diagonal + (a[i - 1] != b[j - 1]);
            diagonal       = row[j];
            row[j]         = attn_min(replace, 1 + attn_min(row[j], row[j - 1]));
        }
    }
    return row[n_b];
}

const char *
options_nearest(const char *written, const char *const *candidates, size_t n)
{
    const char *nearest = NULL;
    size_t best         = SIZE_MAX;

    for (size_t i = 0; i < n; i++) {
        size_t distance = edit_distance(written, candidates[i]);
        if (distance < best) {
            best    = distance;
            nearest = candidates[i];
        }
    }
    return nearest;
}

const option_t *
option_find(const option_set_t *set, const char *name, const char *prefix)
{
    const char *names[ROWS_MAX + 3];
    size_t n = 0;

    assert(set->n <= ROWS_MAX);
    for (size_t i = 0; i < set->n; i++) {
        if (strcmp(set->table[i].name, name) == 0) {
            return &set->table[i];
        }
        names[n++] = set->table[i].name;
    }
    if (prefix[0] == '-') { /* those that only a command line has */
        names[n++] = "config";
        names[n++] = "help";
        names[n++] = "print-config";
    }
    attn_fail(ATTN_ERR_INVALID, "'%s%.*s' is no option of %s; the nearest is %s%s", prefix,
              NAME_MAX_BYTES, name, set->program, prefix, options_nearest(name, names, n));
    return NULL;
}

/* ---- the command line ---- */

/* One argument taken apart, with its value where it has one. */
typedef struct flag {
    char name[NAME_MAX_BYTES + 1];
    const char *value; /* NULL: none was written */
    int used;          /* arguments taken */
} flag_t;

/* Does the option stand alone, so that the next argument is not its value? */
static bool
stands_alone(const option_set_t *set, const char *name)
{
    if (strcmp(name, "help") == 0 || strcmp(name, "print-config") == 0) {
        return true;
    }
    for (size_t i = 0; i < set->n; i++) {
        if (strcmp(set->table[i].name, name) == 0) {
            return set->table[i].kind == OPTION_SWITCH;
        }
    }
    return false;
}

static attn_status_t
flag_read(const option_set_t *set, int argc, char **argv, flag_t *flag)
{
    const char *at = argv[0];

    if (strcmp(at, "-h") == 0) {
        at = "--help";
    }
    if (strncmp(at, "--", 2) != 0 || at[2] == '\0') {
        return attn_fail(ATTN_ERR_INVALID,
                         "'%.64s' is not an option; %s takes --name value or --name=value", at,
                         set->program);
    }
    at += 2;
    const char *equals = strchr(at, '=');
    size_t n           = equals != NULL ? (size_t)(equals - at) : strlen(at);
    snprintf(flag->name, sizeof(flag->name), "%.*s", (int)attn_min(n, NAME_MAX_BYTES), at);
    flag->value = equals != NULL ? equals + 1 : NULL;
    flag->used  = 1;
    if (flag->value == NULL && !stands_alone(set, flag->name) && argc > 1) {
        flag->value = argv[1];
        flag->used  = 2;
    }
    return ATTN_OK;
}

static attn_status_t
flag_apply(const option_set_t *set, void *values, const flag_t *flag)
{
    const option_t *row = option_find(set, flag->name, "--");
    char kind[OPTIONS_VALUE_MAX];

    if (row == NULL) {
        return ATTN_ERR_INVALID;
    }
    if (flag->value == NULL && row->kind != OPTION_SWITCH) {
        option_describe_kind(row, kind);
        return attn_fail(ATTN_ERR_INVALID, "--%s wants a value: %s", row->name, kind);
    }
    attn_status_t status = option_set_value(row, values, flag->value != NULL ? flag->value : "yes");
    return status == ATTN_OK ? status : attn_fail_in(status, "--%s: ", row->name);
}

/* Walk the arguments. The first walk (values NULL) looks for the wish and the file only, for
 * the file has to be read before the flags that win over it. */
static attn_status_t
walk(const option_set_t *set, void *values, int argc, char **argv, options_wish_t *wish,
     const char **file)
{
    flag_t flag;

    for (int i = 0; i < argc; i += flag.used) {
        attn_status_t status = flag_read(set, argc - i, argv + i, &flag);
        if (status != ATTN_OK) {
            return status;
        }
        bool help = strcmp(flag.name, "help") == 0;
        if (help || strcmp(flag.name, "print-config") == 0) {
            if (flag.value != NULL) {
                return attn_fail(ATTN_ERR_INVALID, "--%s takes no value", flag.name);
            }
            *wish = help ? OPTIONS_HELP : *wish == OPTIONS_HELP ? *wish : OPTIONS_PRINT_CONFIG;
        } else if (strcmp(flag.name, "config") == 0) {
            if (flag.value == NULL || flag.value[0] == '\0') {
                return attn_fail(ATTN_ERR_INVALID, "--config wants a file");
            }
            *file = flag.value;
        } else if (values != NULL) {
            status = flag_apply(set, values, &flag);
            if (status != ATTN_OK) {
                return status;
            }
        }
    }
    return ATTN_OK;
}

attn_status_t
options_parse(const option_set_t *set, void *values, int argc, char **argv, options_wish_t *wish_p)
{
    options_wish_t wish = OPTIONS_RUN;
    const char *file    = NULL;

    options_init(set, values);
    attn_status_t status = walk(set, NULL, argc, argv, &wish, &file);
    if (status == ATTN_OK && wish != OPTIONS_HELP && file != NULL) {
        status = options_read_file(set, values, file);
    }
    if (status == ATTN_OK && wish != OPTIONS_HELP) {
        status = walk(set, values, argc, argv, &wish, &file);
    }
    if (status == ATTN_OK && wish != OPTIONS_HELP && set->check != NULL) {
        status = set->check(values);
    }
    if (status == ATTN_OK) {
        *wish_p = wish;
    }
    return status;
}

int
options_start(const option_set_t *set, void *values, int argc, char **argv)
{
    options_wish_t wish;

    if (options_parse(set, values, argc, argv, &wish) != ATTN_OK) {
        fprintf(stderr, "%s: %s (see %s --help)\n", set->program, attn_last_error(), set->program);
        return 2;
    }
    if (wish == OPTIONS_HELP) {
        options_print_help(set, stdout);
        return fflush(stdout) == 0 ? 0 : 1;
    }
    if (wish == OPTIONS_PRINT_CONFIG) {
        options_print_config(set, values, stdout);
        return fflush(stdout) == 0 ? 0 : 1;
    }
    return -1;
}
