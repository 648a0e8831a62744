/* TLS: who gets in, what one is told who does not, and certificates that change. */
#include "rpc/rpc.h"

#include "base/log.h"
#include "base/status.h"
#include "certs.h"
#include "echo_client.h"
#include "echo_server.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define HOUR 3600L
#define IN_TIME_MS 1500 /* for a handshake that fails: calls have 5 s */

static char folder[CERTS_PATH_MAX];

/* A server and one client of it; ca NULL: that side speaks plaintext. */
typedef struct pair {
    echo_server_t echo;
    rpc_tls_t *server_tls, *client_tls;
    rpc_client_t *client;
    rpc_channel_t *channel;
} pair_t;

static rpc_tls_t *
tls_of(const char *ca, const char *name, bool clients_need_not)
{
    char cert[64], key[64], ca_file[64];
    rpc_tls_t *tls = NULL;

    if (ca == NULL) {
        return NULL;
    }
    snprintf(ca_file, sizeof(ca_file), "%s.pem", ca);
    snprintf(cert, sizeof(cert), "%s.pem", name != NULL ? name : "");
    snprintf(key, sizeof(key), "%s.key", name != NULL ? name : "");
    rpc_tls_options_t options = {
        .ca               = certs_path(folder, ca_file),
        .cert             = name != NULL ? certs_path(folder, cert) : NULL,
        .key              = name != NULL ? certs_path(folder, key) : NULL,
        .clients_need_not = clients_need_not,
    };
    assert_int_equal(rpc_tls_open(&options, &tls), ATTN_OK);
    return tls;
}

static void
pair_serve(pair_t *p, const char *ca, const char *name, bool clients_need_not)
{
    memset(p, 0, sizeof(*p));
    p->server_tls                = tls_of(ca, name, clients_need_not);
    rpc_server_options_t options = {.address = "127.0.0.1:0", .threads = 4, .tls = p->server_tls};
    assert_int_equal(echo_server_start(&p->echo, &options), ATTN_OK);
}

static void
pair_connect(pair_t *p, const char *ca, const char *name, const char *server_name)
{
    p->client_tls = tls_of(ca, name, false);
    assert_int_equal(rpc_client_create(0, &p->client), ATTN_OK);
    if (p->client_tls != NULL) {
        rpc_client_set_tls(p->client, p->client_tls, server_name);
    }
    assert_int_equal(rpc_channel_open(p->client, p->echo.address, &p->channel), ATTN_OK);
}

/* Another client's place at the same server. */
static void
pair_aside(pair_t *late, const pair_t *p)
{
    memset(late, 0, sizeof(*late));
    memcpy(late->echo.address, p->echo.address, sizeof(late->echo.address));
}

static void
pair_disconnect(pair_t *p)
{
    rpc_channel_close(p->channel);
    rpc_client_destroy(p->client);
    rpc_tls_close(p->client_tls);
    p->client_tls = NULL;
}

static void
pair_end(pair_t *p)
{
    pair_disconnect(p);
    echo_server_stop(&p->echo, 0);
    rpc_tls_close(p->server_tls);
}

static echo_answer_t
ask(pair_t *p)
{
    uint64_t start  = attn_now_ns();
    echo_answer_t a = echo_call(p->channel, ECHO_UNARY, "hello", 7, 0, NULL, 0, in_ms(5000));

    assert_in_range((attn_now_ns() - start) / ATTN_NS_PER_MS, 0, IN_TIME_MS);
    if (a.status == ATTN_OK) {
        assert_int_equal(a.number, 7);
    }
    return a;
}

static int
setup(void **state)
{
    (void)state;
    attn_log_set_level(ATTN_LOG_ERROR + 1);
    certs_folder(folder);
    certs_ca(folder, "ca");
    certs_ca(folder, "other");
    certs_leaf(folder, "ca", "server", HOUR);
    certs_leaf(folder, "ca", "client", HOUR);
    certs_leaf(folder, "ca", "expired", -HOUR);
    certs_leaf(folder, "other", "stranger", HOUR);
    certs_client(folder, "ca", "caller");
    return 0;
}

static int
teardown(void **state)
{
    (void)state;
    certs_remove(folder);
    return 0;
}

/* ---- who gets in ---- */

typedef struct meeting {
    const char *what;
    const char *server_ca, *server; /* NULL: plaintext */
    bool clients_need_not;
    const char *client_ca, *client, *name;
    const char *says; /* NULL: it is answered; or words of the sentence */
} meeting_t;

