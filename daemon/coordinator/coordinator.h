/* coordinator.h: the coordinator daemon, membership and the front door for thin clients. */
#ifndef ATTN_DAEMON_COORDINATOR_H
#define ATTN_DAEMON_COORDINATOR_H

/** `attnd coordinator ...`: argv after the command. @return the process' exit code */
int coordinator_main(int argc, char **argv);

#endif
