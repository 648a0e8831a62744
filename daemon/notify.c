/*
 * notify.c: what a service manager is told of us, as sd_notify(3) has it: where NOTIFY_SOCKET names
 * a datagram socket, a path or with @ an abstract one, each datagram holds lines of NAME=value.
 */
#include "daemon/process.h"

#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define LINES_MAX 512

void
process_notify(const char *format, ...)
{
    const char *path           = getenv("NOTIFY_SOCKET");
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    char lines[LINES_MAX];
    va_list args;

    if (path == NULL || (path[0] != '/' && path[0] != '@') ||
        strlen(path) >= sizeof(address.sun_path)) {
        return;
    }
    size_t n = strlen(path);
    memcpy(address.sun_path, path, n);
    if (path[0] == '@') {
        address.sun_path[0] = '\0';
    }
    va_start(args, format);
    int length = vsnprintf(lines, sizeof(lines), format, args);
    va_end(args);
    if (length < 0 || length >= LINES_MAX) {
        return;
    }
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0) {
        return;
    }
    /* Nobody waits for it to be heard, and a manager that is gone is not ours to mend. */
    ssize_t sent = sendto(fd, lines, (size_t)length, MSG_NOSIGNAL | MSG_DONTWAIT,
                          (const struct sockaddr *)&address,
                          (socklen_t)(offsetof(struct sockaddr_un, sun_path) + n));
    (void)sent;
    close(fd);
}
