/* page.h: page.html, as bytes (cmake/embed.cmake). */
#ifndef ATTN_DAEMON_PAGE_H
#define ATTN_DAEMON_PAGE_H

#include <stddef.h>

extern const unsigned char monitor_page[];
extern const size_t monitor_page_size;

#endif
