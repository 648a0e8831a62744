/* child.c: processes of the development cluster. fork() and exec() happen before anything
 * of gRPC exists in this process, and it stays so: the parent only waits. */
#include "daemon/dev/dev_int.h"

#include "base/log.h"
#include "base/status.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

/* In the child: never returns. */
static void
child_exec(pid_t parent, int ready_fd, char *const *argv)
{
    char text[16];
    sigset_t none;

    /* Ours alone: the terminal's Ctrl-C is for the parent, who tells us in its own time. */
    setpgid(0, 0);
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() != parent) {
        _exit(1); /* it died before we asked to be told */
    }
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    snprintf(text, sizeof(text), "%d", ready_fd);
    setenv(PROCESS_READY_FD, text, 1);
    execv("/proc/self/exe", argv);
    attn_log(ATTN_LOG_ERROR, "dev.exec", "reason=\"%s\"", strerror(errno));
    _exit(127);
}

attn_status_t
child_start(child_t *child, const char *name, char *const *argv)
{
    pid_t parent = getpid();
    int ends[2];

    memset(child, 0, sizeof(*child));
    child->ready_fd = -1;
    snprintf(child->name, sizeof(child->name), "%s", name);
    if (pipe2(ends, O_CLOEXEC | O_NONBLOCK) != 0) {
        return attn_fail(ATTN_ERR_EXHAUSTED, "%s: no pipe: %s", name, strerror(errno));
    }
    pid_t pid = fork();
    if (pid == 0) {
        fcntl(ends[1], F_SETFD, 0);
        child_exec(parent, ends[1], argv);
    }
    close(ends[1]);
    if (pid < 0) {
        close(ends[0]);
        return attn_fail(ATTN_ERR_EXHAUSTED, "%s: no process: %s", name, strerror(errno));
    }
    child->pid      = pid;
    child->ready_fd = ends[0];
    return ATTN_OK;
}

void
child_read(child_t *child)
{
    ssize_t n = read(child->ready_fd, child->line + child->line_size,
                     sizeof(child->line) - 1 - child->line_size);

    if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
        return;
    }
    if (n > 0) {
        child->line_size += (uint32_t)n;
        child->line[child->line_size] = '\0';
    }
    char *end = strchr(child->line, '\n');
    if (end != NULL) {
        *end         = '\0';
        child->ready = true;
    }
    if (end != NULL || n <= 0 || child->line_size == sizeof(child->line) - 1) {
        close(child->ready_fd); /* all is said, or it ended: its exit status tells more */
        child->ready_fd = -1;
    }
}
