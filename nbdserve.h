/* nbdserve.h - serve block devices over NBD from your own program.
 * SPDX-License-Identifier: 0BSD (full text at the end)
 *
 * Compile nbdserve.c with -DNBDSERVE_NO_MAIN, include this file, and:
 *
 *   1. fill a struct nbdserve_ops with your functions (only read is required)
 *   2. call nbdserve_new, nbdserve_add, nbdserve_listen, nbdserve_run and, in
 *      the end, nbdserve_free
 *
 * Conventions: a function that can fail returns 0 or a negative errno value.
 * Zero all structures, then set what you need: 0 and NULL always mean the
 * default.  Strings are UTF-8, end with NUL, and are copied where they are
 * kept.  proto.md is doc/proto.md of NetworkBlockDevice/nbd, the protocol.
 *
 * What the library leaves to you: it installs no signal handlers, prints
 * nothing, never exits, reads no environment, changes neither locale nor umask
 * nor directory, and keeps no global state, so that several servers may live in
 * one process.  Its descriptors are closed on exec.  It may change errno,
 * except in nbdserve_stop and nbdserve_wake.
 *
 * Its own threads have a stack of NBDSERVE_STACK bytes (256 KiB), on which your
 * functions run, too.  They block all signals but those that a fault of the
 * thread itself raises (SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT,
 * SIGSYS): your handlers for these work in them.  A program that serves pipes
 * should ignore SIGPIPE (sockets do not raise it), and one that serves files
 * should ignore SIGXFSZ if it may run under a limit for the size of files.
 */
#ifndef NBDSERVE_H
#define NBDSERVE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define NBDSERVE_VERSION "0.6.0"
#define NBDSERVE_VERSION_NUMBER 600u /* major * 10000 + minor * 100 + patch */

#ifndef NBDSERVE_API
#define NBDSERVE_API /* storage class or visibility of the public functions */
#endif

struct nbdserve;
struct nbdserve_extents;
struct nbdserve_req;

/* ---- Backends ------------------------------------------------------------ */

/* Flags of one call; the numbers are those of NBD_CMD_FLAG_... in proto.md. */

/* write, trim, zero: the data is durable when the call returns.  Only exports
 * with NBDSERVE_EXPORT_NATIVE_FUA see this flag. */
#define NBDSERVE_CMD_FUA 1u
/* zero: the range keeps its space. */
#define NBDSERVE_CMD_NO_HOLE 2u
/* extents: the first extent is enough. */
#define NBDSERVE_CMD_REQ_ONE 8u
/* zero: if this is no faster than to write zeroes, do nothing and return
 * -ENOTSUP. */
#define NBDSERVE_CMD_FAST_ZERO 16u

/* The status of an extent, as in proto.md, base:allocation; 0 is plain data. */
#define NBDSERVE_EXTENT_HOLE 1u /* it has no space */
#define NBDSERVE_EXTENT_ZERO 2u /* it reads as zeroes */
/* In a context qemu:dirty-bitmap:NAME (QEMU, docs/interop/nbd.txt): it may have
 * changed since NAME.  0: it has not. */
#define NBDSERVE_EXTENT_DIRTY 1u

/* What a backend does.
 *
 * Each request was checked before it comes here: len > 0; off and len lie
 * inside the export and are multiples of min_block; nothing writes to a
 * read-only export; flags are those named above for the call.  read and write
 * get at most max_request bytes, and at most 1 MiB, at a time; the others up to
 * the whole export.
 *
 * Return 0 when the whole range is done, or -errno, of which clients see the
 * nearest NBD error.  There are no short counts.  Any other number, an unknown
 * status of an extent, or a size above INT64_MAX is logged (ten times) and
 * taken as -EIO.  "Not supported" is -ENOTSUP; on systems where -EOPNOTSUPP is
 * another number, that one is an error like any other.
 *
 * A NULL member is not offered to clients, with two exceptions: without zero,
 * or where it returns -ENOTSUP, zeroes are written, up to 4 GiB in a request;
 * without extents all is data.
 *
 * Calls come from several threads at once, unless the export says
 * NBDSERVE_EXPORT_SERIAL, and may block for as long as they like. */
struct nbdserve_ops {
  int (*read)(void *ctx, void *buf, uint64_t off, uint64_t len, uint32_t flags);
  int (*write)(void *ctx, const void *buf, uint64_t off, uint64_t len,
               uint32_t flags);
  /* Brings all writes that have returned to permanent storage. */
  int (*flush)(void *ctx, uint32_t flags);
  /* The client no longer needs the data.  This may do nothing. */
  int (*trim)(void *ctx, uint64_t off, uint64_t len, uint32_t flags);
  /* Makes the range read as zeroes. */
  int (*zero)(void *ctx, uint64_t off, uint64_t len, uint32_t flags);
  /* The client will read the range soon. */
  int (*cache)(void *ctx, uint64_t off, uint64_t len, uint32_t flags);
  /* Calls nbdserve_extent for consecutive pieces, from off on, with what is
   * true of them in the context that nbdserve_extents_context gives. */
  int (*extents)(void *ctx, uint64_t off, uint64_t len, uint32_t flags,
                 struct nbdserve_extents *out);
  /* Frees ctx.  No call follows this one. */
  void (*close)(void *ctx);
  /* Called when a client asks for the export, with its size so far; returns its
   * size now, which is remembered.  NULL: the size stays.  A server makes one
   * such call at a time, maybe beside other calls of a SERIAL export; it must
   * not block, nor call the server. */
  uint64_t (*size)(void *ctx, uint64_t size);
  /* These are for nbdserve's own backends only: keep them 0. */
  void (*run_batch)(void *ctx, struct nbdserve_req *reqs, size_t nreqs);
  size_t (*splice)(void *ctx, int pipe, uint64_t off, uint64_t len);
  int hashes;
  uint32_t (*next_context)(void *ctx, uint32_t number, char *name);
  int (*use_context)(void *ctx, uint32_t number, int begins);
};

