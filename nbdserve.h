/* nbdserve.h - serve block devices over NBD from your own program.
 * SPDX-License-Identifier: 0BSD (full text at the end)
 *
 * Compile nbdserve.c with -DNBDSERVE_NO_MAIN, include this file, and:
 *
 *   1. fill a struct nbdserve_ops with your functions (only read is required)
 *   2. nbdserve_new, nbdserve_add, nbdserve_listen, nbdserve_run, nbdserve_free
 *
 * Every function that can fail returns 0 or a negative errno value.  Zero all
 * structures, then set what you need: 0 and NULL always mean the default.
 * Strings are UTF-8, ended by NUL, and copied where they are kept.
 *
 * The library installs no signal handlers, prints nothing, never exits, reads
 * no environment and keeps no global state: several servers may live in one
 * process.  Its own threads block all signals.  A program that serves pipes
 * should ignore SIGPIPE (sockets do not need it), and one that serves files
 * should ignore SIGXFSZ if it may run under a file size limit.
 */
#ifndef NBDSERVE_H
#define NBDSERVE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define NBDSERVE_VERSION "0.3.0"
#define NBDSERVE_VERSION_NUMBER 300u /* major * 10000 + minor * 100 + patch */

#ifndef NBDSERVE_API
#define NBDSERVE_API /* storage class or visibility of the public functions */
#endif

struct nbdserve;
struct nbdserve_extents;
struct nbdserve_req;

/* ---- Backends ---------------------------------------------------------- */

/* Flags of one call; as NBD_CMD_FLAG_... in proto.md */
#define NBDSERVE_CMD_FUA 1u /* durable before it returns (NATIVE_FUA only) */
#define NBDSERVE_CMD_NO_HOLE 2u /* zero: the range stays allocated */
#define NBDSERVE_CMD_FAST_ZERO \
  16u                           /* zero: -ENOTSUP if no faster than write \
                                 */
#define NBDSERVE_CMD_REQ_ONE 8u /* extents: the first extent is enough */

/* Status of an extent: 0 is plain data (proto.md, base:allocation) */
#define NBDSERVE_EXTENT_HOLE 1u /* not allocated */
#define NBDSERVE_EXTENT_ZERO 2u /* reads as zeroes */

/* What a backend does.  The caller has checked each request: len > 0, off and
 * len inside the export and multiples of min_block, no writes to a read-only
 * export, only the flags named here.  len of read and write is at most
 * max_request, and 1 MiB: longer ones come in pieces; of the others up to the
 * export's size.  Return 0 for the whole range done, or -errno, of which
 * clients see the nearest NBD error; a short count does not exist.
 *
 * A NULL member is not offered to clients, except zero (done by writes, up to
 * 4 GiB, as where zero is -ENOTSUP) and extents (all is data).  Calls come from
 * several threads at once unless the export says NBDSERVE_EXPORT_SERIAL, and
 * may block for as long as they like.
 */
struct nbdserve_ops {
  int (*read)(void *ctx, void *buf, uint64_t off, uint64_t len, uint32_t flags);
  int (*write)(void *ctx, const void *buf, uint64_t off, uint64_t len,
               uint32_t flags);
  /* All writes that have returned reach permanent storage. */
  int (*flush)(void *ctx, uint32_t flags);
  /* The data is no longer needed; may do nothing. */
  int (*trim)(void *ctx, uint64_t off, uint64_t len, uint32_t flags);
  /* The range reads as zeroes afterwards. */
  int (*zero)(void *ctx, uint64_t off, uint64_t len, uint32_t flags);
  /* The range will be read soon. */
  int (*cache)(void *ctx, uint64_t off, uint64_t len, uint32_t flags);
  /* Calls nbdserve_extent for consecutive pieces from off on. */
  int (*extents)(void *ctx, uint64_t off, uint64_t len, uint32_t flags,
                 struct nbdserve_extents *out);
  /* The last call of all: frees ctx. */
  void (*close)(void *ctx);
  /* nbdserve's own backends only: keep it NULL. */
  void (*run_batch)(void *ctx, struct nbdserve_req *reqs, size_t nreqs);
  /* The size that a client gets who comes now: size, the export's so far, or
   * another one, which replaces that.  NULL: it stays.  One call at a time, for
   * all exports of a server: it must not block, nor call the server. */
  uint64_t (*size)(void *ctx, uint64_t size);
};

