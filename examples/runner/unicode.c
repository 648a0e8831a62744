#include "unicode.h"

#include <stdbool.h>

#include "unicode_table.h"

static bool
in_ranges(const uint32_t (*ranges)[2], size_t n, uint32_t code)
{
    size_t low = 0, high = n; /* the first range that ends at or behind code is in [low, high] */

    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (ranges[middle][1] < code) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low < n && ranges[low][0] <= code;
}

static bool
is_space(uint32_t code)
{
    return (code >= 0x09 && code <= 0x0d) || code == 0x20 || code == 0x85 || code == 0xa0 ||
           code == 0x1680 || (code >= 0x2000 && code <= 0x200a) || code == 0x2028 ||
           code == 0x2029 || code == 0x202f || code == 0x205f || code == 0x3000;
}

char_class_t
char_class(uint32_t code)
{
    if (is_space(code)) {
        return CHAR_SPACE;
    }
    if (code < 0x80) {
        bool letter = (code >= 'a' && code <= 'z') || (code >= 'A' && code <= 'Z');
        return letter ? CHAR_LETTER : code >= '0' && code <= '9' ? CHAR_NUMBER : CHAR_OTHER;
    }
    if (in_ranges(letters, sizeof(letters) / sizeof(letters[0]), code)) {
        return CHAR_LETTER;
    }
    return in_ranges(numbers, sizeof(numbers) / sizeof(numbers[0]), code) ? CHAR_NUMBER
                                                                          : CHAR_OTHER;
}

/** Bytes of the character that begins with this byte; 0 if none does. */
static size_t
utf8_length(unsigned char first)
{
    if (first < 0x80) {
        return 1;
    }
    if (first < 0xc2 || first >= 0xf5) {
        return 0;
    }
    return first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
}

size_t
utf8_decode(const char *text, size_t length, uint32_t *code)
{
    static const uint32_t least[5] = {0, 0, 0x80, 0x800, 0x10000};
    unsigned char first            = (unsigned char)text[0];
    size_t n                       = utf8_length(first);
    uint32_t value                 = n == 1 ? first : first & (0x7fu >> n);

    *code = 0xfffd;
    if (n == 0 || n > length) {
        return 1;
    }
    for (size_t i = 1; i < n; i++) {
        if (((unsigned char)text[i] & 0xc0u) != 0x80u) {
            return 1;
        }
        value = value << 6 | ((unsigned char)text[i] & 0x3fu);
    }
    if (value < least[n] || value > 0x10ffff || (value >= 0xd800 && value <= 0xdfff)) {
        return 1;
    }
    *code = value;
    return n;
}

size_t
utf8_unfinished(const char *text, size_t length)
{
    for (size_t back = 1; back <= 3 && back <= length; back++) {
        unsigned char byte = (unsigned char)text[length - back];
        if ((byte & 0xc0u) != 0x80u) {
            return utf8_length(byte) > back ? back : 0;
        }
    }
    return 0;
}