/* Reports the next extent: len bytes (> 0) with that status.  Returns 0, or 1
 * when the client has enough: the backend may then return.  Only from extents,
 * in its thread. */
NBDSERVE_API int nbdserve_extent(struct nbdserve_extents *out, uint64_t len,
                                 uint32_t status);

/* The metadata context that extents is asked about (proto.md, Metadata
 * querying): 0 is base:allocation, i > 0 the export's contexts[i - 1].  In one
 * of these at least one extent has to be reported, else the client gets EIO.  A
 * block of min_block bytes in which one extent ends and another begins is
 * reported as 0, or in the export's own contexts as 1. */
NBDSERVE_API unsigned
nbdserve_extents_context(const struct nbdserve_extents *out);

/* Flags of an export */

/* Writes are refused with EPERM. */
#define NBDSERVE_EXPORT_READONLY 1u
/* Only one of the calls read ... extents runs at a time. */
#define NBDSERVE_EXPORT_SERIAL 2u
/* A flush on one connection covers the writes of all: clients may open several
 * (proto.md, NBD_FLAG_CAN_MULTI_CONN). */
#define NBDSERVE_EXPORT_MULTI_CONN 4u
/* A hint for the client's scheduler: the disk has a head to move. */
#define NBDSERVE_EXPORT_ROTATIONAL 8u
/* write, zero and trim heed NBDSERVE_CMD_FUA.  Without this a flush follows. */
#define NBDSERVE_EXPORT_NATIVE_FUA 16u
/* Serves every name that no other export has. */
#define NBDSERVE_EXPORT_FALLBACK 32u
/* Every write is treated as if it had FUA. */
#define NBDSERVE_EXPORT_WRITETHROUGH 64u
/* Flush and FUA do nothing: what clients write is not durable. */
#define NBDSERVE_EXPORT_UNSAFE 128u

struct nbdserve_export {
  const char *name;        /* up to 4096 bytes; "" or NULL: the default one */
  const char *description; /* for people, up to 4096 bytes */
  uint64_t size;           /* bytes, any number up to INT64_MAX */
  uint32_t min_block;      /* bytes, a power of two up to 65536; 0: 1 */
  uint32_t
      preferred_block;  /* bytes, a power of two, at least 512 and min_block;
                               0: 4096, or min_block if that is larger */
  uint32_t max_request; /* bytes of one read or write, at least
                               preferred_block; 0: 32 MiB */
  uint32_t flags;       /* NBDSERVE_EXPORT_* */
  const struct nbdserve_ops *ops;
  void *ctx; /* is passed to ops */
  /* Metadata contexts besides base:allocation (proto.md, Metadata querying),
   * ended by NULL; or NULL.  Their names, like qemu:dirty-bitmap:NAME or
   * x-NAME:NAME, have something before and behind a colon, are UTF-8 of up to
   * 4096 bytes, each is another, and none begins with "base:".  They are
   * copied.  They need extents; files and memory of nbdserve_flat_open have
   * none.  A volume or snapshot of a store has one for each other snapshot of
   * the same volume, qemu:dirty-bitmap: and its name behind the @, and of these
   * only the ones named here, if any is; extents of a host that passes calls on
   * to those of a volume must not pass on its own contexts (EINVAL). */
  const char *const *contexts;
};

/* ---- The flat backend: a regular file, a block device, or memory -------- */

#define NBDSERVE_FLAT_READONLY 1u /* clients cannot write */
/* What clients write is gone when the export is closed: it goes to a file
 * without a name, and path is only read.  Several exports may share path.
 * Takes 1 bit of memory for each 64 KiB of the export. */
#define NBDSERVE_FLAT_TEMPORARY 2u

struct nbdserve_flat {
  uint64_t offset; /* serve the target from this byte on */
  uint64_t size;   /* serve this many bytes of it; 0: up to its end */
  uint64_t create; /* if not 0: a file that is missing is made, and one that is
                      empty becomes sparse, with this many bytes */
  uint32_t flags;  /* NBDSERVE_FLAT_* */
  const char *dir; /* TEMPORARY: the directory for the file without a name;
                      NULL: it is in memory (in /tmp where the system has no
                      files in memory) */
};

/* Opens path, or "mem:SIZE", which is memory of that size, and fills the
 * members size, flags, ops and ctx of *out; flags are added to those that are
 * there.  options may be NULL.  If it fails, *out stays as it was.
 *
 * The export goes to nbdserve_add, or is closed with out->ops->close(out->ctx).
 * Until then the file is locked: another server, or a second call for the same
 * file, gets -EBUSY unless both only read it.  So the find callback is no place
 * for this call.  After a failed flush every write and flush of the export
 * fails with -EIO until the file is opened anew.
 *
 * A file that this call has made is removed again if the call then fails; a
 * file that was there before stays.  create makes no file through a symbolic
 * link that leads nowhere: -ENOENT.
 *
 * -ENOENT, -EACCES, -EISDIR, ...: as open(2).  -EBUSY: a server has it.
 * -EROFS: a block device that refuses writes; it needs one of the flags.
 * -EINVAL: not a file or block device, a bad option or mem:SIZE, or the slice
 * is not inside the target.  -EFBIG: create, or mem:SIZE, is more than the file
 * system can hold; or TEMPORARY needs more memory than addresses reach.
 * -ENOMEM.  Others as ftruncate(2), fsync(2) and mkstemp(3). */
NBDSERVE_API int nbdserve_flat_open(const char *path,
                                    const struct nbdserve_flat *options,
                                    struct nbdserve_export *out);