/* Reports the next extent: len bytes (> 0) with that status.  Returns 0, or 1
 * when the client has enough: the backend may then return. */
NBDSERVE_API int nbdserve_extent(struct nbdserve_extents *out, uint64_t len,
                                 uint32_t status);

/* Flags of an export */
#define NBDSERVE_EXPORT_READONLY 1u /* writes are refused with EPERM */
#define NBDSERVE_EXPORT_SERIAL 2u   /* one call into ops at a time */
#define NBDSERVE_EXPORT_MULTI_CONN \
  4u                                  /* flush covers all connections' writes \
                                       */
#define NBDSERVE_EXPORT_ROTATIONAL 8u /* a hint for the client's scheduler */
/* write, zero and trim do NBDSERVE_CMD_FUA; without it a flush follows them */
#define NBDSERVE_EXPORT_NATIVE_FUA 16u
#define NBDSERVE_EXPORT_FALLBACK \
  32u /* reached by every name no other one has */
#define NBDSERVE_EXPORT_WRITETHROUGH 64u /* every write as if it had FUA */
#define NBDSERVE_EXPORT_UNSAFE \
  128u /* flush and FUA do nothing: not durable \
        */

struct nbdserve_export {
  const char *name;         /* up to 4096 bytes; "" or NULL: the default one */
  const char *description;  /* for humans, up to 4096 bytes */
  uint64_t size;            /* bytes, up to INT64_MAX; any number */
  uint32_t min_block;       /* 1..65536, power of two; 0: 1 */
  uint32_t preferred_block; /* power of two >= 512 and min; 0: 4096 or min */
  uint32_t max_request;     /* bytes of one read or write; 0: 32 MiB */
  uint32_t flags;           /* NBDSERVE_EXPORT_READONLY... */
  const struct nbdserve_ops *ops;
  void *ctx;
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

/* ---- The content-addressed store ----------------------------------------
 *
 * One file or block device holds any number of volumes and snapshots, every
 * distinct block once, named by its SHA-256 (FIPS 180-4).  What a flush covered
 * survives a power cut at any instant.  All calls may come from any thread.
 *
 * A volume is NAME; a snapshot, read-only, is VOL@NAME.  A NAME has 1 to 166
 * bytes, no / @ " \, no control characters, and does not begin with "sha256-":
 * what does is the id of a snapshot (nbdserve_cas_seal).
 *
 * Besides their own errors all calls may return -EIO (the medium fails, or is
 * damaged; once a sync has failed, all changes do until the store is opened
 * anew), -ENOSPC and -ENOMEM; changes -EROFS if the store is read-only.
 *
 * Memory: 16 bytes for each block of the store and 4 for each one in a map.
 */
struct nbdserve_cas;

/* Check a block's SHA-256 when it is read for the first time since the store
 * was opened; the default if the processor computes it. */
#define NBDSERVE_CAS_VERIFY 1u
#define NBDSERVE_CAS_NO_VERIFY 2u /* do not */
#define NBDSERVE_CAS_READONLY 4u  /* next to other readers; changes nothing */

struct nbdserve_cas_options {
  uint32_t flags;      /* NBDSERVE_CAS_* */
  uint32_t block_size; /* init: power of two, 4096 (0: that) to 65536 */
  uint32_t log_pages;  /* init: of 4096 bytes, 8 to 2^24; 0: 4096 */
};

/* Makes an empty store.  -EEXIST: there is a file of that name (a block device
 * is taken if its first 4096 bytes are zero).  -EINVAL: bad options.  Others as
 * open(2). */
NBDSERVE_API int nbdserve_cas_init(const char *path,
                                   const struct nbdserve_cas_options *options);

/* Opens a store, and repairs what a crash left behind.  options may be NULL.
 * -EBUSY: another process has it.  -EROFS: it is on a device that refuses
 * writes (NBDSERVE_CAS_READONLY opens it).  -EINVAL: not a store.  -EOPNOTSUPP:
 * one of a version that is not known here.  -EIO: damaged; read-only its last
 * good state may be had.  Others as open(2). */
NBDSERVE_API int nbdserve_cas_open(const char *path,
                                   const struct nbdserve_cas_options *options,
                                   struct nbdserve_cas **out);

/* Makes all durable and frees it; its exports must have been closed.  0 or the
 * error of that last sync. */
NBDSERVE_API int nbdserve_cas_close(struct nbdserve_cas *cas);

/* Fills *out with a volume or snapshot, as nbdserve_flat_open does; one may be
 * open many times, so the find callback may do it.  -ENOENT: no such name. */
NBDSERVE_API int nbdserve_cas_volume(struct nbdserve_cas *cas, const char *name,
                                     struct nbdserve_export *out);

/* Changes the catalog, durably when it returns 0.  -ENOENT: no such name.
 * -EEXIST: that one is taken.  -EINVAL: not a possible name or size.
 * -EBUSY: it is open, or being verified (ROLLBACK, RESIZE, RM).  -ENOTEMPTY:
 * it has snapshots. */
NBDSERVE_API int nbdserve_cas_change(struct nbdserve_cas *cas, int verb,
                                     const char *name, const char *to,
                                     uint64_t size);

#define NBDSERVE_CAS_CREATE 1   /* name: a volume of size bytes, all zero */
#define NBDSERVE_CAS_SNAPSHOT 2 /* name: VOL@NAME */
#define NBDSERVE_CAS_CLONE 3    /* to: a volume with what name has */
#define NBDSERVE_CAS_RENAME 4   /* name becomes to; snapshots follow */
#define NBDSERVE_CAS_ROLLBACK 5 /* name: VOL@NAME; VOL becomes what that is */
#define NBDSERVE_CAS_RESIZE 6   /* name gets size bytes */
#define NBDSERVE_CAS_RM 7       /* name is no more */
#define NBDSERVE_CAS_DRY_RUN 16 /* with one of the last three: only checks */

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
  uint32_t clients; /* that have it open */
  int readonly;     /* a snapshot */
  const char *id;   /* of a snapshot that was sealed, else "" */
};

