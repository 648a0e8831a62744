/*
 * tls.c: certificates from files. C core would take what it is given and fail each handshake
 * later, without a word on whose fault it is; so files are taken apart by OpenSSL here before
 * they are put to use, and what is wrong is said by file.
 *
 * Servers ask for news before every handshake (C core's config fetcher). Clients have no such
 * hook: a channel compares versions when a call begins, and connects anew (channel.c).
 */
#include "rpc/rpc_int.h"

#include "base/log.h"
#include "base/status.h"

#include <errno.h>
#include <fcntl.h>
#include <grpc/grpc_security.h>
#include <grpc/support/string_util.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define FILE_MAX (1u << 20) /* bytes of a file */

enum { CA, CERT, KEY, FILES };

/* One state of a file, as far as stat() tells. */
typedef struct mark {
    dev_t device;
    ino_t inode;
    off_t size;
    struct timespec changed;
} mark_t;

struct rpc_tls {
    atomic_uint refs;
    bool clients_need_not;
    char *paths[FILES]; /* NULL: there is none */
    atomic_ullong version;
    pthread_mutex_t lock; /* of all below */
    char *texts[FILES];   /* in use */
    mark_t marks[FILES];  /* of the files when they were last looked at */
};

/* ---- reading ---- */

static void
mark_of(const char *path, mark_t *mark)
{
    struct stat s;

    memset(mark, 0, sizeof(*mark)); /* all of it is compared */
    if (path != NULL && stat(path, &s) == 0) {
        mark->device  = s.st_dev;
        mark->inode   = s.st_ino;
        mark->size    = s.st_size;
        mark->changed = s.st_mtim;
    }
}

static attn_status_t
read_file(const char *path, char **text_p)
{
    char *text   = malloc(FILE_MAX + 1);
    size_t size  = 0;
    ssize_t some = 1;
    int fd       = text != NULL ? open(path, O_RDONLY | O_CLOEXEC) : -1;

    while (fd >= 0 && size <= FILE_MAX && (some = read(fd, text + size, FILE_MAX + 1 - size)) > 0) {
        size += (size_t)some;
    }
    attn_status_t status = ATTN_OK;
    if (text == NULL) {
        status = attn_fail(ATTN_ERR_NO_MEMORY, "no memory to read %s", path);
    } else if (fd < 0 || some < 0) {
        status = attn_fail(ATTN_ERR_INVALID, "%s: %s", path, strerror(errno));
    } else if (size > FILE_MAX || memchr(text, 0, size) != NULL) {
        status =
            attn_fail(ATTN_ERR_INVALID, "%s is no PEM file of at most %u bytes", path, FILE_MAX);
    }
    if (fd >= 0) {
        close(fd);
    }
    if (status != ATTN_OK) {
        free(text);
        return status;
    }
    text[size] = 0;
    *text_p    = text;
    return ATTN_OK;
}

/* ---- checking ---- */

/* A passphrase would be asked for on the terminal. */
static int
no_passphrase(char *into, int room, int writing, void *arg)
{
    (void)into;
    (void)room;
    (void)writing;
    (void)arg;
    return -1;
}

/* The first certificate, and how many there are; NULL if there is none, or one is broken. */
static X509 *
read_certificates(const char *text, uint32_t *n_p)
{
    BIO *bio    = BIO_new_mem_buf(text, -1);
    X509 *first = NULL, *one;

    *n_p = 0;
    while (bio != NULL && (one = PEM_read_bio_X509(bio, NULL, no_passphrase, NULL)) != NULL) {
        if ((*n_p)++ == 0) {
            first = one;
        } else {
            X509_free(one);
        }
    }
    if (ERR_GET_REASON(ERR_peek_last_error()) != PEM_R_NO_START_LINE) {
        X509_free(first); /* it ended in the middle of one */
        first = NULL;
    }
    ERR_clear_error();
    BIO_free(bio);
    return first;
}

/* Peers decide whether a certificate is still good, by their clocks; ours are told in the log. */
static void
note_expiry(const char *path, const X509 *cert)
{
    char until[32] = "";
    struct tm tm;

    if (ASN1_TIME_to_tm(X509_get0_notAfter(cert), &tm) == 1) {
        strftime(until, sizeof(until), "%Y-%m-%dT%H:%M:%SZ", &tm);
    }
    if (X509_cmp_current_time(X509_get0_notAfter(cert)) < 0) {
        attn_log(ATTN_LOG_WARN, "tls.expired", "file=\"%s\" not_after=%s", path, until);
    } else {
        attn_log(ATTN_LOG_INFO, "tls.certificate", "file=\"%s\" not_after=%s", path, until);
    }
}