/* ---- The content-addressed store -----------------------------------------
 *
 * A store is one file or block device that holds any number of volumes and
 * snapshots.  Each distinct block is stored once, named by its SHA-256 (FIPS
 * 180-4).  What a flush has covered survives a power cut at any instant.  All
 * calls may come from any thread.
 *
 * A volume is called NAME; a snapshot, which is read-only, VOL@NAME.  A NAME
 * has 1 to 166 bytes, none of / @ " \ and no control characters, and does not
 * begin with "sha256-": such a name is the id of a snapshot
 * (nbdserve_cas_seal).
 *
 * What was answered survives the end of the process, even by SIGKILL.
 *
 * Besides their own errors all calls may return -ENOSPC, which leaves all as it
 * was, -ENOMEM, and -EIO when the medium fails or is damaged; once a sync has
 * failed, all changes do until the store is opened anew.  Changes return -EROFS
 * if the store is read-only.
 *
 * Memory: 16 bytes for each block of the store, cache_mib, and 8 KiB for each
 * 4 GiB of a map of which something is in use.
 */
struct nbdserve_cas;

/* Check a block's SHA-256 when it is read for the first time since the store
 * was opened; the default if the processor computes it. */
#define NBDSERVE_CAS_VERIFY 1u
#define NBDSERVE_CAS_NO_VERIFY 2u /* do not check blocks when they are read */
#define NBDSERVE_CAS_READONLY 4u  /* change nothing; other readers may, too */
/* Go on behind a damaged part of the log; what it said there is lost. */
#define NBDSERVE_CAS_REPAIR 8u
/* Besides, give up the maps and records that cannot be read. */
#define NBDSERVE_CAS_ACCEPT_LOSS 16u

struct nbdserve_cas_options {
  uint32_t flags;      /* NBDSERVE_CAS_* */
  uint32_t block_size; /* init: power of two, 4096 (0: that) to 65536 */
  uint32_t log_pages;  /* init: of 4096 bytes, 8 to 2^24; 0: 4096 */
  uint32_t cache_mib;  /* open: memory for leaves of maps, in MiB; 0: 64 */
};

/* Makes an empty store.  -EEXIST: there is a file of that name (a block device
 * is taken if its first two MiB and its last one are zero).  -EINVAL: bad
 * options.  Others as open(2). */
NBDSERVE_API int nbdserve_cas_init(const char *path,
                                   const struct nbdserve_cas_options *options);

/* Opens a store, and repairs what a crash left behind.  options may be NULL.
 * -EBUSY: another process has it.  -EROFS: it is on a device that refuses
 * writes (NBDSERVE_CAS_READONLY opens it).  -EINVAL: not a store.  -EOPNOTSUPP:
 * one of a version that is not known here.  -EUCLEAN (117 where the system has
 * no such error): damaged, so it is not written until NBDSERVE_CAS_REPAIR or,
 * if that does not do, NBDSERVE_CAS_ACCEPT_LOSS is given; read-only, what is
 * left may be had.  Others as open(2). */
NBDSERVE_API int nbdserve_cas_open(const char *path,
                                   const struct nbdserve_cas_options *options,
                                   struct nbdserve_cas **out);

/* Makes all changes durable and frees the store, whose exports must have been
 * closed.  Returns 0 or the error of that last sync. */
NBDSERVE_API int nbdserve_cas_close(struct nbdserve_cas *cas);

/* Fills *out with a volume or snapshot, as nbdserve_flat_open does with a file.
 * It may be open many times, so the find callback may call this.  For other
 * stores there are two more exports: NAME/pull, all of a sealed snapshot
 * (-EOPNOTSUPP: it is not sealed), and /blocks, from which every block of the
 * store can be read that one knows the SHA-256 of.  -ENOENT: there is no such
 * name. */
NBDSERVE_API int nbdserve_cas_volume(struct nbdserve_cas *cas, const char *name,
                                     struct nbdserve_export *out);

/* Changes the catalog; the change is durable when this returns 0.  verb is one
 * of those below, which also say what name, to and size are; the macros behind
 * them are easier to read.  -ENOENT: there is no such name.  -EEXIST: the new
 * name is taken.  -EINVAL: not a possible name or size, or an id that several
 * snapshots have.  -EBUSY: it is open (ROLLBACK, RESIZE, RM).  -ENOTEMPTY: it
 * has snapshots (RM). */
NBDSERVE_API int nbdserve_cas_change(struct nbdserve_cas *cas, int verb,
                                     const char *name, const char *to,
                                     uint64_t size);

/* The same for several changes: all of ops[0..n), each as those before it have
 * left the catalog, or none.  RESIZE is done alone, else -EINVAL.  After an
 * error *failed, which may be NULL, is the index of the one that is at fault.
 */
struct nbdserve_cas_op {
  int verb;
  const char *name;
  const char *to;
  uint64_t size;
};

NBDSERVE_API int nbdserve_cas_changes(struct nbdserve_cas *cas,
                                      const struct nbdserve_cas_op *ops,
                                      size_t n, size_t *failed);

/* Makes a volume that nobody can find until it is complete, and fills *out with
 * it as nbdserve_cas_volume does.  Only its name is taken.  After a crash it is
 * not there.  Errors as of NBDSERVE_CAS_CREATE. */
NBDSERVE_API int nbdserve_cas_begin(struct nbdserve_cas *cas, const char *name,
                                    uint64_t size, struct nbdserve_export *out);

/* Closes *ex, which nbdserve_cas_begin has filled.  keep: all that was written
 * is made durable and the volume appears, with ex->size as its size, if that is
 * less by now; else, or after an error, it is removed. */
NBDSERVE_API int nbdserve_cas_finish(struct nbdserve_cas *cas,
                                     struct nbdserve_export *ex, int keep);