static const meeting_t meetings[] = {
    {"mTLS", "ca", "server", false, "ca", "client", NULL, NULL},
    {"TLS, no certificate asked for", "ca", "server", true, "ca", NULL, NULL, NULL},
    {"TLS, one shown that nobody asked for", "ca", "server", true, "ca", "client", NULL, NULL},
    {"another name, told", "ca", "server", false, "ca", "client", "localhost", NULL},
    {"no certificate", "ca", "server", false, "ca", NULL, NULL, "certificate from us"},
    {"a stranger's certificate", "ca", "server", false, "ca", "stranger", NULL,
     "certificate from us"},
    {"an expired certificate", "ca", "server", false, "ca", "expired", NULL, "certificate from us"},
    {"a server of another CA", "other", "stranger", true, "ca", NULL, NULL,
     "certificate verify failed"},
    {"one for clients alone", "ca", "server", false, "ca", "caller", NULL, NULL},
    {"a client that poses as a server", "ca", "caller", true, "ca", NULL, NULL,
     "certificate verify failed"},
    {"an expired server", "ca", "expired", true, "ca", NULL, NULL, "certificate verify failed"},
    {"a server of another name", "ca", "server", true, "ca", NULL, "elsewhere.example",
     "elsewhere.example"},
    {"plaintext to TLS", "ca", "server", true, NULL, NULL, NULL, "speak TLS?"},
    {"plaintext to mTLS", "ca", "server", false, NULL, NULL, NULL, "speak TLS?"},
    {"TLS to plaintext", NULL, NULL, false, "ca", "client", NULL, "speak plaintext?"},
};

static void
test_who_gets_in(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof(meetings) / sizeof(meetings[0]); i++) {
        const meeting_t *m = &meetings[i];
        pair_t p;

        pair_serve(&p, m->server_ca, m->server, m->clients_need_not);
        pair_connect(&p, m->client_ca, m->client, m->name);
        echo_answer_t a = ask(&p);
        print_message("%s: %s %s\n", m->what, attn_strerror(a.status), a.sentence);
        if (m->says == NULL) {
            assert_int_equal(a.status, ATTN_OK);
        } else {
            assert_int_equal(a.status, ATTN_ERR_UNAVAILABLE);
            assert_non_null(strstr(a.sentence, m->says));
            assert_non_null(strstr(a.sentence, p.echo.address));
            assert_int_equal(atomic_load(&p.echo.handled), 0);
        }
        pair_end(&p);
    }
}

static void
test_nobody_there_is_no_matter_of_tls(void **state)
{
    pair_t p;

    (void)state;
    pair_serve(&p, NULL, NULL, false);
    echo_server_stop(&p.echo, 0);
    pair_connect(&p, "ca", "client", NULL);
    echo_answer_t a = ask(&p);
    assert_int_equal(a.status, ATTN_ERR_UNAVAILABLE);
    assert_non_null(strstr(a.sentence, "refused"));
    assert_null(strchr(a.sentence, '('));
    pair_disconnect(&p);
}

/* ---- certificates that change ---- */

static void
test_new_handshakes_take_new_certificates(void **state)
{
    echo_log_t log = {0};
    rpc_stream_t *stream;
    pair_t p;

    (void)state;
    certs_leaf(folder, "ca", "mine", HOUR);
    certs_leaf(folder, "other", "next", HOUR);
    pair_serve(&p, "ca", "mine", true);
    pair_connect(&p, "ca", NULL, NULL);
    log.client = p.client;
    assert_int_equal(
        rpc_stream_open(p.channel, ECHO_STREAM, UINT64_MAX, echo_received, &log, &stream), ATTN_OK);
    echo_send(stream, "", 0, NULL, 0, NULL, NULL);
    assert_true(echo_wait_messages(&log, 1));

    certs_replace(folder, "next", "mine"); /* the server looks by itself, at the next handshake */
    echo_send(stream, "", 1, NULL, 0, NULL, NULL);
    assert_true(echo_wait_messages(&log, 2));

    pair_t late;
    pair_aside(&late, &p);
    pair_connect(&late, "other", NULL, NULL);
    assert_int_equal(ask(&late).status, ATTN_OK);
    pair_disconnect(&late);
    pair_connect(&late, "ca", NULL, NULL); /* which the new certificate is not of */
    assert_int_equal(ask(&late).status, ATTN_ERR_UNAVAILABLE);
    pair_disconnect(&late);

    echo_send(stream, "", 2, NULL, 0, NULL, NULL); /* where it began, it goes on */
    assert_true(echo_wait_messages(&log, 3));
    assert_int_equal(ask(&p).status, ATTN_OK);
    rpc_stream_close(stream);
    assert_true(echo_wait_end(&log));
    pair_end(&p);
}