/* Calls each for all in the catalog until it returns non-zero, which is
 * returned; that one counts as open meanwhile. */
typedef int nbdserve_list_fn(void *arg, const struct nbdserve_cas_info *info);

NBDSERVE_API int nbdserve_cas_list(struct nbdserve_cas *cas,
                                   nbdserve_list_fn *each, void *arg);

/* Tells how far long work is, now and then, in bytes; it ends with -ECANCELED
 * if that returns non-zero.  May be NULL where it is asked for. */
typedef int nbdserve_progress_fn(void *arg, uint64_t done, uint64_t total);

/* Gives a snapshot its identity, durably when it returns 0: "sha256-" and 64
 * hexadecimal digits, which name the same size, block size and contents in any
 * store.  id gets it, or "".  It is a name of the snapshot from then on; if
 * several have it, of one of them.  Reads and checks what has not been since
 * the store was opened; once sealed, a snapshot has its id at once.
 * -ENOENT: no such name.  -EINVAL: that is a volume.  -EIO: it is damaged. */
NBDSERVE_API int nbdserve_cas_seal(struct nbdserve_cas *cas, const char *name,
                                   char id[72], nbdserve_progress_fn *progress,
                                   void *arg);

/* Calls each, in order, for the ranges in bytes in which two volumes or
 * snapshots differ, until it returns non-zero, which is returned.  They begin
 * at blocks and end there or at the larger size; behind the smaller one all is
 * zero.  What both have in common since one was made from the other takes no
 * time.  All that differs is listed; what is equal only if it is stored twice,
 * or if just one of the two ends in the block.  Of a volume that is written
 * meanwhile each block is as it was at some moment.  -ENOENT: no such name. */