/* Makes the volume name, of size bytes, all zero. */
#define NBDSERVE_CAS_CREATE 1
/* Keeps what a volume holds now; name is VOL@NAME. */
#define NBDSERVE_CAS_SNAPSHOT 2
/* Makes the volume `to`, with the contents of name. */
#define NBDSERVE_CAS_CLONE 3
/* Gives name the new name `to`; snapshots follow their volume. */
#define NBDSERVE_CAS_RENAME 4
/* Gives VOL the contents of its snapshot; name is VOL@NAME. */
#define NBDSERVE_CAS_ROLLBACK 5
/* Gives the volume name size bytes. */
#define NBDSERVE_CAS_RESIZE 6
/* Removes name. */
#define NBDSERVE_CAS_RM 7
/* Or'ed to ROLLBACK, RESIZE or RM, and then to all of a change: only checks
 * whether it could be done. */
#define NBDSERVE_CAS_DRY_RUN 16

#define nbdserve_cas_create(cas, name, size) \
  nbdserve_cas_change(cas, NBDSERVE_CAS_CREATE, name, NULL, size)
#define nbdserve_cas_snapshot(cas, name) \
  nbdserve_cas_change(cas, NBDSERVE_CAS_SNAPSHOT, name, NULL, 0)
#define nbdserve_cas_clone(cas, name, to) \
  nbdserve_cas_change(cas, NBDSERVE_CAS_CLONE, name, to, 0)
#define nbdserve_cas_rename(cas, name, to) \
  nbdserve_cas_change(cas, NBDSERVE_CAS_RENAME, name, to, 0)
#define nbdserve_cas_rollback(cas, name) \
  nbdserve_cas_change(cas, NBDSERVE_CAS_ROLLBACK, name, NULL, 0)
#define nbdserve_cas_resize(cas, name, size) \
  nbdserve_cas_change(cas, NBDSERVE_CAS_RESIZE, name, NULL, size)
#define nbdserve_cas_rm(cas, name) \
  nbdserve_cas_change(cas, NBDSERVE_CAS_RM, name, NULL, 0)

struct nbdserve_cas_info {
  const char *name;
  uint64_t size;    /* bytes */
  uint64_t created; /* seconds since 1970 */
  uint32_t clients; /* that have it open, or its metadata context selected */
  int readonly;     /* a snapshot */
  const char *id;   /* of a snapshot that was sealed, else "" */
  int partial;      /* it is being pulled, or was (nbdserve_cas_pull): not to
                       be opened */
};

/* Calls each once for each volume and snapshot, until it returns a number that
 * is not 0, which is then returned.  It may call the store. */
typedef int nbdserve_list_fn(void *arg, const struct nbdserve_cas_info *info);

NBDSERVE_API int nbdserve_cas_list(struct nbdserve_cas *cas,
                                   nbdserve_list_fn *each, void *arg);

/* Is called now and then by what takes long, with the bytes done so far and in
 * total.  If it returns a number that is not 0, the work ends with -ECANCELED.
 * May be NULL. */
typedef int nbdserve_progress_fn(void *arg, uint64_t done, uint64_t total);

/* Gives a snapshot its id, durably when this returns 0: "sha256-" and 64
 * hexadecimal digits, which are the same for equal size, block size and
 * contents in any store.  id gets it, or "" after an error.  From then on the
 * id can be used in place of the name; if several snapshots have it, of one of
 * them for reading, while what changes one refuses it.  The blocks that were
 * not read since the store was opened are read and checked, but for what is
 * shared with a snapshot of the same volume that was sealed before; a snapshot
 * that has its id gets it at once.  -ENOENT: there is no such name.  -EINVAL:
 * it is a volume.  -EIO: it is damaged. */
NBDSERVE_API int nbdserve_cas_seal(struct nbdserve_cas *cas, const char *name,
                                   char id[72], nbdserve_progress_fn *progress,
                                   void *arg);

/* Calls each, in order, for the ranges (in bytes) in which two volumes or
 * snapshots differ, until it returns a number that is not 0, which is then
 * returned.  Ranges begin at a block and end at a block or at the larger size;
 * the smaller one counts as zeroes behind its end.  What both share, since one
 * was made from the other, takes no time.  All that differs is listed; a listed
 * block may be equal if it is stored twice, at the end of the shorter one, or
 * lost in both.
 * Of a volume that is being written each block is as it was at some moment.
 * -ENOENT: there is no such name. */
typedef int nbdserve_range_fn(void *arg, uint64_t off, uint64_t len);

NBDSERVE_API int nbdserve_cas_diff(struct nbdserve_cas *cas, const char *a,
                                   const char *b, nbdserve_range_fn *each,
                                   void *arg);

struct nbdserve_cas_stat {
  uint64_t block_size;
  uint64_t stored;  /* bytes of distinct blocks and map pages in use */
  uint64_t free;    /* bytes in the file that nobody uses */
  uint64_t file;    /* size of the file */
  uint64_t log;     /* percent of the log in use */
  uint64_t damaged; /* not 0: when it was opened, the log or a part of the
                       catalog or of a map could not be read */
};

NBDSERVE_API void nbdserve_cas_stat(struct nbdserve_cas *cas,
                                    struct nbdserve_cas_stat *out);

/* Checks everything that is stored against its SHA-256, and calls each for what
 * is damaged: len bytes at off of the volume or snapshot name or, if len is 0,
 * the tree of its id or, if name is "" as well, a part of the store; why says
 * what is wrong.  It may call the store.  If it returns a number that is not 0,
 * the work ends with that.  Returns 0 if nothing is damaged, -EUCLEAN if
 * something is.  Of what lies twice one copy that is damaged is no damage: it
 * is written anew. */
typedef int nbdserve_damage_fn(void *arg, const char *name, uint64_t off,
                               uint64_t len, const char *why);
