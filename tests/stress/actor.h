/*
 * actor.h: one client thread: random acts on sequences of its own, each answer judged, each call
 * timed, each error held against what was promised.
 */
#ifndef ATTN_TESTS_STRESS_ACTOR_H
#define ATTN_TESTS_STRESS_ACTOR_H

#include "tests/stress/shared.h"
#include "tests/stress/truth.h"

#include <pthread.h>

#define ACTOR_SEQS 6u
#define ACTOR_LOG 40u
#define ACTOR_ROWS 400u     /* query rows, and new tokens, of a step */
#define ACTOR_TWIN_ROWS 64u /* of an entry that is asked again elsewhere */
#define ACTOR_ENTRIES 4u
#define LIST_PAGES (8u * 192)
#define ACTOR_DRAFT 24u    /* tokens of a tree draft */
#define ACTOR_LENGTH 1100u /* sequences are cut when they grow longer */
#define ACTOR_LAYERS 4u

/** A client, a cache and what its threads share. Opened anew when the coordinator was. */
typedef struct connection {
    pthread_rwlock_t lock; /* held for reading during an act */
    target_t target;
    bool open;
    uint32_t index;       /* among those of its process */
    uint32_t number;      /* how often it was opened */
    uint32_t coordinator; /* stress->coordinators when it was opened */
    shadow_t common;      /* a sequence that all its threads fork */
    atomic_bool common_is_lost;
} connection_t;

/** Close it, if it is open, and count what went over it. */
void connection_close(connection_t *connection, stress_t *stress);

typedef struct actor {
    const client_plan_t *plan;
    stress_t *stress;
    actor_figures_t *figures;
    connection_t *connection;
    uint32_t number; /* of the actor, in the whole run */
    uint32_t opened; /* connection->number that the shadows belong to */
    const attn_geometry_t *geometry;
    chance_t chance;
    uint64_t next_content;

    shadow_t seqs[ACTOR_SEQS];
    uint64_t unsettled_until_ns[ACTOR_SEQS]; /* a step that met a disturbance may still be open */

    /* The call in progress. */
    const char *call;
    uint64_t call_began_ns, call_ends_ns;
    uint32_t disturbances; /* when the act began */
    uint64_t act_began_ns;

    float *q, *k, *v, *o, *lse; /* of a step; elements as wide as f32 */
    float *twin_o, *twin_lse;   /* [layers] of the entry to be asked again */
    target_t twin;              /* an engine of its own; open when first needed */
    bool twin_open;
    uint32_t n_log;
    char log[ACTOR_LOG][200];
} actor_t;

void *actor_thread(void *actor);
bool actor_init(actor_t *actor, const client_plan_t *plan, uint32_t number,
                connection_t *connection);
void actor_fini(actor_t *actor);

/** Note what is done, for the tail that a failure prints. */
void actor_log(actor_t *actor, const char *format, ...) __attribute__((format(printf, 2, 3)));

/** The run failed: prints words, seed and the log's tail, and stops everybody. */
void actor_fail(actor_t *actor, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* ---- calls ---- */

/** A call begins that is to end by deadline_ns; and ended. Too late is a failure. */
void actor_call(actor_t *actor, const char *name, uint64_t deadline_ns);
attn_status_t actor_called(actor_t *actor, attn_status_t status);

/** Did a disturbance touch the time since the act began? Then calls may fail as promised. */
bool actor_excused(const actor_t *actor);

/** A failed call is fine if it is of a kind that disturbances cause, and there was one.
 * @return whether it is; if not, the run failed */
bool actor_accepts(actor_t *actor, const char *what, attn_status_t status);

/* ---- sequences ---- */

/** Ask what is committed, hold it against the shadow, and cut or drop what was lost.
 * @return the sequence can be used */
bool actor_resolve(actor_t *actor, uint32_t s);
void actor_drop(actor_t *actor, uint32_t s); /* free it here and there */

/* ---- steps ---- */

void actor_step(actor_t *actor);

/** Append n tokens of this content to a sequence, without queries. @return its status */
attn_status_t actor_ingest(actor_t *actor, target_t *target, shadow_t *s, uint64_t n,
                           uint64_t content);

/** Write tokens [first, end) of the shadow at their places: at the sequence's end, or into a hole.
 * @return the status of the first step that failed */
attn_status_t actor_write(actor_t *actor, target_t *target, attn_seq_t seq, const shadow_t *from,
                          uint64_t first, uint64_t end);

/** Read committed tokens of some layers back, and hold them against the shadow. */
void actor_export(actor_t *actor, uint32_t s);

/** One entry of a step. */
typedef struct part {
    uint32_t s; /* of actor->seqs */
    uint64_t base;
    uint32_t n_q, n_new, accepted;
    uint64_t content, q_content;
    uint32_t q_row, new_row; /* first rows in the step's tensors */
    uint32_t n_lists, indptr[9], pages[LIST_PAGES];
    bool by_run; /* the lists are those of a run, drawn anew for each */
    bool masked; /* n_q rows of mask; path: what is kept, accepted of it */
    uint8_t mask[ACTOR_DRAFT * ((ACTOR_DRAFT + 7) / 8)];
    uint32_t path[ACTOR_DRAFT];
    uint64_t shift; /* rows of content are those at position + shift */
} part_t;

/** Is this entry's answer, alone in an engine of another shape, the same bit by bit? The answers
 * of all layers are in twin_o and twin_lse. */
void actor_twin(actor_t *actor, const part_t *part, const attn_batch_t *batch);

void actor_write_rows(const actor_t *actor, const part_t *part, uint32_t layer, bool with_q,
                      bool with_kv);
question_t actor_question(const actor_t *actor, const part_t *part, uint32_t layer,
                          attn_dtype_t o_dtype);

#endif