static void
test_a_client_takes_new_certificates(void **state)
{
    echo_log_t log = {0};
    rpc_stream_t *stream;
    pair_t p;

    (void)state;
    certs_leaf(folder, "ca", "mine", HOUR);
    certs_leaf(folder, "other", "next", HOUR);
    pair_serve(&p, "ca", "server", false);
    pair_connect(&p, "ca", "mine", NULL);
    log.client = p.client;
    assert_int_equal(
        rpc_stream_open(p.channel, ECHO_STREAM, UINT64_MAX, echo_received, &log, &stream), ATTN_OK);
    echo_send(stream, "", 0, NULL, 0, NULL, NULL);
    assert_true(echo_wait_messages(&log, 1));

    certs_replace(folder, "next", "mine");
    assert_int_equal(ask(&p).status, ATTN_OK); /* nobody looked */
    rpc_tls_refresh(p.client_tls, false);
    assert_int_equal(rpc_tls_version(p.client_tls), 2);
    assert_int_equal(ask(&p).status, ATTN_ERR_UNAVAILABLE); /* it shows the other CA's now */
    echo_send(stream, "", 1, NULL, 0, NULL, NULL);
    assert_true(echo_wait_messages(&log, 2)); /* over the connection that stands */

    certs_leaf(folder, "ca", "next", HOUR);
    certs_replace(folder, "next", "mine");
    rpc_tls_refresh(p.client_tls, false);
    assert_int_equal(ask(&p).status, ATTN_OK);
    rpc_stream_close(stream);
    assert_true(echo_wait_end(&log));
    pair_end(&p);
}

static void
write_text(const char *file, const char *text)
{
    FILE *f = fopen(certs_path(folder, file), "w");

    assert_non_null(f);
    fputs(text, f);
    fclose(f);
}

static void
test_bad_files_change_nothing(void **state)
{
    static const char broken[] = "-----BEGIN CERTIFICATE-----\nMIIB\n";
    pair_t p;

    (void)state;
    certs_leaf(folder, "ca", "mine", HOUR);
    certs_leaf(folder, "ca", "next", HOUR);
    pair_serve(&p, "ca", "mine", true);
    pair_connect(&p, "ca", NULL, NULL);
    for (int i = 0; i < 4; i++) {
        if (i == 0) {
            write_text("mine.pem", broken);
        } else if (i == 1) {
            unlink(certs_path(folder, "mine.pem"));
        } else if (i == 2) { /* half of a renewal: the key is still the old one */
            assert_int_equal(rename(certs_path(folder, "next.pem"), certs_path(folder, "mine.pem")),
                             0);
        } else {
            write_text("mine.key", "");
        }
        rpc_tls_refresh(p.server_tls, i % 2 == 0);
        assert_int_equal(rpc_tls_version(p.server_tls), 1);
        pair_t late;
        pair_aside(&late, &p);
        pair_connect(&late, "ca", NULL, NULL);
        assert_int_equal(ask(&late).status, ATTN_OK); /* a new handshake, with the old ones */
        pair_disconnect(&late);
    }
    assert_int_equal(rename(certs_path(folder, "next.key"), certs_path(folder, "mine.key")), 0);
    rpc_tls_refresh(p.server_tls, false);
    assert_int_equal(rpc_tls_version(p.server_tls), 2);
    assert_int_equal(ask(&p).status, ATTN_OK);
    pair_end(&p);
}

/* ---- files ---- */

static void
expect_refused(const char *ca, const char *cert, const char *key, const char *says)
{
    rpc_tls_t *tls            = NULL;
    rpc_tls_options_t options = {
        .ca   = ca != NULL ? certs_path(folder, ca) : NULL,
        .cert = cert != NULL ? certs_path(folder, cert) : NULL,
        .key  = key != NULL ? certs_path(folder, key) : NULL,
    };

    assert_int_equal(rpc_tls_open(&options, &tls), ATTN_ERR_INVALID);
    if (strstr(attn_last_error(), says) == NULL) {
        fail_msg("\"%s\" does not say \"%s\"", attn_last_error(), says);
    }
    assert_null(tls);
}

