#include "daemon/options_tables.h"

#include "base/log.h"
#include "base/status.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const option_set_t *const all_sets[] = {&coordinator_option_set, &worker_option_set,
                                               &dev_option_set};
#define N_SETS (sizeof(all_sets) / sizeof(all_sets[0]))

/* Room for the values of any command. */
typedef union any_options {
    worker_options_t worker;
    coordinator_options_t coordinator;
    dev_options_t dev;
} any_options_t;

#define ARGS(...) ((char *[]){__VA_ARGS__}), sizeof((char *[]){__VA_ARGS__}) / sizeof(char *)

static attn_status_t
parse(const option_set_t *set, void *values, char **argv, size_t argc)
{
    options_wish_t wish;
    return options_parse(set, values, (int)argc, argv, &wish);
}

/* The arguments are refused with a sentence that holds every one of the words. */
static void
assert_refused(const option_set_t *set, char **argv, size_t argc, const char *word,
               const char *word2)
{
    any_options_t values;

    assert_int_equal(parse(set, &values, argv, argc), ATTN_ERR_INVALID);
    if (strstr(attn_last_error(), word) == NULL || strstr(attn_last_error(), word2) == NULL) {
        fail_msg("'%s' lacks '%s' or '%s'", attn_last_error(), word, word2);
    }
}

/* A config file with this content; the path is valid until the next call. */
static char *
config_file(const char *content, size_t n)
{
    static char path[] = "/tmp/attnd_options_XXXXXX";

    unlink(path);
    memcpy(path + sizeof(path) - 7, "XXXXXX", 6);
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, content, n), (ssize_t)n);
    close(fd);
    return path;
}

static char *
config_text(const char *content)
{
    return config_file(content, strlen(content));
}

static void
test_defaults_are_those_documented(void **state)
{
    any_options_t values;
    (void)state;
    assert_int_equal(parse(&worker_option_set, &values, NULL, 0), ATTN_OK);
    assert_string_equal(values.worker.listen, "127.0.0.1:0");
    assert_string_equal(values.worker.device, "cpu");
    assert_int_equal(values.worker.slab, 0);
    assert_int_equal(values.worker.reserve, UINT64_C(2) << 30);
    assert_int_equal(values.worker.log_level, ATTN_LOG_INFO);
    assert_false(values.worker.tls.allow_plaintext);
    assert_int_equal(parse(&coordinator_option_set, &values, NULL, 0), ATTN_OK);
    assert_int_equal(values.coordinator.lost_ms, 2000);
    assert_int_equal(parse(&dev_option_set, &values, NULL, 0), ATTN_OK);
    assert_int_equal(values.dev.workers, 4);
    assert_string_equal(values.dev.device, "cpu");
    assert_string_equal(values.dev.ready_file, "");
}

static void
test_both_forms_of_flags(void **state)
{
    any_options_t values;
    (void)state;
    assert_int_equal(
        parse(&worker_option_set, &values,
              ARGS("--slab=64MiB", "--threads", "3", "--allow-plaintext", "--listen", "0.0.0.0:9",
                   "--log-level=debug", "--spin-us", "2ms", "--drain-ms=1s", "--name", "--odd--")),
        ATTN_OK);
    assert_int_equal(values.worker.slab, 64 << 20);
    assert_int_equal(values.worker.threads, 3);
    assert_true(values.worker.tls.allow_plaintext);
    assert_string_equal(values.worker.listen, "0.0.0.0:9");
    assert_int_equal(values.worker.log_level, ATTN_LOG_DEBUG);
    assert_int_equal(values.worker.spin_us, 2000);
    assert_int_equal(values.worker.drain_ms, 1000);
    assert_string_equal(values.worker.name, "--odd--");
    assert_int_equal(parse(&worker_option_set, &values, ARGS("--threads", "3", "--threads=5")),
                     ATTN_OK);
    assert_int_equal(values.worker.threads, 5);
}

static void
test_wrong_names_get_the_nearest(void **state)
{
    (void)state;
    assert_refused(&worker_option_set, ARGS("--thread", "3"), "--thread'", "nearest is --threads");
    assert_refused(&worker_option_set, ARGS("--lisen=1:1"), "--lisen", "nearest is --listen");
    assert_refused(&worker_option_set, ARGS("--confg", "x"), "--confg", "nearest is --config");
    assert_refused(&worker_option_set, ARGS("--"), "'--' is not an option", "attnd worker");
    assert_refused(&worker_option_set, ARGS("worker"), "'worker' is not an option", "--name");
    assert_refused(&dev_option_set, ARGS("--=3"), "'--'", "no option of attnd dev");
}

