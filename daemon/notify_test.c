#include "daemon/process.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

/* A datagram socket bound to what NOTIFY_SOCKET would name. */
static int
listen_at(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    size_t n                   = strlen(path);
    int fd                     = socket(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK, 0);

    assert_true(fd >= 0);
    assert_in_range(n, 1, sizeof(address.sun_path) - 1);
    memcpy(address.sun_path, path, n);
    if (path[0] == '@') {
        address.sun_path[0] = '\0';
    }
    assert_int_equal(bind(fd, (struct sockaddr *)&address,
                          (socklen_t)(offsetof(struct sockaddr_un, sun_path) + n)),
                     0);
    assert_int_equal(setenv("NOTIFY_SOCKET", path, 1), 0);
    return fd;
}

static void
assert_heard(int fd, const char *expected)
{
    char heard[1024];
    ssize_t n = recv(fd, heard, sizeof(heard) - 1, 0);

    assert_true(n >= 0);
    heard[n] = '\0';
    assert_string_equal(heard, expected);
}

static void
assert_silent(int fd)
{
    char heard[1024];

    assert_int_equal(recv(fd, heard, sizeof(heard), 0), -1);
    assert_int_equal(errno, EAGAIN);
}

static void
test_a_path(void **state)
{
    char path[80];
    (void)state;
    snprintf(path, sizeof(path), "/tmp/attnd_notify_%d", (int)getpid());
    int fd = listen_at(path);
    process_notify("READY=1\nSTATUS=serving on %s", "h:1");
    process_notify("STOPPING=1");
    assert_heard(fd, "READY=1\nSTATUS=serving on h:1");
    assert_heard(fd, "STOPPING=1");
    assert_silent(fd);
    unlink(path);
    process_notify("READY=1"); /* to nobody: no harm */
    close(fd);
}

static void
test_an_abstract_name(void **state)
{
    char path[80];
    (void)state;
    snprintf(path, sizeof(path), "@attnd_notify_%d", (int)getpid());
    int fd = listen_at(path);
    process_notify("READY=1");
    assert_heard(fd, "READY=1");
    close(fd);
}

static void
test_nothing_where_there_is_no_socket(void **state)
{
    char path[80], text[600];
    (void)state;
    snprintf(path, sizeof(path), "@attnd_notify_%d", (int)getpid());
    int fd = listen_at(path);
    memset(text, 'x', sizeof(text) - 1);
    text[sizeof(text) - 1] = '\0';
    process_notify("STATUS=%s", text); /* too long: not sent in part */
    setenv("NOTIFY_SOCKET", text, 1);
    process_notify("READY=1");
    setenv("NOTIFY_SOCKET", "vsock:2:1", 1);
    process_notify("READY=1");
    setenv("NOTIFY_SOCKET", "", 1);
    process_notify("READY=1");
    unsetenv("NOTIFY_SOCKET");
    process_notify("READY=1");
    assert_silent(fd);
    close(fd);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_path),
        cmocka_unit_test(test_an_abstract_name),
        cmocka_unit_test(test_nothing_where_there_is_no_socket),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