static attn_status_t
check_own(const rpc_tls_t *tls, const char *cert_text, const char *key_text)
{
    uint32_t n;
    X509 *cert = read_certificates(cert_text, &n);

    if (cert == NULL) {
        return attn_fail(ATTN_ERR_INVALID, "%s holds no PEM certificate, or a broken one",
                         tls->paths[CERT]);
    }
    BIO *bio             = BIO_new_mem_buf(key_text, -1);
    EVP_PKEY *key        = PEM_read_bio_PrivateKey(bio, NULL, no_passphrase, NULL);
    attn_status_t status = ATTN_OK;
    if (key == NULL) {
        status = attn_fail(ATTN_ERR_INVALID,
                           "%s holds no PEM private key that opens without a passphrase",
                           tls->paths[KEY]);
    } else if (X509_check_private_key(cert, key) != 1) {
        status = attn_fail(ATTN_ERR_INVALID, "the key in %s is not that of the certificate in %s",
                           tls->paths[KEY], tls->paths[CERT]);
    } else {
        note_expiry(tls->paths[CERT], cert);
    }
    ERR_clear_error();
    EVP_PKEY_free(key);
    BIO_free(bio);
    X509_free(cert);
    return status;
}

static attn_status_t
check(const rpc_tls_t *tls, char *const texts[FILES])
{
    uint32_t n;
    X509 *first = read_certificates(texts[CA], &n);

    if (first == NULL) {
        return attn_fail(ATTN_ERR_INVALID, "%s holds no PEM certificate, or a broken one",
                         tls->paths[CA]);
    }
    X509_free(first);
    return texts[CERT] != NULL ? check_own(tls, texts[CERT], texts[KEY]) : ATTN_OK;
}

static void
free_texts(char *texts[FILES])
{
    if (texts[KEY] != NULL) {
        explicit_bzero(texts[KEY], strlen(texts[KEY]));
    }
    for (int i = 0; i < FILES; i++) {
        free(texts[i]);
        texts[i] = NULL;
    }
}

/* Read all files and put them to use, or change nothing. Under the lock. */
static attn_status_t
load(rpc_tls_t *tls)
{
    char *texts[FILES]   = {NULL};
    attn_status_t status = ATTN_OK;

    for (int i = 0; i < FILES; i++) { /* marks first: what changes while it is read is read again */
        mark_of(tls->paths[i], &tls->marks[i]);
    }
    for (int i = 0; i < FILES && status == ATTN_OK; i++) {
        status = tls->paths[i] != NULL ? read_file(tls->paths[i], &texts[i]) : ATTN_OK;
    }
    if (status == ATTN_OK) {
        status = check(tls, texts);
    }
    if (status != ATTN_OK) {
        free_texts(texts);
        return status;
    }
    free_texts(tls->texts);
    memcpy(tls->texts, texts, sizeof(texts));
    atomic_fetch_add(&tls->version, 1);
    return ATTN_OK;
}

void
rpc_tls_refresh(rpc_tls_t *tls, bool always)
{
    pthread_mutex_lock(&tls->lock);
    for (int i = 0; i < FILES; i++) {
        mark_t mark;
        mark_of(tls->paths[i], &mark);
        always = always || memcmp(&mark, &tls->marks[i], sizeof(mark)) != 0;
    }
    if (always && load(tls) == ATTN_OK) {
        attn_log(ATTN_LOG_INFO, "tls.reloaded", "version=%llu",
                 (unsigned long long)rpc_tls_version(tls));
    } else if (always) {
        attn_log(ATTN_LOG_ERROR, "tls.kept", "version=%llu reason=\"%s\"",
                 (unsigned long long)rpc_tls_version(tls), attn_last_error());
    }
    pthread_mutex_unlock(&tls->lock);
}

/* ---- life ---- */

void
rpc_tls_close(rpc_tls_t *tls)
{
    if (tls == NULL || atomic_fetch_sub(&tls->refs, 1) != 1) {
        return;
    }
    free_texts(tls->texts);
    for (int i = 0; i < FILES; i++) {
        gpr_free(tls->paths[i]);
    }
    pthread_mutex_destroy(&tls->lock);
    gpr_free(tls);
}

