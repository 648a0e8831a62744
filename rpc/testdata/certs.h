/* certs.h: certificates for tests, made on the spot. Files are FOLDER/NAME.pem and .key. */
#ifndef ATTN_RPC_CERTS_H
#define ATTN_RPC_CERTS_H

#define CERTS_PATH_MAX 256

/** A new folder below TMPDIR; certs_remove() deletes it with all in it. */
void certs_folder(char folder[CERTS_PATH_MAX]);
void certs_remove(const char *folder);

/** A CA of this name. */
void certs_ca(const char *folder, const char *name);

/** A certificate by a CA for localhost and 127.0.0.1, valid until so many seconds from now. */
void certs_leaf(const char *folder, const char *ca, const char *name, long seconds);

/** The same, good for nothing but calling others. */
void certs_client(const char *folder, const char *ca, const char *name);

/** The path of a file, "NAME.pem" say, in one of four buffers in turn. */
const char *certs_path(const char *folder, const char *file);

/** Put the certificate and key NAME in the place of those of INSTEAD, as renewals do. */
void certs_replace(const char *folder, const char *name, const char *instead);

#endif