NBDSERVE_API int nbdserve_cas_verify(struct nbdserve_cas *cas,
                                     nbdserve_damage_fn *each,
                                     nbdserve_progress_fn *progress, void *arg);

/* A server from which a store gets blocks, at the other end of two streams.
 * Zero all but what you need to set. */
struct nbdserve_peer {
  int in_fd; /* sockets or pipes, maybe the same; they stay open */
  int out_fd;
  uint32_t stall_ms; /* for the handshake as a whole, and after it for each
                        head or data of a message; 0: 120000 */
  nbdserve_progress_fn *progress;
  void *arg;     /* is passed to progress */
  char why[200]; /* what is wrong with the server, if an error is the server's;
                    else "" */
  /* These are for the library: keep them 0. */
  int64_t deadline;
  uint64_t size;
  uint64_t done;
  uint64_t total;
};

/* As nbdserve_cas_verify, and mends what it can: a block of which there is a
 * second one with the same digest, and a digest that cannot be read.  Maps lie
 * twice, and are mended whenever they are read; superblocks, too, whenever a
 * store is opened for writing.
 *
 * With peer, which may be NULL, a server of all of a store (`nbdserve
 * STORE::`) is asked for damaged blocks: what it has of the right SHA-256, in
 * whatever volume, is written where it belongs.  Further errors then as of
 * nbdserve_cas_pull; peer->progress and arg are set from those that are given
 * here.  The peer mends in a first round, of which each is told nothing; the
 * second is as without it, so progress begins anew.  Maps are not asked for: a
 * pull gets them. */
NBDSERVE_API int nbdserve_cas_repair(struct nbdserve_cas *cas,
                                     struct nbdserve_peer *peer,
                                     nbdserve_damage_fn *each,
                                     nbdserve_progress_fn *progress, void *arg);

/* Makes the snapshot name, VOL@NAME, of one that another store has: of `from`
 * there, which is sealed (a name, or its id).  Only what is not here yet is
 * fetched.  All is checked, and nothing of that name is to be seen before it is
 * complete, sealed and durable.  If there is no volume VOL, one is made with
 * the same contents.  After an error what came is kept, as a volume ID/partial
 * that only nbdserve_cas_list shows and NBDSERVE_CAS_RM removes, or
 * nbdserve_cas_gc after a week; the next pull of that id goes on with it.
 *
 * -EEXIST: there is such a snapshot, with other contents.  -EUCLEAN: there is
 * such a snapshot, and a part of it is lost.  -EINVAL: no possible name, or the
 * blocks there have another size.  -ENOENT: the server has no such export, or
 * it is not sealed.  -EBADMSG: what comes is not what it should be.  -EPROTO:
 * that is no such server.  -ETIMEDOUT: it says nothing.  -EPIPE: it has hung
 * up.  -EBUSY: another pull gets the same.  -ENOSPC: there is no space, or only
 * 1 % of it, 64 MiB at least, which is left to others.  -ECANCELED: progress
 * has said so.  -EIO: it cannot read it, or we cannot
 * store it.  With pipes ignore SIGPIPE. */
NBDSERVE_API int nbdserve_cas_pull(struct nbdserve_cas *cas, const char *name,
                                   const char *from,
                                   struct nbdserve_peer *peer);

/* Gives unused space back to the file system, but for what the store needs to
 * go on on a full disk.  *bytes: how many bytes of the file are unused. */
NBDSERVE_API int nbdserve_cas_gc(struct nbdserve_cas *cas, uint64_t *bytes,
                                 nbdserve_progress_fn *progress, void *arg);

/* ---- The server ---------------------------------------------------------- */

/* Levels of log messages */
#define NBDSERVE_LOG_ERROR 0   /* something was refused or lost */
#define NBDSERVE_LOG_WARNING 1 /* it goes on, but look at it */
#define NBDSERVE_LOG_INFO 2    /* clients come and go */
#define NBDSERVE_LOG_TRACE 3   /* every request */

/* Flag of a server: nbdserve_run returns after the last client has left. */
#define NBDSERVE_CONFIG_ONCE 1u

/* Passes on an export's name and description (either may be NULL) to the client
 * that asks for the list.  Returns a number that is not 0 when the client is
 * gone: the rest is for nobody. */
typedef int nbdserve_emit_fn(void *arg, const char *name,
                             const char *description);

/* What a client gets to know of an export */
struct nbdserve_info {
  uint64_t size;            /* bytes */
  uint32_t flags;           /* proto.md, Transmission flags; never 0 */
  uint32_t min_block;       /* bytes; these three are proto.md's minimum, */
  uint32_t preferred_block; /* preferred and */
  uint32_t max_request;     /* maximum block size */
};