typedef int nbdserve_range_fn(void *arg, uint64_t off, uint64_t len);

NBDSERVE_API int nbdserve_cas_diff(struct nbdserve_cas *cas, const char *a,
                                   const char *b, nbdserve_range_fn *each,
                                   void *arg);

struct nbdserve_cas_stat {
  uint64_t block_size;
  uint64_t stored; /* bytes of distinct blocks and map pages in use */
  uint64_t free;   /* bytes in the file that nobody uses */
  uint64_t file;   /* size of the file */
  uint64_t log;    /* percent of the log in use */
};

NBDSERVE_API void nbdserve_cas_stat(struct nbdserve_cas *cas,
                                    struct nbdserve_cas_stat *out);

/* Checks all that is stored against its SHA-256 and calls each for what is
 * damaged: len bytes at off of a volume or snapshot or, with len 0 and name "",
 * the part of the store that why names.  0: nothing is damaged.  -EUCLEAN:
 * something is. */
typedef void nbdserve_damage_fn(void *arg, const char *name, uint64_t off,
                                uint64_t len, const char *why);
NBDSERVE_API int nbdserve_cas_verify(struct nbdserve_cas *cas,
                                     nbdserve_damage_fn *each,
                                     nbdserve_progress_fn *progress, void *arg);

/* Gives unused space back to the file system.  *bytes: how much of the file is
 * unused.  -EUCLEAN: the store is damaged, and nobody knows what is. */
NBDSERVE_API int nbdserve_cas_gc(struct nbdserve_cas *cas, uint64_t *bytes,
                                 nbdserve_progress_fn *progress, void *arg);

/* ---- The server --------------------------------------------------------- */

/* Levels of log messages */
#define NBDSERVE_LOG_ERROR 0   /* something was refused or lost */
#define NBDSERVE_LOG_WARNING 1 /* it goes on, but look at it */
#define NBDSERVE_LOG_INFO 2    /* clients come and go */
#define NBDSERVE_LOG_TRACE 3   /* every request */

/* Flags of a server */
#define NBDSERVE_CONFIG_ONCE \
  1u /* nbdserve_run returns after the last client \
      */

typedef int nbdserve_emit_fn(void *arg, const char *name,
                             const char *description);

struct nbdserve_config {
  uint32_t version; /* NBDSERVE_VERSION_NUMBER: header and library must agree */
  uint32_t flags;   /* NBDSERVE_CONFIG_ONCE */
  uint32_t threads; /* calls into a backend at a time per client, besides one
                       for a request above 1 MiB; each of them may hold 1 MiB;
                       0: 16 */
  uint32_t max_conn;     /* clients at a time; the others wait; 0: 128 */
  uint32_t handshake_ms; /* for the whole handshake; 0: 10000 */
  uint32_t stall_ms;     /* for what a client has begun: a request (each MiB
                            of its data), taking a reply; then it is
                            disconnected; 0: 120000 */
  uint32_t idle_exit_ms; /* nbdserve_run returns after that time without
                            clients; 0: never */
  uint32_t without;      /* what clients do not get: bits 2 to 15, those
                            transmission flags (WRITE_ZEROES with
                            FAST_ZERO); bit 16 + N, option N */
  int log_level;         /* highest level wanted; 0: errors only */
  void (*log)(void *ctx, int level, const char *message); /* NULL: silent; may
                               be called from several threads at once */
  /* Exports that are not known beforehand: find fills *out and returns 0 (each
   * client gets its own; close ends it), or -ENOENT; list calls emit for each
   * until emit returns non-zero.  Both may be NULL. */
  int (*find)(void *ctx, const char *name, struct nbdserve_export *out);
  int (*list)(void *ctx, nbdserve_emit_fn *emit, void *arg);
  /* Called before each sound request of a length above 0, and each FLUSH, is
   * done, from several threads at once; it may take its time.  type: the
   * NBD_CMD of proto.md.  0: go on, or -errno, which is the answer.  NULL:
   * none.  With it neighbours are not joined: slower. */
  int (*before)(void *ctx, unsigned type, uint64_t off, uint64_t len);
  void *ctx; /* for log, find, list and before */
};

