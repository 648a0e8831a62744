#include "certs.h"

#include <assert.h>
#include <dirent.h>
#include <openssl/pem.h>
#include <openssl/rand.h>
#include <openssl/x509v3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define DAY 86400L

const char *
certs_path(const char *folder, const char *file)
{
    static _Thread_local char paths[4][2 * CERTS_PATH_MAX];
    static _Thread_local unsigned turn;
    char *path = paths[turn++ % 4];

    snprintf(path, sizeof(paths[0]), "%s/%s", folder, file);
    return path;
}

void
certs_folder(char folder[CERTS_PATH_MAX])
{
    const char *tmp = getenv("TMPDIR");

    snprintf(folder, CERTS_PATH_MAX, "%s/attn-certs-XXXXXX", tmp != NULL ? tmp : "/tmp");
    char *made = mkdtemp(folder);
    assert(made != NULL);
    (void)made;
}

void
certs_remove(const char *folder)
{
    struct dirent *entry;
    DIR *dir = opendir(folder);

    while (dir != NULL && (entry = readdir(dir)) != NULL) {
        unlink(certs_path(folder, entry->d_name)); /* not . and .. */
    }
    closedir(dir);
    rmdir(folder);
}

static FILE *
open_file(const char *folder, const char *name, const char *end, const char *mode)
{
    char file[CERTS_PATH_MAX];

    snprintf(file, sizeof(file), "%s.%s", name, end);
    FILE *f = fopen(certs_path(folder, file), mode);
    assert(f != NULL);
    return f;
}

static void
add_extension(X509 *cert, X509 *issuer, int id, const char *value)
{
    X509V3_CTX context;

    X509V3_set_ctx(&context, issuer, cert, NULL, NULL, 0);
    X509_EXTENSION *extension = X509V3_EXT_conf_nid(NULL, &context, id, value);
    assert(extension != NULL);
    X509_add_ext(cert, extension, -1);
    X509_EXTENSION_free(extension);
}

/* A certificate with this key; no issuer: it signs itself. */
static X509 *
make(const char *name, EVP_PKEY *key, X509 *issuer, EVP_PKEY *issuer_key, long seconds,
     const char *usage)
{
    X509 *cert = X509_new();
    uint32_t serial;

    RAND_bytes((unsigned char *)&serial, sizeof(serial));
    X509_set_version(cert, X509_VERSION_3);
    ASN1_INTEGER_set(X509_get_serialNumber(cert), serial >> 1);
    X509_gmtime_adj(X509_getm_notBefore(cert), -2 * DAY);
    X509_gmtime_adj(X509_getm_notAfter(cert), seconds);
    X509_NAME_add_entry_by_txt(X509_get_subject_name(cert), "CN", MBSTRING_ASC,
                               (const unsigned char *)name, -1, -1, 0);
    X509_set_issuer_name(cert, X509_get_subject_name(issuer != NULL ? issuer : cert));
    X509_set_pubkey(cert, key);
    add_extension(cert, issuer != NULL ? issuer : cert, NID_basic_constraints,
                  issuer == NULL ? "critical,CA:TRUE" : "CA:FALSE");
    if (issuer != NULL) {
        add_extension(cert, issuer, NID_subject_alt_name, "DNS:localhost,IP:127.0.0.1");
    }
    if (usage != NULL) {
        add_extension(cert, issuer, NID_ext_key_usage, usage);
    }
    int done = X509_sign(cert, issuer_key, EVP_sha256());
    assert(done > 0);
    (void)done;
    return cert;
}

static void
write_both(const char *folder, const char *name, X509 *cert, EVP_PKEY *key)
{
    FILE *f = open_file(folder, name, "pem", "w");
    PEM_write_X509(f, cert);
    fclose(f);
    f = open_file(folder, name, "key", "w");
    PEM_write_PrivateKey(f, key, NULL, NULL, 0, NULL, NULL);
    fclose(f);
}

void
certs_ca(const char *folder, const char *name)
{
    EVP_PKEY *key = EVP_EC_gen("P-256");
    X509 *cert    = make(name, key, NULL, key, 30 * DAY, NULL);

    write_both(folder, name, cert, key);
    X509_free(cert);
    EVP_PKEY_free(key);
}

static void
leaf(const char *folder, const char *ca, const char *name, long seconds, const char *usage)
{
    FILE *f      = open_file(folder, ca, "pem", "r");
    X509 *issuer = PEM_read_X509(f, NULL, NULL, NULL);
    fclose(f);
    f                    = open_file(folder, ca, "key", "r");
    EVP_PKEY *issuer_key = PEM_read_PrivateKey(f, NULL, NULL, NULL);
    fclose(f);

    EVP_PKEY *key = EVP_EC_gen("P-256");
    X509 *cert    = make(name, key, issuer, issuer_key, seconds, usage);
    write_both(folder, name, cert, key);
    X509_free(cert);
    X509_free(issuer);
    EVP_PKEY_free(key);
    EVP_PKEY_free(issuer_key);
}

void
certs_leaf(const char *folder, const char *ca, const char *name, long seconds)
{
    leaf(folder, ca, name, seconds, NULL);
}

void
certs_client(const char *folder, const char *ca, const char *name)
{
    leaf(folder, ca, name, DAY, "clientAuth");
}

void
certs_replace(const char *folder, const char *name, const char *instead)
{
    static const char *const ends[] = {"key", "pem"};

    for (int i = 0; i < 2; i++) {
        char from[CERTS_PATH_MAX], to[CERTS_PATH_MAX];
        snprintf(from, sizeof(from), "%s.%s", name, ends[i]);
        snprintf(to, sizeof(to), "%s.%s", instead, ends[i]);
        int error = rename(certs_path(folder, from), certs_path(folder, to));
        assert(error == 0);
        (void)error;
    }
}
