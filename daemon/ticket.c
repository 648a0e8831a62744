#include "daemon/ticket.h"

#include "base/status.h"

#include <inttypes.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <stdio.h>
#include <string.h>

#define VERSION 1
#define MAC TICKET_MAC
#define MAC_TEXT (2u * MAC) /* in hex */

/* The MAC of n bytes of text, in hex; an empty string, which is no MAC of any text, if OpenSSL is
 * out of memory. */
static void
sign(const char *text, size_t n, const uint8_t secret[TICKET_SECRET], char hex[MAC_TEXT + 1])
{
    static const char digits[] = "0123456789abcdef";
    uint8_t mac[MAC];
    unsigned size = MAC;
    bool made =
        HMAC(EVP_sha256(), secret, TICKET_SECRET, (const uint8_t *)text, n, mac, &size) != NULL;

    for (unsigned i = 0; made && i < MAC; i++) {
        hex[2 * i]     = digits[mac[i] >> 4];
        hex[2 * i + 1] = digits[mac[i] & 15];
    }
    hex[made ? MAC_TEXT : 0] = '\0';
}

bool
ticket_sign(const uint8_t *bytes, size_t n, const uint8_t secret[TICKET_SECRET],
            uint8_t mac[TICKET_MAC])
{
    unsigned size = MAC;

    return HMAC(EVP_sha256(), secret, TICKET_SECRET, bytes, n, mac, &size) != NULL && size == MAC;
}

void
ticket_write(const ticket_t *ticket, const uint8_t secret[TICKET_SECRET], char text[TICKET_MAX])
{
    char hex[MAC_TEXT + 1];

    int n = snprintf(text, TICKET_MAX, "%d.%c.%" PRIu32 ".%" PRIu64, VERSION, ticket->role,
                     ticket->client, ticket->period);
    sign(text, (size_t)n, secret, hex);
    snprintf(text + n, TICKET_MAX - (size_t)n, ".%s", hex);
}

/* Where its MAC begins, with the dot before it; NULL: it is too long, too short or has none. */
static const char *
mac_of(const char *text)
{
    const char *dot = strrchr(text, '.');

    return dot != NULL && dot - text < TICKET_MAX && strlen(dot + 1) == MAC_TEXT ? dot : NULL;
}

bool
ticket_may_be(const char *text)
{
    return text != NULL && mac_of(text) != NULL;
}

attn_status_t
ticket_read(const char *text, const uint8_t secret[TICKET_SECRET], uint64_t period,
            ticket_t *ticket)
{
    const char *dot = text != NULL ? mac_of(text) : NULL;
    char hex[MAC_TEXT + 1], role;
    int version;

    if (text == NULL) {
        return attn_fail(ATTN_ERR_DENIED,
                         "the call has no " TICKET_HEADER ": OpenClient gives one, for the "
                         "metadata of every call");
    }
    if (dot == NULL) {
        return attn_fail(ATTN_ERR_DENIED, "the call's " TICKET_HEADER " is malformed");
    }
    sign(text, (size_t)(dot - text), secret, hex);
    if (hex[0] == '\0' || CRYPTO_memcmp(hex, dot + 1, MAC_TEXT) != 0) {
        return attn_fail(ATTN_ERR_DENIED,
                         "the call's " TICKET_HEADER " is not of the coordinator here");
    }
    /* What carries its MAC is of our own making. */
    if (sscanf(text, "%d.%c.%" SCNu32 ".%" SCNu64, &version, &role, &ticket->client,
               &ticket->period) != 4 ||
        version != VERSION) {
        return attn_fail(ATTN_ERR_DENIED, "the call's " TICKET_HEADER " is of another version");
    }
    ticket->role = (ticket_role_t)role;
    if (ticket->period + 1 < period) {
        return attn_fail(ATTN_ERR_DENIED,
                         "the call's " TICKET_HEADER " is of period %" PRIu64
                         ", and this is period "
                         "%" PRIu64 ": KeepAlive gives a new one",
                         ticket->period, period);
    }
    return ATTN_OK;
}

bool
ticket_texts_equal(const char *a, const char *b)
{
    size_t n = strlen(a);

    return strlen(b) == n && CRYPTO_memcmp(a, b, n) == 0;
}