static void
test_wrong_files_are_named(void **state)
{
    (void)state;
    write_text("empty.pem", "");
    write_text("words.pem", "this is no certificate\n");
    write_text("locked.key", "-----BEGIN ENCRYPTED PRIVATE KEY-----\n"
                             "MIHsMFcGCSqGSIb3DQEFDTBKMCkGCSqGSIb3DQEFDDAc\n"
                             "-----END ENCRYPTED PRIVATE KEY-----\n");
    expect_refused(NULL, "server.pem", "server.key", "CA");
    expect_refused("ca.pem", "server.pem", NULL, "only one of the two");
    expect_refused("ca.pem", NULL, "server.key", "only one of the two");
    expect_refused("absent.pem", NULL, NULL, "absent.pem: No such file");
    expect_refused("empty.pem", NULL, NULL, "empty.pem holds no PEM certificate");
    expect_refused("words.pem", NULL, NULL, "words.pem holds no PEM certificate");
    expect_refused("ca.key", NULL, NULL, "ca.key holds no PEM certificate");
    expect_refused("ca.pem", "server.key", "server.key", "server.key holds no PEM certificate");
    expect_refused("ca.pem", "server.pem", "server.pem", "server.pem holds no PEM private key");
    expect_refused("ca.pem", "server.pem", "locked.key", "without a passphrase");
    expect_refused("ca.pem", "server.pem", "client.key", "is not that of the certificate");
    expect_refused("ca.pem", "server.pem", ".", "Is a directory");
}

static void
test_a_server_needs_a_certificate(void **state)
{
    rpc_tls_t *tls               = tls_of("ca", NULL, false);
    rpc_server_options_t options = {.address = "127.0.0.1:0", .tls = tls};
    rpc_server_t *server         = NULL;

    (void)state;
    assert_int_equal(rpc_server_create(&options, &server), ATTN_ERR_INVALID);
    assert_null(server);
    rpc_tls_close(tls);
}

static void
test_contents_for_other_ports(void **state)
{
    rpc_tls_t *tls = tls_of("ca", "server", false);
    rpc_tls_pem_t pem;

    (void)state;
    rpc_tls_pem(tls, &pem);
    assert_non_null(strstr(pem.ca, "BEGIN CERTIFICATE"));
    assert_non_null(strstr(pem.cert, "BEGIN CERTIFICATE"));
    assert_non_null(strstr(pem.key, "PRIVATE KEY"));
    assert_int_equal(pem.version, 1);
    rpc_tls_pem_free(&pem);
    rpc_tls_refresh(tls, false); /* nothing changed */
    assert_int_equal(rpc_tls_version(tls), 1);
    rpc_tls_refresh(tls, true);
    assert_int_equal(rpc_tls_version(tls), 2);
    rpc_tls_close(tls);
}

/* ---- the header of a client ---- */

static void
test_header_goes_with_every_call(void **state)
{
    pair_t p;

    (void)state;
    pair_serve(&p, NULL, NULL, false);
    pair_connect(&p, NULL, NULL, NULL);
    for (int i = 0; i < 3; i++) {
        char value[32];
        snprintf(value, sizeof(value), "value %d", i);
        if (i > 0) {
            rpc_client_set_header(p.client, "echo-header", value);
        }
        assert_int_equal(rpc_client_header_version(p.client), i);
        echo_answer_t a = echo_call(p.channel, ECHO_UNARY, "header", 0, 0, NULL, 0, in_ms(5000));
        assert_int_equal(a.status, ATTN_OK);
        assert_string_equal(a.text, i > 0 ? value : "none");
    }
    pair_end(&p);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_who_gets_in),
        cmocka_unit_test(test_nobody_there_is_no_matter_of_tls),
        cmocka_unit_test(test_new_handshakes_take_new_certificates),
        cmocka_unit_test(test_a_client_takes_new_certificates),
        cmocka_unit_test(test_bad_files_change_nothing),
        cmocka_unit_test(test_wrong_files_are_named),
        cmocka_unit_test(test_a_server_needs_a_certificate),
        cmocka_unit_test(test_contents_for_other_ports),
        cmocka_unit_test(test_header_goes_with_every_call),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
