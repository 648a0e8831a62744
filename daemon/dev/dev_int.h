/* dev_int.h: what the files of this folder share. */
#ifndef ATTN_DAEMON_DEV_INT_H
#define ATTN_DAEMON_DEV_INT_H

#include "daemon/options_tables.h"
#include "daemon/process.h"

#include <sys/types.h>

#define CHILD_LINE_MAX (PROCESS_ADDRESS_MAX + 2)

/** A daemon that we started. */
typedef struct child {
    char name[16]; /* "coordinator", "worker-2" */
    pid_t pid;     /* 0: not running */
    int ready_fd;  /* it writes a line there when it is ready; -1 after that */
    char line[CHILD_LINE_MAX];
    uint32_t line_size;
    bool ready;
} child_t;

/**
 * Start this program again with these arguments (NULL at the end; argv[0] is set here). The
 * child ends when we do, is not reached by the terminal's signals, and tells by its ready_fd.
 */
attn_status_t child_start(child_t *child, const char *name, char *const *argv);

/** Something can be read from ready_fd. */
void child_read(child_t *child);

#endif
