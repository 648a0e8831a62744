/* dev.h: a cluster on this machine, for trying things out and for tests. */
#ifndef ATTN_DAEMON_DEV_H
#define ATTN_DAEMON_DEV_H

/** `attnd dev ...`: argv after the command. @return the process' exit code */
int dev_main(int argc, char **argv);

#endif