/* Makes a server; *out is NULL if that fails.  config may be NULL.
 * -EINVAL: another version, or a value out of range.  -ENOMEM, -EMFILE. */
NBDSERVE_API int nbdserve_new(struct nbdserve **out,
                              const struct nbdserve_config *config);

/* Adds an export; any time, any thread.  The first one also answers to the
 * empty name if none has it.  From then on the server owns ctx.
 * -EINVAL: a value out of range, or no read.  -EEXIST: the name is taken. */
NBDSERVE_API int nbdserve_add(struct nbdserve *s,
                              const struct nbdserve_export *ex);

/* Changes the size of an added export: new clients see it, connected ones keep
 * theirs; one that has ops->size has that, as a file does.  -ENOENT, or -EINVAL
 * for more than INT64_MAX. */
NBDSERVE_API int nbdserve_resize(struct nbdserve *s, const char *name,
                                 uint64_t size);

/* Listens on "unix:PATH", "tcp:HOST:PORT" (a numeric address, [IPv6], or
 * localhost for both loopbacks; port 0: the kernel picks one) or "fd:N" (a
 * listening socket, which is closed in the end; a connected one is -EINVAL, for
 * nbdserve_serve).  Before nbdserve_run.
 * -EINVAL: not one of these.  -ENAMETOOLONG: PATH is over the system's limit.
 * -EADDRINUSE: someone listens there.  Others as socket(2), bind(2). */
NBDSERVE_API int nbdserve_listen(struct nbdserve *s, const char *address);

/* The NBD URI of the first listener for the export of that name, into
 * buf[size].  -ENOENT: there is none.  -ERANGE: size is too small. */
NBDSERVE_API int nbdserve_uri(struct nbdserve *s, const char *name, char *buf,
                              size_t size);

/* Serves clients until nbdserve_stop, then lets what is in flight finish,
 * flushes all added exports and returns 0, or the flush's error.
 * -EINTR: nbdserve_wake; clients are still served; call it again. */
NBDSERVE_API int nbdserve_run(struct nbdserve *s);

/* Serves one client in the caller's thread, on sockets or pipes (in_fd and
 * out_fd may be the same), which stay open.  name: NULL for a normal
 * handshake, else the export to enter transmission with at once, as for a
 * socket handed to the kernel.  Returns 0 when the client has left in order,
 * -ENOENT: no such export, -EPROTO: it broke the protocol, others: I/O. */
NBDSERVE_API int nbdserve_serve(struct nbdserve *s, int in_fd, int out_fd,
                                const char *name);

/* Ends nbdserve_run and nbdserve_serve.  From any thread or a signal handler;
 * may repeat.  There is no way back. */
NBDSERVE_API void nbdserve_stop(struct nbdserve *s);

/* Closes the listeners and removes their unix sockets: nobody new connects, the
 * clients that are there are served on.  May repeat.  Only the thread that
 * calls nbdserve_run may call this, and not while nbdserve_run is running. */
NBDSERVE_API void nbdserve_unlisten(struct nbdserve *s);

/* Makes nbdserve_run return -EINTR.  From any thread or a signal handler. */
NBDSERVE_API void nbdserve_wake(struct nbdserve *s);

struct nbdserve_stats {
  uint64_t clients;       /* accepted so far */
  uint64_t clients_now;   /* connected now */
  uint64_t requests;      /* answered, failed ones included */
  uint64_t errors;        /* answered with an error */
  uint64_t bytes_read;    /* by NBD_CMD_READ */
  uint64_t bytes_written; /* by NBD_CMD_WRITE */
  uint64_t flushes;       /* calls of the backends' flush */
};

/* Totals so far; any thread. */
NBDSERVE_API void nbdserve_stats(struct nbdserve *s,
                                 struct nbdserve_stats *out);

/* Closes the listeners (unlinking their sockets) and all exports.  s may be
 * NULL; nobody may be in another call on s. */
NBDSERVE_API void nbdserve_free(struct nbdserve *s);

