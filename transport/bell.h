#ifndef EP_TRANSPORT_BELL_H
#define EP_TRANSPORT_BELL_H
/*
 * bell: how a rank that sleeps is woken by a message of another process, inside transport/ only.
 * Ranks of one host share a small memory segment with one futex word each; others send a datagram.
 * The bell carries no data and may be lost: a sleeper looks for itself every BELL_NET_MS.
 *
 * The ranks open their bells together, in four steps between which the caller exchanges what it got
 * (see mpi.c): bell_open makes this rank's card; bell_share, with all cards, makes the host's
 * segment; bell_join maps it; bell_connect, with all results of bell_join, removes its name. After
 * that bell_ring_self may be called from any thread, the rest from one.
 */
#include "base/base.h"

#define BELL_NET_MS 200

/* What a rank tells the others about itself; sent as bytes between equal binaries. */
typedef struct bell_card {
    char host[64], boot[40]; /* name and boot id of the machine */
    uint64_t token;          /* random; rank 0's marks the datagrams of the job */
    uint32_t address;        /* IPv4, network order; 0: none */
    uint16_t port;           /* network order */
    uint16_t is_ok;          /* set by the caller: this rank's part of opening went well */
    uint32_t zero;
} bell_card;

typedef struct bell bell;

/* card is set even where bell_open fails (is_ok = 0), so that the exchange can go on. */
ep_status bell_open(bell **out, int rank, int n_ranks, bell_card *card, ep_err *err);
void bell_share(bell *b, const bell_card *cards);
/* The rank whose segment this one sees, -1 for none. */
int32_t bell_join(bell *b, const bell_card *cards);
ep_status bell_connect(bell *b, const bell_card *cards, const int32_t *joined, ep_err *err);

void bell_ring(bell *b, int peer); /* after the message was sent */
void bell_ring_self(bell *b);
/* Says that this rank is about to sleep; look once more for messages before bell_sleep. */
uint32_t bell_arm(bell *b);
void bell_disarm(bell *b);
/* Sleeps until rung since bell_arm, at most ns; disarms. */
void bell_sleep(bell *b, uint32_t armed, int64_t ns);
/* Whether the bell was rung since the last call: a message is here, or will be in a moment. */
bool bell_rang(bell *b);
/* Number of peers reached by datagram. */
int bell_n_remote(const bell *b);
void bell_close(bell *b);

#endif