struct nbdserve_config {
  /* NBDSERVE_VERSION_NUMBER: header and library may differ in the patch. */
  uint32_t version;
  uint32_t flags; /* NBDSERVE_CONFIG_ONCE */
  /* How many calls into a backend may run at a time for one client, besides one
   * for a request above 1 MiB; each may hold 1 MiB of memory, extents 2.  Up to
   * 1024; with 1 the client's thread does all itself.  0: 16. */
  uint32_t threads;
  /* How many clients are served at a time; others wait, and one message a
   * minute says so.  Up to 2^20; 0: 128. */
  uint32_t max_conn;
  /* Milliseconds for the whole handshake; 0: 10000. */
  uint32_t handshake_ms;
  /* Milliseconds for what a client has begun: sending a request, or each MiB of
   * its data, and taking each MiB of a reply.  A client that needs more is
   * disconnected; one that is idle is not.  0: 120000. */
  uint32_t stall_ms;
  /* nbdserve_run returns when nobody has been connected for so many
   * milliseconds, counted from its start or from when the last client left.  0:
   * never. */
  uint32_t idle_exit_ms;
  /* What clients do not get: bits 2 to 15 stand for these transmission flags
   * (WRITE_ZEROES takes FAST_ZERO with it), bit 16 + N for option N (proto.md,
   * Transmission flags, Option types). */
  uint32_t without;
  /* The highest level of messages that log wants; 0: errors only. */
  int log_level;
  /* Gets each message, a line without its end.  May be called from several
   * threads at once, and may call nbdserve_stats.  NULL: nothing is logged. */
  void (*log)(void *ctx, int level, const char *message);
  /* Finds an export that was not added: fills *out and returns 0, or -ENOENT.
   * Each client gets one of its own, which close ends.  Any other error refuses
   * the client, as does an export that is not valid; then close is called if
   * ops has it.  May be NULL. */
  int (*find)(void *ctx, const char *name, struct nbdserve_export *out);
  /* Lists these exports: calls emit(arg, ...) for each, until emit returns a
   * number that is not 0.  Returns 0 or -errno; after an error the client is
   * told that the list is not complete, and goes on.  May be NULL. */
  int (*list)(void *ctx, nbdserve_emit_fn *emit, void *arg);
  /* Called before each valid request of a length above 0, and each FLUSH, is
   * done, from several threads at once; it may take its time.  type: the
   * NBD_CMD of proto.md.  Returns 0 to go on, or -errno, which is then the
   * answer.  With it, adjacent requests are not joined, which is slower.  May
   * be NULL. */
  int (*before)(void *ctx, unsigned type, uint64_t off, uint64_t len);
  /* Called once for each request when its outcome is known, from several
   * threads at once, mostly before the reply is sent; not of a request whose
   * client goes away in between.  type may be none that exists.  err: 0 or
   * -errno.  ns: nanoseconds since the request was there as a whole (without
   * its data, if that is long).  May be NULL. */
  void (*after)(void *ctx, unsigned type, uint64_t off, uint64_t len, int err,
                uint64_t ns);
  /* Called in a client's thread when it has entered an export, before its first
   * request.  in_fd: where its requests come from.  info: what it was told.  A
   * client of nbdserve_serve with a name is told nothing by the server: whoever
   * has passed the socket on has to tell it this.  May be NULL. */
  void (*entered)(void *ctx, int in_fd, const char *name,
                  const struct nbdserve_info *info);
  void *ctx; /* is passed to these functions */
};

/* Makes a server; *out is NULL if that fails.  config may be NULL.  -EINVAL:
 * the header is of another version, or a value is out of range.  -ENOMEM,
 * -EMFILE.
 */
NBDSERVE_API int nbdserve_new(struct nbdserve **out,
                              const struct nbdserve_config *config);

/* Adds an export; at any time, from any thread.  The first one also answers to
 * the empty name if no other has it.  On success the server owns ctx and calls
 * close in the end; after an error ctx is still yours.  -EINVAL: a value is out
 * of range, or there is no read.  -EEXIST: the name is taken.  -ENOMEM. */
NBDSERVE_API int nbdserve_add(struct nbdserve *s,
                              const struct nbdserve_export *ex);

/* Changes the size of an added export, from any thread: new clients see it,
 * those that are connected keep theirs.  An export that has ops->size is asked
 * nevertheless, and a file follows its end.  -ENOENT: there is no such name.
 * -EINVAL: more than INT64_MAX. */
NBDSERVE_API int nbdserve_resize(struct nbdserve *s, const char *name,
                                 uint64_t size);

/* Listens on "unix:PATH", on "tcp:HOST:PORT" (HOST is a numeric address, [IPv6]
 * in brackets, or localhost for both loopback addresses; with PORT 0 the kernel
 * picks one) or on "fd:N" (a listening socket, which the server closes in the
 * end).  Call it before nbdserve_run, in one thread; up to 32 times.  A unix
 * socket has the mode that the umask leaves; one on which nobody listens is
 * replaced.  After an error nothing is left behind.
 *
 * -EINVAL: none of these; or N is connected, which is for nbdserve_serve.
 * -ENAMETOOLONG: PATH is longer than the system allows.  -EADDRINUSE: somebody
 * listens there, or a file is in the way.  -EMFILE: too many.  Others as
 * socket(2) and bind(2). */
NBDSERVE_API int nbdserve_listen(struct nbdserve *s, const char *address);

/* Writes the NBD URI of the first listener, for the export of that name, to
 * buf[size].  In the thread that called nbdserve_listen, before nbdserve_run.
 * -ENOENT: there is no listener, or it is of "fd:N".  -ERANGE: size is too
 * small. */
NBDSERVE_API int nbdserve_uri(struct nbdserve *s, const char *name, char *buf,
                              size_t size);

/* Serves clients until nbdserve_stop (or the end of the flag ONCE or
 * idle_exit_ms).  Then the listeners are closed, what clients have sent is done
 * and answered, for five seconds at most (a backend's call that runs longer is
 * waited for), and all added exports are flushed.  Returns 0, or the error of
 * such a flush.  -EINTR: nbdserve_wake was called; clients are still served;
 * call nbdserve_run again.  One thread at a time. */
NBDSERVE_API int nbdserve_run(struct nbdserve *s);

/* Serves one client in the caller's thread, on sockets or pipes (in_fd and
 * out_fd may be the same), which stay open; from any number of threads.  name:
 * NULL for a normal handshake, else the export whose transmission phase begins
 * at once, as for a socket that is handed to the kernel.
 *
 * Returns 0 when the client has left in order or nbdserve_stop was called.
 * -ENOENT: there is no such export.  -EPROTO: the client broke the protocol.
 * -ETIMEDOUT: it took too long.  -ENOMEM.  Others as recv(2) and send(2).
 *
 * Over TCP, replies that are still on their way can be lost if you close the
 * socket while the client sends: shut down its writing side first and read to
 * the end. */
