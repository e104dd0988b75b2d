/* The lifecycle of a call, checked by spin (tests/protocol/test_spec.py, docs/verification.md).
 *
 * Modelled: producers that push again after a lost reply, and reuse an id once its record has expired; two routers that
 * read, place and die; two engines, the first with two worker processes (a zombie and its successor, under one id);
 * claims, chunks and ends whose replies are lost and which are repeated; leases that expire under dead and under live
 * workers; cancels at any time.
 *
 * Each atomic or d_step block is one run of one Lua script (named next to it), because Redis runs one script at a time.
 *
 * Not modelled: data loss in Redis (see tests/workers/test_lost_writes.py), batches, queue order, priorities, sessions,
 * parking, drains, deadlines (they act like cancels), poison and error counts, overload, and time (a lease may expire
 * at any moment). tests/protocol/test_state_machine.py covers what the model leaves out.
 *
 * The number of faults is limited, so every run is finite (-DNP: there is no cycle). When no process can take a step,
 * all calls have ended (the last line). So every accepted call ends under every schedule. Each -D in capitals of
 * tests/protocol/test_spec.py removes one safeguard.
 */
#ifndef CRASHES
#define CRASHES 1   /* of workers */
#endif
#ifndef LAPSES
#define LAPSES 1    /* leases that expire under a live worker: a pause, a slow network */
#endif
#ifndef LOSSES
#define LOSSES 1    /* replies */
#endif
#ifndef ROUTER_CRASHES
#define ROUTER_CRASHES 1
#endif
#ifndef CANCELS
#define CANCELS 1
#endif

#ifndef PRODUCERS
#define PRODUCERS 2 /* with one call each; the first one's id is used twice */
#endif

#define CALLS 2
#define ENGINES 2
#define GENERATIONS 2
#define CHUNKS 1
#define NO_ENGINE ENGINES

/* states of a record */
#define NONE 0
#define PENDING 1
#define RUNNING 2
#define COMPLETED 3
#define CANCELLED 4

typedef Record {
  byte state, gen, attempt, engine, events;
  bit flagged;
  /* ghost variables, used only by the properties */
  byte ends, begun;
  bit acknowledged
};
typedef Engine {
  byte incarnation;
  bit claimed[CALLS];      /* by the latest claim, until its reply has arrived; later claims have another number */
  bit lease, dead, up      /* up: the process of this incarnation is alive */
};

Record call[CALLS];
Engine engine[ENGINES];
bit stream[CALLS * GENERATIONS];   /* one entry per call and generation; index ENTRY(c, gen) */
byte producers_done;
byte crashes = CRASHES, lapses = LAPSES, losses = LOSSES, router_crashes = ROUTER_CRASHES, cancels = CANCELS;

#define ENTRY(c, g) ((c) * GENERATIONS + (g) - 1)
#define ENDED(c) (call[c].state >= COMPLETED)
#define OVER (producers_done == PRODUCERS && (ENDED(0) || call[0].state == NONE) && (ENDED(1) || call[1].state == NONE))
#define WAITS_AT(c, e) (call[c].state == PENDING && call[c].engine == e)
#define RUNS_AT(c, e) (call[c].state == RUNNING && call[c].engine == e)
#define WAITS_ON_STREAM(c, g) (call[c].state == PENDING && call[c].gen == g && call[c].engine == NO_ENGINE)
#define READY(e) (engine[e].incarnation && !engine[e].dead)
#define OWNS(me, e) (engine[e].incarnation == me && !engine[e].dead)

#ifdef NO_ATTEMPT
#define FENCE(c, g, a, e) (call[c].gen == g && call[c].engine == e)
#elif defined(NO_GENERATION)
#define FENCE(c, g, a, e) (call[c].attempt == a && call[c].engine == e)
#else
#define FENCE(c, g, a, e) (call[c].gen == g && call[c].attempt == a && call[c].engine == e)
#endif

/* Safeguards that a mutant removes. */
#ifdef CLAIM_WITHOUT_LEASE
#define CLAIM_IS_FENCED false
#else
#define CLAIM_IS_FENCED (!OWNS(me, e))
#endif
#ifdef NO_CLAIM_NUMBER
#define CLAIM_IS_NEW true
#else
#define CLAIM_IS_NEW !(engine[e].claimed[0] || engine[e].claimed[1])
#endif
#ifdef NO_CHUNK_NUMBER
#define CHUNK_IS_NEW(i) true
#else
#define CHUNK_IS_NEW(i) (n[i] >= call[i].events)
#endif
#ifdef FINISH_TWICE
#define CAN_END(i) (call[i].state >= RUNNING)
#else
#define CAN_END(i) (call[i].state == RUNNING)
#endif
#ifdef CANCEL_IGNORED
#define CANCEL_HOLDS(i) false
#else
#define CANCEL_HOLDS(i) (call[i].flagged)
#endif

/* terminal.lua: the only place where a call ends */
inline end_call(c, how) {
  call[c].state = how;
  call[c].ends++;
  assert(call[c].ends == 1);                                       /* no double completion */
  assert(!(call[c].acknowledged && how == COMPLETED))              /* an acknowledged cancel holds */
}

