#include "tests/stress/proc.h"

#include <dirent.h>
#include <stdio.h>
#include <unistd.h>

static uint32_t
entries_of(pid_t pid, const char *what)
{
    char path[64];
    uint32_t n = 0;

    snprintf(path, sizeof(path), "/proc/%d/%s", (int)pid, what);
    DIR *folder = opendir(path);
    for (struct dirent *e; folder != NULL && (e = readdir(folder)) != NULL;) {
        n += e->d_name[0] != '.';
    }
    if (folder != NULL) {
        closedir(folder);
    }
    return n;
}

bool
proc_count(pid_t pid, proc_counts_t *counts)
{
    char path[64];
    unsigned long long size = 0, resident = 0;

    snprintf(path, sizeof(path), "/proc/%d/statm", (int)pid);
    FILE *file = fopen(path, "r");
    bool read  = file != NULL && fscanf(file, "%llu %llu", &size, &resident) == 2;
    if (file != NULL) {
        fclose(file);
    }
    counts->threads     = entries_of(pid, "task");
    counts->descriptors = entries_of(pid, "fd") - (pid == getpid()); /* the folder is open, too */
    counts->rss_bytes   = resident * (uint64_t)sysconf(_SC_PAGESIZE);
    return read && counts->threads > 0;
}