static void
test_nearest_counts_every_kind_of_edit(void **state)
{
    const char *const names[] = {"abxy", "abcdefg", "q"};
    (void)state;
    assert_string_equal(options_nearest("abcd", names, 3),
                        "abxy"); /* two replaced, not three added */
    assert_string_equal(options_nearest("abcdef", names, 3), "abcdefg");
    assert_string_equal(options_nearest("", names, 3), "q");
    assert_null(options_nearest("abcd", names, 0));
}

static void
test_wrong_values_get_the_bounds(void **state)
{
    static const struct {
        char *flag;
        const char *word, *word2;
    } cases[] = {
        {"--threads=1025", "1025", "from 0 to 1024"},
        {"--threads=-1", "-1", "from 0 to 1024"},
        {"--threads=3x", "3x", "from 0 to 1024"},
        {"--threads=3MiB", "3MiB", "from 0 to 1024"},
        {"--threads=", "--threads: ''", "from 0 to 1024"},
        {"--threads= 3", "' 3'", "from 0 to 1024"},
        {"--slab=1KiB", "--slab", "from 1MiB"},
        {"--slab=18446744073709551616", "--slab", "64TiB"},
        {"--slab=99999999999999999TiB", "--slab", "64TiB"},
        {"--slab=1GB", "1GB", "KiB, MiB, GiB"},
        {"--drain-ms=11m", "11m", "600000ms"},
        {"--listen=localhost", "localhost", "HOST:PORT"},
        {"--listen=127.0.0.1:65536", "65536", "65535"},
        {"--listen=:70", ":70", "HOST:PORT"},
        {"--listen=", "--listen: ''", "HOST:PORT"},
        {"--listen=::1:70", "::1:70", "HOST:PORT"},
        {"--device=gpu", "\"gpu\"", "cpu and cuda:N"},
        {"--device=", "--device", "cpu and cuda:N"},
        {"--device=cuda:", "--device", "a number"},
        {"--device=cuda:x", "cuda:x", "a number"},
        {"--device=cuda:0x1", "cuda:0x1", "a number"},
        {"--device=cuda:65536", "cuda:65536", "up to 65535"},
        {"--log-level=loud", "loud", "debug | info | warn | error"},
        {"--allow-plaintext=maybe", "maybe", "yes or no"},
        {"--help=yes", "--help", "no value"},
        {"--threads", "--threads wants a value", "from 0 to 1024"},
        {"--config", "--config wants a file", "config"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        char *flag = cases[i].flag;
        assert_refused(&worker_option_set, &flag, 1, cases[i].word, cases[i].word2);
    }
}

static void
test_text_has_a_limit(void **state)
{
    char flag[400] = "--name=";
    char *argument = flag;
    any_options_t values;
    (void)state;
    memset(flag + 7, 'x', OPTIONS_TEXT_MAX - 1);
    assert_int_equal(parse(&worker_option_set, &values, &argument, 1), ATTN_OK);
    flag[7 + OPTIONS_TEXT_MAX - 1] = 'x';
    assert_refused(&worker_option_set, &argument, 1, "at most 255 bytes", "name");
}

static void
test_flags_win_over_the_file(void **state)
{
    any_options_t values;
    char *file = config_text("# all\nlog-level = warn\n\n[dev]\nworkers = 9\n"
                             "[worker]\n  threads = 2 ; inline\n\tslab=16MiB\nname =\n");
    (void)state;
    assert_int_equal(parse(&worker_option_set, &values, ARGS("--threads=7", "--config", file)),
                     ATTN_OK);
    assert_int_equal(values.worker.threads, 7);
    assert_int_equal(values.worker.slab, 16 << 20);
    assert_int_equal(values.worker.log_level, ATTN_LOG_WARN);
    assert_int_equal(parse(&dev_option_set, &values, ARGS("--config", file)), ATTN_OK);
    assert_int_equal(values.dev.workers, 9);
    assert_int_equal(values.dev.log_level, ATTN_LOG_WARN);
}

static void
test_wrong_files_name_the_line(void **state)
{
    static const struct {
        const char *content, *word, *word2;
    } cases[] = {
        {"threads = 1\nthreads 2\n", ":2: ", "name = value"},
        {"\n\nthread = 1\n", ":3: ", "nearest is threads"},
        {"[worker]\nthreads = x\n", ":2: ", "from 0 to 1024"},
        {"threads = 1\n\nthreads = 1\n", ":3: ", "twice"},
        {"[worker\nthreads = 1\n", ":1: ", "[section]"},
        {"[wroker]\nthreads = 1\n", ":2: ", "nearest is [worker]"},
        {"workers = 2\n", ":1: ", "no option of attnd worker"},
        {"config = x\n", ":1: ", "no option of attnd worker"},
        {"= 3\n", ":1: ", "no option of attnd worker"},
        {"threads =\n", ":1: ", "from 0 to 1024"},
        {"threads = 1\n\x7f\x45LF\n", ":2: ", "control byte"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        char *file = config_text(cases[i].content);
        assert_refused(&worker_option_set, ARGS("--config", file), cases[i].word, cases[i].word2);
        assert_non_null(strstr(attn_last_error(), file));
    }
}

static void
test_garbage_files_are_refused(void **state)
{
    char bytes[4096];
    (void)state;
    memset(bytes, 'a', sizeof(bytes));
    char *file = config_file(bytes, sizeof(bytes));
    assert_refused(&worker_option_set, ARGS("--config", file), ":1: ", "too long");
    for (size_t i = 0; i < sizeof(bytes); i++) {
        bytes[i] = (char)(i * 2654435761u >> 13);
    }
    file = config_file(bytes, sizeof(bytes));
    assert_refused(&worker_option_set, ARGS("--config", file), file, ":1: ");
    file = config_file("threads = 1\0\nslab = 1\n", 22);
    assert_refused(&worker_option_set, ARGS("--config", file), ":1: ", "control byte");
    assert_refused(&worker_option_set, ARGS("--config", "/nonexistent"), "/nonexistent",
                   "cannot be read");
    assert_refused(&worker_option_set, ARGS("--config", "/tmp"), "/tmp", "not a file");

    char *large = malloc(OPTIONS_FILE_MAX + 1);
    assert_non_null(large);
    memset(large, '\n', OPTIONS_FILE_MAX + 1);
    file = config_file(large, OPTIONS_FILE_MAX + 1);
    free(large);
    assert_refused(&worker_option_set, ARGS("--config", file), "65537", "at most 65536");
}

static void
test_rules_over_several_options(void **state)
{
    any_options_t values;
    (void)state;
    assert_refused(&worker_option_set, ARGS("--listen=0.0.0.0:0"), "0.0.0.0", "--allow-plaintext");
    assert_refused(&dev_option_set, ARGS("--listen=example.org:7070"), "example.org",
                   "no certificates");
    assert_refused(&coordinator_option_set, ARGS("--lost-ms=900"), "--lost-ms 900",
                   "twice --heartbeat-ms 500");
    assert_int_equal(
        parse(&coordinator_option_set, &values, ARGS("--listen=[::]:70", "--allow-plaintext")),
        ATTN_OK);
    assert_int_equal(
        parse(&coordinator_option_set, &values, ARGS("--listen=[::]:70", "--allow-plaintext=no")),
        ATTN_ERR_INVALID);
    assert_refused(&worker_option_set, ARGS("--coordinator=10.0.0.1:7070"),
                   "--coordinator 10.0.0.1", "--allow-plaintext");
    assert_int_equal(parse(&coordinator_option_set, &values,
                           ARGS("--listen=[::]:70", "--tls-cert=c", "--tls-key=k", "--tls-ca=a")),
                     ATTN_OK);
    assert_true(values.coordinator.tls.client_certs);
    assert_refused(&worker_option_set, ARGS("--tls-cert=c", "--tls-key=k"), "--tls-ca is missing",
                   "together");
    assert_refused(&dev_option_set, ARGS("--tls-ca=a", "--allow-plaintext"),
                   "--tls-cert is missing", "together");
    assert_refused(&worker_option_set, ARGS("--ucx-memory=1MiB", "--ucx-slab=2MiB"),
                   "--ucx-slab is 2097152 bytes", "--ucx-memory 1048576");
    assert_refused(&worker_option_set, ARGS("--ucx-memory=31MiB"), "--ucx-slab is 33554432 bytes",
                   "0 to lend none");
    assert_refused(&worker_option_set,
                   ARGS("--device=cuda", "--ucx-slab=33MiB", "--gpu-lend=33MiB"),
                   "--ucx-slab is 34603008 bytes", "--gpu-lend 34603008");
    assert_refused(&worker_option_set, ARGS("--ucx-slab=65535"), "--ucx-slab", "64KiB");
    assert_int_equal(parse(&worker_option_set, &values, ARGS("--ucx-memory=0")), ATTN_OK);
    assert_int_equal(parse(&worker_option_set, &values, ARGS("--ucx-memory=32MiB")), ATTN_OK);
    assert_refused(&worker_option_set, ARGS("--ucx-net=all"), "--ucx-net all",
                   "--ucx-net-plaintext");
    assert_refused(
        &worker_option_set,
        ARGS("--ucx-net=eth1", "--tls-cert=a", "--tls-key=b", "--tls-ca=c", "--allow-plaintext"),
        "in clear", "--ucx-net-plaintext");
    assert_int_equal(parse(&worker_option_set, &values, ARGS("--ucx-net=lo")), ATTN_OK);
    assert_int_equal(
        parse(&worker_option_set, &values, ARGS("--ucx-net=eth1", "--allow-plaintext")), ATTN_OK);
    assert_int_equal(parse(&worker_option_set, &values,
                           ARGS("--ucx-net=mlx5_0:1", "--ucx-net-plaintext", "--tls-cert=a",
                                "--tls-key=b", "--tls-ca=c")),
                     ATTN_OK);
    assert_string_equal(values.worker.ucx_net, "mlx5_0:1");
}

static void
test_what_is_loopback(void **state)
{
    (void)state;
    assert_true(options_address_is_loopback("127.0.0.1:0"));
    assert_true(options_address_is_loopback("127.9.9.9:80"));
    assert_true(options_address_is_loopback("localhost:80"));
    assert_true(options_address_is_loopback("[::1]:80"));
    assert_false(options_address_is_loopback("0.0.0.0:80"));
    assert_false(options_address_is_loopback("[::]:80"));
    assert_false(options_address_is_loopback("127.0.0.1.example.org:80"));
    assert_false(options_address_is_loopback("localhost.example.org:80"));
    assert_false(options_address_is_loopback("128.0.0.1:80"));
}

static char *
printed_config(const option_set_t *set, const void *values)
{
    char *text  = NULL;
    size_t size = 0;
    FILE *out   = open_memstream(&text, &size);

    assert_non_null(out);
    options_print_config(set, values, out);
    fclose(out);
    return text;
}

static void
test_print_config_reads_back_the_same(void **state)
{
    any_options_t values, again;
    (void)state;
    assert_int_equal(parse(&worker_option_set, &values,
                           ARGS("--slab=3MiB", "--name", "left rack", "--allow-plaintext",
                                "--log-level=error", "--advertise=h:1", "--spin-us=7")),
                     ATTN_OK);
    char *text = printed_config(&worker_option_set, &values.worker);
    assert_non_null(strstr(text, "\nslab = 3MiB\n"));
    assert_int_equal(parse(&worker_option_set, &again, ARGS("--config", config_text(text))),
                     ATTN_OK);
    char *text_again = printed_config(&worker_option_set, &again.worker);
    assert_string_equal(text, text_again);
    free(text);
    free(text_again);
}

/* inih reads 196 bytes of a line, and ends values at " ;": what a file would not give back is not
 * written as if it did. */
static void
test_print_config_of_what_no_file_can_hold(void **state)
{
    char value[240];
    any_options_t values, again;
    (void)state;
    memset(value, 'k', sizeof(value) - 1);
    value[sizeof(value) - 1] = 0;
    options_init(&worker_option_set, &values);
    snprintf(values.worker.tls.key, sizeof(values.worker.tls.key), "%s", value);
    char *text = printed_config(&worker_option_set, &values.worker);
    assert_non_null(strstr(text, "\n# tls-key cannot be written here"));
    assert_int_equal(parse(&worker_option_set, &again, ARGS("--config", config_text(text))),
                     ATTN_OK);
    free(text);
    value[196 - strlen("tls-key = ")] = 0;
    snprintf(values.worker.tls.key, sizeof(values.worker.tls.key), "%s", value);
    text = printed_config(&worker_option_set, &values.worker);
    options_init(&worker_option_set, &again);
    assert_int_equal(options_read_file(&worker_option_set, &again, config_text(text)), ATTN_OK);
    assert_string_equal(again.worker.tls.key, value);
    free(text);

    static const char *const odd[] = {";a", "a ;b", "a\t;b", " a", "a ", "a\nb"};
    for (size_t i = 0; i < sizeof(odd) / sizeof(odd[0]); i++) {
        snprintf(values.worker.tls.key, sizeof(values.worker.tls.key), "%s", odd[i]);
        text = printed_config(&worker_option_set, &values.worker);
        assert_non_null(strstr(text, "\n# tls-key cannot be written here"));
        free(text);
    }
}

static void
test_wishes(void **state)
{
    any_options_t values;
    options_wish_t wish;
    (void)state;
    /* Help comes whatever else is wrong. */
    assert_int_equal(options_parse(&dev_option_set, &values, 3,
                                   (char *[]){"--workers=0", "--print-config", "-h"}, &wish),
                     ATTN_OK);
    assert_int_equal(wish, OPTIONS_HELP);
    assert_int_equal(
        options_parse(&dev_option_set, &values, 1, (char *[]){"--print-config"}, &wish), ATTN_OK);
    assert_int_equal(wish, OPTIONS_PRINT_CONFIG);
    assert_int_equal(options_parse(&dev_option_set, &values, 0, NULL, &wish), ATTN_OK);
    assert_int_equal(wish, OPTIONS_RUN);
    assert_int_equal(options_start(&dev_option_set, &values, 1, (char *[]){"--workers=0"}), 2);
    assert_int_equal(options_start(&dev_option_set, &values, 0, NULL), -1);
}

static void
test_help_names_every_option(void **state)
{
    char flag[80];
    (void)state;
    for (size_t i = 0; i < N_SETS; i++) {
        char *text  = NULL;
        size_t size = 0;
        FILE *out   = open_memstream(&text, &size);
        assert_non_null(out);
        options_print_help(all_sets[i], out);
        fclose(out);
        for (size_t j = 0; j < all_sets[i]->n; j++) {
            snprintf(flag, sizeof(flag), "  --%s", all_sets[i]->table[j].name);
            assert_non_null(strstr(text, flag));
            assert_in_range(strlen(all_sets[i]->table[j].help), 20, 400);
        }
        for (char *line = strtok(text, "\n"); line != NULL; line = strtok(NULL, "\n")) {
            assert_in_range(strlen(line), 0, 100);
        }
        free(text);
    }
}

/* deploy/attnd.conf is what --print-config prints, command by command. With ATTN_UPDATE=1 in the
 * environment this test writes the file instead. */
static void
test_the_shipped_config_is_generated(void **state)
{
    char *expected = NULL;
    size_t size    = 0, n;
    char actual[OPTIONS_FILE_MAX];
    any_options_t values;
    (void)state;

    FILE *out = open_memstream(&expected, &size);
    assert_non_null(out);
    fprintf(out,
            "# attnd's options with their defaults: attnd COMMAND --config FILE reads this file,\n"
            "# attnd COMMAND --print-config prints its section. Flags win over the file.\n");
    for (size_t i = 0; i < N_SETS; i++) {
        fputc('\n', out);
        options_init(all_sets[i], &values);
        options_print_config(all_sets[i], &values, out);
    }
    fclose(out);

    if (getenv("ATTN_UPDATE") != NULL) {
        FILE *file = fopen(ATTN_CONF, "w");
        assert_non_null(file);
        assert_int_equal(fwrite(expected, 1, size, file), size);
        assert_int_equal(fclose(file), 0);
    }
    FILE *file = fopen(ATTN_CONF, "r");
    assert_non_null(file);
    n = fread(actual, 1, sizeof(actual) - 1, file);
    fclose(file);
    actual[n] = '\0';
    assert_string_equal(actual, expected);
    for (size_t i = 0; i < N_SETS; i++) {
        assert_int_equal(parse(all_sets[i], &values, ARGS("--config", ATTN_CONF)), ATTN_OK);
    }
    free(expected);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_defaults_are_those_documented),
        cmocka_unit_test(test_both_forms_of_flags),
        cmocka_unit_test(test_wrong_names_get_the_nearest),
        cmocka_unit_test(test_nearest_counts_every_kind_of_edit),
        cmocka_unit_test(test_wrong_values_get_the_bounds),
        cmocka_unit_test(test_text_has_a_limit),
        cmocka_unit_test(test_flags_win_over_the_file),
        cmocka_unit_test(test_wrong_files_name_the_line),
        cmocka_unit_test(test_garbage_files_are_refused),
        cmocka_unit_test(test_rules_over_several_options),
        cmocka_unit_test(test_what_is_loopback),
        cmocka_unit_test(test_print_config_reads_back_the_same),
        cmocka_unit_test(test_print_config_of_what_no_file_can_hold),
        cmocka_unit_test(test_wishes),
        cmocka_unit_test(test_help_names_every_option),
        cmocka_unit_test(test_the_shipped_config_is_generated),
    };
    int failed = cmocka_run_group_tests_name("daemon.options", tests, NULL, NULL);
    unlink(config_text(""));
    return failed;
}