/* lost.lua: an attempt ended without a result; next_engine: the engine that gets the call back, or NO_ENGINE */
inline lose_attempt(c, next_engine) {
  if
  :: call[c].flagged -> end_call(c, CANCELLED)
  :: else ->
#ifndef REAP_WITHOUT_ATTEMPT
    call[c].attempt++;
#endif
    call[c].state = PENDING;
    call[c].engine = next_engine;
    if
    :: next_engine == NO_ENGINE -> stream[ENTRY(c, call[c].gen)] = 1
    :: else -> skip
    fi
  fi
}

/* submit.lua */
inline submit(c) {
  if
  :: call[c].state == NONE ->
    call[c].state = PENDING; call[c].gen++; call[c].attempt = 1; call[c].engine = NO_ENGINE;
    call[c].events = 0; call[c].flagged = 0;
    call[c].ends = 0; call[c].begun = 0; call[c].acknowledged = 0;
    stream[ENTRY(c, call[c].gen)] = 1
  :: else -> skip                                                  /* duplicate */
  fi
}

proctype Producer(byte c) {
  d_step { submit(c) }
  if
  :: atomic { losses > 0 -> losses-- }; d_step { submit(c) }       /* the reply was lost: push again */
  :: skip
  fi;
  if
  :: c == 0 -> atomic { ENDED(c) -> call[c].state = NONE }         /* the record expires, and its id is reused */
     d_step { submit(c) }
  :: skip
  fi;
  producers_done++
}

proctype Canceller() {
  byte c;
end:
  do
  :: atomic { cancels > 0 ->                                       /* cancel.lua */
      cancels--;
      if :: c = 0 :: c = 1 fi;
      if
      :: call[c].state == PENDING -> call[c].acknowledged = 1; end_call(c, CANCELLED)
      :: call[c].state == RUNNING -> call[c].acknowledged = 1; call[c].flagged = 1
      :: else -> skip
      fi;
      c = 0 }
  od
}

/* A router reads an entry, or takes it over from another router: any entry on the stream may reach any router. */
proctype Router() {
  byte c, g, e;                                                    /* g > 0: it is processing an entry */
end:
  do
  :: atomic { g == 0 && (stream[0] || stream[1] || stream[2] || stream[3]) ->
      if
      :: stream[0] -> c = 0; g = 1
      :: stream[1] -> c = 0; g = 2
      :: stream[2] -> c = 1; g = 1
      :: stream[3] -> c = 1; g = 2
      fi
#ifdef TAKE_ON_READ
      ; stream[ENTRY(c, g)] = 0
#endif
      }
  :: atomic { g > 0 && router_crashes > 0 -> router_crashes--; c = 0; g = 0 }
  :: atomic { g > 0 && !WAITS_ON_STREAM(c, g) ->
      stream[ENTRY(c, g)] = 0; c = 0; g = 0 }                      /* assign.lua: stale */
  :: atomic { g > 0 && WAITS_ON_STREAM(c, g) && (READY(0) || READY(1)) ->
      if                                                           /* assign.lua: to a ready engine */
      :: READY(0) -> e = 0
      :: READY(1) -> e = 1
      fi;
      stream[ENTRY(c, g)] = 0; call[c].engine = e; c = 0; g = 0; e = 0 }
  od
}

/* reap.lua */
#define REAPABLE(e) (engine[e].incarnation && !engine[e].lease && \
  (!engine[e].dead || WAITS_AT(0, e) || WAITS_AT(1, e) || RUNS_AT(0, e) || RUNS_AT(1, e)))
inline reap(e) {
  engine[e].dead = 1;
  if
  :: RUNS_AT(0, e) -> lose_attempt(0, NO_ENGINE)
  :: else ->
    if
    :: RUNS_AT(1, e) -> lose_attempt(1, NO_ENGINE)
    :: else ->
      if
      :: WAITS_AT(0, e) -> call[0].engine = NO_ENGINE; stream[ENTRY(0, call[0].gen)] = 1
      :: else ->
        if
        :: WAITS_AT(1, e) -> call[1].engine = NO_ENGINE; stream[ENTRY(1, call[1].gen)] = 1
        :: else -> skip
        fi
      fi
    fi
  fi
}

/* The passing of time, and the maintenance of any router. One run of reap.lua moves one call (its limit may be that
 * small), so that anything can happen between two of them. */
proctype Maintenance() {
end:
  do
  :: d_step { engine[0].lease && !engine[0].up -> engine[0].lease = 0 }
  :: d_step { engine[1].lease && !engine[1].up -> engine[1].lease = 0 }
  :: d_step { lapses > 0 && engine[0].lease -> lapses--; engine[0].lease = 0 }
  :: d_step { lapses > 0 && engine[1].lease -> lapses--; engine[1].lease = 0 }
  :: d_step { REAPABLE(0) -> reap(0) }
  :: d_step { REAPABLE(1) -> reap(1) }
  od
}

