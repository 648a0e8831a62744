/* worker.h: the worker daemon, the engine behind rpc. */
#ifndef ATTN_DAEMON_WORKER_H
#define ATTN_DAEMON_WORKER_H

/** `attnd worker ...`: argv after the command. @return the process' exit code */
int worker_main(int argc, char **argv);

#endif