NBDSERVE_API int nbdserve_serve(struct nbdserve *s, int in_fd, int out_fd,
                                const char *name);

/* Finds out what a client of an export (NULL or "": the default one) gets to
 * know now: whoever hands a socket
 * to the kernel has to pass these numbers on.  The next client of that name may
 * be told something else, if the size changes or find gives another export;
 * config.entered has what it was told.  From any thread.  -ENOENT: there is no
 * such export.  Others as of find. */
NBDSERVE_API int nbdserve_info(struct nbdserve *s, const char *name,
                               struct nbdserve_info *info);

/* Ends nbdserve_run and all nbdserve_serve, for good.  From any thread or a
 * signal handler; may be called again. */
NBDSERVE_API void nbdserve_stop(struct nbdserve *s);

/* Closes the listeners and removes their unix sockets: nobody new connects, the
 * clients that are there are served on.  May be called again.  Only in the
 * thread that calls nbdserve_run, and not while nbdserve_run is running. */
NBDSERVE_API void nbdserve_unlisten(struct nbdserve *s);

/* Makes nbdserve_run return -EINTR, now or the next time it is called.  From
 * any thread or a signal handler. */
NBDSERVE_API void nbdserve_wake(struct nbdserve *s);

struct nbdserve_stats {
  uint64_t clients;       /* that were accepted so far */
  uint64_t clients_now;   /* that are connected now */
  uint64_t requests;      /* that were answered, failed ones included */
  uint64_t errors;        /* requests that were answered with an error */
  uint64_t bytes_read;    /* by NBD_CMD_READ */
  uint64_t bytes_written; /* by NBD_CMD_WRITE */
  uint64_t flushes;       /* calls of the backends' flush */
};

/* Writes the totals so far to *out; from any thread. */
NBDSERVE_API void nbdserve_stats(struct nbdserve *s,
                                 struct nbdserve_stats *out);

/* Ends what nbdserve_run has not ended: clients are cut off after the grace,
 * and all exports are flushed, of which errors are only logged.  Then closes
 * all exports.  s may be NULL; no other call may be running on s. */
NBDSERVE_API void nbdserve_free(struct nbdserve *s);

/* Returns NBDSERVE_VERSION as the library was compiled with. */
NBDSERVE_API const char *nbdserve_version(void);

#ifdef __cplusplus
}
#endif
#endif

