/*
 * options_file.c: a config file through inih. The library splits lines; this reader hands
 * them over one by one, so that it can count them for the sentences, and refuses what inih
 * would take for something else: control bytes, lines longer than its buffer (it would go on
 * in the middle of one), indentation (it would take it for a continuation of the value before).
 */
#include "base/status.h"
#include "daemon/options_int.h"

#include <errno.h>
#include <ini.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

typedef struct reading {
    const option_set_t *set;
    void *values;
    const char *path;
    FILE *file;
    uint32_t line;
    uint64_t seen; /* one bit a row: set by this file already */
    attn_status_t status;
} reading_t;

/* Fail at the line that was read last; the first failure stays. */
static void
stop_at_line(reading_t *reading)
{
    reading->status = ATTN_ERR_INVALID;
    attn_fail_in(ATTN_ERR_INVALID, "%s:%u: ", reading->path, reading->line);
}

static const char *
what_is_wrong(const char *line, size_t n, size_t room)
{
    if (n + 1 > room) {
        return "the line is too long; at most 196 bytes are read";
    }
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)line[i];
        if ((c < 0x20 && c != '\t' && c != '\n' && c != '\r') || c == 0x7f) {
            return "the line holds a control byte; this is not a config file";
        }
    }
    return NULL;
}

/* inih's reader: the next line into `to`, or NULL at the end and after a failure. */
static char *
read_line(char *to, int room, void *arg)
{
    reading_t *reading = arg;
    char *line         = NULL;
    size_t size        = 0;

    if (reading->status != ATTN_OK) {
        return NULL;
    }
    ssize_t n = getline(&line, &size, reading->file);
    if (n < 0) {
        free(line);
        return NULL;
    }
    reading->line++;
    const char *wrong = what_is_wrong(line, (size_t)n, (size_t)room);
    if (wrong != NULL) {
        attn_fail(ATTN_ERR_INVALID, "%s", wrong);
        stop_at_line(reading);
        free(line);
        return NULL;
    }
    size_t indent = strspn(line, " \t");
    memcpy(to, line + indent, (size_t)n - indent + 1);
    free(line);
    return to;
}

static bool
section_is_known(const option_set_t *set, const char *section)
{
    size_t n = 0;

    for (; set->sections[n] != NULL; n++) {
        if (strcmp(set->sections[n], section) == 0) {
            return true;
        }
    }
    attn_fail(ATTN_ERR_INVALID, "[%s] is no section; the nearest is [%s]", section,
              options_nearest(section, set->sections, n));
    return false;
}

/* inih's handler: 1 goes on. */
static int
take_line(void *arg, const char *section, const char *name, const char *value)
{
    reading_t *reading      = arg;
    const option_set_t *set = reading->set;

    if (reading->status != ATTN_OK) {
        return 1;
    }
    if (section[0] != '\0' && !section_is_known(set, section)) {
        stop_at_line(reading);
        return 1;
    }
    if (section[0] != '\0' && strcmp(section, set->section) != 0) {
        return 1;
    }
    const option_t *row = option_find(set, name, "");
    if (row == NULL) {
        stop_at_line(reading);
        return 1;
    }
    uint64_t bit = UINT64_C(1) << (row - set->table);
    if (reading->seen & bit) {
        attn_fail(ATTN_ERR_INVALID, "%s is set twice in this file", name);
        stop_at_line(reading);
        return 1;
    }
    reading->seen |= bit;
    if (option_set_value(row, reading->values, value) != ATTN_OK) {
        stop_at_line(reading);
    }
    return 1;
}

static attn_status_t
open_file(const char *path, FILE **file_p)
{
    struct stat about;

    FILE *file = fopen(path, "re");
    if (file == NULL) {
        return attn_fail(ATTN_ERR_INVALID, "%s cannot be read: %s", path, strerror(errno));
    }
    if (fstat(fileno(file), &about) != 0 || !S_ISREG(about.st_mode)) {
        fclose(file);
        return attn_fail(ATTN_ERR_INVALID, "%s is not a file", path);
    }
    if (about.st_size > OPTIONS_FILE_MAX) {
        fclose(file);
        return attn_fail(ATTN_ERR_INVALID, "%s has %lld bytes; a config file has at most %d", path,
                         (long long)about.st_size, OPTIONS_FILE_MAX);
    }
    *file_p = file;
    return ATTN_OK;
}

attn_status_t
options_read_file(const option_set_t *set, void *values, const char *path)
{
    reading_t reading    = {.set = set, .values = values, .path = path};
    attn_status_t status = open_file(path, &reading.file);

    if (status != ATTN_OK) {
        return status;
    }
    int wrong_line = ini_parse_stream(read_line, &reading, take_line, &reading);
    if (ferror(reading.file) && reading.status == ATTN_OK) {
        reading.status = attn_fail(ATTN_ERR_INVALID, "%s: reading failed", path);
    }
    fclose(reading.file);
    if (reading.status == ATTN_OK && wrong_line != 0) {
        reading.status =
            attn_fail(ATTN_ERR_INVALID, "%s:%d: the line is neither 'name = value' nor '[section]'",
                      path, wrong_line);
    }
    return reading.status;
}