rpc_tls_t *
rpc_tls_ref(rpc_tls_t *tls)
{
    if (tls != NULL) {
        atomic_fetch_add(&tls->refs, 1);
    }
    return tls;
}

bool
rpc_tls_has_own(const rpc_tls_t *tls)
{
    return tls->paths[CERT] != NULL;
}

attn_status_t
rpc_tls_open(const rpc_tls_options_t *options, rpc_tls_t **tls_p)
{
    if (options->ca == NULL) {
        return attn_fail(ATTN_ERR_INVALID,
                         "TLS needs a file of CA certificates to tell right peers from others");
    }
    if ((options->cert == NULL) != (options->key == NULL)) {
        return attn_fail(ATTN_ERR_INVALID, "a certificate needs its key, and a key its "
                                           "certificate: only one of the two is given");
    }
    rpc_tls_t *tls        = gpr_zalloc(sizeof(*tls));
    tls->clients_need_not = options->clients_need_not;
    tls->paths[CA]        = gpr_strdup(options->ca);
    tls->paths[CERT]      = options->cert != NULL ? gpr_strdup(options->cert) : NULL;
    tls->paths[KEY]       = options->key != NULL ? gpr_strdup(options->key) : NULL;
    atomic_init(&tls->refs, 1);
    pthread_mutex_init(&tls->lock, NULL);
    attn_status_t status = load(tls);
    if (status != ATTN_OK) {
        rpc_tls_close(tls);
        return status;
    }
    *tls_p = tls;
    return ATTN_OK;
}

/* ---- contents ---- */

uint64_t
rpc_tls_version(const rpc_tls_t *tls)
{
    return atomic_load(&tls->version);
}

void
rpc_tls_pem(rpc_tls_t *tls, rpc_tls_pem_t *pem)
{
    pthread_mutex_lock(&tls->lock);
    *pem = (rpc_tls_pem_t){
        .ca      = gpr_strdup(tls->texts[CA]),
        .cert    = tls->texts[CERT] != NULL ? gpr_strdup(tls->texts[CERT]) : NULL,
        .key     = tls->texts[KEY] != NULL ? gpr_strdup(tls->texts[KEY]) : NULL,
        .version = atomic_load(&tls->version),
    };
    pthread_mutex_unlock(&tls->lock);
}

void
rpc_tls_pem_free(rpc_tls_pem_t *pem)
{
    if (pem->key != NULL) {
        explicit_bzero(pem->key, strlen(pem->key));
    }
    gpr_free(pem->ca);
    gpr_free(pem->cert);
    gpr_free(pem->key);
    *pem = (rpc_tls_pem_t){0};
}

/* ---- credentials of C core ---- */

static grpc_ssl_certificate_config_reload_status
fetch(void *arg, grpc_ssl_server_certificate_config **config)
{
    rpc_tls_use_t *use = arg;
    rpc_tls_pem_t pem;

    rpc_tls_refresh(use->tls, false);
    if (rpc_tls_version(use->tls) == use->version) {
        return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_UNCHANGED;
    }
    rpc_tls_pem(use->tls, &pem);
    grpc_ssl_pem_key_cert_pair pair = {.private_key = pem.key, .cert_chain = pem.cert};
    *config                         = grpc_ssl_server_certificate_config_create(pem.ca, &pair, 1);
    use->version                    = pem.version;
    rpc_tls_pem_free(&pem);
    return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_NEW;
}

grpc_server_credentials *
rpc_server_credentials(rpc_tls_use_t *use)
{
    if (use->tls == NULL) {
        return grpc_insecure_server_credentials_create();
    }
    return grpc_ssl_server_credentials_create_with_options(
        grpc_ssl_server_credentials_create_options_using_config_fetcher(
            use->tls->clients_need_not ? GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE
                                       : GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY,
            fetch, use));
}

grpc_channel_credentials *
rpc_channel_credentials(rpc_tls_use_t *use)
{
    rpc_tls_pem_t pem;

    if (use->tls == NULL) {
        return grpc_insecure_credentials_create();
    }
    rpc_tls_pem(use->tls, &pem);
    grpc_ssl_pem_key_cert_pair pair = {.private_key = pem.key, .cert_chain = pem.cert};
    grpc_channel_credentials *credentials =
        grpc_ssl_credentials_create(pem.ca, pem.cert != NULL ? &pair : NULL, NULL, NULL);
    use->version = pem.version;
    rpc_tls_pem_free(&pem);
    return credentials;
}
