#include "tests/stress/proc.h"

#include <dirent.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define NAMES_MAX 32u
#define NAME_MAX_BYTES 32u

/* Pools of C core whose size follows load: it names their threads. Ours keep the program's name.
 * "timer_manager" and "grpc_shutdown" are not among them: there is one at most. */
static const char *const pools[] = {"default-executo", "resolver-execut", "grpc_global_tim",
                                    "event_engine"};
#define POOLS (sizeof(pools) / sizeof(pools[0]))

typedef struct names {
    uint32_t n, counts[NAMES_MAX];
    char names[NAMES_MAX][NAME_MAX_BYTES];
} names_t;

static void
add_name(names_t *all, const char *name)
{
    for (uint32_t i = 0; i < all->n; i++) {
        if (strcmp(all->names[i], name) == 0) {
            all->counts[i]++;
            return;
        }
    }
    if (all->n < NAMES_MAX) {
        snprintf(all->names[all->n], NAME_MAX_BYTES, "%s", name);
        all->counts[all->n++] = 1;
    }
}

static void
read_names(pid_t pid, names_t *all)
{
    char path[300], name[NAME_MAX_BYTES];

    *all = (names_t){0};
    snprintf(path, sizeof(path), "/proc/%d/task", (int)pid);
    DIR *folder = opendir(path);
    for (struct dirent *e; folder != NULL && (e = readdir(folder)) != NULL;) {
        snprintf(path, sizeof(path), "/proc/%d/task/%s/comm", (int)pid, e->d_name);
        FILE *file = e->d_name[0] != '.' ? fopen(path, "r") : NULL;
        if (file != NULL && fscanf(file, "%31s", name) == 1) {
            add_name(all, name);
        }
        if (file != NULL) {
            fclose(file);
        }
    }
    if (folder != NULL) {
        closedir(folder);
    }
}

static bool
is_pool(const char *name)
{
    for (uint32_t i = 0; i < POOLS; i++) {
        if (strcmp(name, pools[i]) == 0) {
            return true;
        }
    }
    return false;
}

static uint32_t
descriptors_of(pid_t pid)
{
    char path[64];
    uint32_t n = 0;

    snprintf(path, sizeof(path), "/proc/%d/fd", (int)pid);
    DIR *folder = opendir(path);
    for (struct dirent *e; folder != NULL && (e = readdir(folder)) != NULL;) {
        n += e->d_name[0] != '.';
    }
    if (folder != NULL) {
        closedir(folder);
        n -= pid == getpid(); /* the folder is open, too */
    }
    return n;
}

/* @return false if there is no such process */
static bool
read_memory(pid_t pid, proc_counts_t *counts)
{
    char path[64], line[512];
    unsigned long long first, end, resident, mapping = 0;

    snprintf(path, sizeof(path), "/proc/%d/smaps", (int)pid);
    FILE *file = fopen(path, "r");
    while (file != NULL && fgets(line, sizeof(line), file) != NULL) {
        if (sscanf(line, "%llx-%llx ", &first, &end) == 2) {
            mapping = end - first;
        } else if (sscanf(line, "Rss: %llu kB", &resident) == 1) {
            counts->rss_bytes += resident * 1024;
            counts->heap_bytes += mapping < PROC_SLAB_BYTES ? resident * 1024 : 0;
        }
    }
    if (file != NULL) {
        fclose(file);
    }
    return counts->rss_bytes > 0;
}

bool
proc_count(pid_t pid, proc_counts_t *counts)
{
    names_t all;

    *counts = (proc_counts_t){0};
    read_names(pid, &all);
    for (uint32_t i = 0; i < all.n; i++) {
        *(is_pool(all.names[i]) ? &counts->core_threads : &counts->threads) += all.counts[i];
    }
    counts->descriptors = descriptors_of(pid);
    return read_memory(pid, counts) && counts->threads > 0;
}

bool
proc_grew(const proc_counts_t *before, const proc_counts_t *now)
{
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    /* A process in which C core does not run any more has none of its threads. */
    uint32_t room =
        before->core_threads > 0 ? (uint32_t)POOLS * 2 * (uint32_t)(cores > 0 ? cores : 1) : 0;

    return now->threads > before->threads || now->core_threads > before->core_threads + room ||
           now->descriptors > before->descriptors;
}

void
proc_thread_names(pid_t pid, char *text, size_t size)
{
    names_t all;
    size_t n = 0;

    text[0] = '\0';
    read_names(pid, &all);
    for (uint32_t i = 0; i < all.n && n < size; i++) {
        n += (size_t)snprintf(text + n, size - n, "%s%u %s", i > 0 ? ", " : "", all.counts[i],
                              all.names[i]);
    }
}
