/*
 * options.h: the options of a command as one table. A row names an option, its kind, default,
 * bounds and help; the same rows read flags and the config file, refuse what is wrong, and
 * print --help and --print-config. So no option exists that is not documented, and no
 * documentation names one that does not exist.
 *
 *     flags        --name value, --name=value; a switch alone is "yes"; the last one wins
 *     config file  name = value, one a line; # or ; open a comment; lines below [command]
 *                  are for that command only, lines above the first section for every one
 *
 * Flags win over the file, the file over the defaults. Used at start, by one thread.
 */
#ifndef ATTN_DAEMON_OPTIONS_H
#define ATTN_DAEMON_OPTIONS_H

#include "base/attn_types.h"

#include <stdio.h>

#define OPTIONS_TEXT_MAX 256u  /* bytes of a text value, its end included */
#define OPTIONS_FILE_MAX 65536 /* bytes of a config file */

/** What a value looks like, and the C type of its field. */
typedef enum option_kind {
    OPTION_TEXT,    /**< char[OPTIONS_TEXT_MAX] */
    OPTION_ADDRESS, /**< char[OPTIONS_TEXT_MAX]: HOST:PORT, or empty if the default is */
    OPTION_COUNT,   /**< uint64_t */
    OPTION_BYTES,   /**< uint64_t: 512, 64KiB, 16MiB, 4GiB, 1TiB */
    OPTION_MS,      /**< uint64_t, milliseconds: 500, 500ms, 2s */
    OPTION_US,      /**< uint64_t, microseconds: 50, 50us, 2ms, 1s */
    OPTION_SWITCH,  /**< bool: yes, no (true, false, on, off, 1, 0) */
    OPTION_CHOICE,  /**< uint32_t: index into choices */
} option_kind_t;

/** One option. Make `offset` and `room` with OPTION_FIELD(). */
typedef struct option {
    const char *name; /**< without the dashes */
    option_kind_t kind;
    size_t offset, room;        /**< of its field in the struct of values */
    const char *initial;        /**< the default, as a user would write it */
    uint64_t least, most;       /**< of numbers, in the unit of the kind */
    const char *const *choices; /**< of OPTION_CHOICE, NULL at the end */
    const char *value_name;     /**< "HOST:PORT", for --help; NULL: after the kind */
    const char *help;           /**< one paragraph */
} option_t;

#define OPTION_FIELD(type, field)                                                                  \
    .offset = offsetof(type, field), .room = sizeof(((type *)0)->field)

/** A command and its table. */
typedef struct option_set {
    const char *program;         /**< "attnd worker": as it is called */
    const char *section;         /**< "worker": its section in a config file */
    const char *summary;         /**< one line, for --help */
    const char *const *sections; /**< all sections that a file may have, NULL at the end */
    const option_t *table;
    size_t n;
    /** Optional: rules over several options. Fails with a sentence. */
    attn_status_t (*check)(const void *values);
} option_set_t;

/** What the command line asked for. */
typedef enum options_wish {
    OPTIONS_RUN,
    OPTIONS_HELP,
    OPTIONS_PRINT_CONFIG,
} options_wish_t;

/** Fill values with the defaults. */
void options_init(const option_set_t *set, void *values);

/**
 * Defaults, then the file that --config names, then the flags; then the set's check.
 *
 * @param argv  the arguments after the command, argc of them
 *
 * @return ATTN_ERR_INVALID with a sentence that names the option (and file:line), what is
 *         wrong with it, and what would be right
 */
attn_status_t options_parse(const option_set_t *set, void *values, int argc, char **argv,
                            options_wish_t *wish_p);

/** Read a config file into values: the lines that concern set. */
attn_status_t options_read_file(const option_set_t *set, void *values, const char *path);

void options_print_help(const option_set_t *set, FILE *out);

/** A config file with every option documented and the values in force. */
void options_print_config(const option_set_t *set, const void *values, FILE *out);

/**
 * All of a command's start: parse, serve --help and --print-config, and put a wrong option's
 * sentence on stderr.
 * @return -1: run with these values; otherwise the code to exit with: 0, or 2 after a mistake
 */
int options_start(const option_set_t *set, void *values, int argc, char **argv);

/** The candidate nearest to what was written, by edit distance; NULL if there are none. */
const char *options_nearest(const char *written, const char *const *candidates, size_t n);

/** Does HOST of HOST:PORT reach this machine only: localhost, 127.0.0.0/8, [::1]? */
bool options_address_is_loopback(const char *address);

#endif
