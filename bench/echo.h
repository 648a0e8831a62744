/*
 * echo.h: the floor under a remote layer: what gRPC C core alone takes to carry so many bytes
 * to a process and so many back. Nothing of attnd is in it: no protobuf, no handlers, no locks;
 * one thread and one completion queue on each side. What libattn and a worker take beyond is
 * theirs to answer for.
 */
#ifndef ATTN_BENCH_ECHO_H
#define ATTN_BENCH_ECHO_H

#include <stdbool.h>
#include <stdint.h>

#define ECHO_BYTES_MAX (8u << 20) /* of a message */
#define ECHO_SERVERS_MAX 64u

typedef struct echo echo_t;

/** Be a server on a free port of 127.0.0.1, which goes to port_fd as a line of text. Polls for
 * spin_us before it sleeps. Never returns: it ends with its parent. */
void echo_serve(int port_fd, uint32_t spin_us) __attribute__((noreturn));

/** Connect to n servers: streaming, with one stream to each that stays open; else every message
 * is a unary call. Ends the program if one does not answer. */
echo_t *echo_open(const uint16_t *ports, uint32_t n, bool streaming, uint32_t spin_us);

/** Send `request` bytes (at least 4) to every server and wait until each has answered with
 * `reply` bytes, which are copied out. All are under way at once. */
void echo_round(echo_t *echo, uint32_t request, uint32_t reply);

void echo_close(echo_t *echo);

#endif