/* The steps of a worker; they all use its own variables. */
inline drop(i) { gen[i] = 0; attempt[i] = 0; n[i] = 0; run_no[i] = 0 }

inline hold(i) { gen[i] = call[i].gen; attempt[i] = call[i].attempt; n[i] = call[i].events; run_no[i] = call[i].begun }

/* claim.lua; after a lost reply, a claim with the same number returns the same calls */
inline take(i) {
  engine[e].claimed[i] = WAITS_AT(i, e);
  if
  :: WAITS_AT(i, e) ->
    call[i].state = RUNNING;
    call[i].begun++
  :: else
  fi
}
inline claim() {
  if
  :: CLAIM_IS_FENCED -> goto fenced
  :: else ->
    if
#ifndef NO_CLAIM_NUMBER
    :: engine[e].claimed[0] || engine[e].claimed[1] -> skip          /* repeats the number of the latest claim */
#endif
    :: CLAIM_IS_NEW -> take(0); take(1)
    fi;
    if
    :: losses > 0 -> losses--; again = 1
    :: again = 0;
      if :: engine[e].claimed[0] && RUNS_AT(0, e) -> hold(0) :: else fi;
      if :: engine[e].claimed[1] && RUNS_AT(1, e) -> hold(1) :: else fi;
      engine[e].claimed[0] = 0; engine[e].claimed[1] = 0           /* its next claim has another number */
    fi
  fi
}

/* publish.lua */
inline publish(i) {
  if
  :: call[i].state == RUNNING && FENCE(i, gen[i], attempt[i], e) ->
    if
    :: CHUNK_IS_NEW(i) ->
      assert(gen[i] == call[i].gen && run_no[i] == call[i].begun);  /* no output of an old attempt */
      assert(call[i].events == n[i]);                                /* each chunk exactly once */
      call[i].events++
    :: else -> skip                                                  /* already in the log */
    fi;
    if
    :: losses > 0 -> losses--
    :: n[i]++
    fi
  :: else -> drop(i)                                                 /* stale */
  fi
}

/* finish.lua */
inline finish(i) {
  if
  :: FENCE(i, gen[i], attempt[i], e) && CAN_END(i) ->
    assert(gen[i] == call[i].gen && run_no[i] == call[i].begun);    /* no end from an old attempt */
    if
    :: CANCEL_HOLDS(i) -> end_call(i, CANCELLED)
    :: else -> end_call(i, COMPLETED)
    fi;
    if
    :: losses > 0 -> losses--
    :: drop(i)
    fi
  :: else -> drop(i)                                                 /* repeated, or stale */
  fi
}

/* e: the engine that it serves. Two workers of one engine are a zombie and its successor, in any order. me: identifies
 * its incarnations. Its own earlier incarnations can do nothing any more, so they need no other identity. */
proctype Worker(byte e; byte me) {
  bit again;                                                       /* a claim's reply was lost */
  byte run_no[CALLS];                                              /* ghost: which run of its call it holds */
  byte gen[CALLS], attempt[CALLS], n[CALLS];                       /* the calls it holds: fences and the next chunk */
end_registering:
  if
  :: atomic { !engine[e].lease || engine[e].dead ->                /* register.lua */
      engine[e].incarnation = me; engine[e].lease = 1; engine[e].dead = 0; engine[e].up = 1;
      engine[e].claimed[0] = 0; engine[e].claimed[1] = 0;
#ifndef REGISTER_FORGETS
      if :: RUNS_AT(0, e) -> lose_attempt(0, e) :: else fi;
      if :: RUNS_AT(1, e) -> lose_attempt(1, e) :: else fi
#endif
      }
  fi;
end_working:
  do
  :: d_step { OWNS(me, e) && !engine[e].lease -> engine[e].lease = 1 }           /* heartbeat.lua: in time */
  :: !OWNS(me, e) -> goto fenced                                                 /* heartbeat.lua: too late */
  :: atomic { crashes > 0 ->
      crashes--;
      if :: engine[e].incarnation == me -> engine[e].up = 0 :: else fi;
      goto fenced }
  :: atomic { again || WAITS_AT(0, e) || WAITS_AT(1, e) -> claim() }
  :: atomic { gen[0] && n[0] < CHUNKS -> publish(0) }
  :: atomic { gen[1] && n[1] < CHUNKS -> publish(1) }
  :: atomic { gen[0] && n[0] == CHUNKS -> finish(0) }
  :: atomic { gen[1] && n[1] == CHUNKS -> finish(1) }
  od;
fenced:                                                            /* it drops its calls, and registers again */
  atomic { drop(0); drop(1); again = 0 };
  goto end_registering
}

init {
  atomic {
    run Producer(0);
    if :: PRODUCERS == 2 -> run Producer(1) :: else fi;
    run Router(); run Router();
    run Worker(0, 1); run Worker(0, 2); run Worker(1, 3);
    run Maintenance(); run Canceller()
  };
  timeout -> assert(OVER)                                          /* no call is lost or stuck */
}
