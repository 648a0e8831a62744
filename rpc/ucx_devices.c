/*
 * ucx_devices.c: over which devices of the network a client takes messages. UCX opens a port on
 * each TCP device that it may use, and who reaches that port can write into the process; so it is
 * one of them, by which the system reaches the worker, unless UCX_NET_DEVICES names others. Devices
 * of RDMA open nothing that takes writes without a key, and may be all used.
 */
#include "rpc/ucx_asks_int.h"

#include "base/status.h"

#include <dirent.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#define ANY_PORT "9" /* nothing is sent there */

/* The host of "scheme:///host:port", "host:port" or "[host]:port". */
static bool
host_of(const char *address, char *host, size_t room)
{
    const char *slash = strrchr(address, '/');
    const char *from  = slash != NULL ? slash + 1 : address;
    const char *colon = strrchr(from, ':');
    size_t n          = colon != NULL ? (size_t)(colon - from) : strlen(from);

    if (n >= 2 && from[0] == '[' && from[n - 1] == ']') {
        from++;
        n -= 2;
    }
    if (n == 0 || n >= room) {
        return false;
    }
    memcpy(host, from, n);
    host[n] = '\0';
    return true;
}

/* The address that this host has towards another. */
static bool
own_address(const struct addrinfo *to, struct sockaddr_storage *own)
{
    socklen_t size = sizeof(*own);
    int fd         = socket(to->ai_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    if (fd < 0) {
        return false;
    }
    bool good = connect(fd, to->ai_addr, to->ai_addrlen) == 0 &&
                getsockname(fd, (struct sockaddr *)own, &size) == 0;
    close(fd);
    return good;
}

static bool
is_same(const struct sockaddr *a, const struct sockaddr *b)
{
    if (a == NULL || a->sa_family != b->sa_family) {
        return false;
    }
    return a->sa_family == AF_INET
               ? memcmp(&((const struct sockaddr_in *)(const void *)a)->sin_addr,
                        &((const struct sockaddr_in *)(const void *)b)->sin_addr,
                        sizeof(struct in_addr)) == 0
               : a->sa_family == AF_INET6 &&
                     memcmp(&((const struct sockaddr_in6 *)(const void *)a)->sin6_addr,
                            &((const struct sockaddr_in6 *)(const void *)b)->sin6_addr,
                            sizeof(struct in6_addr)) == 0;
}

static bool
device_with(const struct sockaddr *own, char *name, size_t room)
{
    struct ifaddrs *all;
    bool found = false;

    if (getifaddrs(&all) != 0) {
        return false;
    }
    for (const struct ifaddrs *i = all; i != NULL && !found; i = i->ifa_next) {
        if (is_same(i->ifa_addr, own)) {
            found = (size_t)snprintf(name, room, "%s", i->ifa_name) < room;
        }
    }
    freeifaddrs(all);
    return found;
}

/* Add ",NAME:PORT" of each port of a device of RDMA, as far as there is room. */
static void
add_ports(const char *device, char *devices, size_t room)
{
    char path[320];

    snprintf(path, sizeof(path), "/sys/class/infiniband/%s/ports", device);
    DIR *ports = opendir(path);
    if (ports == NULL) {
        return;
    }
    for (const struct dirent *p = readdir(ports); p != NULL; p = readdir(ports)) {
        size_t n = strlen(devices), more = strlen(device) + strlen(p->d_name) + 2;
        if (p->d_name[0] != '.' && n + more < room) {
            snprintf(devices + n, room - n, ",%s:%s", device, p->d_name);
        }
    }
    closedir(ports);
}

static void
add_rdma(char *devices, size_t room)
{
    DIR *all = opendir("/sys/class/infiniband");

    if (all == NULL) {
        return; /* there are none */
    }
    for (const struct dirent *d = readdir(all); d != NULL; d = readdir(all)) {
        if (d->d_name[0] != '.') {
            add_ports(d->d_name, devices, room);
        }
    }
    closedir(all);
}

attn_status_t
ucx_devices_to(const char *address, char *devices, size_t room)
{
    struct addrinfo hints = {.ai_socktype = SOCK_DGRAM}, *to = NULL;
    struct sockaddr_storage own;
    char host[256];

    if (getenv("UCX_NET_DEVICES") != NULL) {
        snprintf(devices, room, "all"); /* of those */
        return ATTN_OK;
    }
    bool found = address != NULL && host_of(address, host, sizeof(host)) &&
                 getaddrinfo(host, ANY_PORT, &hints, &to) == 0 && own_address(to, &own) &&
                 device_with((const struct sockaddr *)&own, devices, room);
    if (to != NULL) {
        freeaddrinfo(to);
    }
    if (!found) {
        return attn_fail(ATTN_ERR_UNSUPPORTED,
                         "no device of the network is known that leads to the worker at %.100s: "
                         "UCX_NET_DEVICES may name some",
                         address != NULL ? address : "");
    }
    add_rdma(devices, room);
    return ATTN_OK;
}
