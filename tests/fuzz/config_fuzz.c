/*
 * Config files, and the values of options, addresses and inproc targets among them. Byte 0 picks
 * the command. A file that was taken prints as one that is taken again, with the same values.
 */
#include "base/status.h"
#include "client/target.h"
#include "daemon/options_tables.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef union values {
    worker_options_t worker;
    coordinator_options_t coordinator;
    dev_options_t dev;
} values_t;

/* A file of these bytes; its path into `path`. */
static int
file_of(const void *bytes, size_t n, char path[64])
{
    int fd = memfd_create("config", 0);

    if (fd < 0 || write(fd, bytes, n) != (ssize_t)n) {
        abort();
    }
    snprintf(path, 64, "/proc/self/fd/%d", fd);
    return fd;
}

static void
read_again(const option_set_t *set, const values_t *values)
{
    values_t again;
    char *text = NULL, *text_again = NULL, path[64];
    size_t n, n_again;

    FILE *out = open_memstream(&text, &n);
    options_print_config(set, values, out);
    fclose(out);
    int fd = file_of(text, n, path);
    memset(&again, 0, sizeof(again));
    options_init(set, &again);
    if (options_read_file(set, &again, path) != ATTN_OK) {
        fprintf(stderr, "config_fuzz: %s\n%s", attn_last_error(), text);
        abort();
    }
    out = open_memstream(&text_again, &n_again);
    options_print_config(set, &again, out);
    fclose(out);
    bool whole = strstr(text, "cannot be written here") == NULL;
    if (whole && (n != n_again || memcmp(text, text_again, n) != 0)) {
        fprintf(stderr, "config_fuzz: printed otherwise:\n%s", text_again);
        abort();
    }
    close(fd);
    free(text);
    free(text_again);
}

static void
read_target(const uint8_t *bytes, size_t n)
{
    char *text = malloc(n + 1);
    target_t target;

    if (text == NULL) {
        return;
    }
    memcpy(text, bytes, n);
    text[n] = 0;
    if (target_parse(text, &target) != ATTN_OK && *attn_last_error() == 0) {
        abort();
    }
    options_address_is_loopback(text);
    free(text);
}

int
LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n)
{
    static const option_set_t *const sets[] = {&worker_option_set, &coordinator_option_set,
                                               &dev_option_set};
    values_t values;
    char path[64];

    if (n == 0) {
        return 0;
    }
    unsigned which = bytes[0] % 4;
    bytes++;
    n--;
    if (which == 3) {
        read_target(bytes, n);
        return 0;
    }
    int fd = file_of(bytes, n, path);
    memset(&values, 0, sizeof(values));
    options_init(sets[which], &values);
    if (options_read_file(sets[which], &values, path) == ATTN_OK) {
        read_again(sets[which], &values);
    } else if (*attn_last_error() == 0) {
        abort();
    }
    close(fd);
    return 0;
}