/* NBDSERVE_VERSION of the library. */
NBDSERVE_API const char *nbdserve_version(void);

#ifdef __cplusplus
}
#endif
#endif

/* ---- The format of a store, version 1 ------------------------------------
 *
 * Big-endian.  Superblocks lie at 0 and 1 MiB, the log at 2 MiB; from the next
 * multiple of 1 MiB behind it on, groups of 32768 slots: first the SHA-256 of
 * each, then the slots.  A slot, of block_size bytes, holds data or a page; as
 * the number of a slot 0 means: all zeroes.
 *
 *   superblock                       log page
 *   0     8 "NBDSCAS1"               0     4 "LOG1"
 *   8     4 version                  4     2 entries
 *   12    4 block_size               8     8 seq; it lies at seq mod log_pages
 *   16   16 id of the store          16    8 durable: all pages before that one
 *   32    8 its number               24    8 of the id of the store
 *   40    8 seq to replay from       32   48 an entry, and so on, up to 84
 *   48    4 log_pages                4064 32 SHA-256 of what stands before
 *   52    4 slots in use
 *   56    4 slot of the catalog      log entry
 *   60    4 id of the next volume    0     4 id of a volume
 *   64    4 unknown bit: refuse      4     4 slot, or 0
 *   68    4 unknown bit: read-only   8     8 block of the volume
 *   4064 32 SHA-256                  16   32 SHA-256 of the slot's data; with
 *                                            slot 0: 8 number of blocks
 *   page
 *   0     4 "MAP1" or "CAT1"         catalog record, 256 bytes
 *   4     4 level; 0: of blocks      0  4 id        4  4 1: snapshot
 *   8     4 index in the level       8  8 size      16 4 slot of the root
 *   12    4 CAT1: slot of the next   20 4 levels, 4
 *   16   16 of its SHA-256, with     24 8 seconds since 1970
 *           zeroes here              36 4 id it was made from
 *   32      slots, 4 bytes each,     40 32 content id of a snapshot, or zeroes
 *           or records               89   name, up to 166 bytes, and zeroes
 *
 * A page's own SHA-256 in its group is zero.
 *
 * A content id is h when h = SHA-256("nbdserve-cid-1", 4 block_size, 8 size)
 * has become SHA-256(h, digests) for each 256 blocks in turn, where the digest
 * of a block is its SHA-256, with zeroes behind the end of the volume; or
 * zeroes for one that is all zeroes, and for those that lack in the end.
 *
 * What keeps it whole ("durable state" is what the newest superblock's maps
 * say, with the log behind it):
 *
 * (C1) A slot that durable state names is never written.
 * (C2) An entry is logged after the writes of its data and digest returned.
 * (C3) A log page is written once; each flush begins a new one, seq + 1.
 * (C4) All pages before durable, and their data, were there when an fdatasync
 *      began that has returned.
 * (C5) A data slot that an entry drops is free after an fdatasync that began
 *      after that entry's page was written.
 * (C6) A page's slot is free when a superblock without it is durable.
 * (C7) Checkpoint: pages, fdatasync, first superblock, fdatasync, second.
 * (C8) On opening, superblocks that differ are made equal: the newer one is
 *      synced, then the other one written and synced, before either changes.
 * (C9) Replay takes pages while seq and digest fit.  Entries before the highest
 *      durable apply; later ones each only if the slot's data has their digest.
 *      A valid page behind the end that says the end is durable means damage:
 *      then nothing is written.
 * (C10) Recovery counts all references before it takes a slot, takes none that
 *      the log names, ends with a checkpoint, and goes on log_pages behind the
 *      end of the log, so that no page that was left there can fit again.
 * (C11) Pages never enter the index of digests.
 * (C12) A hit in the index is a hint: the bytes are compared.
 * (C13) ref counts edges from distinct pages and the catalog, and pins.  A page
 *      with several is copied before it changes: its children gain an edge.
 * (C14) After a failed sync, or write of page, log or superblock, nothing is
 *      written until the store is opened anew.
 * (C15) The catalog changes only in a checkpoint.
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