/* ---- The format of a store, version 2 ------------------------------------
 *
 * This format is kept.  What a program of this version writes, every later one
 * reads and goes on with.  A store of a later format says so in one of two
 * words of feature bits: with a bit of the first one that it does not know,
 * this version does not open the store, and with one of the second it opens it
 * for reading only.  Bytes that have no meaning here are written as zeroes and
 * not looked at.  Version 1 was never released; its stores are refused.
 *
 * Words
 *
 *   slot      room for a block, or for a page of block_size bytes.  Slots are
 *             counted from 1; where a slot is named, 0 means: all zeroes
 *   segment   256 slots; group: 128 segments, behind the digests of their slots
 *   pair      two slots of a segment, x and x + 128, with x mod 256 below 128.
 *             A page lies in both, and is named by the first
 *   leaf      a page that names the slots of blocks
 *   to drop   to take away a name; to retire: the same of a page
 *   durable   survives a power cut: written before an fdatasync that has
 *             returned began.  Durable state is what the newest superblock's
 *             maps say, with the log behind it
 *
 * The file
 *
 *   0           first superblock, 4096 bytes
 *   1 MiB       second superblock
 *   2 MiB       log_pages log pages of 4096 bytes
 *   ...         from the next multiple of 1 MiB on groups, each of 1 MiB with
 *               the SHA-256 of 32768 slots, and these slots
 *
 * Numbers are big-endian.  OFFSET SIZE FIELD:
 *
 *   superblock: all of it stands in 512 bytes, which a disk writes in one go
 *   0     7 "NBDSCAS"                48    4 log_pages
 *   7     1 "2"                      52    4 slots in use, whole segments
 *   8     4 version: 2               56    4 slot of the root of the catalog
 *   12    4 block_size               60    4 id of the next volume
 *   16   16 id of the store          64    4 unknown bit: do not open
 *   32    8 its number: see (C8)     68    4 unknown bit: do not write; 1: a
 *                                            volume is partial (since 0.6)
 *   40    8 log page to replay from  480  32 SHA-256 of what stands before
 *
 *   log page
 *   0    48 an entry, and so on, up to 84
 *   4032  4 "LOG1"                   4048  8 durable: all pages before that one
 *   4036  4 entries                  4056  8 number of the newest superblock of
 *   4040  8 number of the page; it           which both copies are durable
 *           lies at that mod         4064 32 SHA-256 of the entries, with
 *           log_pages                        zeroes up to a multiple of 64
 *                                            bytes, of 4032 to 4063, and of
 *                                            the store's id
 *   entry
 *   0     4 id of a volume           8     8 block of the volume
 *   4     4 slot, or 0               16   32 SHA-256 of the slot's data; with
 *                                            slot 0: 8 number of blocks
 *   page, of a map or the catalog
 *   0     4 "MAP1" or "CAT1"         20   12 first bytes of its SHA-256, with
 *   4     4 level                            zeroes here
 *   8     4 index in the level,      32      slots, 4 bytes each, F =
 *           mod 2^32                         block_size / 4 - 8 of them; or
 *                                            records
 *   12    8 number of its checkpoint
 *
 *   record of the catalog, 288 bytes
 *   0     4 id; 0: no record         32    4 id that it was made from; of a
 *   4     4 1: snapshot; 2: partial,         snapshot: its volume
 *           of a pull that has not   36    4 slot of the root of the map with
 *           come to its end                  the tree of its id, or 0
 *   8     8 size, bytes              40   32 content id, or zeroes
 *   16    4 slot of the map's root   72   32 kept for an origin
 *   20    4 levels of the map: 4     104   8 kept for a quota
 *   24    8 seconds since 1970       112 166 name, and zeroes
 *
 * The catalog is a tree of pages: its root has level 6, then come level 5, and
 * level 4 with the records.  A map has the levels 3 to 0.  The slot numbers
 * 0xffffffff (what was there is lost) and 0xfffffffe (kept for blocks that are
 * known by their SHA-256 only) stand in maps only.  The digest of a slot is the
 * SHA-256 of its data, that of a page the SHA-256 of the page with zeroes in 20
 * to 31.
 *
 * A content id is a tree, too.  d0[i] is the SHA-256 of block i, with zeroes
 * behind the end of the volume, or 32 zeroes if all of the block is zero;
 * d(k+1)[j] is the SHA-256 of d(k)[jF] to d(k)[jF + F - 1], zeroes for those
 * that lack, or 32 zeroes if all of these are.  The id is
 * SHA-256("nbdserve-cid-2", 4 bytes block_size, 8 bytes size, d4[0]).  The map
 * with a tree has d(k)[j] at byte (k - 1) * F^3 * block_size + 32 j.
 *
 * What keeps it whole
 *
 * (C1) A slot that durable state names is never written; except that repairing
 *      writes what should have been there.
 * (C2) An entry is logged after the writes of its data and digest returned.
 * (C3) Entries are in the file, not synced, before the lock is let go under
 *      which they were made.  So kill -9 loses nothing that was answered.
 * (C4) All pages before `durable`, and their data, were there when an fdatasync
 *      began that has returned.
 * (C5) A data slot that an entry drops is free after an fdatasync that began
 *      after that entry was written.
 * (C6) A page's slots are free when a superblock without it is durable twice.
 * (C7) Checkpoint: pages, fdatasync, first superblock, fdatasync, second one,
 *      fdatasync.  Only then slots become free, the log's beginning moves, and
 *      the change is answered.
 * (C8) Opening for writing raises the superblock's number by 2^24, so that no
 *      checkpoint which was begun has one above it, and writes both: first,
 *      after a sync, the older one; then, after another sync, the newer one.
 *      One is enough.  Where there is no space to write over them, two that
 *      are alike stay as they are.  What somebody else has written in a place
 *      is not written over.
 * (C9) Replay takes all valid pages of the log.  Entries before the highest
 *      `durable` apply; later ones each only if the slot's data has their
 *      digest. A page that is not valid is left out; but one before the highest
 *      `durable`, or a page that follows a newer superblock than there is,
 *      means damage: then the store is not written until it is repaired.
 * (C10) Recovery counts all holds, makes durable what it has found, only then
 *      takes a slot, ends with a checkpoint, and goes on at the place behind
 *      the end of the log, or one of the next that can be written, with a
 *      number so high that no page that was left there can fit again.  It does
 *      so unless every page of the log can be read, none is valid, and none has
 *      a number that is to come.
 * (C11) Pages never enter the index of digests.
 * (C12) A log page is rewritten as it fills, entries first, sum last: what a
 *      torn write leaves is the page as it was before, or as it is.  A hit in
 *      the index of digests is a hint: the bytes are compared.
 * (C13) A log page is never written again once a sync that covers it, or a
 *      checkpoint that does not need it, has begun.  A page of a map that
 *      several name is copied before it changes: what is below gains an edge.
 * (C14) After a failed sync, or write of log or superblock, nothing is written
 *      until the store is opened anew.  Other writes that fail are the error of
 *      who asked; a checkpoint that they end is taken back.
 * (C15) The catalog changes only in a checkpoint, and nobody sees a change
 *      before it is durable, or a part of it.
 * (C16) A volume that is being filled is in no record, and is not logged.
 * (C17) Of a page's two copies that one is good which is whole (sum, level,
 *      index, and a number not above the superblock's) and which a digest
 *      vouches for; of two, the one with the higher number.  If both are whole
 *      and equal, or no digest can be read, no digest is needed.
 * (C18) A pair counts as free for pages when its segment is known to have all
 *      its space in the file, durably.
 * (C19) A segment in which a write failed is passed over.
 * (C20) There are free pairs for all that is dirty, and 128 more, which only
 *      changes take that give back what they take; the last 6 are for removing.
 * (C21) A page of which both copies are wrong is lost: its blocks cannot be
 *      read until they are written, and nothing else is harmed.  If more than 8
 *      are lost, or one cannot be read, or is of the catalog, the store is not
 *      written until loss is accepted.
 * (C22) A second after the last request a page without entries says that all of
 *      the log is durable.
 */

/*
 * BSD Zero Clause License (0BSD)
 *
 * Permission to use, copy, modify, and/or distribute this software for any
 * purpose with or without fee is hereby granted.
 *
 * THE SOFTWARE IS PROVIDED "AS IS" AND THE AUTHOR DISCLAIMS ALL WARRANTIES
 * WITH REGARD TO THIS SOFTWARE INCLUDING ALL IMPLIED WARRANTIES OF
 * MERCHANTABILITY AND FITNESS. IN NO EVENT SHALL THE AUTHOR BE LIABLE FOR ANY
 * SPECIAL, DIRECT, INDIRECT, OR CONSEQUENTIAL DAMAGES OR ANY DAMAGES
 * WHATSOEVER RESULTING FROM LOSS OF USE, DATA OR PROFITS, WHETHER IN AN ACTION
 * OF CONTRACT, NEGLIGENCE OR OTHER TORTIOUS ACTION, ARISING OUT OF OR IN
 * CONNECTION WITH THE USE OR PERFORMANCE OF THIS SOFTWARE.
 */
