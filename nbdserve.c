/* nbdserve.c - a complete NBD server in one file.
 * SPDX-License-Identifier: 0BSD (full text at the end of nbdserve.h)
 *
 *   cc nbdserve.c -o nbdserve        a server: see README, or nbdserve --help
 *   cc -DNBDSERVE_NO_MAIN -c ...     a library: see nbdserve.h
 *
 * The protocol is doc/proto.md of NetworkBlockDevice/nbd, and so are its names.
 *
 * ---- Map ----------------------------------------------------------------
 * A section uses only what stands above it.  KEEP IT SO: nothing else makes a
 * file of this length readable.  `grep -n '==== \[' nbdserve.c` prints it.
 *
 *   [1]  CONFIG        NBDSERVE_  compile-time switches
 *   [2]  PLATFORM      os_        the operating system; all #if on it
 *   [3]  UTIL          u_         bytes, numbers, text, log
 *   [4]  SHA-256       sha_       FIPS 180-4
 *   [5]  WIRE          wire_      constants and tables of the protocol
 *   [6]  SOCKET I/O    io_        bytes in and out, deadlines
 *   [7]  EXPORT        ex_        exports, lookup, one request on a backend
 *   [8]  HANDSHAKE     hs_        option haggling
 *   [9]  TRANSMISSION  tx_        requests in, replies out
 *   [10] FLAT          flat_      backend: file, block device, memory
 *   [11] CAS           cas_       store of volumes and snapshots
 *   [12] SERVER        srv_       listeners, clients, the public calls
 *   [13] CLI           cli_       the command
 *
 * ---- Threads ------------------------------------------------------------
 * nbdserve_run accepts; a thread serves each client, and hands what may take
 * long to that client's workers (see [9]).  A store has at times one more.
 *
 * ---- Locks, in the order they may be taken -------------------------------
 *   1. nbdserve.lock   exports and their sizes, clients
 *   2. conn.lock       a client's queue and counters
 *   3. conn.sending    one writer on a client's socket at a time (the only
 *                      lock held while a client is waited for: it is its own)
 *   4. ex.serial       one call into an NBDSERVE_EXPORT_SERIAL backend at a
 * time
 *   5. ex.lock         an export's group of waiting flushes
 *   6. flat.lock       what a file has turned out not to support
 *   7. nbdserve_cas.ckpt, then .lock: see [11] */

/* ==== [1] CONFIG (NBDSERVE_) =============================================
 * Set these with -D.  Switches are 0 or 1; 1 takes something out. */
#ifndef NBDSERVE_NO_MAIN
#define NBDSERVE_NO_MAIN 0 /* a library only: no main(), no command line */
#endif
#ifndef NBDSERVE_NO_FLAT
#define NBDSERVE_NO_FLAT 0 /* no backend for files, devices and memory */
#endif
#ifndef NBDSERVE_NO_CAS
#define NBDSERVE_NO_CAS 0 /* no content-addressed store */
#endif
#ifndef NBDSERVE_NO_HWSHA
#define NBDSERVE_NO_HWSHA 0 /* SHA-256 in plain C only */
#endif
#ifndef NBDSERVE_NO_TCP
#define NBDSERVE_NO_TCP 0 /* no TCP, no internet addresses */
#endif
#ifndef NBDSERVE_NO_THREADS
#define NBDSERVE_NO_THREADS 0 /* one client at a time, no pthread symbol */
#endif
#ifndef NBDSERVE_POSIX_ONLY
#define NBDSERVE_POSIX_ONLY 0 /* ignore what Linux and the BSDs add */
#endif
#ifndef NBDSERVE_MALLOC /* or functions of yours with the types of these two \
                         */
#define NBDSERVE_MALLOC malloc
#define NBDSERVE_FREE free
#endif
#ifndef NBDSERVE_MAX_REQUEST
#define NBDSERVE_MAX_REQUEST 67108864 /* bytes; a longer WRITE disconnects */
#endif
#ifndef NBDSERVE_MAX_OPTION
#define NBDSERVE_MAX_OPTION \
  65536 /* bytes of option data that are looked at \
         */
#endif
#ifndef NBDSERVE_STACK
#define NBDSERVE_STACK 262144 /* bytes of stack of the library's threads */
#endif

/* ==== [2] PLATFORM (os_) =================================================
 * Everything that differs between systems.  A call that a system lacks, or
 * that a sandbox forbids, ends in a portable way or in -EOPNOTSUPP; no other
 * section asks which system this is.  tcc has no atomics: only locks. */
#if defined __linux__ && !defined _GNU_SOURCE
#define _GNU_SOURCE 1
#elif defined __APPLE__ && !defined _DARWIN_C_SOURCE
#define _DARWIN_C_SOURCE 1
#elif defined __NetBSD__ && !defined _NETBSD_SOURCE
#define _NETBSD_SOURCE 1
#endif
#ifndef _FILE_OFFSET_BITS
#define _FILE_OFFSET_BITS 64
#endif

#include "nbdserve.h"

#include <arpa/inet.h>
#include <assert.h>
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>
#if defined __x86_64__ && defined __GNUC__ && !defined __TINYC__ && \
    !NBDSERVE_NO_CAS && !NBDSERVE_NO_HWSHA && !NBDSERVE_POSIX_ONLY
#include <cpuid.h>
#include <immintrin.h>
#define OS_HWSHA 1
#define OS_HWSHA_TARGET __attribute__((target("sha,sse4.1")))

static int os_has_hwsha(void) {
  unsigned a, b = 0, c = 0, d;
  return __get_cpuid(1, &a, &b, &c, &d) && c & 1 << 19 /* SSE 4.1 */ &&
         __get_cpuid_count(7, 0, &a, &b, &c, &d) && b & 1 << 29;
}
#else
#define OS_HWSHA 0
#define os_has_hwsha() 0
#endif

void *(NBDSERVE_MALLOC)(size_t);
void(NBDSERVE_FREE)(void *);

#define STATIC_ASSERT(name, cond) \
  enum { \
    assert_##name = 1 / (int)!!(cond) \
  }
STATIC_ASSERT(off_t_has_64_bits, sizeof(off_t) >= 8);

#if defined __linux__ && !NBDSERVE_POSIX_ONLY
#define OS_LINUX 1
#else
#define OS_LINUX 0
#endif
#ifndef SOCK_CLOEXEC
#define SOCK_CLOEXEC 0
#endif
#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0 /* SO_NOSIGPIPE does it: see os_setup_client */
#endif
#ifdef __GNUC__ /* lets printf-like functions be checked */
#define OS_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))
#else
#define OS_PRINTF(fmt, args)
#endif

#if NBDSERVE_NO_THREADS /* nothing to lock, nobody to wait for */
struct os_monitor {
  char m, c;
};
#define OS_PTHREAD(x, call) ((void)(x), 0)
#define os_thread(fn, arg) ((void)(fn)(arg), 0) /* at once, to its end */
#else
#include <pthread.h>
struct os_monitor {
  pthread_mutex_t m;
  pthread_cond_t c;
}; /* waiting in it */
#define OS_PTHREAD(x, call) call

/* Starts a detached thread that takes no signals: those are the host's. */
static int os_thread(void *(*fn)(void *), void *arg) {
  pthread_attr_t attr;
  pthread_t t;
  sigset_t all, old;
  sigfillset(&all);
  pthread_attr_init(&attr);
  pthread_attr_setstacksize(&attr, NBDSERVE_STACK);
  pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
  pthread_sigmask(SIG_SETMASK, &all, &old);
  int err = pthread_create(&t, &attr, fn, arg);
  pthread_sigmask(SIG_SETMASK, &old, NULL);
  pthread_attr_destroy(&attr);
  return -err;
}
#endif
#define os_monitor_init(x) \
  (-(OS_PTHREAD(x, pthread_mutex_init(&(x)->m, NULL)) | \
     OS_PTHREAD(x, pthread_cond_init(&(x)->c, NULL))))
#define os_monitor_free(x) \
  ((void)OS_PTHREAD(x, pthread_mutex_destroy(&(x)->m)), \
   (void)OS_PTHREAD(x, pthread_cond_destroy(&(x)->c)))
#define os_lock(x) ((void)OS_PTHREAD(x, pthread_mutex_lock(&(x)->m)))
#define os_unlock(x) ((void)OS_PTHREAD(x, pthread_mutex_unlock(&(x)->m)))
#define os_wait(x) ((void)OS_PTHREAD(x, pthread_cond_wait(&(x)->c, &(x)->m)))
#define os_wake_one(x) ((void)OS_PTHREAD(x, pthread_cond_signal(&(x)->c)))
#define os_wake_all(x) ((void)OS_PTHREAD(x, pthread_cond_broadcast(&(x)->c)))

static int64_t os_now_ms(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static void os_set_fd_flags(int fd, int nonblock) {
  int fl = fcntl(fd, F_GETFL) & ~O_NONBLOCK;
  fcntl(fd, F_SETFL, nonblock ? fl | O_NONBLOCK : fl);
  fcntl(fd, F_SETFD, FD_CLOEXEC);
}

/* A pipe that nobody waits at: a socket pair never lacks CLOEXEC. */
static int os_pipe(int fd[2]) {
  int r = socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fd);
  for (int i = 0; i < 2 && !r; i++)
    os_set_fd_flags(fd[i], 1);
  return r < 0 ? -errno : 0;
}

/* The directory that path is in, opened, or -errno. */
static int os_open_dir(const char *path) {
  char dir[PATH_MAX];
  const char *slash = strrchr(path, '/');
  int n = slash ? (int)(slash - path) + 1 : 0;
  if (snprintf(dir, sizeof dir, "%.*s.", n, path) >= (int)sizeof dir)
    return -ENAMETOOLONG;
  int fd = open(dir, O_RDONLY | O_CLOEXEC);
  return fd < 0 ? -errno : fd;
}

/* The next client of a listening socket, blocking, or -errno. */
static int os_accept(int fd) {
#if OS_LINUX
  int c = accept4(fd, NULL, NULL, SOCK_CLOEXEC);
#else
  int c = accept(fd, NULL, NULL);
  if (c >= 0) os_set_fd_flags(c, 0); /* the BSDs inherit O_NONBLOCK */
#endif
  return c < 0 ? -errno : c;
}

/* Prepares a client's socket: no Nagle delay (proto.md, Protocol phases), no
 * SIGPIPE, dead peers noticed, calls that block end with EAGAIN after stall_ms.
 * Not a socket: nothing happens. */
static void os_setup_client(int fd, uint32_t stall_ms) {
  struct timeval t = {stall_ms / 1000, (int)(stall_ms % 1000) * 1000};
  int one = 1;
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t);
  setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &t, sizeof t);
  setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one);
#ifdef SO_NOSIGPIPE
  setsockopt(fd, SOL_SOCKET, SO_NOSIGPIPE, &one, sizeof one);
#endif
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  one = 2 << 20; /* a long reply fits: 3 times faster on Linux, 10 on macOS */
  setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &one, sizeof one);
}

/* Takes the first done bytes off the n pieces at v. */
static void os_advance(struct iovec **v, int *n, size_t done) {
  for (; *n > 0 && done >= (*v)->iov_len; ++*v, --*n)
    done -= (*v)->iov_len;
  if (!done) return;
  assert(*n > 0);
  (*v)->iov_base = (char *)(*v)->iov_base + done;
  (*v)->iov_len -= done;
}

#if !NBDSERVE_NO_FLAT || !NBDSERVE_NO_CAS
/* ---- Files and block devices: for [10] and [11] -------------------------
 * Offsets and lengths have 64 bits without a sign everywhere else; here they
 * become an off_t.  The caller makes sure that no range reaches beyond
 * INT64_MAX, and each function asserts that.  A descriptor stays the caller's.
 *
 * Calls that a signal interrupts go on: a host may have handlers without
 * SA_RESTART. */

/* What a call moves.  The values are those of a boolean "writing". */
enum {
  OS_READ = 0,
  OS_WRITE = 1
};

#if OS_LINUX || (!defined __APPLE__ && !NBDSERVE_POSIX_ONLY)
/* Moves what one system call moves of v[0..n); as pread(2) and pwrite(2).  For
 * a single piece the plain calls are a little faster. */
static ssize_t os_transfer_some(int fd, int writing, const struct iovec *v,
                                int n, off_t off) {
  if (n > 1) return writing ? pwritev(fd, v, n, off) : preadv(fd, v, n, off);
  return writing ? pwrite(fd, v->iov_base, v->iov_len, off)
                 : pread(fd, v->iov_base, v->iov_len, off);
}
#else
/* The same where POSIX is all there is: one piece at a time. */
static ssize_t os_transfer_some(int fd, int writing, const struct iovec *v,
                                int n, off_t off) {
  (void)n;
  return writing ? pwrite(fd, v->iov_base, v->iov_len, off)
                 : pread(fd, v->iov_base, v->iov_len, off);
}
#endif

/* Reads (OS_READ) or writes (OS_WRITE) all of v[0..n), which lies at off in one
 * piece.  Changes v.  No piece may be empty.
 *
 * The system may do less than it was asked to (at a signal, a full disk, or
 * after 2 GiB); what is left is asked for again until it is done or an error
 * tells why not.  After an error some of it may have been done.  -EIO: the file
 * ends before all was read. */
static int os_transfer(int fd, int writing, struct iovec *v, int n,
                       uint64_t off) {
  assert(writing == OS_READ || writing == OS_WRITE);
  while (n > 0) {
    assert(v->iov_len > 0); /* else 0 would not mean the end of the file */
    assert(off <= INT64_MAX);
    ssize_t done = os_transfer_some(fd, writing, v, n, (off_t)off);
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) return -errno;
    if (done == 0) return -EIO;
    off += (uint64_t)done;
    os_advance(&v, &n, (size_t)done);
  }
  return 0;
}

#ifdef __APPLE__
/* Asks the drive to empty its cache, which fsync(2) does not on this system.
 * Where a file system cannot do that, fsync is the best there is. */
static int os_try_datasync(int fd) {
  int r = fcntl(fd, F_FULLFSYNC);
  return r < 0 && errno != EINTR && errno != EIO ? fsync(fd) : r;
}
#else
/* As fdatasync(2). */
static int os_try_datasync(int fd) {
  return fdatasync(fd);
}
#endif

/* When it returns 0, all that was written to fd is on the medium, with as much
 * of the file's metadata as it takes to read it.  After any error nobody knows
 * what is there, and a second call tells nothing about it: see (F1), (C14). */
static int os_datasync(int fd) {
  while (os_try_datasync(fd) < 0)
    if (errno != EINTR) return -errno;
  return 0;
}

/* What os_fallocate does to a range.  The numbers are those of Linux. */
enum {
  OS_ALLOCATE = 0,    /* has space, maybe with a larger file; keeps its data */
  OS_PUNCH_HOLE = 3,  /* gives its space back; reads as zeroes; same size */
  OS_ZERO_RANGE = 17, /* reads as zeroes and has space; same size */
  OS_FALLOCATE_MODES  /* all are below this */
};

#if OS_LINUX
#ifdef FALLOC_FL_ZERO_RANGE /* musl does not name it */
STATIC_ASSERT(punch_hole_is_linux_s,
              OS_PUNCH_HOLE == (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE));
STATIC_ASSERT(zero_range_is_linux_s,
              OS_ZERO_RANGE == (FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE));
#endif

/* Changes the space behind a range.  -EINVAL: not at these boundaries, as for a
 * part of a device's sector.  -EOPNOTSUPP: this kind of file (ENODEV), its file
 * system or a sandbox (EPERM or ENOSYS) does not have that. */
static int os_fallocate(int fd, int mode, uint64_t off, uint64_t len) {
  assert(mode >= 0 && mode < OS_FALLOCATE_MODES);
  assert(len > 0 && off <= INT64_MAX && len <= INT64_MAX - off);
  while (fallocate(fd, mode, (off_t)off, (off_t)len) < 0) {
    if (errno == EINTR) continue;
    if (errno == ENOSYS || errno == EPERM || errno == ENODEV)
      return -EOPNOTSUPP;
    return -errno;
  }
  return 0;
}
#else
/* Other systems have nothing that keeps all these promises. */
static int os_fallocate(int fd, int mode, uint64_t off, uint64_t len) {
  (void)fd;
  (void)mode;
  (void)off;
  (void)len;
  return -EOPNOTSUPP;
}
#endif

/* Keeps other servers out, until fd is closed: a writer keeps out everybody, a
 * reader keeps out writers.  -EBUSY: another server is there already.  On a
 * file system without locks nobody is kept out.
 *
 * flock(2) it is because its lock belongs to the descriptor.  A lock of
 * fcntl(2) belongs to the process: it would let one server open a file twice,
 * and vanish when the process closes any other descriptor of the file. */
static int os_lock_file(int fd, int readonly) {
  int r = flock(fd, (readonly ? LOCK_SH : LOCK_EX) | LOCK_NB);
  return r < 0 && (errno == EWOULDBLOCK || errno == EAGAIN) ? -EBUSY : 0;
}

/* Makes a new file and its name survive a power cut.  fd is the file at path.
 * First the file, then the name: a name must not lead to a file that is not
 * there yet. */
static int os_sync_new_file(int fd, const char *path) {
  int err = os_datasync(fd);
  if (err) return err;
  int dir = os_open_dir(path);
  if (dir < 0) return dir;
  err = os_datasync(dir);
  close(dir);
  return err == -EINVAL ? 0 : err; /* some directories cannot be synced */
}
#endif

#if !NBDSERVE_NO_FLAT
/* ---- Files and block devices: for [10] alone ---------------------------- */

#if defined SEEK_HOLE && !NBDSERVE_POSIX_ONLY
/* Returns 1 if there is data at off, and 0 if there is a hole, which reads as
 * zeroes.  *next: where the data or the hole ends, at most end.
 *
 * When in doubt it is data: clients skip what they are told is a hole, so a
 * hole that is called data costs time, and data that is called a hole is lost.
 * Other threads may change the file in between; each answer was true once. */
static int os_is_data(int fd, uint64_t off, uint64_t end, uint64_t *next) {
  assert(off < end && end <= INT64_MAX);
  *next = end;
  off_t data = lseek(fd, (off_t)off, SEEK_DATA);
  if (data < 0 && errno == ENXIO) {
    /* There is no data behind off.  All up to end is a hole, unless the file
     * has become shorter: a read behind its end must still fail. */
    return lseek(fd, 0, SEEK_END) < (off_t)end;
  }
  if (data < 0) return 1; /* the file system does not know */
  if ((uint64_t)data > off) {
    if ((uint64_t)data < end) *next = (uint64_t)data;
    return 0;
  }
  off_t hole = lseek(fd, (off_t)off, SEEK_HOLE);
  if (hole > (off_t)off && (uint64_t)hole < end) *next = (uint64_t)hole;
  assert(*next > off && *next <= end);
  return 1;
}
#else
/* Where files do not tell their holes, all is data. */
static int os_is_data(int fd, uint64_t off, uint64_t end, uint64_t *next) {
  (void)fd;
  (void)off;
  *next = end;
  return 1;
}
#endif

#if OS_LINUX && defined MFD_CLOEXEC
/* Opens a new file in memory, as open(2). */
static int os_open_memory(void) {
  return memfd_create("nbdserve", MFD_CLOEXEC);
}
#else
/* This system has no files in memory. */
static int os_open_memory(void) {
  return -1;
}
#endif

#if OS_LINUX && defined O_TMPFILE
/* Opens a new file in dir that never has a name, as open(2).  O_EXCL: nobody
 * can give it one. */
static int os_open_unnamed(const char *dir) {
  return open(dir, O_TMPFILE | O_EXCL | O_RDWR | O_CLOEXEC, 0600);
}
#else
/* Every file of this system has a name at first. */
static int os_open_unnamed(const char *dir) {
  (void)dir;
  return -1;
}
#endif

/* Opens a new file in dir and takes its name away at once.  mkstemp makes the
 * name up and refuses one that is there, so it follows no link that others may
 * have placed. */
static int os_open_and_unlink(const char *dir) {
  char path[PATH_MAX];
  int len = snprintf(path, sizeof path, "%s/nbdserveXXXXXX", dir);
  if (len < 0 || len >= (int)sizeof path) return -ENAMETOOLONG;
  int fd = mkstemp(path);
  if (fd < 0) return -errno;
  fcntl(fd, F_SETFD, FD_CLOEXEC);
  if (unlink(path) == 0) return fd;
  int err = -errno;
  close(fd);
  return err;
}

/* Opens a file of nobody else's that is gone when it is closed: in dir or, if
 * dir is NULL, in memory, or in /tmp where the system has no files in memory.
 * The caller owns the descriptor.
 *
 * The ways are tried from the best to the one that works everywhere, without a
 * look at why one has failed.  -errno: of the last one. */
static int os_nameless_file(const char *dir) {
  int fd = dir ? -1 : os_open_memory();
  if (fd >= 0) return fd;
  if (!dir) dir = "/tmp";
  fd = os_open_unnamed(dir); /* not every file system can do that */
  return fd >= 0 ? fd : os_open_and_unlink(dir);
}

/* Removes the file at path if it still is the one that fd is: in the meantime
 * somebody may have put another one there, which is not ours to remove. */
static void os_remove_own_file(const char *path, int fd) {
  struct stat own;
  struct stat found;
  if (fstat(fd, &own) < 0 || lstat(path, &found) < 0) return;
  if (own.st_dev == found.st_dev && own.st_ino == found.st_ino) unlink(path);
}

#if OS_LINUX
/* These two are of <linux/fs.h>, which not every libc comes with. */
#define OS_BLKROGET _IO(0x12, 94)
#define OS_BLKROTATIONAL _IO(0x12, 126)

/* Does the block device refuse writes?  Opening such a device for writing
 * succeeds nevertheless. */
static int os_is_readonly_device(int fd) {
  int yes = 0;
  return ioctl(fd, OS_BLKROGET, &yes) == 0 && yes;
}

/* Does the block device have a head to move?  Files do not know. */
static int os_is_rotational(int fd) {
  unsigned short yes = 0;
  return ioctl(fd, OS_BLKROTATIONAL, &yes) == 0 && yes;
}
#else
/* Nothing to ask: opening the device must tell. */
static int os_is_readonly_device(int fd) {
  (void)fd;
  return 0;
}

/* Nothing to ask. */
static int os_is_rotational(int fd) {
  (void)fd;
  return 0;
}
#endif

#if defined POSIX_FADV_WILLNEED && !NBDSERVE_POSIX_ONLY
/* Says that a range will be read soon. */
static void os_willneed(int fd, uint64_t off, uint64_t len) {
  assert(off <= INT64_MAX && len <= INT64_MAX - off);
  posix_fadvise(fd, (off_t)off, (off_t)len, POSIX_FADV_WILLNEED);
}
#else
/* This system cannot be told. */
static void os_willneed(int fd, uint64_t off, uint64_t len) {
  (void)fd;
  (void)off;
  (void)len;
}
#endif

#endif /* !NBDSERVE_NO_FLAT */

/* ==== [3] UTIL (u_) ======================================================
 * Bytes of network and disk go through get and put: big-endian, unaligned. */
static uint16_t u_get16(const unsigned char *p) {
  return (uint16_t)(p[0] << 8 | p[1]);
}
static uint32_t u_get32(const unsigned char *p) {
  return (uint32_t)u_get16(p) << 16 | u_get16(p + 2);
}
static uint64_t u_get64(const unsigned char *p) {
  return (uint64_t)u_get32(p) << 32 | u_get32(p + 4);
}

static void u_put16(unsigned char *p, unsigned v) {
  p[0] = (unsigned char)(v >> 8);
  p[1] = (unsigned char)v;
}
static void u_put32(unsigned char *p, uint32_t v) {
  u_put16(p, v >> 16);
  u_put16(p + 2, v);
}
static void u_put64(unsigned char *p, uint64_t v) {
  u_put32(p, (uint32_t)(v >> 32));
  u_put32(p + 4, (uint32_t)v);
}

static uint64_t u_min(uint64_t a, uint64_t b) {
  return a < b ? a : b;
}
static int u_is_power_of_2(uint64_t v) {
  return v && !(v & (v - 1));
}

static int u_is_zero(const unsigned char *p, size_t n) {
  uint64_t v[4], any = 0; /* memcmp is slow in musl */
  for (; n >= 32 && !any; p += 32, n -= 32, any = v[0] | v[1] | v[2] | v[3])
    memcpy(v, p, 32);
  while (n > 0 && !any)
    any = p[--n];
  return !any;
}

static void *u_zalloc(size_t n) {
  void *p = NBDSERVE_MALLOC(n);
  return p ? memset(p, 0, n) : NULL;
}

/* A number up to INT64_MAX, maybe with K to E; what is behind it, or NULL. */
static const char *u_parse_size(const char *s, uint64_t *out) {
  static const char units[] = "KMGTPEkmgtpe";
  const char *p = s;
  uint64_t v = 0;
  for (; *p >= '0' && *p <= '9'; p++) {
    if (v > (INT64_MAX - (uint64_t)(*p - '0')) / 10) return NULL;
    v = v * 10 + (uint64_t)(*p - '0');
  }
  const char *unit = *p ? strchr(units, *p) : NULL;
  int shift = unit ? (int)((unit - units) % 6 + 1) * 10 : 0;
  if (p == s || v > (uint64_t)INT64_MAX >> shift) return NULL;
  *out = v << shift;
  return unit ? p + 1 : p;
}

/* The text of a -errno value; strerror shares memory only for unknown ones. */
static const char *u_errno_text(int err) {
  return strerror(-err);
}

/* Appends s to buf[size], as %XX what a URI may not hold.  False: no room. */
static int u_append_uri(char *buf, size_t size, const char *s) {
  size_t n = strlen(buf);
  for (; *s && n < size; s++)
    n += (size_t)snprintf(
        buf + n, size - n,
        strchr("-._~/", *s) || (*s > 0 && isalnum(*s)) ? "%c" : "%%%02X",
        (unsigned char)*s);
  return n < size;
}

/* How long the character at s is; 0: not UTF-8, or a control character. */
static int u_utf8_len(const char *s) {
  static const uint32_t least[] = {32, ~0u, 160, 2048, 65536, ~0u};
  const unsigned char *p = (const unsigned char *)s;
  uint32_t c, n = 0, i = 1;
  while (n < 5 && *p << n & 128)
    n++; /* the ones that it begins with */
  for (c = *p & 127u >> n; i < n && p[i] >> 6 == 2; i++)
    c = c << 6 | p[i] % 64;
  return i < n || c < least[n] || c == 127 || c >> 11 == 27 /* surrogates */ ||
                 c > 0x10ffff
             ? 0
             : (int)i;
}

/* Gives the host a message if it wants that level; what is not text in it, and
 * may come from a client, as '?'. */
static void OS_PRINTF(3, 4) u_log(const struct nbdserve_config *config,
                                  int level, const char *fmt, ...) {
  char text[512], *p;
  va_list ap;
  if (!config->log || level > config->log_level) return;
  va_start(ap, fmt);
  vsnprintf(text, sizeof text, fmt, ap);
  va_end(ap);
  for (p = text; *p; p += u_utf8_len(p))
    if (!u_utf8_len(p)) *p = '?';
  config->log(config->ctx, level, text);
}

/* ==== [4] SHA-256 (sha_) =================================================
 * SHA-256 (FIPS 180-4) of one message, or of two messages of the same length
 * side by side.
 *
 * Why two: many x86 processors have instructions for SHA-256, but each of
 * these waits for the result of the one before, so one message alone leaves
 * most of the processor idle.  The instructions for a second message fit into
 * the gaps, and two digests take about as long as one.
 *
 * A state is the eight words that the standard calls A to H.  They lie in
 * memory in the order F E B A H G D C, because the instructions want ABEF in
 * one register and CDGH in another one, A and C as the highest words.  All code
 * below uses that order, so that no state is ever rearranged. */
#if !NBDSERVE_NO_CAS

/* Where each word lies in a state */
enum {
  SHA_F,
  SHA_E,
  SHA_B,
  SHA_A,
  SHA_H,
  SHA_G,
  SHA_D,
  SHA_C,
  SHA_STATE_WORDS
};

enum {
  SHA_BLOCK_LEN = 64, /* bytes that are mixed into the state at a time */
  SHA_ROUNDS = 64,    /* rounds for each block */
  SHA_COUNT_LEN = 8   /* bytes at a message's end that hold its length */
};

/* The constant that goes into each round: the first 32 bits behind the point of
 * the cube root of each of the first 64 primes */
static const uint32_t sha_k[SHA_ROUNDS] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1,
    0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3,
    0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786,
    0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147,
    0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13,
    0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b,
    0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a,
    0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
    0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

/* The functions of the standard.  They are macros because tcc does not inline;
 * their arguments are evaluated several times. */
#define SHA_ROR(x, n) ((x) >> (n) | (x) << (32 - (n)))
#define SHA_BIG_SIGMA_0(x) (SHA_ROR(x, 2) ^ SHA_ROR(x, 13) ^ SHA_ROR(x, 22))
#define SHA_BIG_SIGMA_1(x) (SHA_ROR(x, 6) ^ SHA_ROR(x, 11) ^ SHA_ROR(x, 25))
#define SHA_SIGMA_0(x) (SHA_ROR(x, 7) ^ SHA_ROR(x, 18) ^ (x) >> 3)
#define SHA_SIGMA_1(x) (SHA_ROR(x, 17) ^ SHA_ROR(x, 19) ^ (x) >> 10)
#define SHA_CHOOSE(x, y, z) (((x) & (y)) ^ (~(x) & (z)))
#define SHA_MAJORITY(x, y, z) (((x) & (y)) ^ ((x) & (z)) ^ ((y) & (z)))

/* One round on the state v.  The standard moves every word one place on after
 * each round; here the words stay where they are, and the next round names
 * them differently instead.  addend: the constant plus the message's word. */
#define SHA_ROUND(v, a, b, c, d, e, f, g, h, addend) \
  do { \
    v[SHA_##h] += SHA_BIG_SIGMA_1(v[SHA_##e]) + \
                  SHA_CHOOSE(v[SHA_##e], v[SHA_##f], v[SHA_##g]) + (addend); \
    v[SHA_##d] += v[SHA_##h]; \
    v[SHA_##h] += SHA_BIG_SIGMA_0(v[SHA_##a]) + \
                  SHA_MAJORITY(v[SHA_##a], v[SHA_##b], v[SHA_##c]); \
  } while (0)

/* Computes the words that the rounds for a block take, one each.  The first 16
 * are the block, big-endian; every other one is made of four before it. */
static void sha_schedule(uint32_t w[SHA_ROUNDS], const unsigned char *block) {
  int i;
  for (i = 0; i < 16; i++)
    w[i] = u_get32(block + 4 * i);
  for (; i < SHA_ROUNDS; i++)
    w[i] =
        SHA_SIGMA_1(w[i - 2]) + w[i - 7] + SHA_SIGMA_0(w[i - 15]) + w[i - 16];
}

/* Mixes nblocks blocks into a state, in plain C.  For each block a copy of the
 * state goes through all rounds and is then added to the state. */
static void sha_portable(uint32_t *state, const unsigned char *blocks,
                         size_t nblocks) {
  uint32_t w[SHA_ROUNDS];
  uint32_t v[SHA_STATE_WORDS];
  for (; nblocks > 0; nblocks--, blocks += SHA_BLOCK_LEN) {
    sha_schedule(w, blocks);
    memcpy(v, state, sizeof v);
    for (int i = 0; i < SHA_ROUNDS; i += 8) {
      SHA_ROUND(v, A, B, C, D, E, F, G, H, sha_k[i] + w[i]);
      SHA_ROUND(v, H, A, B, C, D, E, F, G, sha_k[i + 1] + w[i + 1]);
      SHA_ROUND(v, G, H, A, B, C, D, E, F, sha_k[i + 2] + w[i + 2]);
      SHA_ROUND(v, F, G, H, A, B, C, D, E, sha_k[i + 3] + w[i + 3]);
      SHA_ROUND(v, E, F, G, H, A, B, C, D, sha_k[i + 4] + w[i + 4]);
      SHA_ROUND(v, D, E, F, G, H, A, B, C, sha_k[i + 5] + w[i + 5]);
      SHA_ROUND(v, C, D, E, F, G, H, A, B, sha_k[i + 6] + w[i + 6]);
      SHA_ROUND(v, B, C, D, E, F, G, H, A, sha_k[i + 7] + w[i + 7]);
    }
    for (int i = 0; i < SHA_STATE_WORDS; i++)
      state[i] += v[i];
  }
}

#if OS_HWSHA
/* One of the two messages that the instructions work on.  All of it can
 * stay in registers: two lanes, the constants and what is in between fit into
 * the 16 that the processor has. */
struct sha_lane {
  __m128i abef; /* half of the state */
  __m128i cdgh; /* the other half */
  __m128i w[4]; /* 16 words of the message's schedule, the next ones first */
};

/* Loads four words from anywhere. */
static inline OS_HWSHA_TARGET __m128i sha_load(const void *from) {
  return _mm_loadu_si128((const __m128i *)from);
}

/* Loads a block of the message, whose words are big-endian.  There is no loop
 * because gcc would keep an array that a loop indexes in memory. */
static inline OS_HWSHA_TARGET void sha_lane_load(struct sha_lane *lane,
                                                 const unsigned char *block) {
  const __m128i order = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  lane->w[0] = _mm_shuffle_epi8(sha_load(block), order);
  lane->w[1] = _mm_shuffle_epi8(sha_load(block + 16), order);
  lane->w[2] = _mm_shuffle_epi8(sha_load(block + 32), order);
  lane->w[3] = _mm_shuffle_epi8(sha_load(block + 48), order);
}

/* Does four rounds, k being their constants, and computes the four words of the
 * schedule that the rounds need 16 later.  The last four calls for a block
 * compute words in vain; a second loop without that was not faster. */
static inline OS_HWSHA_TARGET void sha_lane_rounds(struct sha_lane *lane,
                                                   __m128i k) {
  __m128i *w = lane->w;
  __m128i addend = _mm_add_epi32(w[0], k);
  /* Each of these does two rounds, on the lower half of addend.  The old ABEF
   * is the new CDGH, so the halves change places twice. */
  lane->cdgh = _mm_sha256rnds2_epu32(lane->cdgh, lane->abef, addend);
  addend = _mm_shuffle_epi32(addend, 14); /* the upper half */
  lane->abef = _mm_sha256rnds2_epu32(lane->abef, lane->cdgh, addend);
  __m128i seven_back = _mm_alignr_epi8(w[3], w[2], 4);
  __m128i sum = _mm_add_epi32(_mm_sha256msg1_epu32(w[0], w[1]), seven_back);
  w[0] = w[1];
  w[1] = w[2];
  w[2] = w[3];
  w[3] = _mm_sha256msg2_epu32(sum, w[2]);
}

/* Adds a state to what the rounds made of it, and saves the sum as the state,
 * from which the next block goes on. */
static inline OS_HWSHA_TARGET void sha_lane_save(struct sha_lane *lane,
                                                 uint32_t *state) {
  lane->abef = _mm_add_epi32(lane->abef, sha_load(state + SHA_F));
  lane->cdgh = _mm_add_epi32(lane->cdgh, sha_load(state + SHA_H));
  _mm_storeu_si128((__m128i *)(void *)(state + SHA_F), lane->abef);
  _mm_storeu_si128((__m128i *)(void *)(state + SHA_H), lane->cdgh);
}

/* Mixes nblocks blocks each into two states, with the instructions.  The lines
 * for the two lanes alternate, and the compiler keeps that order more or less;
 * the processor does the rest. */
static OS_HWSHA_TARGET void sha_hw(uint32_t *state, const unsigned char *blocks,
                                   uint32_t *other_state,
                                   const unsigned char *other_blocks,
                                   size_t nblocks) {
  struct sha_lane lane = {.abef = sha_load(state + SHA_F),
                          .cdgh = sha_load(state + SHA_H)};
  struct sha_lane other = {.abef = sha_load(other_state + SHA_F),
                           .cdgh = sha_load(other_state + SHA_H)};
  for (size_t i = 0; i < nblocks; i++) {
    sha_lane_load(&lane, blocks + SHA_BLOCK_LEN * i);
    sha_lane_load(&other, other_blocks + SHA_BLOCK_LEN * i);
    for (int round = 0; round < SHA_ROUNDS; round += 4) {
      __m128i k = sha_load(sha_k + round);
      sha_lane_rounds(&lane, k);
      sha_lane_rounds(&other, k);
    }
    sha_lane_save(&lane, state);
    sha_lane_save(&other, other_state);
  }
}

/* Mixes nblocks blocks into a state, and as many other blocks into another
 * state.  use_hw: with the instructions, both at once; then there must be other
 * blocks, maybe the same ones.  Else other_blocks may be NULL. */
static void sha_mix(int use_hw, uint32_t *state, const unsigned char *blocks,
                    uint32_t *other_state, const unsigned char *other_blocks,
                    size_t nblocks) {
  assert(other_blocks || !use_hw || !nblocks);
  if (use_hw) {
    sha_hw(state, blocks, other_state, other_blocks, nblocks);
    return;
  }
  sha_portable(state, blocks, nblocks);
  if (other_blocks) sha_portable(other_state, other_blocks, nblocks);
}
#else
/* The same where only plain C can do it. */
static void sha_mix(int use_hw, uint32_t *state, const unsigned char *blocks,
                    uint32_t *other_state, const unsigned char *other_blocks,
                    size_t nblocks) {
  (void)use_hw;
  assert(!use_hw); /* os_has_hwsha says so */
  sha_portable(state, blocks, nblocks);
  if (other_blocks) sha_portable(other_state, other_blocks, nblocks);
}
#endif

/* Writes what comes behind the last whole block of a message, and returns how
 * many blocks that takes, 1 or 2:
 *
 *   the rest of the message, 0 to 63 bytes
 *   the byte 0x80
 *   zeroes, as few as it takes to fill the last block
 *   the length of the whole message in bits, 8 bytes */
static size_t sha_pad(unsigned char tail[2 * SHA_BLOCK_LEN],
                      const unsigned char *message, size_t len) {
  size_t rest = len % SHA_BLOCK_LEN;
  size_t nblocks = rest + 1 + SHA_COUNT_LEN <= SHA_BLOCK_LEN ? 1 : 2;
  size_t end = SHA_BLOCK_LEN * nblocks;
  memset(tail, 0, end);
  if (rest) memcpy(tail, message + (len - rest), rest); /* else maybe NULL */
  tail[rest] = 0x80;
  assert(rest + 1 <= end - SHA_COUNT_LEN);
  u_put64(tail + end - SHA_COUNT_LEN, (uint64_t)len * 8);
  return nblocks;
}

/* Writes the digest that a state stands for, once all blocks are mixed in. */
static void sha_put_digest(unsigned char digest[32], const uint32_t *state) {
  static const unsigned char order[SHA_STATE_WORDS] = {
      SHA_A, SHA_B, SHA_C, SHA_D, SHA_E, SHA_F, SHA_G, SHA_H};
  for (int i = 0; i < SHA_STATE_WORDS; i++)
    u_put32(digest + 4 * i, state[order[i]]);
}

/* Writes the digest of first[len] to first_digest and, if second is not NULL,
 * the digest of second[len] to second_digest.  A digest may be written over its
 * own message.  use_hw: use the processor's instructions; only where
 * os_has_hwsha. */
static void sha_256(int use_hw, const void *first, const void *second,
                    size_t len, unsigned char *first_digest,
                    unsigned char *second_digest) {
  static const uint32_t start[SHA_STATE_WORDS] = {
      [SHA_A] = 0x6a09e667, [SHA_B] = 0xbb67ae85, [SHA_C] = 0x3c6ef372,
      [SHA_D] = 0xa54ff53a, [SHA_E] = 0x510e527f, [SHA_F] = 0x9b05688c,
      [SHA_G] = 0x1f83d9ab, [SHA_H] = 0x5be0cd19};
  uint32_t state[2][SHA_STATE_WORDS];
  unsigned char tail[2][2 * SHA_BLOCK_LEN];
  assert(first || !len);
  assert(second_digest || !second);

  /* The instructions always work on two messages.  A single message keeps
   * itself company, and the second result is not looked at. */
  const void *beside = use_hw && !second ? first : second;
  memcpy(state[0], start, sizeof start);
  memcpy(state[1], start, sizeof start);
  size_t ntail = sha_pad(tail[0], first, len);
  if (beside) sha_pad(tail[1], beside, len);
  sha_mix(use_hw, state[0], first, state[1], beside, len / SHA_BLOCK_LEN);
  sha_mix(use_hw, state[0], tail[0], state[1], beside ? tail[1] : NULL, ntail);
  sha_put_digest(first_digest, state[0]);
  if (second) sha_put_digest(second_digest, state[1]);
}

#endif /* !NBDSERVE_NO_CAS */

/* ==== [5] WIRE (wire_) ===================================================
 * The protocol's numbers and what is true of each command. */
#define NBD_INIT_MAGIC UINT64_C(0x4e42444d41474943)   /* "NBDMAGIC" */
#define NBD_OPTION_MAGIC UINT64_C(0x49484156454f5054) /* "IHAVEOPT" */
#define NBD_REP_MAGIC UINT64_C(0x0003e889045565a9)

/* Error replies to options have bit 31 set, which an enum need not hold. */
#define NBD_REP_ERR_UNSUP 0x80000001u
#define NBD_REP_ERR_INVALID 0x80000003u
#define NBD_REP_ERR_UNKNOWN 0x80000006u
#define NBD_REP_ERR_BLOCK_SIZE_REQD 0x80000008u
#define NBD_REP_ERR_TOO_BIG 0x80000009u
#define NBD_REP_ERR_EXT_HEADER_REQD 0x8000000au

enum { /* handshake: flags of server and client, options, replies, infos */
  NBD_FLAG_FIXED_NEWSTYLE = 1 << 0,
  NBD_FLAG_NO_ZEROES = 1 << 1,
  NBD_FLAG_C_FIXED_NEWSTYLE = 1 << 0,
  NBD_FLAG_C_NO_ZEROES = 1 << 1,
  NBD_OPT_EXPORT_NAME = 1,
  NBD_OPT_ABORT = 2,
  NBD_OPT_LIST = 3,
  NBD_OPT_INFO = 6,
  NBD_OPT_GO = 7,
  NBD_OPT_STRUCTURED_REPLY = 8,
  NBD_OPT_LIST_META_CONTEXT = 9,
  NBD_OPT_SET_META_CONTEXT = 10,
  NBD_OPT_EXTENDED_HEADERS = 11,
  NBD_REP_ACK = 1,
  NBD_REP_SERVER = 2,
  NBD_REP_INFO = 3,
  NBD_REP_META_CONTEXT = 4,
  NBD_INFO_EXPORT = 0,
  NBD_INFO_NAME = 1,
  NBD_INFO_DESCRIPTION = 2,
  NBD_INFO_BLOCK_SIZE = 3
};

enum { /* transmission: magics, flags of the export, commands, replies */
  NBD_REQUEST_MAGIC = 0x25609513,
  NBD_EXTENDED_REQUEST_MAGIC = 0x21e41c71,
  NBD_SIMPLE_REPLY_MAGIC = 0x67446698,
  NBD_STRUCTURED_REPLY_MAGIC = 0x668e33ef,
  NBD_EXTENDED_REPLY_MAGIC = 0x6e8a278c,
  NBD_FLAG_HAS_FLAGS = 1 << 0,
  NBD_FLAG_READ_ONLY = 1 << 1,
  NBD_FLAG_SEND_FLUSH = 1 << 2,
  NBD_FLAG_SEND_FUA = 1 << 3,
  NBD_FLAG_ROTATIONAL = 1 << 4,
  NBD_FLAG_SEND_TRIM = 1 << 5,
  NBD_FLAG_SEND_WRITE_ZEROES = 1 << 6,
  NBD_FLAG_SEND_DF = 1 << 7,
  NBD_FLAG_CAN_MULTI_CONN = 1 << 8,
  NBD_FLAG_SEND_CACHE = 1 << 10,
  NBD_FLAG_SEND_FAST_ZERO = 1 << 11,
  NBD_FLAG_BLOCK_STATUS_PAYLOAD = 1 << 12,
  NBD_CMD_READ = 0,
  NBD_CMD_WRITE = 1,
  NBD_CMD_DISC = 2,
  NBD_CMD_FLUSH = 3,
  NBD_CMD_TRIM = 4,
  NBD_CMD_CACHE = 5,
  NBD_CMD_WRITE_ZEROES = 6,
  NBD_CMD_BLOCK_STATUS = 7,
  NBD_CMD_FLAG_FUA = 1 << 0,
  NBD_CMD_FLAG_NO_HOLE = 1 << 1,
  NBD_CMD_FLAG_DF = 1 << 2,
  NBD_CMD_FLAG_REQ_ONE = 1 << 3,
  NBD_CMD_FLAG_FAST_ZERO = 1 << 4,
  NBD_CMD_FLAG_PAYLOAD_LEN = 1 << 5,
  NBD_REPLY_FLAG_DONE = 1 << 0,
  NBD_REPLY_TYPE_NONE = 0,
  NBD_REPLY_TYPE_OFFSET_DATA = 1,
  NBD_REPLY_TYPE_OFFSET_HOLE = 2,
  NBD_REPLY_TYPE_BLOCK_STATUS = 5,
  NBD_REPLY_TYPE_BLOCK_STATUS_EXT = 6,
  NBD_REPLY_TYPE_ERROR = (1 << 15) + 1,
  NBD_REPLY_TYPE_ERROR_OFFSET = (1 << 15) + 2,
  NBD_EPERM = 1,
  NBD_EIO = 5,
  NBD_ENOMEM = 12,
  NBD_EINVAL = 22,
  NBD_ENOSPC = 28,
  NBD_EOVERFLOW = 75,
  NBD_ENOTSUP = 95,
  NBD_ESHUTDOWN = 108
};

enum { /* sizes of messages without their data; the longest name or message */
  WIRE_OPTION = 16,
  WIRE_REP = 20,
  WIRE_REQUEST = 28,
  WIRE_SIMPLE = 16,
  WIRE_CHUNK = 20,
  WIRE_EXTENDED = 32 /* either way */,
  WIRE_STRING_MAX = 4096
};

enum {
  WIRE_COMPACT,
  WIRE_STRUCTURED,
  WIRE_EXT
}; /* what was negotiated */

/* What is true of each command: validation and dispatch read it here. */
static const struct wire_cmd {
  const char *name;
  uint16_t flags; /* besides FUA, which any command may carry */
  uint16_t needs; /* transmission flags that expose it; 0: always there */
  uint8_t writes; /* refused on a read-only export */
  int beyond;     /* error of a range beyond the end, 0: no range */
} wire_cmds[] = {
    {"NBD_CMD_READ", NBD_CMD_FLAG_DF, 0, 0, -EINVAL},
    {"NBD_CMD_WRITE", NBD_CMD_FLAG_PAYLOAD_LEN, 0, 1, -ENOSPC},
    {"NBD_CMD_DISC", 0, 0, 0, 0},
    {"NBD_CMD_FLUSH", 0, NBD_FLAG_SEND_FLUSH, 0, 0},
    {"NBD_CMD_TRIM", 0, NBD_FLAG_SEND_TRIM, 1, -EINVAL},
    {"NBD_CMD_CACHE", 0, NBD_FLAG_SEND_CACHE, 0, -EINVAL},
    {"NBD_CMD_WRITE_ZEROES", NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO,
     NBD_FLAG_SEND_WRITE_ZEROES, 1, -ENOSPC},
    {"NBD_CMD_BLOCK_STATUS", NBD_CMD_FLAG_REQ_ONE | NBD_CMD_FLAG_PAYLOAD_LEN, 0,
     0, -EINVAL}};

static const struct wire_cmd *wire_cmd(unsigned type) {
  return type < sizeof wire_cmds / sizeof *wire_cmds ? &wire_cmds[type] : NULL;
}

static uint32_t wire_error(int err) {
  static const int errors[][2] = {{0, 0},
                                  {EPERM, NBD_EPERM},
                                  {EACCES, NBD_EPERM},
                                  {EROFS, NBD_EPERM},
                                  {ENOMEM, NBD_ENOMEM},
                                  {EINVAL, NBD_EINVAL},
                                  {ENOSPC, NBD_ENOSPC},
                                  {EDQUOT, NBD_ENOSPC},
                                  {EFBIG, NBD_ENOSPC},
                                  {EOVERFLOW, NBD_EOVERFLOW},
                                  {ENOTSUP, NBD_ENOTSUP},
                                  {EOPNOTSUPP, NBD_ENOTSUP},
                                  {ESHUTDOWN, NBD_ESHUTDOWN}};
  for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
    if (errors[i][0] == -err) return (uint32_t)errors[i][1];
  return NBD_EIO;
}

struct nbdserve_req {
  uint16_t type, flags; /* NBD_CMD_*, NBD_CMD_FLAG_* */
  int mode;             /* WIRE_COMPACT... */
  uint64_t cookie, off, len;
  uint64_t start;      /* off as the client gave it: this may be a piece */
  unsigned char *buf;  /* data of READ and WRITE; reply of BLOCK_STATUS */
  size_t owned;        /* bytes at buf if they are the request's own, else 0 */
  int err;             /* 0 or -errno */
  const char *why;     /* of an error, for humans; NULL: u_errno_text */
  int flush, deferred; /* only that is left to do; a worker answers it */
  int hole, more, ready; /* READ: is only zeroes; other chunks follow this one;
                            the reply is in the send buffer, or sent */
  struct nbdserve_req *next;
};

/* The head of a chunk with len bytes of payload; the bytes written. */
static size_t wire_put_chunk(unsigned char *p, const struct nbdserve_req *r,
                             unsigned type, uint64_t len) {
  u_put32(p, r->mode == WIRE_EXT ? NBD_EXTENDED_REPLY_MAGIC
                                 : NBD_STRUCTURED_REPLY_MAGIC);
  u_put16(p + 4, r->more && !r->err ? 0 : NBD_REPLY_FLAG_DONE);
  u_put16(p + 6, type);
  u_put64(p + 8, r->cookie);
  u_put32(p + 16, (uint32_t)len);
  if (r->mode != WIRE_EXT) return WIRE_CHUNK;
  u_put64(p + 16, r->start);
  u_put64(p + 24, len);
  return WIRE_EXTENDED;
}

/* ==== [6] SOCKET I/O (io_) ===============================================
 * Whole messages over sockets and pipes.  -ETIMEDOUT: the deadline has passed.
 * A connection that has a stop pipe looks at it before it waits for input, and
 * gets -ESHUTDOWN; the others are woken by shutdown(2). */
enum {
  IO_GRACE_MS = 5000
};
struct io {
  int in, out;      /* sockets or pipes */
  int stop;         /* readable from nbdserve_stop on; -1: shutdown() is used */
  int64_t deadline; /* in os_now_ms; 0: none */
  int64_t stall_ms; /* how long what has begun may take */
};

static int io_wait(const struct io *io, int writing) {
  struct pollfd p[2] = {
      {writing ? io->out : io->in, writing ? POLLOUT : POLLIN, 0},
      {io->stop, POLLIN, 0}}; /* poll skips a negative one */
  int64_t deadline = io->deadline;
  if (!deadline && io->stall_ms) deadline = os_now_ms() + io->stall_ms;
  for (;;) {
    int64_t left = deadline ? deadline - os_now_ms() : -1;
    if (deadline && left <= 0) return -ETIMEDOUT;
    int r = poll(p, 2, (int)(left > INT_MAX ? INT_MAX : left));
    if (r < 0 && errno != EINTR) return -errno;
    if (r <= 0) continue;
    if (p[1].revents && !writing) return -ESHUTDOWN;
    if (p[0].revents) return 0;
    p[1].fd = -1; /* stopping: what is being sent gets a little longer */
    deadline = os_now_ms() + IO_GRACE_MS;
  }
}

/* Flags for a call that may block only if nothing else is to be watched. */
static int io_flags(const struct io *io, int flags) {
  return io->stop >= 0 || io->deadline ? MSG_DONTWAIT : flags;
}

/* After a call that failed: 0 to try again, or -errno. */
static int io_again(const struct io *io, int writing) {
  if (errno == EINTR) return 0;
  if (errno != EAGAIN && errno != EWOULDBLOCK) return -errno;
  return io_flags(io, 0) ? io_wait(io, writing)
                         : -ETIMEDOUT; /* os_setup_client */
}

/* Receives up to len bytes, at least one.  Their number, 0 at the end of the
 * stream, or -errno.  all: waits for all of them where that is cheap. */
static ssize_t io_recv(const struct io *io, void *buf, size_t len, int all) {
  int flags = io_flags(io, all ? MSG_WAITALL : 0);
  int err = flags == MSG_DONTWAIT ? io_wait(io, 0) : 0;
  assert(len > 0);
  while (!err) {
    ssize_t n = recv(io->in, buf, len, flags);
    if (n < 0 && errno == ENOTSOCK) n = read(io->in, buf, len);
    if (n >= 0) return n;
    err = io_again(io, 0);
  }
  return err;
}

/* Receives exactly len bytes: 0, -EPIPE when the stream ends before, -errno. */
static int io_recv_all(const struct io *io, unsigned char *p, size_t len) {
  int64_t from = io->deadline ? io->deadline : os_now_ms(); /* that holds */
  for (ssize_t n; len > 0; p += n, len -= (size_t)n) {
    n = io_recv(io, p, len, 1);
    if (n <= 0) return n < 0 ? (int)n : -EPIPE;
    if ((size_t)n < len && os_now_ms() - from > io->stall_ms) return -ETIMEDOUT;
  }
  return 0;
}

/* Sends all of v[0..n), which it uses up. */
static int io_send(const struct io *io, struct iovec *v, int n) {
  int flags = io_flags(io, 0) | MSG_NOSIGNAL, err = 0;
  while (n > 0 && !err) {
    struct msghdr m = {.msg_iov = v, .msg_iovlen = (unsigned)n};
    ssize_t done = sendmsg(io->out, &m, flags);
    if (done < 0 && errno == ENOTSOCK) { /* what a pipe takes without waiting */
      err = io_wait(io, 1);
      if (err) break;
      done = write(io->out, v->iov_base, u_min(v->iov_len, PIPE_BUF));
    }
    if (done < 0)
      err = io_again(io, 1);
    else
      os_advance(&v, &n, (size_t)done);
  }
  return err;
}

/* ==== [7] EXPORT (ex_) ===================================================
 * What is served, how a name finds it, and how one request is done on it.
 *
 * (E1) An added export stays where it is until nbdserve_free; one from the
 *      find callback belongs to one client.
 * (E2) The requests that arrive here have passed tx_validate: range, alignment
 *      and flags hold, and are asserted, not checked again.
 * (E3) A flush covers what was written before it was asked for.  Those that
 *      wait while one is running all get the result of the next one. */
struct ex {
  struct nbdserve_export e; /* size: under s->lock */
  int dynamic;              /* from the find callback */
  struct ex *next;
  struct os_monitor serial, lock; /* lock: guards what follows */
  uint64_t nflushes, failed;      /* begun so far; the last one that failed */
  int flushing, failure; /* the last has not returned; error of failed */
  char strings[];        /* name and description */
};

enum {
  SRV_LISTENERS = 32
};
struct srv_listener {
  int fd, is_unix; /* text is a path that is ours to unlink... */
  struct stat st;  /* ...if it still is this socket */
  char text[128];  /* that, HOST:PORT, or "" */
};

struct nbdserve {
  struct nbdserve_config config; /* fixed; defaults filled in */
  int stop[2], wake[2]; /* pipes: nbdserve_stop; nbdserve_run looks around */
  struct srv_listener listeners[SRV_LISTENERS + 1]; /* localhost is two */
  int nlisteners;
  int64_t idle_from;      /* nbdserve_run: when the last client had gone */
  struct os_monitor lock; /* guards what follows */
  struct ex *exports, **last_export;
  struct conn *conns; /* clients being served */
  unsigned nconns;
  struct nbdserve_stats stats;
};

enum {
  EX_FLAGS = 2 * NBDSERVE_EXPORT_UNSAFE - 1, /* all that there are */
  EX_ZEROES = 1 << 20, /* bytes of zeroes written at a time */
  EX_EXTENTS = 2048,   /* in one reply, at most */
  EX_EXTENTS_SIZE = WIRE_EXTENDED + 8 + 16 * EX_EXTENTS
};

struct nbdserve_extents {
  uint64_t left, skip; /* bytes not yet, and already, described */
  uint64_t align;      /* boundaries are multiples of it */
  unsigned n, max;
  unsigned char *data; /* 8 bytes of length and 8 of status each */
};

static void ex_free(struct ex *ex) {
  assert(!ex->flushing);
  if (ex->e.ops && ex->e.ops->close) ex->e.ops->close(ex->e.ctx);
  os_monitor_free(&ex->lock);
  os_monitor_free(&ex->serial);
  NBDSERVE_FREE(ex);
}

/* Checks an export as the host describes it and makes a copy with the defaults
 * filled in; the copy owns ctx.  -EINVAL, -ENOMEM: the caller keeps it. */
static int ex_new(struct ex **out, const struct nbdserve_export *from) {
  struct nbdserve_export e = *from;
  if (!e.name) e.name = "";
  if (!e.description) e.description = "";
  size_t n = strlen(e.name), d = strlen(e.description);
  if (!e.min_block) e.min_block = 1;
  if (!e.preferred_block)
    e.preferred_block = e.min_block > 4096 ? e.min_block : 4096;
  if (!e.max_request)
    e.max_request = (uint32_t)u_min(32u << 20, NBDSERVE_MAX_REQUEST);
  if (!e.ops || !e.ops->read || e.size > INT64_MAX || e.flags > EX_FLAGS ||
      !u_is_power_of_2(e.min_block) || e.min_block > 65536 ||
      n > WIRE_STRING_MAX || !u_is_power_of_2(e.preferred_block) ||
      e.preferred_block < 512 || e.preferred_block < e.min_block ||
      e.max_request < e.preferred_block ||
      e.max_request > NBDSERVE_MAX_REQUEST || d > WIRE_STRING_MAX)
    return -EINVAL;
  if (!e.ops->write) e.flags |= NBDSERVE_EXPORT_READONLY;
  struct ex *ex = u_zalloc(sizeof *ex + n + d + 2);
  if (!ex) return -ENOMEM;
  if (os_monitor_init(&ex->serial) || os_monitor_init(&ex->lock)) {
    ex_free(ex); /* without ops: ctx stays the caller's */
    return -ENOMEM;
  }
  e.name = strcpy(ex->strings, e.name);
  e.description = strcpy(ex->strings + n + 1, e.description);
  ex->e = e;
  *out = ex;
  return 0;
}

static struct ex *ex_by_name(struct nbdserve *s, const char *name) {
  struct ex *ex = s->exports;
  while (ex && strcmp(ex->e.name, name) != 0)
    ex = ex->next;
  return ex;
}

/* The export a client means: an added one of that name, what the find callback
 * has, for the empty name the first one added, one that takes any name; and its
 * size now.  -ENOENT or what the callback said.  ex_put gives it back. */
static int ex_get(struct nbdserve *s, const char *name, struct ex **out,
                  uint64_t *size) {
  struct nbdserve_export e = {0};
  int err = -ENOENT;
  os_lock(&s->lock);
  struct ex *same = ex_by_name(s, name), *any = s->exports;
  while (any && *name && !(any->e.flags & NBDSERVE_EXPORT_FALLBACK))
    any = any->next;
  if ((*out = same ? same : any)) {
    struct nbdserve_export *x = &(*out)->e;
    *size = x->size = x->ops->size ? x->ops->size(x->ctx, x->size) : x->size;
  }
  os_unlock(&s->lock);
  if (!same && s->config.find) err = s->config.find(s->config.ctx, name, &e);
  if (same || (err == -ENOENT && any))
    err = 0;
  else if (!err) {
    *size = e.size;
    if (!e.name) e.name = name;
    err = ex_new(out, &e);
    if (!err)
      (*out)->dynamic = 1;
    else if (e.ops && e.ops->close)
      e.ops->close(e.ctx);
  }
  if (!err) *size -= *size % (*out)->e.min_block; /* nobody reaches the rest */
  return err;
}

static void ex_put(struct ex *ex) {
  if (ex && ex->dynamic) ex_free(ex); /* (E1) */
}

/* The transmission flags of a client: each exactly when it is so.  meta: it has
 * selected metadata contexts of this export. */
static unsigned ex_flags(const struct nbdserve *s, const struct ex *ex,
                         int mode, int meta) {
  const struct nbdserve_ops *ops = ex->e.ops;
  unsigned f = 0, writable = !(ex->e.flags & NBDSERVE_EXPORT_READONLY);
  if (writable) f |= NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO;
  if (writable && ops->flush) f |= NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA;
  if (writable && ops->trim) f |= NBD_FLAG_SEND_TRIM;
  if (ex->e.flags & NBDSERVE_EXPORT_ROTATIONAL) f |= NBD_FLAG_ROTATIONAL;
  if ((ex->e.flags & NBDSERVE_EXPORT_MULTI_CONN) && s->config.max_conn > 1)
    f |= NBD_FLAG_CAN_MULTI_CONN; /* a second one would wait for ever */
  if (ops->cache) f |= NBD_FLAG_SEND_CACHE;
  if (mode != WIRE_COMPACT) f |= NBD_FLAG_SEND_DF;
  if (mode == WIRE_EXT && meta) f |= NBD_FLAG_BLOCK_STATUS_PAYLOAD;
  return (f & ~s->config.without) | NBD_FLAG_HAS_FLAGS |
         (writable ? 0 : NBD_FLAG_READ_ONLY);
}

/* All writes that returned before this call are on permanent storage when it
 * returns 0.  One caller flushes for all that wait (E3). */
static int ex_flush(struct ex *ex) {
  int err;
  if (!ex->e.ops->flush || (ex->e.flags & NBDSERVE_EXPORT_UNSAFE)) return 0;
  os_lock(&ex->lock);
  uint64_t mine = ex->nflushes + 1; /* the first that has not begun yet */
  while (ex->flushing && ex->nflushes <= mine)
    os_wait(&ex->lock);
  if (ex->nflushes < mine) {
    ex->nflushes = mine;
    ex->flushing = 1;
    os_unlock(&ex->lock);
    if (ex->e.flags & NBDSERVE_EXPORT_SERIAL) os_lock(&ex->serial);
    err = ex->e.ops->flush(ex->e.ctx, 0);
    if (ex->e.flags & NBDSERVE_EXPORT_SERIAL) os_unlock(&ex->serial);
    os_lock(&ex->lock);
    ex->flushing = 0;
    if (err) ex->failed = mine;
    if (err) ex->failure = err;
    os_wake_all(&ex->lock);
  }
  err = ex->failed >= mine ? ex->failure : 0;
  os_unlock(&ex->lock);
  return err;
}

/* Must r be on permanent storage before it is answered?  And does the backend
 * (native: NBDSERVE_EXPORT_NATIVE_FUA) see to that, or a flush that follows
 * (0)? */
static int ex_wants_fua(const struct ex *ex, const struct nbdserve_req *r,
                        uint32_t native) {
  return wire_cmd(r->type)->writes && r->len > 0 &&
         (ex->e.flags &
          (NBDSERVE_EXPORT_NATIVE_FUA | NBDSERVE_EXPORT_UNSAFE)) == native &&
         ((r->flags & NBD_CMD_FLAG_FUA) ||
          (ex->e.flags & NBDSERVE_EXPORT_WRITETHROUGH));
}

int nbdserve_extent(struct nbdserve_extents *x, uint64_t len, uint32_t status) {
  uint64_t part = u_min(len, x->skip);
  x->skip -= part;
  len = u_min(len - part, x->left);
  while (len > 0 && x->left > 0) {
    unsigned char *p = x->data + 16 * x->n;
    uint64_t n = len == x->left ? len : len - len % x->align;
    if (!n) { /* a boundary inside a block: that block is data */
      n = u_min(x->align, x->left);
      x->skip = n - len;
      len = n;
      status = 0;
    }
    len -= n;
    x->left -= n;
    if (x->n && u_get64(p - 8) == status) {
      u_put64(p - 16, u_get64(p - 16) + n);
    } else if (x->n < x->max) {
      u_put64(p, n);
      u_put64(p + 8, status);
      x->n++;
    } else {
      x->left = 0;
    }
  }
  return x->left == 0;
}

/* The extents of a request, as the reply that goes out: r->buf, r->owned. */
static int ex_extents(struct ex *ex, struct nbdserve_req *r) {
  unsigned one = r->flags & NBDSERVE_CMD_REQ_ONE, ext = r->mode == WIRE_EXT;
  struct nbdserve_extents x = {.left = r->len, .align = ex->e.min_block};
  x.max = one ? 1 : (unsigned)u_min(ex->e.max_request / 16, EX_EXTENTS);
  unsigned char *p = NBDSERVE_MALLOC(EX_EXTENTS_SIZE);
  if (!p) return -ENOMEM;
  x.data = p + (ext ? WIRE_EXTENDED + 8 : WIRE_CHUNK + 4);
  int err = !ex->e.ops->extents
                ? 0
                : ex->e.ops->extents(ex->e.ctx, r->off, r->len, one, &x);
  if (!err && !x.n) nbdserve_extent(&x, r->len, 0); /* proto.md: at least one */
  for (unsigned i = 0; i < x.n && !ext; i++) { /* len was below 2^32, too */
    u_put32(x.data + 8 * i, (uint32_t)u_get64(x.data + 16 * i));
    u_put32(x.data + 8 * i + 4, (uint32_t)u_get64(x.data + 16 * i + 8));
  }
  u_put32(x.data - 4, x.n);
  u_put32(x.data - (ext ? 8 : 4), 1); /* the id of base:allocation */
  r->buf = p;                         /* freed with r, also when this failed */
  r->owned = (size_t)(x.data - p) + (ext ? 16 : 8) * x.n;
  wire_put_chunk(
      p, r, ext ? NBD_REPLY_TYPE_BLOCK_STATUS_EXT : NBD_REPLY_TYPE_BLOCK_STATUS,
      r->owned - (ext ? WIRE_EXTENDED : WIRE_CHUNK));
  return err;
}

static int ex_do(struct ex *ex, struct nbdserve_req *r) {
  const struct nbdserve_ops *ops = ex->e.ops;
  uint32_t f =
      ex_wants_fua(ex, r, NBDSERVE_EXPORT_NATIVE_FUA) ? NBDSERVE_CMD_FUA : 0;
  void *ctx = ex->e.ctx;
  int err = -EINVAL;
  assert(r->len > 0 && r->off <= INT64_MAX && r->len <= INT64_MAX - r->off);
  assert(r->off % ex->e.min_block == 0); /* (E2) */
  assert(!wire_cmd(r->type)->writes ||
         !(ex->e.flags & NBDSERVE_EXPORT_READONLY));
  f |= r->flags & (NBDSERVE_CMD_NO_HOLE | NBDSERVE_CMD_FAST_ZERO);
  if (ex->e.flags & NBDSERVE_EXPORT_SERIAL) os_lock(&ex->serial);
  switch (r->type) {
  case NBD_CMD_READ:
    err = ops->read(ctx, r->buf, r->off, r->len, 0);
    break;
  case NBD_CMD_WRITE:
    err = ops->write(ctx, r->buf, r->off, r->len, f);
    break;
  case NBD_CMD_TRIM:
    err = ops->trim(ctx, r->off, r->len, f);
    break;
  case NBD_CMD_CACHE:
    err = ops->cache(ctx, r->off, r->len, 0);
    break;
  case NBD_CMD_WRITE_ZEROES:
    err = ops->zero ? ops->zero(ctx, r->off, r->len, f) : -ENOTSUP;
    break;
  case NBD_CMD_BLOCK_STATUS:
    err = ex_extents(ex, r);
    break;
  default:
    assert(0); /* (E2) */
  }
  if (ex->e.flags & NBDSERVE_EXPORT_SERIAL) os_unlock(&ex->serial);
  assert(err <= 0);
  if (err != -ENOTSUP || r->type != NBD_CMD_WRITE_ZEROES ||
      f & NBDSERVE_CMD_FAST_ZERO)
    return err;
  if (r->len > UINT32_MAX) return -EOVERFLOW; /* nobody could end it */
  struct nbdserve_req w = {.type = NBD_CMD_WRITE,
                           .off = r->off,
                           .flags = r->flags & NBD_CMD_FLAG_FUA};
  uint64_t step = u_min(u_min(r->len, EX_ZEROES), ex->e.max_request);
  step -= step % ex->e.min_block; /* both are multiples of it */
  w.buf = u_zalloc((size_t)step);
  err = w.buf ? 0 : -ENOMEM;
  for (uint64_t left = r->len; left > 0 && !err; left -= w.len) {
    w.len = u_min(step, left);
    err = ex_do(ex, &w);
    w.off += w.len;
  }
  NBDSERVE_FREE(w.buf);
  return err;
}

#if !NBDSERVE_NO_FLAT || !NBDSERVE_NO_CAS
/* read and write of nbdserve's own backends, whose ctx begins with batch. */
struct ex_batched {
  void (*run_batch)(void *ctx, struct nbdserve_req *r, size_t n);
};

#define EX_BATCH_OF_ONE(name, buffer, command) \
  static int name(void *ctx, buffer buf, uint64_t off, uint64_t len, \
                  uint32_t flags) { \
    struct nbdserve_req r = {.type = command, \
                             .off = off, \
                             .len = len, \
                             .buf = (unsigned char *)(uintptr_t)buf}; \
    assert(!(flags & NBDSERVE_CMD_FUA)); /* not NATIVE_FUA: a flush follows */ \
    ((struct ex_batched *)ctx)->run_batch(ctx, &r, 1); \
    return (void)flags, r.err; \
  }
EX_BATCH_OF_ONE(ex_batched_read, void *, NBD_CMD_READ)
EX_BATCH_OF_ONE(ex_batched_write, const void *, NBD_CMD_WRITE)
#endif

/* ==== [8] HANDSHAKE (hs_) ================================================
 * Fixed newstyle negotiation (proto.md, Handshake and Option types).
 *
 * (H1) The length in an option's head alone frames it: all its data is taken
 *      before anything is answered, so the stream stays in step.
 * (H2) What a client claims is never allocated: data beyond NBDSERVE_MAX_OPTION
 *      is thrown away in pieces.
 * (H3) One deadline covers the whole handshake. */
enum {
  TX_RBUF = 256 << 10,
  TX_WBUF = 288 << 10,  /* bytes received, sent at a time */
  TX_SMALL = 128 << 10, /* longer requests are done one by one */
  TX_KEEP = 1 << 20,    /* buffer for those; they are in pieces then */
  TX_BATCH = 128,
  TX_DEFERRED = 1024, /* requests in one; waiting for workers */
  TX_WHY = 80,
  TX_LOGGED = 10, /* bytes of an error's text; logged errors */
  TX_HEAD = WIRE_EXTENDED + 6 + TX_WHY + 8 /* longest reply without data */
};
STATIC_ASSERT(option_fits, (int)NBDSERVE_MAX_OPTION <= (int)TX_RBUF);
STATIC_ASSERT(small_fits_in, TX_SMALL + (int)WIRE_EXTENDED <= (int)TX_RBUF);
STATIC_ASSERT(small_fits_out, TX_SMALL + TX_HEAD <= TX_WBUF);

struct conn {
  /* -- fixed */
  struct nbdserve *s;
  struct conn *next; /* guarded by s->lock */
  struct io io;
  int fd, id; /* fd: to close; -1: the caller's */
  /* -- the handshake's; what transmission needs is fixed then */
  const unsigned char *data; /* of the option being answered */
  size_t len;
  uint32_t opt;
  int no_zeroes, mode, meta; /* WIRE_COMPACT...; base:allocation is selected */
  char meta_name[WIRE_STRING_MAX + 1]; /* of this export */
  struct ex *ex;
  uint64_t size;
  unsigned tflags, max_workers, max_deferred;
  void (*run_batch)(void *ctx, struct nbdserve_req *r, size_t n); /* or NULL */
  size_t read_head; /* bytes in front of the data of a READ */
  /* -- the client's thread only, as the two buffers at the end */
  unsigned char *big;
  size_t rpos, rend, wlen, nreqs; /* received, not looked at; to be sent */
  struct nbdserve_req reqs[TX_BATCH];
  int64_t began; /* when the request that is not all there was begun */
  int big_write; /* the last request was one: expect another */
  /* -- one sender at a time */
  struct os_monitor sending; /* guards out, and why nothing goes there: */
  int broken;
  /* -- client's thread and workers */
  struct os_monitor lock;                  /* guards the rest */
  struct nbdserve_req *queue, **queue_end; /* one worker each */
  struct nbdserve_req *flushes;            /* one worker for all of them, */
  int flushing;                            /* which is at it */
  unsigned nqueue, ndeferred, nworkers, nidle, nlogged;
  int closing, waits; /* no more comes: workers finish; for one to finish */
  unsigned char rbuf[TX_RBUF], wbuf[TX_WBUF];
};

enum {
  HS_ENTER,
  HS_MORE,
  HS_END
}; /* what follows an option; or -errno */

/* Tells the log about a client; the text begins with its number. */
#define HS_LOG(c, level, ...) \
  u_log(&(c)->s->config, level, "client " __VA_ARGS__)

/* Sends the replies to an option: they gather in the send buffer. */
static int hs_send(struct conn *c) {
  struct iovec v = {c->wbuf, c->wlen};
  c->wlen = 0;
  if (!c->broken) c->broken = io_send(&c->io, &v, 1);
  return c->broken;
}

/* Room for len more bytes to send; hs_run sees it when the client is gone. */
static unsigned char *hs_room(struct conn *c, size_t len) {
  assert(len <= TX_WBUF);
  if (c->wlen + len > TX_WBUF) hs_send(c);
  c->wlen += len;
  return c->wbuf + c->wlen - len;
}

static unsigned char *hs_reply(struct conn *c, uint32_t type, size_t len) {
  unsigned char *p = hs_room(c, WIRE_REP + len);
  u_put64(p, NBD_REP_MAGIC);
  u_put32(p + 8, c->opt);
  u_put32(p + 12, type);
  u_put32(p + 16, (uint32_t)len);
  return p + WIRE_REP;
}

static int hs_ack(struct conn *c) {
  hs_reply(c, NBD_REP_ACK, 0);
  return HS_MORE;
}

static int hs_fail(struct conn *c, uint32_t type, const char *why) {
  size_t n = strlen(why);
  memcpy(hs_reply(c, type, n), why, n);
  HS_LOG(c, NBDSERVE_LOG_INFO, "%d: option %" PRIu32 " refused: %s", c->id,
         c->opt, why);
  return HS_MORE;
}

/* Takes a string with its 32-bit length off the option's data and copies it to
 * out[WIRE_STRING_MAX + 1].  0, or an error reply. */
static uint32_t hs_take_string(struct conn *c, char *out) {
  uint32_t n = c->len < 4 ? 0 : u_get32(c->data);
  if (c->len < 4 || n > c->len - 4) return NBD_REP_ERR_INVALID;
  if (n > WIRE_STRING_MAX) return NBD_REP_ERR_TOO_BIG;
  memcpy(out, c->data + 4, n);
  out[n] = 0;
  c->data += 4 + n;
  c->len -= 4 + n;
  return memchr(out, 0, n) ? NBD_REP_ERR_INVALID : 0;
}

/* The export is settled: what transmission needs to know of it. */
static void hs_settle(struct conn *c, struct ex *ex, const char *name) {
  const struct nbdserve_config *k = &c->s->config;
  assert(!c->ex);
  c->ex = ex;
  c->meta = c->meta && strcmp(c->meta_name, name) == 0;
  c->tflags = ex_flags(c->s, ex, c->mode, c->meta);
  c->run_batch = k->before ? NULL : ex->e.ops->run_batch;
  c->read_head = c->mode == WIRE_EXT          ? WIRE_EXTENDED + 8
                 : c->mode == WIRE_STRUCTURED ? WIRE_CHUNK + 8
                                              : WIRE_SIMPLE;
  c->max_workers = k->threads > 1 ? k->threads : 0;
  c->max_deferred = c->run_batch ? TX_DEFERRED : k->threads;
  HS_LOG(c, NBDSERVE_LOG_INFO, "%d: export '%s', %" PRIu64 " bytes%s", c->id,
         name, c->size, c->tflags & NBD_FLAG_READ_ONLY ? ", read-only" : "");
}

/* The options.  Each takes its data and answers: HS_*, or -errno to close. */

static int hs_opt_export_name(struct conn *c) {
  size_t n = c->no_zeroes ? 10 : 10 + 124;
  char name[WIRE_STRING_MAX + 1];
  struct ex *ex;
  snprintf(name, sizeof name, "%.*s", (int)c->len, (const char *)c->data);
  if (c->mode == WIRE_EXT) return -EPROTO; /* extended headers demand GO */
  if (strlen(name) != c->len || ex_get(c->s, name, &ex, &c->size))
    return -ENOENT; /* this option knows no error reply */
  hs_settle(c, ex, name);
  unsigned char *p = memset(hs_room(c, n), 0, n);
  u_put64(p, c->size);
  u_put16(p + 8, c->tflags);
  return HS_ENTER;
}

static int hs_emit(void *arg, const char *name, const char *description) {
  size_t n = name ? strlen(name) : 0;
  size_t d = description ? strlen(description) : 0;
  struct conn *c = arg;
  if (n > WIRE_STRING_MAX || d > WIRE_STRING_MAX)
    return 0; /* who could ask for it? */
  unsigned char *p = hs_reply(c, NBD_REP_SERVER, 4 + n + d);
  u_put32(p, (uint32_t)n);
  if (n) memcpy(p + 4, name, n);
  if (d) memcpy(p + 4 + n, description, d);
  return c->broken;
}

static int hs_opt_list(struct conn *c) {
  struct nbdserve *s = c->s;
  int err = 0;
  if (c->len) return hs_fail(c, NBD_REP_ERR_INVALID, "data with NBD_OPT_LIST");
  os_lock(&s->lock);
  for (struct ex *ex = s->exports; ex && !err; ex = ex->next) {
    os_unlock(&s->lock); /* (E1): the list only grows, at its end */
    err = hs_emit(c, ex->e.name, ex->e.description);
    os_lock(&s->lock);
  }
  os_unlock(&s->lock);
  if (!err && s->config.list) err = s->config.list(s->config.ctx, hs_emit, c);
  return err ? -EPIPE : hs_ack(c);
}

static void hs_info(struct conn *c, struct ex *ex, unsigned type) {
  const char *text = type == NBD_INFO_NAME ? ex->e.name : ex->e.description;
  unsigned char *p;
  if (type == NBD_INFO_EXPORT) {
    p = hs_reply(c, NBD_REP_INFO, 12);
    u_put64(p + 2, c->size);
    u_put16(p + 10, c->tflags);
  } else if (type == NBD_INFO_BLOCK_SIZE) {
    p = hs_reply(c, NBD_REP_INFO, 14);
    u_put32(p + 2, ex->e.min_block);
    u_put32(p + 6, ex->e.preferred_block);
    u_put32(p + 10, ex->e.max_request);
  } else {
    p = hs_reply(c, NBD_REP_INFO, 2 + strlen(text));
    memcpy(p + 2, text, strlen(text));
  }
  u_put16(p, type);
}

static int hs_opt_go(struct conn *c) {
  char name[WIRE_STRING_MAX + 1];
  unsigned wants = 1u << NBD_INFO_EXPORT, type, i;
  struct ex *ex;
  uint32_t bad = hs_take_string(c, name);
  if (!bad && (c->len < 2 || c->len != 2 + 2 * (size_t)u_get16(c->data)))
    bad = NBD_REP_ERR_INVALID;
  if (bad) return hs_fail(c, bad, "malformed request for information");
  int err = ex_get(c->s, name, &ex, &c->size);
  if (err)
    return hs_fail(c, NBD_REP_ERR_UNKNOWN,
                   err == -ENOENT ? "no such export" : u_errno_text(err));
  c->tflags =
      ex_flags(c->s, ex, c->mode, c->meta && strcmp(c->meta_name, name) == 0);
  for (i = 2; i < c->len; i += 2) /* what is not known goes to bit 31 */
    wants |= 1u << u_min(u_get16(c->data + i), 31);
  bad = ex->e.min_block > 1 && !(wants & 1u << NBD_INFO_BLOCK_SIZE);
  if (bad || ex->e.preferred_block != 4096 || ex->e.max_request != 32u << 20)
    wants |= 1u << NBD_INFO_BLOCK_SIZE; /* not what is taken for granted */
  if (!*ex->e.description) wants &= ~(1u << NBD_INFO_DESCRIPTION);
  for (type = 0; type <= NBD_INFO_BLOCK_SIZE; type++)
    if (wants & 1u << type) hs_info(c, ex, type);
  if (!bad && c->opt == NBD_OPT_GO) {
    hs_ack(c);
    hs_settle(c, ex, name);
    return HS_ENTER;
  }
  ex_put(ex);
  if (!bad) return hs_ack(c);
  return hs_fail(c, NBD_REP_ERR_BLOCK_SIZE_REQD, "ask for the block size");
}

/* Asks for another form of replies and, with extended headers, requests. */
static int hs_opt_mode(struct conn *c) {
  int ext = c->opt == NBD_OPT_EXTENDED_HEADERS;
  if (c->len) return hs_fail(c, NBD_REP_ERR_INVALID, "data where none belongs");
  if (c->mode == WIRE_EXT && !ext)
    return hs_fail(c, NBD_REP_ERR_EXT_HEADER_REQD, "the headers are extended");
  c->mode = ext ? WIRE_EXT : WIRE_STRUCTURED;
  return hs_ack(c);
}

static int hs_opt_meta_context(struct conn *c) {
  static const char context[] = "base:allocation";
  const size_t n = sizeof context - 1;
  char name[WIRE_STRING_MAX + 1], query[WIRE_STRING_MAX + 1];
  int set = c->opt == NBD_OPT_SET_META_CONTEXT, found;
  struct ex *ex;
  if (c->mode == WIRE_COMPACT)
    return hs_fail(c, NBD_REP_ERR_INVALID, "structured replies come first");
  uint32_t bad = hs_take_string(c, name), left = 0;
  if (!bad && c->len < 4) bad = NBD_REP_ERR_INVALID;
  if (!bad) {
    left = u_get32(c->data);
    c->data += 4;
    c->len -= 4;
  }
  for (found = !set && !left; left > 0 && !bad; left--) {
    bad = hs_take_string(c, query);
    found |= !bad && (strcmp(query, context) == 0 ||
                      (!set && strcmp(query, "base:") == 0));
  }
  if (!bad && c->len > 0) bad = NBD_REP_ERR_INVALID;
  if (bad) return hs_fail(c, bad, "malformed query for metadata contexts");
  if (ex_get(c->s, name, &ex, &c->size))
    return hs_fail(c, NBD_REP_ERR_UNKNOWN, "no such export");
  ex_put(ex);
  if (found) {
    unsigned char *p = hs_reply(c, NBD_REP_META_CONTEXT, 4 + n);
    u_put32(p, set ? 1 : 0); /* ids mean something in SET only */
    memcpy(p + 4, context, n);
    c->meta |= set;
    if (set) strcpy(c->meta_name, name);
  }
  return hs_ack(c);
}

static int (*const hs_options[])(struct conn *c) = {
    [NBD_OPT_EXPORT_NAME] = hs_opt_export_name,
    [NBD_OPT_LIST] = hs_opt_list,
    [NBD_OPT_INFO] = hs_opt_go,
    [NBD_OPT_GO] = hs_opt_go,
    [NBD_OPT_STRUCTURED_REPLY] = hs_opt_mode,
    [NBD_OPT_EXTENDED_HEADERS] = hs_opt_mode,
    [NBD_OPT_LIST_META_CONTEXT] = hs_opt_meta_context,
    [NBD_OPT_SET_META_CONTEXT] = hs_opt_meta_context};

static int hs_option(struct conn *c) {
  int (*handler)(struct conn *) = NULL;
  unsigned char head[WIRE_OPTION];
  int err = io_recv_all(&c->io, head, sizeof head);
  if (err) return err;
  c->opt = u_get32(head + 8);
  uint32_t len = u_get32(head + 12);
  if (u_get64(head) != NBD_OPTION_MAGIC) return -EPROTO;
  if (len > WIRE_STRING_MAX && c->opt == NBD_OPT_EXPORT_NAME) return -ENOENT;
  if (c->opt < sizeof hs_options / sizeof *hs_options &&
      !(c->s->config.without >> 16 >> c->opt & 1))
    handler = hs_options[c->opt];
  for (uint32_t left = len, piece; left > 0 && !err; left -= piece) {
    piece = (uint32_t)u_min(left, TX_RBUF); /* (H1), (H2) */
    err = io_recv_all(&c->io, c->rbuf, piece);
  }
  if (err) return err;
  if (c->opt == NBD_OPT_SET_META_CONTEXT) c->meta = 0; /* also if it fails */
  if (c->opt == NBD_OPT_ABORT) return (void)hs_ack(c), HS_END;
  if (!handler) return hs_fail(c, NBD_REP_ERR_UNSUP, "unknown option");
  c->data = c->rbuf;
  c->len = len;
  return len <= NBDSERVE_MAX_OPTION
             ? handler(c)
             : hs_fail(c, NBD_REP_ERR_TOO_BIG, "too much data");
}

/* The handshake: HS_ENTER, HS_END when the client has left in order, -errno. */
static int hs_run(struct conn *c) {
  unsigned char *p = hs_room(c, 18), flags[4];
  int r, err;
  c->io.deadline = os_now_ms() + c->s->config.handshake_ms; /* (H3) */
  u_put64(p, NBD_INIT_MAGIC);
  u_put64(p + 8, NBD_OPTION_MAGIC);
  u_put16(p + 16, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
  err = hs_send(c);
  if (!err) err = io_recv_all(&c->io, flags, sizeof flags);
  if (err) return err;
  if (u_get32(flags) > (NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES))
    return -EPROTO;
  c->no_zeroes = (u_get32(flags) & NBD_FLAG_C_NO_ZEROES) != 0;
  do {
    r = hs_option(c);
    err = hs_send(c);
  } while (r == HS_MORE && !err);
  c->io.deadline = 0;
  return r < 0 || !err ? r : err;
}

/* ==== [9] TRANSMISSION (tx_) =============================================
 *   recv -> tx_take: parse, tx_validate -+-> batch -> tx_exec -> one send
 *                                        +-> tx_big: one by one
 *                                        +-> tx_defer -> tx_worker -> send
 *
 * (T1) Every request gets exactly one reply, DISC none.  The order is free.
 * (T2) A batch is what one recv brought.  READs get their place in the send
 *      buffer before they are done, each with room for its head in front, so
 *      data is never copied; the other replies follow behind them, and so do
 *      READs of nothing but zeroes, without their data.
 * (T3) A batch's writes are done before its flushes start: a flush covers all
 *      that was answered before it arrived, and more.
 * (T4) No slow request holds up a READ behind it, while there are workers:
 *      they do what may take long.
 * (T5) Memory is bounded and nobody waits for it: a client has its buffers and
 *      max_deferred requests of up to TX_KEEP bytes (EX_EXTENTS_SIZE with
 *      ops->run_batch: no READ or WRITE waits then); the others go in pieces.
 */

static int tx_send(struct conn *c, struct iovec *v, int n) {
  int err;
  os_lock(&c->sending);
  if (!c->broken && (c->broken = io_send(&c->io, v, n)) != 0)
    shutdown(c->io.out, SHUT_RDWR); /* the client's thread sees it so */
  err = c->broken;
  os_unlock(&c->sending);
  return err;
}

static void tx_log(struct conn *c, const struct nbdserve_req *r) {
  const struct wire_cmd *cmd = wire_cmd(r->type);
  int level = !r->err || r->err == -ENOTSUP ? NBDSERVE_LOG_TRACE
              : r->why                      ? NBDSERVE_LOG_INFO
                                            : NBDSERVE_LOG_WARNING;
  unsigned logged = 0;
  if (level > c->s->config.log_level) return;
  os_lock(&c->lock); /* not while logging: the host may call nbdserve_stats */
  if (level < NBDSERVE_LOG_TRACE) logged = ++c->nlogged;
  os_unlock(&c->lock);
  if (logged <= TX_LOGGED)
    HS_LOG(c, level,
           "%d: %s (%u) flags=0x%x off=%" PRIu64 " len=%" PRIu64 ": %s%s",
           c->id, cmd ? cmd->name : "?", r->type, r->flags, r->start, r->len,
           !r->err  ? "ok"
           : r->why ? r->why
                    : u_errno_text(r->err),
           logged == TX_LOGGED ? "; further failures are not logged" : "");
}

/* Writes all of r's reply but the data of a READ to p[TX_HEAD]: the bytes
 * written.  That of a BLOCK_STATUS that succeeded lies in r->buf already. */
static size_t tx_put_head(const struct nbdserve_req *r, unsigned char *p) {
  unsigned char *q = p + (r->mode == WIRE_EXT ? WIRE_EXTENDED : WIRE_CHUNK);
  unsigned type = NBD_REPLY_TYPE_NONE;
  const char *why = r->why || !r->err ? r->why : u_errno_text(r->err);
  uint32_t err = wire_error(r->err);
  uint64_t data = 0;
  size_t n = 0;
  if (err == NBD_ENOTSUP && !(r->flags & NBD_CMD_FLAG_FAST_ZERO))
    err = NBD_EINVAL; /* proto.md: only an answer to FAST_ZERO */
  if (!err && r->type == NBD_CMD_BLOCK_STATUS) return 0;
  if (r->mode == WIRE_COMPACT ||
      (r->mode == WIRE_STRUCTURED && !err && r->type != NBD_CMD_READ)) {
    u_put32(p, NBD_SIMPLE_REPLY_MAGIC);
    u_put32(p + 4, err);
    u_put64(p + 8, r->cookie);
    return WIRE_SIMPLE;
  }
  if (err) {
    int in_pieces = !r->why && r->type == NBD_CMD_READ && r->len > TX_KEEP;
    type = in_pieces ? NBD_REPLY_TYPE_ERROR_OFFSET : NBD_REPLY_TYPE_ERROR;
    n = (size_t)u_min(strlen(why), TX_WHY);
    u_put32(q, err);
    u_put16(q + 4, (unsigned)n);
    memcpy(q + 6, why, n);
    n += 6;
    u_put64(q + n, r->off);
    n += in_pieces ? 8 : 0;
  } else if (r->type == NBD_CMD_READ && r->len) {
    type = r->hole ? NBD_REPLY_TYPE_OFFSET_HOLE : NBD_REPLY_TYPE_OFFSET_DATA;
    n = r->hole ? 12 : 8;
    data = r->hole ? 0 : r->len;
    u_put64(q, r->off);
    if (r->hole) u_put32(q + 8, (uint32_t)r->len);
  }
  return wire_put_chunk(p, r, type, n + data) + n;
}

/* Does a READ's data go as a hole?  It mostly costs a look at one byte. */
static int tx_is_hole(const struct nbdserve_req *r) {
  return r->mode != WIRE_COMPACT && r->len >= 512 &&
         u_is_zero(r->buf, (size_t)r->len);
}

/* Answers the requests of a list, in as few sends as possible, and frees what
 * they own.  The READs that lie ready in the send buffer go first. */
static int tx_answer(struct conn *c, struct nbdserve_req *list) {
  unsigned char heads[32 * TX_HEAD];
  struct iovec v[TX_BATCH + 2];
  struct nbdserve_stats *stats = &c->s->stats;
  struct nbdserve_req *r;
  int err = 0, n = 0;
  os_lock(&c->s->lock);
  for (r = list; r; r = r->next) {
    assert(r->err <= 0 && !r->deferred);
    stats->requests++;
    stats->errors += r->err != 0;
    if (!r->err && r->type == NBD_CMD_READ) stats->bytes_read += r->len;
    if (!r->err && r->type == NBD_CMD_WRITE) stats->bytes_written += r->len;
    if (!r->ready || !r->buf) continue;
    unsigned char *p = r->buf - c->read_head;
    if (!n || (unsigned char *)v[n - 1].iov_base + v[n - 1].iov_len != p)
      v[n++] = (struct iovec){p, 0};
    v[n - 1].iov_len += c->read_head + (size_t)r->len;
  }
  os_unlock(&c->s->lock);
  for (r = list; r; r = r->next)
    tx_log(c, r);
  for (r = list; r && !err; n = 0) {
    v[n] = (struct iovec){heads, 0};
    v[n + 1] = (struct iovec){NULL, 0};
    for (; r && !v[n + 1].iov_len && v[n].iov_len + TX_HEAD <= sizeof heads;
         r = r->next) {
      int is_read = r->type == NBD_CMD_READ;
      if (r->ready) continue;
      r->hole |= !r->err && is_read && !r->hole && tx_is_hole(r);
      v[n].iov_len += tx_put_head(r, heads + v[n].iov_len);
      if (r->err || r->hole) continue;
      v[n + 1].iov_base = r->buf;
      v[n + 1].iov_len = is_read                           ? (size_t)r->len
                         : r->type == NBD_CMD_BLOCK_STATUS ? r->owned
                                                           : 0;
    }
    err = tx_send(c, v, n + 2);
  }
  for (r = list; r; r = r->next)
    if (r->owned) NBDSERVE_FREE(r->buf);
  return err;
}

/* Does what is left of a request, unless the host has it fail before. */
static int tx_do(struct conn *c, struct nbdserve_req *r) {
  const struct nbdserve_config *k = &c->s->config;
  int err = 0;
  if (k->before && (!r->flush || r->type == NBD_CMD_FLUSH))
    err = k->before(k->ctx, r->type, r->off, r->len);
  if (!err && !r->flush) err = ex_do(c->ex, r);
  if (!err && (r->flush || ex_wants_fua(c->ex, r, 0))) err = ex_flush(c->ex);
  return err;
}

/* Waits for a worker to answer something, or to end. */
static void tx_wait(struct conn *c) {
  c->waits = 1;
  os_wait(&c->lock);
  c->waits = 0;
}

/* A worker of a client: does and answers what is queued until it has gone. */
static void *tx_worker(void *arg) {
  struct conn *c = arg;
  os_lock(&c->lock);
  for (;;) {
    int flush = c->flushes && !c->flushing;
    if (!flush && !c->queue) {
      if (c->closing) break; /* flushes that came meanwhile are the other's */
      c->nidle++;
      os_wait(&c->lock);
      c->nidle--;
      continue;
    }
    struct nbdserve_req *list = flush ? c->flushes : c->queue, *r;
    c->flushing |= flush;
    if (flush) {
      c->flushes = NULL;
    } else {
      c->queue = list->next;
      if (!c->queue) c->queue_end = &c->queue;
      list->next = NULL;
      c->nqueue--;
    }
    os_unlock(&c->lock);
    for (r = list; r; r = r->next)
      r->err = r == list || c->s->config.before ? tx_do(c, r) : list->err;
    tx_answer(c, list);
    os_lock(&c->lock);
    if (flush) c->flushing = 0;
    for (; (r = list); c->ndeferred--) {
      list = r->next;
      NBDSERVE_FREE(r);
    }
    if (c->waits) os_wake_all(&c->lock);
  }
  c->nworkers--;
  if (c->waits) os_wake_all(&c->lock);
  os_unlock(&c->lock);
  return NULL;
}

/* Hands a request to the workers, with its buffer if that is its own.  False
 * when there are none: then the caller does it. */
static int tx_defer(struct conn *c, const struct nbdserve_req *r) {
  struct nbdserve_req *q = c->max_workers ? NBDSERVE_MALLOC(sizeof *q) : NULL;
  assert(!r->err && !r->deferred);
  if (!q) return 0;
  *q = *r;
  q->next = NULL;
  os_lock(&c->lock);
  while (c->ndeferred >= c->max_deferred)
    tx_wait(c);
  unsigned takers = c->nqueue + !q->flush + /* workers that are wanted */
                    (!c->flushing && (c->flushes || q->flush));
  if (takers > c->nidle && c->nworkers < c->max_workers &&
      os_thread(tx_worker, c) == 0)
    c->nworkers++;
  if (!c->nworkers) {
    os_unlock(&c->lock);
    NBDSERVE_FREE(q);
    return 0;
  }
  c->ndeferred++;
  if (q->flush) {
    q->next = c->flushes;
    c->flushes = q;
  } else {
    *c->queue_end = q;
    c->queue_end = &q->next;
    c->nqueue++;
  }
  os_wake_one(&c->lock);
  os_unlock(&c->lock);
  return 1;
}

/* Checks a request against all that was negotiated.  Sets r->err, r->why. */
static void tx_validate(const struct conn *c, struct nbdserve_req *r,
                        uint64_t payload) {
  const struct wire_cmd *cmd = wire_cmd(r->type);
  int is_status = r->type == NBD_CMD_BLOCK_STATUS, err = -EINVAL;
  int is_write = r->type == NBD_CMD_WRITE, stray = r->flags;
  if (cmd) stray &= ~cmd->flags;
  if (c->tflags & NBD_FLAG_SEND_FUA) stray &= ~NBD_CMD_FLAG_FUA;
  if (!(c->tflags & NBD_FLAG_SEND_DF)) stray |= r->flags & NBD_CMD_FLAG_DF;
  if (!(c->tflags & NBD_FLAG_SEND_FAST_ZERO))
    stray |= r->flags & NBD_CMD_FLAG_FAST_ZERO;
  if (c->mode != WIRE_EXT ||
      (is_status && !(c->tflags & NBD_FLAG_BLOCK_STATUS_PAYLOAD)))
    stray |= r->flags & NBD_CMD_FLAG_PAYLOAD_LEN;
  r->why = !cmd                               ? "unknown command"
           : stray & NBD_CMD_FLAG_PAYLOAD_LEN ? "it takes no payload"
           : cmd->writes && (c->tflags & NBD_FLAG_READ_ONLY)
               ? ((void)(err = -EPERM), "the export is read-only")
           : is_write && payload != r->len
               ? "NBD_CMD_FLAG_PAYLOAD_LEN is missing"
           : cmd->beyond && (r->off > c->size || r->len > c->size - r->off)
               ? ((void)(err = cmd->beyond), "beyond the end of the export")
           : is_status && !c->meta   ? "no metadata context was negotiated"
           : ~c->tflags & cmd->needs ? "the export does not offer it"
           : stray                   ? "flag does not apply"
           : cmd->beyond && (r->off | r->len) & (c->ex->e.min_block - 1)
               ? "no multiple of the minimum block size"
           : r->type <= NBD_CMD_WRITE && r->len > c->ex->e.max_request
               ? "longer than the maximum payload size"
           : is_status && !r->len ? "nothing to report on"
           : r->flags & NBD_CMD_FLAG_DF && r->len > TX_KEEP
               ? ((void)(err = -EOVERFLOW), "too long for a single chunk")
               : NULL;
  r->err = r->why ? err : 0;
}

/* Does the batch, or defers what is for workers (T4), and answers it: READs in
 * the send buffer (T2).  0, -errno to close. */
static int tx_exec(struct conn *c) {
  struct nbdserve_req *r = c->reqs, *list = NULL, **end = &list;
  size_t n = c->nreqs;
  if (!n) return 0;
  c->nreqs = c->wlen = 0;
  for (size_t i = 0, j; i < n; i = j) {
    j = i + 1;
    if (r[i].err || !r[i].len) continue; /* FLUSH has no length either */
    if (c->run_batch && r[i].type <= NBD_CMD_WRITE) {
      while (j < n && !r[j].err && r[j].len && r[j].type <= NBD_CMD_WRITE)
        j++;
      c->run_batch(c->ex->e.ctx, r + i, j - i);
      for (size_t k = i; k < j; k++)
        r[k].flush = !r[k].err && ex_wants_fua(c->ex, r + k, 0);
    } else {
      r[i].deferred = r[i].type > NBD_CMD_WRITE && tx_defer(c, r + i);
      if (!r[i].deferred) r[i].err = tx_do(c, r + i);
    }
  }
  for (; n > 0; n--, r++) { /* (T3) */
    int flush = r->flush && !r->err && !r->deferred;
    if (flush && !(r->deferred = tx_defer(c, r))) r->err = tx_do(c, r);
    if (r->deferred) continue;
    *end = r;
    end = &r->next;
    if (r->err || r->type != NBD_CMD_READ || !r->buf) continue;
    if ((r->hole = tx_is_hole(r))) continue;
    tx_put_head(r, r->buf - c->read_head);
    r->ready = 1;
  }
  return tx_answer(c, list);
}

/* A long READ, in pieces: as chunks of a structured reply.  A simple one cannot
 * be taken back, so one of several pieces is read twice, to see that it can. */
static int tx_long_read(struct conn *c, struct nbdserve_req *r) {
  int pass = c->mode == WIRE_COMPACT && r->len > TX_KEEP ? 0 : 1, err;
  uint64_t end = r->off + r->len;
  struct nbdserve_req p = *r;
  p.buf = c->big + TX_HEAD;
  os_lock(&c->lock); /* no worker's reply may come between the pieces */
  while (!pass && c->ndeferred)
    tx_wait(c);
  os_unlock(&c->lock);
  for (; pass < 2; pass++)
    for (p.off = r->off; p.off < end; p.off += p.len) {
      int bare = c->mode == WIRE_COMPACT && p.off > p.start; /* no new head */
      p.len = u_min(end - p.off, TX_KEEP);
      p.more = p.off + p.len < end;
      if (p.more) p.len -= (p.off + p.len) % 512; /* proto.md: if possible */
      r->err = ex_do(c->ex, &p);
      if (r->err && pass && bare) return r->err; /* proto.md: disconnect */
      if (r->err) r->off = p.off;
      if (r->err) return tx_answer(c, r);
      if (!pass) continue;
      p.hole = tx_is_hole(&p);
      struct iovec v[] = {{c->big, bare ? 0 : tx_put_head(&p, c->big)},
                          {p.buf, p.hole ? 0 : (size_t)p.len}};
      if ((err = tx_send(c, v, 2)) != 0) return err;
    }
  r->ready = 1;
  return tx_answer(c, r);
}

/* A READ or WRITE behind the batch: one for a worker, with a buffer of its own,
 * or a long one, in pieces; or what is refused, with its payload. */
static int tx_big(struct conn *c, struct nbdserve_req *r, uint64_t left,
                  int defer) {
  const struct nbdserve_config *k = &c->s->config;
  int err = 0;
  assert(!c->nreqs && (r->len > 0 || left > 0));
  if (defer && r->len <= TX_KEEP) r->buf = NBDSERVE_MALLOC((size_t)r->len);
  if (r->buf) r->owned = (size_t)r->len;
  if (!r->buf && !c->big) c->big = NBDSERVE_MALLOC(TX_HEAD + TX_KEEP);
  if (!r->buf && !c->big) return -ENOMEM; /* for not even a megabyte */
  if (!r->buf && !r->err && k->before)
    r->err = k->before(k->ctx, r->type, r->off, r->len);
  if (!r->buf && !r->err && !left) return tx_long_read(c, r);
  c->big_write |= !r->buf;
  struct nbdserve_req p = *r;
  if (!p.buf) p.buf = c->big;
  for (; left > 0 && !err; left -= p.len, p.off += p.len) {
    p.len = u_min(left, TX_KEEP);
    size_t part = (size_t)u_min(p.len, c->rend - c->rpos); /* this is here */
    memcpy(p.buf, c->rbuf + c->rpos, part);
    c->rpos += part;
    err = io_recv_all(&c->io, p.buf + part, (size_t)p.len - part);
    if (!err && !r->err && !r->owned) r->err = ex_do(c->ex, &p);
  }
  r->flush = !r->owned && !r->err && ex_wants_fua(c->ex, r, 0);
  if (!err && (r->owned || r->flush)) {
    if (tx_defer(c, r)) return 0;
    r->err = tx_do(c, r);
  }
  if (!err) return tx_answer(c, r);
  if (r->owned) NBDSERVE_FREE(r->buf);
  return err;
}

enum {
  TX_NEXT,
  TX_MORE,
  TX_DISC
};

/* Takes the next request out of the receive buffer; a short one goes into the
 * batch.  TX_NEXT, TX_MORE: it is not all there, TX_DISC, -errno to close. */
static int tx_take(struct conn *c) {
  unsigned char *p = c->rbuf + c->rpos;
  int ext = c->mode == WIRE_EXT, err;
  size_t head = ext ? WIRE_EXTENDED : WIRE_REQUEST, here = c->rend - c->rpos;
  if (here < head) return TX_MORE;
  struct nbdserve_req r = {.flags = u_get16(p + 4),
                           .type = u_get16(p + 6),
                           .cookie = u_get64(p + 8),
                           .off = u_get64(p + 16),
                           .len = ext ? u_get64(p + 24) : u_get32(p + 24),
                           .mode = c->mode};
  uint64_t payload =
      (ext ? r.flags & NBD_CMD_FLAG_PAYLOAD_LEN : r.type == NBD_CMD_WRITE)
          ? r.len
          : 0;
  if (u_get32(p) !=
          (uint32_t)(ext ? NBD_EXTENDED_REQUEST_MAGIC : NBD_REQUEST_MAGIC) ||
      payload > (ext ? c->ex->e.max_request : NBDSERVE_MAX_REQUEST)) {
    err = tx_exec(c);
    HS_LOG(c, NBDSERVE_LOG_INFO,
           "%d: request magic 0x%08" PRIx32 ", %" PRIu64
           " bytes of payload; closed",
           c->id, u_get32(p), payload);
    return err ? err : -EPROTO;
  }
  if (r.type == NBD_CMD_DISC) return TX_DISC;
  if (payload <= TX_SMALL && here < head + payload) return TX_MORE;
  r.start = r.off;
  r.flush = r.type == NBD_CMD_FLUSH;
  if (r.flush) r.off = r.len = 0;                /* reserved */
  if (r.type == NBD_CMD_BLOCK_STATUS && payload) /* contexts that it wants */
    r.len = payload == 12 && u_get32(p + head + 8) == 1 ? u_get64(p + head) : 0;
  tx_validate(c, &r, payload);
  int defer = !c->run_batch && c->max_workers && r.len && !r.err;
  if (payload > TX_SMALL ||
      (!r.err && r.type <= NBD_CMD_WRITE && (r.len > TX_SMALL || defer))) {
    c->rpos += head;
    err = tx_exec(c);
    return err ? err : tx_big(c, &r, payload, defer);
  }
  c->rpos += head + (size_t)payload;
  if (payload) r.buf = p + head;
  int is_read = r.type == NBD_CMD_READ && !r.err && r.len;
  size_t slot = is_read ? c->read_head + (size_t)r.len : 0; /* (T2) */
  assert(r.err || r.len <= TX_SMALL || r.type > NBD_CMD_WRITE);
  err = c->nreqs == TX_BATCH || c->wlen + slot > TX_WBUF ? tx_exec(c) : 0;
  if (err) return err;
  if (slot) r.buf = c->wbuf + c->wlen + c->read_head;
  c->wlen += slot;
  c->reqs[c->nreqs++] = r;
  return TX_NEXT;
}

static int tx_fill(struct conn *c) {
  size_t left = c->rend - c->rpos, want = TX_RBUF - left;
  assert(c->rpos <= c->rend && c->rend <= TX_RBUF);
  assert(!c->nreqs && !c->wlen && want > 0); /* WRITEs of the batch lie there */
  if (c->rpos) memmove(c->rbuf, c->rbuf + c->rpos, left);
  c->rend = left;
  if (c->big_write && want > 4096)
    want = 4096; /* so that little of the next payload need be copied */
  c->big_write = 0;
  ssize_t n = io_recv(&c->io, c->rbuf + left, want, 0);
  if (c->rpos || !left) c->began = os_now_ms(); /* not while it was idle */
  c->rpos = 0;
  if (n == -ETIMEDOUT && !left) return 0; /* idle: as long as it likes */
  if (n <= 0) return n < 0 ? (int)n : left ? -EPIPE : 1;
  c->rend += (size_t)n;
  return left && os_now_ms() - c->began > c->io.stall_ms ? -ETIMEDOUT : 0;
}

static int tx_run(struct conn *c) {
  int r, err;
  do {
    r = tx_take(c);
    err = r == TX_MORE || r == TX_DISC ? tx_exec(c) : r;
    if (r == TX_MORE && !err) err = tx_fill(c);
  } while (r != TX_DISC && !err);
  os_lock(&c->lock);
  c->closing = 1;
  os_wake_all(&c->lock);
  while (c->nworkers)
    tx_wait(c);
  assert(!c->queue && !c->flushes && !c->ndeferred);
  os_unlock(&c->lock);
  return err > 0 ? 0 : err;
}

/* ==== [10] FLAT (flat_) ==================================================
 * A regular file, a block device or memory, served as it is.  Here the file is
 * called the target, also if it is a device or in memory.
 *
 *   export      0 ................................ size
 *   target      offset .................. offset + size
 *   overlay     0 [64 KiB] [64 KiB] [64 KiB] [...] size
 *
 * Only a temporary export (NBDSERVE_FLAT_TEMPORARY) has an overlay, a file
 * without a name.  Its target is only read.  The first write to a block brings
 * the whole block to the overlay; from then on the block is read and written
 * there.  What is not in the overlay is read from the target.  The functions
 * that know of blocks begin with overlay_.
 *
 * Requests: READ and WRITE come to flat_batch, in the client's thread and many
 * at a time; the others come one by one to a method of flat_ops, in threads
 * that may wait.  Their ranges are inside the export (E2).
 *
 * (F1) After a failed fdatasync the kernel may have dropped what it could not
 *      write, and the next fdatasync says that all is well.  So the first
 *      failure is for good: every later write and flush fails with EIO until
 *      the file is opened anew.
 * (F2) A call that a system, a file system or a sandbox may lack is tried until
 *      it first says so; from then on the portable way is taken.
 * (F3) Nothing here depends on the offset of a descriptor, so any number of
 *      threads may call at once.
 * (F4) What nbdserve_flat_open makes and then cannot use it removes again. */
#if !NBDSERVE_NO_FLAT

enum {
  FLAT_MAX_IOV = 64, /* neighbouring requests that go into one system call */
  FLAT_OVERLAY_BLOCK = 65536 /* bytes that come to the overlay as a whole */
};

/* An open export: nbdserve_flat_open makes it, flat_close frees it.
 *
 *   members         written by          read by                  lock
 *   own ... size    nbdserve_flat_open  everybody                none
 *   failed          FLUSH               FLUSH, all that writes   lock
 *   unsupported     TRIM, ZEROES        TRIM, ZEROES             lock
 *   in_overlay      WRITE               READ, WRITE              lock
 *
 * The lock is held for the moment that it takes to look, except for in_overlay:
 * see there. */
struct flat {
  struct ex_batched own; /* must come first: ex_batched_read looks there */

  /* Fixed while the export is open: no lock is needed. */
  int fd;          /* the target; ours to close */
  int overlay_fd;  /* the overlay, ours to close; -1: writes go to the target */
  int follows_end; /* the export ends where the target ends, even if it grows */
  uint64_t offset; /* bytes of the target in front of the export */
  uint64_t size;   /* bytes of the export when it was opened */

  struct os_monitor lock; /* guards all that follows */
  int failed;             /* a sync has failed (F1) */
  unsigned unsupported;   /* bit N: os_fallocate lacks mode N here (F2) */
  /* Bit N % 8 of byte N / 8: block N is in the overlay.  A READ or WRITE holds
   * the lock from its look at the bits to the end of its I/O: another WRITE
   * could bring the block over in between, and one of the two would be lost. */
  unsigned char in_overlay[];
};
STATIC_ASSERT(modes_of_fallocate_have_bits, OS_FALLOCATE_MODES <= 32);

/* Do writes go to the overlay?  Then clients can do nothing to the target. */
static int flat_is_temporary(const struct flat *f) {
  return f->overlay_fd >= 0;
}

/* ---- What has failed before ---------------------------------------------- */

/* Has a sync failed (F1)?  Takes the lock. */
static int flat_has_failed(struct flat *f) {
  os_lock(&f->lock);
  int failed = f->failed;
  os_unlock(&f->lock);
  return failed;
}

/* Makes all later writes and flushes fail (F1).  Takes the lock. */
static void flat_set_failed(struct flat *f) {
  os_lock(&f->lock);
  f->failed = 1;
  os_unlock(&f->lock);
}

/* Is there still hope that os_fallocate can do that (F2)?  Takes the lock. */
static int flat_supports(struct flat *f, int mode) {
  assert(mode >= 0 && mode < OS_FALLOCATE_MODES);
  os_lock(&f->lock);
  unsigned unsupported = f->unsupported >> mode & 1u;
  os_unlock(&f->lock);
  return !unsupported;
}

/* Remembers that os_fallocate cannot do that (F2).  Takes the lock. */
static void flat_set_unsupported(struct flat *f, int mode) {
  assert(mode >= 0 && mode < OS_FALLOCATE_MODES);
  os_lock(&f->lock);
  f->unsupported |= 1u << mode;
  os_unlock(&f->lock);
}

/* ---- The overlay of a temporary export ---------------------------------- */

/* Is a block in the overlay?  The caller holds the lock. */
static int overlay_has(const struct flat *f, uint64_t block) {
  assert(block <= f->size / FLAT_OVERLAY_BLOCK);
  return f->in_overlay[block / 8] >> block % 8 & 1;
}

/* Notes that a block is in the overlay.  The caller holds the lock. */
static void overlay_add(struct flat *f, uint64_t block) {
  assert(block <= f->size / FLAT_OVERLAY_BLOCK);
  f->in_overlay[block / 8] |= (unsigned char)(1 << block % 8);
}

/* Reads len bytes at off, all in one block, from where that block is.  The
 * caller holds the lock. */
static int overlay_read(struct flat *f, void *buf, uint64_t off, size_t len) {
  struct iovec v = {buf, len};
  if (overlay_has(f, off / FLAT_OVERLAY_BLOCK))
    return os_transfer(f->overlay_fd, OS_READ, &v, 1, off);
  return os_transfer(f->fd, OS_READ, &v, 1, f->offset + off);
}

/* Brings a block to the overlay, of which len bytes at off have the new data at
 * buf and the others are as in the target.  The last block of an export may be
 * shorter than the others.  The caller holds the lock. */
static int overlay_write_first(struct flat *f, const void *buf, uint64_t off,
                               size_t len) {
  unsigned char block[FLAT_OVERLAY_BLOCK];
  size_t skip = (size_t)(off % FLAT_OVERLAY_BLOCK);
  uint64_t start = off - skip;
  size_t block_len = (size_t)u_min(sizeof block, f->size - start);
  assert(skip + len <= block_len);
  if (len < block_len) {
    struct iovec old = {block, block_len};
    int err = os_transfer(f->fd, OS_READ, &old, 1, f->offset + start);
    if (err) return err;
  }
  memcpy(block + skip, buf, len);
  struct iovec v = {block, block_len};
  int err = os_transfer(f->overlay_fd, OS_WRITE, &v, 1, start);
  if (err) return err; /* the target's block still counts */
  overlay_add(f, off / FLAT_OVERLAY_BLOCK);
  return 0;
}

/* Writes len bytes at off, all in one block, to the overlay.  The caller holds
 * the lock. */
static int overlay_write(struct flat *f, void *buf, uint64_t off, size_t len) {
  struct iovec v = {buf, len};
  if (!overlay_has(f, off / FLAT_OVERLAY_BLOCK))
    return overlay_write_first(f, buf, off, len);
  return os_transfer(f->overlay_fd, OS_WRITE, &v, 1, off);
}

/* Does a READ or WRITE block by block; returns 0 or the first error.  The
 * caller holds the lock. */
static int overlay_do(struct flat *f, const struct nbdserve_req *r) {
  int err = 0;
  assert(r->len <= f->size && r->off <= f->size - r->len);
  for (uint64_t done = 0, len; done < r->len && !err; done += len) {
    uint64_t off = r->off + done;
    unsigned char *buf = r->buf + done;
    len = FLAT_OVERLAY_BLOCK - off % FLAT_OVERLAY_BLOCK;
    len = u_min(len, r->len - done);
    if (r->type == NBD_CMD_READ)
      err = overlay_read(f, buf, off, (size_t)len);
    else
      err = overlay_write(f, buf, off, (size_t)len);
  }
  return err;
}

/* flat_batch for a temporary export.  Each request has the lock while all of
 * its I/O is done. */
static void overlay_batch(struct flat *f, struct nbdserve_req *reqs,
                          size_t nreqs) {
  for (size_t i = 0; i < nreqs; i++) {
    os_lock(&f->lock);
    reqs[i].err = overlay_do(f, &reqs[i]);
    os_unlock(&f->lock);
  }
}

/* ---- Requests ----------------------------------------------------------- */

/* Returns how many of the first requests are of one type and lie one behind the
 * other, so that one system call can do them all. */
static size_t flat_run_length(const struct nbdserve_req *reqs, size_t nreqs) {
  size_t most = nreqs < FLAT_MAX_IOV ? nreqs : FLAT_MAX_IOV;
  assert(nreqs > 0);
  for (size_t n = 1; n < most; n++) {
    const struct nbdserve_req *last = &reqs[n - 1];
    if (reqs[n].type != last->type) return n;
    if (reqs[n].off != last->off + last->len) return n;
  }
  return most;
}

/* Does a run of requests with one system call, or more if that does less. */
static int flat_transfer(struct flat *f, const struct nbdserve_req *reqs,
                         size_t nreqs) {
  struct iovec v[FLAT_MAX_IOV];
  assert(nreqs > 0 && nreqs <= FLAT_MAX_IOV);
  for (size_t i = 0; i < nreqs; i++) {
    v[i].iov_base = reqs[i].buf;
    v[i].iov_len = (size_t)reqs[i].len;
    assert(v[i].iov_len == reqs[i].len); /* there is a buffer of that size */
  }
  return os_transfer(f->fd, reqs->type == NBD_CMD_WRITE ? OS_WRITE : OS_READ, v,
                     (int)nreqs, f->offset + reqs->off);
}

/* Does a run of requests and sets the error of each.  If the run fails they are
 * repeated one by one, so that only those fail that fail by themselves. */
static void flat_do_run(struct flat *f, struct nbdserve_req *reqs,
                        size_t nreqs) {
  int err = flat_transfer(f, reqs, nreqs);
  for (size_t i = 0; i < nreqs; i++)
    reqs[i].err = err && nreqs > 1 ? flat_transfer(f, &reqs[i], 1) : err;
}

/* Does READs and WRITEs, in their order, in the caller's thread, and sets the
 * error of each: the method of struct ex_batched.
 *
 * Clients that read or write a long range often cut it into requests that lie
 * one behind the other; those become one system call. */
static void flat_batch(void *ctx, struct nbdserve_req *reqs, size_t nreqs) {
  struct flat *f = ctx;
  if (flat_is_temporary(f)) {
    overlay_batch(f, reqs, nreqs);
    return;
  }
  int failed = flat_has_failed(f);
  size_t run;
  for (; nreqs > 0; reqs += run, nreqs -= run) {
    assert(reqs->type == NBD_CMD_READ || reqs->type == NBD_CMD_WRITE);
    if (failed && reqs->type == NBD_CMD_WRITE) { /* (F1) */
      reqs->err = -EIO;
      run = 1;
      continue;
    }
    run = flat_run_length(reqs, nreqs);
    flat_do_run(f, reqs, run);
  }
}

/* Makes all that was written durable, or fails for good (F1).  A temporary
 * export has nothing that should last. */
static int flat_flush(void *ctx, uint32_t flags) {
  (void)flags;
  struct flat *f = ctx;
  if (flat_is_temporary(f)) return 0;
  if (flat_has_failed(f)) return -EIO;
  int err = os_datasync(f->fd);
  if (err) flat_set_failed(f);
  return err;
}

/* Changes the space behind a range of the export.  -EOPNOTSUPP: the caller must
 * do without, now (the range is not made of whole sectors of a device) or, as
 * is then remembered, always (F2). */
static int flat_allocate(struct flat *f, int mode, uint64_t off, uint64_t len) {
  if (flat_is_temporary(f)) return -EOPNOTSUPP; /* the target stays */
  if (flat_has_failed(f)) return -EIO;          /* (F1): it is a write */
  if (!flat_supports(f, mode)) return -EOPNOTSUPP;
  int err = os_fallocate(f->fd, mode, f->offset + off, len);
  if (err == -EOPNOTSUPP) flat_set_unsupported(f, mode); /* (F2) */
  return err == -EINVAL ? -EOPNOTSUPP : err;
}

/* Gives the space behind a range back. */
static int flat_trim(void *ctx, uint64_t off, uint64_t len, uint32_t flags) {
  (void)flags;
  int err = flat_allocate(ctx, OS_PUNCH_HOLE, off, len);
  return err == -EOPNOTSUPP ? 0 : err; /* a trim may do nothing */
}

/* Makes a range read as zeroes, without space if that is allowed and possible.
 * -ENOTSUP: nothing here is faster than to write the zeroes. */
static int flat_zero(void *ctx, uint64_t off, uint64_t len, uint32_t flags) {
  int err = -EOPNOTSUPP;
  if (!(flags & NBDSERVE_CMD_NO_HOLE))
    err = flat_allocate(ctx, OS_PUNCH_HOLE, off, len);
  if (err == -EOPNOTSUPP) err = flat_allocate(ctx, OS_ZERO_RANGE, off, len);
  return err == -EOPNOTSUPP ? -ENOTSUP : err;
}

/* Brings a range of the target into the system's memory, if it likes to. */
static int flat_cache(void *ctx, uint64_t off, uint64_t len, uint32_t flags) {
  (void)flags;
  struct flat *f = ctx;
  os_willneed(f->fd, f->offset + off, len);
  return 0;
}

/* Reports data and holes.  Of a temporary export nothing is reported, which
 * means that all is data: a hole of the target may have been written, and what
 * the overlay holds is not worth the time to look. */
static int flat_extents(void *ctx, uint64_t off, uint64_t len, uint32_t flags,
                        struct nbdserve_extents *out) {
  (void)flags;
  struct flat *f = ctx;
  uint64_t pos = f->offset + off;
  uint64_t end = pos + len;
  uint64_t next;
  if (flat_is_temporary(f)) return 0;
  for (; pos < end; pos = next) {
    int is_data = os_is_data(f->fd, pos, end, &next);
    uint32_t status = NBDSERVE_EXTENT_HOLE | NBDSERVE_EXTENT_ZERO;
    if (nbdserve_extent(out, next - pos, is_data ? 0 : status)) break;
  }
  return 0;
}

/* The size that a new client gets.  size: what the export has so far, maybe by
 * nbdserve_resize. */
static uint64_t flat_size(void *ctx, uint64_t size) {
  struct flat *f = ctx;
  /* The overlay's map has no bits for more than there was. */
  if (flat_is_temporary(f)) return u_min(size, f->size);
  /* An offset in the target must not exceed what off_t holds. */
  if (!f->follows_end) return u_min(size, INT64_MAX - f->offset);
  off_t end = lseek(f->fd, 0, SEEK_END);
  if (end < 0) return size;
  return (uint64_t)end < f->offset ? 0 : (uint64_t)end - f->offset;
}

/* Frees an export, whose files the caller closes.  NULL is no harm. */
static void flat_free(struct flat *f) {
  if (!f) return;
  os_monitor_free(&f->lock);
  NBDSERVE_FREE(f);
}

/* Ends an export.  Nothing is left that could fail: what has to last was
 * flushed before. */
static void flat_close(void *ctx) {
  struct flat *f = ctx;
  close(f->fd);
  if (flat_is_temporary(f)) close(f->overlay_fd);
  flat_free(f);
}

/* Reads and writes come from flat_batch, by way of ex_batched_read and _write
 * if they are single. */
static const struct nbdserve_ops flat_ops = {
    .read = ex_batched_read,
    .write = ex_batched_write,
    .flush = flat_flush,
    .trim = flat_trim,
    .zero = flat_zero,
    .cache = flat_cache,
    .extents = flat_extents,
    .close = flat_close,
    .run_batch = flat_batch,
    .size = flat_size,
};

/* ---- Opening ------------------------------------------------------------
 * One function a step.  The steps fill struct flat_target, then struct flat is
 * made of it.  The lock comes before all that looks at the file or changes it,
 * so that of several servers that start at once exactly one does. */

/* A target on its way to become an export */
struct flat_target {
  const char *path; /* as the caller gave it */
  int is_memory;    /* path is mem:SIZE, else a name in the file system */
  int writable;     /* clients' writes go to it */
  int fd;           /* ours to close; -1: not open */
  int is_new;       /* this call made the file, and has it locked: (F4) */
  uint64_t create;  /* size for a new or empty file; 0: none is made */
  uint64_t size;    /* bytes of the file, once it is complete */
};

/* Looks at the options, and at a path that is mem:SIZE.  -EINVAL. */
static int flat_check_options(struct flat_target *t,
                              const struct nbdserve_flat *options) {
  static const char prefix[] = "mem:";
  uint32_t known = NBDSERVE_FLAT_READONLY | NBDSERVE_FLAT_TEMPORARY;
  if (options->flags & ~known) return -EINVAL;
  t->writable = !options->flags;
  t->create = options->create;
  t->is_memory = strncmp(t->path, prefix, strlen(prefix)) == 0;
  if (t->is_memory) {
    const char *rest = u_parse_size(t->path + strlen(prefix), &t->create);
    if (!rest || *rest) return -EINVAL;
  }
  return t->create > INT64_MAX ? -EINVAL : 0;
}

/* Opens the target, and makes the file if it is missing and may be made.  Only
 * O_EXCL tells whether this call has made it, which (F4) must know; it follows
 * no link to where nothing is yet.  A new file is opened for writing in any
 * case, as it gets its size. */
static int flat_open_target(struct flat_target *t) {
  int flags = O_CLOEXEC | O_NOCTTY | O_NONBLOCK; /* a FIFO must not block */
  if (t->is_memory) {
    t->fd = os_nameless_file(NULL);
    return t->fd < 0 ? t->fd : 0;
  }
  if (t->create) {
    t->fd = open(t->path, flags | O_RDWR | O_CREAT | O_EXCL, 0666);
    if (t->fd < 0 && errno != EEXIST) return -errno;
    t->is_new = t->fd >= 0;
  }
  if (t->fd < 0)
    t->fd = open(t->path, flags | (t->writable ? O_RDWR : O_RDONLY));
  return t->fd < 0 ? -errno : 0;
}

/* Keeps other servers away from the target.  If another one was quicker to take
 * the file that this call has just made, the file is no longer ours. */
static int flat_lock_target(struct flat_target *t) {
  if (t->is_memory) return 0;
  int err = os_lock_file(t->fd, !t->writable);
  if (err) t->is_new = 0;
  return err;
}

/* Refuses what is neither a file nor a block device, and a device that is to be
 * written and cannot.  Gives a new or empty file its size.  Finds the size.
 *
 * If the file that this call has made has a size by now, another server has had
 * it in between and has ended: the file and its data are no longer ours. */
static int flat_prepare_target(struct flat_target *t) {
  struct stat st;
  if (fstat(t->fd, &st) < 0) return -errno;
  if (st.st_size != 0) t->is_new = 0;
  if (S_ISDIR(st.st_mode)) return -EISDIR;
  if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode)) return -EINVAL;
  if (S_ISBLK(st.st_mode) && t->writable && os_is_readonly_device(t->fd))
    return -EROFS;
  if (t->create && S_ISREG(st.st_mode) && st.st_size == 0) {
    if (ftruncate(t->fd, (off_t)t->create) < 0) return -errno;
    int err = t->is_memory ? 0 : os_sync_new_file(t->fd, t->path);
    if (err) return err;
  }
  off_t end = lseek(t->fd, 0, SEEK_END);
  if (end < 0) return -errno;
  t->size = (uint64_t)end;
  return 0;
}

/* Undoes what was done to open a target (F4).  The file goes first, while the
 * lock still keeps others from taking it. */
static void flat_abandon_target(struct flat_target *t) {
  if (t->is_new) os_remove_own_file(t->path, t->fd);
  if (t->fd >= 0) close(t->fd);
}

/* How many bytes struct flat has for a temporary export of that size.  -EFBIG:
 * more than most, which is what size_t holds: on a machine with addresses of 32
 * bits a sparse file may well be too large. */
static int flat_temporary_len(uint64_t size, size_t most, size_t *len) {
  uint64_t nblocks = size / FLAT_OVERLAY_BLOCK + 1;
  uint64_t map_len = nblocks / 8 + 1;
  assert(most > sizeof(struct flat));
  if (map_len > most - sizeof(struct flat)) return -EFBIG;
  *len = sizeof(struct flat) + (size_t)map_len;
  return 0;
}

/* Makes the export of a target, as yet without an overlay; flat_free undoes it.
 * -EINVAL: the slice is not inside the target.  -EFBIG, -ENOMEM. */
static int flat_new(struct flat **out, const struct flat_target *t,
                    const struct nbdserve_flat *options) {
  uint64_t offset = options->offset;
  uint64_t size = options->size;
  size_t len = sizeof(struct flat);
  assert(t->fd >= 0 && t->size <= INT64_MAX);
  if (offset > t->size || size > t->size - offset) return -EINVAL;
  if (!size) size = t->size - offset;
  if (options->flags & NBDSERVE_FLAT_TEMPORARY) {
    int err = flat_temporary_len(size, SIZE_MAX, &len);
    if (err) return err;
  }
  struct flat *f = u_zalloc(len);
  if (!f) return -ENOMEM;
  int err = os_monitor_init(&f->lock);
  if (err) {
    NBDSERVE_FREE(f);
    return err;
  }
  f->own.run_batch = flat_batch;
  f->fd = t->fd; /* and t's, until nbdserve_flat_open has done all */
  f->overlay_fd = -1;
  f->follows_end = !options->size;
  f->offset = offset;
  f->size = size;
  *out = f;
  return 0;
}

/* Gives a temporary export its overlay. */
static int flat_open_overlay(struct flat *f,
                             const struct nbdserve_flat *options) {
  if (!(options->flags & NBDSERVE_FLAT_TEMPORARY)) return 0;
  int fd = os_nameless_file(options->dir);
  if (fd < 0) return fd;
  f->overlay_fd = fd;
  return 0;
}

/* Opens, locks and completes the target.  Whatever it returns, the caller gives
 * the target back with flat_abandon_target or makes an export of it. */
static int flat_get_target(struct flat_target *t,
                           const struct nbdserve_flat *options) {
  int err = flat_check_options(t, options);
  if (err) return err;
  err = flat_open_target(t);
  if (err) return err;
  err = flat_lock_target(t);
  if (err) return err;
  return flat_prepare_target(t);
}

/* See nbdserve.h.  Until all steps have succeeded the target is t's; then its
 * descriptor and the overlay's are the export's. */
int nbdserve_flat_open(const char *path, const struct nbdserve_flat *options,
                       struct nbdserve_export *out) {
  static const struct nbdserve_flat defaults;
  struct flat_target t = {.path = path, .fd = -1};
  struct flat *f = NULL;
  if (!options) options = &defaults;
  int err = flat_get_target(&t, options);
  if (!err) err = flat_new(&f, &t, options);
  if (!err) err = flat_open_overlay(f, options);
  if (err) {
    flat_free(f);
    flat_abandon_target(&t);
    return err;
  }
  assert(f->offset + f->size <= INT64_MAX); /* for os_transfer */
  out->size = f->size;
  out->flags |= NBDSERVE_EXPORT_MULTI_CONN; /* fdatasync is for all writers */
  if (options->flags & NBDSERVE_FLAT_READONLY)
    out->flags |= NBDSERVE_EXPORT_READONLY;
  if (os_is_rotational(f->fd)) out->flags |= NBDSERVE_EXPORT_ROTATIONAL;
  out->ops = &flat_ops;
  out->ctx = f;
  return 0;
}

#endif /* !NBDSERVE_NO_FLAT */

/* ==== [11] CAS (cas_) ====================================================
 * A store: volumes and snapshots in one file, every distinct block once.  Its
 * format, and the rules (C1) to (C15) that keep it whole, stand at the end of
 * nbdserve.h.  Locks: ckpt, then lock.  Data is never read or written under
 * lock, and maps are in memory. */
#if !NBDSERVE_NO_CAS

#ifndef CAS_UNIT          /* the tests make stores with everything in small */
#define CAS_UNIT 1048576u /* bytes: superblocks, log, groups start at these */
#define CAS_FANOUT(block_size) \
  ((block_size) / 4 - 8)   /* slots in a map page \
                            */
#define CAS_ENTRIES 84     /* in a log page */
#define CAS_SEGMENT 256    /* slots that are taken in a row */
#define CAS_MIN_BLOCK 4096 /* bytes */
#endif
#define CAS_MAGIC "NBDSCAS1"
#define CAS_ANY UINT32_MAX /* cas_item.expect: the map may have any slot */
#define CAS_TAG(digest) (u_get32(digest) >> 2 | 0x40000000u) /* never 0 */
#define CAS_GOOD 0x80000000u /* read or written since, and it fitted */

/* What pages begin with: the letters of their names in the format */
enum {
  CAS_MAP = 0x4d415031, /* "MAP1" */
  CAS_CAT = 0x43415431, /* "CAT1" */
  CAS_LOG = 0x4c4f4731  /* "LOG1" */
};

/* Sizes and places of what the format describes, in bytes */
enum {
  CAS_PAGE = 4096,  /* size of a log page or superblock */
  CAS_SUM = 4064,   /* where a log page or superblock has its SHA-256 */
  CAS_HEAD = 32,    /* size of the head of any page */
  CAS_CHECK = 16,   /* where other pages have the first half of theirs */
  CAS_ENTRY = 48,   /* size of an entry of the log */
  CAS_RECORD = 256, /* size of a record of the catalog */
  CAS_NAME = 166,   /* length of the longest NAME */
  CAS_PATH = 334    /* size of the longest VOL@NAME, with the NUL */
};

/* Where the fields of a catalog record are, in bytes */
enum {
  CAS_ID = 0,          /* 4: id of the volume or snapshot */
  CAS_IS_SNAPSHOT = 4, /* 4: 1 for a snapshot */
  CAS_SIZE = 8,        /* 8: bytes */
  CAS_ROOT = 16,       /* 4: slot of the root of the map */
  CAS_DEPTH = 20,      /* 4: levels of the map */
  CAS_CREATED = 24,    /* 8: seconds since 1970 */
  CAS_ORIGIN = 36,     /* 4: id that it was made from */
  CAS_CID = 40,        /* 32: content id of a snapshot that was sealed */
  CAS_NAMED = 89       /* the name, and zeroes */
};

/* Limits that follow from the format */
enum {
  CAS_SLOTS = CAS_UNIT / 32,     /* slots in a group */
  CAS_GROUPS = CAS_UNIT / 8 - 1, /* groups in a store: < 2^32 slots in all */
  CAS_LEVELS = 4                 /* levels of a map */
};

/* How much is done at a time */
enum {
  CAS_FILL = 128,  /* digests read in one call to fill the index */
  CAS_BATCH = 256, /* blocks that go through a request's steps together */
  CAS_RUN = 64     /* pieces in one call of os_transfer */
};

/* When space is made or kept */
enum {
  CAS_DIRTY = 4096,    /* pages that changed: more bring about a checkpoint */
  CAS_WAITING = 65536, /* slots that wait for one: more bring it about, too */
  CAS_RESERVE = 4 * CAS_SEGMENT, /* free slots that data may not take */
  CAS_SLACK = 64 * CAS_SEGMENT   /* free slots to have before filling gaps */
};

/* cas_group.ref of a slot that will be free when a list of them is */
enum {
  CAS_FREED = -1
};

/* cas_item.state, bits: what is to be done, or was read, of a block */
enum {
  CAS_DATA = 1,   /* its data */
  CAS_DIGEST = 2, /* its digest */
  CAS_DUP = 4     /* it is compared with a slot that has the same digest */
};

/* What memory holds of each slot of a group; in arrays, because searches go
 * along one of these only. */
struct cas_group {
  int32_t ref[CAS_SLOTS];   /* edges and pins (C13); 0: free; or CAS_FREED */
  uint32_t tag[CAS_SLOTS];  /* CAS_TAG if it is in the index; CAS_GOOD */
  uint32_t next[CAS_SLOTS]; /* next slot of its bucket or of a list; 0: none */
  uint32_t head[CAS_SLOTS]; /* first slot of a bucket: indexed by buckets */
  uint16_t nfree[CAS_SLOTS / CAS_SEGMENT]; /* free slots in each segment */
};

/* A page of a map.  All are in memory, a fraction of what is kept of slots. */
struct cas_node {
  int32_t refs;           /* edges from pages and images (C13) */
  int level;              /* 0: its slots are those of blocks */
  int bad;                /* something below could not be read */
  uint32_t slot;          /* where it lies; 0: nowhere yet as it is now */
  uint32_t *e;            /* [fanout] slots of blocks, on level 0 */
  struct cas_node *kid[]; /* [fanout] pages below, on other levels */
};

/* A volume or snapshot.  All its exports are this one struct. */
struct cas_image {
  struct ex_batched own;            /* must come first */
  struct nbdserve_cas *s;           /* the store that it is in */
  struct cas_image *next;           /* in the catalog */
  struct cas_image *parent;         /* the volume of a snapshot, else NULL */
  struct cas_node *root;            /* its map; NULL: all holes */
  uint64_t size;                    /* bytes */
  uint64_t clients;                 /* exports and calls that use it */
  unsigned char record[CAS_RECORD]; /* of the catalog, but for root and size */
};

struct nbdserve_cas {
  /* Fixed while the store is open: no lock is needed. */
  int fd;              /* the file or block device, ours to close */
  int readonly;        /* nothing is changed */
  int verify;          /* a block is checked when it is first read */
  int hw;              /* the processor computes SHA-256 */
  int is_device;       /* it cannot grow */
  uint32_t bs;         /* bytes of a block */
  uint32_t fanout;     /* slots that a map page names */
  uint32_t log_pages;  /* pages that the log has room for */
  uint64_t data_off;   /* byte of the file where the groups begin */
  uint64_t end;        /* bytes of the file when it was opened */
  uint64_t max_blocks; /* blocks that an image may have */

  struct os_monitor ckpt;        /* one checkpoint at a time; guards these: */
  struct cas_item *pages;        /* what it writes */
  uint32_t npages;               /* how many they are */
  unsigned char super[CAS_PAGE]; /* id and log_pages in it are fixed */

  struct os_monitor lock; /* guards the rest; woken: a sync or work ended */

  int syncing;     /* a sync is under way; a second one may miss its error */
  int failed;      /* -errno: nothing is written any more (C14) */
  int log_damaged; /* the log has a page that it should not have (C9) */
  int damaged;     /* something could not be read: nothing is freed */
  int replaying;   /* what is in the log need not be logged */
  int busy;        /* a thread is in cas_work */
  int closing;     /* that thread is to end */

  struct cas_image *images; /* the catalog */
  uint32_t nimages;         /* how many they are */
  uint32_t next_id;         /* id of the next volume or snapshot */
  uint32_t catalog;         /* slot of its first page; the others by next */

  struct cas_group *groups[CAS_GROUPS]; /* the first ngroups are there */
  uint32_t ngroups;                     /* groups in memory */
  uint32_t nslots;                      /* slots in the file */
  uint32_t nfree;                       /* those with ref 0 */
  uint32_t mask;                        /* of buckets: see cas_bucket */
  uint32_t cursor;                      /* slots are taken from here on */
  uint32_t ndirty;   /* pages of maps that changed: without a slot */
  uint32_t dropped;  /* list of slots, by next: free after a sync (C5) */
  uint32_t retired;  /* the same: free after a checkpoint (C6) */
  uint32_t nwaiting; /* slots in both lists */
  uint32_t filled;   /* slots that the index was filled with */
  uint32_t to_fill;  /* slots that it is to be filled with */

  uint32_t nlog;    /* entries in the log page that is being filled */
  uint64_t seq;     /* number of that page */
  uint64_t tail;    /* number to replay from, by the superblock */
  uint64_t durable; /* pages before that number are durable (C4) */
  uint64_t nlogged; /* entries so far */
  uint64_t nsynced; /* entries that a sync has covered */
  unsigned char log[CAS_PAGE]; /* the log page that is being filled */
  unsigned char page[65536];   /* any other page */
};

#define CAS_AT(s, x, field) \
  ((s)->groups[(x) / CAS_SLOTS]->field[(x) % CAS_SLOTS])
#define CAS_NFREE(s, x) /* of its segment */ \
  ((s)->groups[(x) / CAS_SLOTS]->nfree[(x) % CAS_SLOTS / CAS_SEGMENT])
#define CAS_NEEDED(s) ((s)->ndirty + (s)->nimages + 2) /* by a checkpoint */

/* ---- Slots -------------------------------------------------------------- */

static uint64_t cas_blocks(const struct nbdserve_cas *s, uint64_t size) {
  return size / s->bs + (size % s->bs != 0);
}

static uint64_t cas_off(const struct nbdserve_cas *s, uint32_t x, int what) {
  uint64_t group = CAS_UNIT + (uint64_t)CAS_SLOTS * s->bs, in = x % CAS_SLOTS;
  in = what == CAS_DATA ? CAS_UNIT + in * s->bs : in * 32;
  return s->data_off + x / CAS_SLOTS * group + in;
}

/* The bucket of a tag.  There are as many as slots in all groups: their number
 * is above mask and at most twice that, so a new group splits just some. */
static uint32_t *cas_bucket(struct nbdserve_cas *s, uint32_t tag) {
  uint32_t b = tag & ~CAS_GOOD & (2 * s->mask + 1);
  if (b >= s->ngroups * CAS_SLOTS) b &= s->mask;
  return &CAS_AT(s, b, head);
}

static void cas_index(struct nbdserve_cas *s, uint32_t x, uint32_t tag) {
  uint32_t *b = cas_bucket(s, tag);
  assert(x && tag);
  CAS_AT(s, x, tag) |= tag;
  CAS_AT(s, x, next) = *b;
  *b = x;
}

static void cas_unindex(struct nbdserve_cas *s, uint32_t x) {
  uint32_t *tag = &CAS_AT(s, x, tag), *p = cas_bucket(s, *tag);
  while (*tag && *p && *p != x)
    p = &CAS_AT(s, *p, next);
  if (*p == x) *p = CAS_AT(s, x, next); /* else it is a page, or not there */
  *tag = 0;
}

/* Counts segments in until there is slot x; a new group splits buckets. */
static int cas_extend(struct nbdserve_cas *s, uint32_t x) {
  for (; s->nslots <= x; s->nslots += CAS_SEGMENT) {
    if (s->nslots == s->ngroups * CAS_SLOTS) {
      if (s->ngroups == CAS_GROUPS) return -ENOSPC;
      s->groups[s->ngroups] = u_zalloc(sizeof(struct cas_group));
      if (!s->groups[s->ngroups]) return -ENOMEM;
      s->ngroups++;
      uint32_t b = s->nslots ? s->nslots : 1;
      for (; b < s->ngroups * CAS_SLOTS; b++) {
        if (b > 2 * s->mask + 1) s->mask = 2 * s->mask + 1;
        uint32_t *p = &CAS_AT(s, b - s->mask - 1, head), y = *p, next;
        for (*p = 0; y; y = next) {
          next = CAS_AT(s, y, next);
          cas_index(s, y, CAS_AT(s, y, tag));
        }
      }
    }
    CAS_NFREE(s, s->nslots) = s->nslots ? CAS_SEGMENT : CAS_SEGMENT - 1;
    s->nfree += CAS_NFREE(s, s->nslots);
    CAS_AT(s, 0, ref) = 1; /* that number means zeroes */
  }
  return 0;
}

static int cas_grow(struct nbdserve_cas *s) {
  uint32_t x = s->nslots;
  uint64_t end = cas_off(s, x, CAS_DATA) + (uint64_t)CAS_SEGMENT * s->bs;
  uint64_t off = x ? cas_off(s, x, x % CAS_SLOTS ? CAS_DATA : CAS_DIGEST) : 0;
  int err = s->is_device ? 0 : os_fallocate(s->fd, OS_ALLOCATE, off, end - off);
  if (s->is_device ? end > s->end : end > INT64_MAX) return -ENOSPC;
  return err && err != -EOPNOTSUPP ? err : cas_extend(s, x);
}

static int cas_want(struct nbdserve_cas *s, uint32_t more) {
  int err = s->failed;
  while (!err && s->nfree < CAS_NEEDED(s) + more)
    err = cas_grow(s);
  return err;
}

/* One more edge to a slot, or pin on it.  A free one is taken by that. */
static void cas_hold(struct nbdserve_cas *s, uint32_t x) {
  int32_t *ref = &CAS_AT(s, x, ref);
  if (!x) return;
  if (!*ref) s->nfree--;
  if (!*ref) CAS_NFREE(s, x)--;
  *ref = *ref == CAS_FREED ? 1 : *ref + 1;
}

/* One less.  After the last the slot goes to a list that will be freed. */
static void cas_drop(struct nbdserve_cas *s, uint32_t x, uint32_t *list) {
  int32_t *ref = &CAS_AT(s, x, ref);
  if (!x || (s->damaged && *ref == 1)) return;
  assert(*ref > 0);
  if (--*ref > 0) return;
  cas_unindex(s, x);
  *ref = CAS_FREED;
  if (s->replaying) return; /* it may come back: see nbdserve_cas_open */
  CAS_AT(s, x, next) = *list;
  *list = x;
  s->nwaiting++;
}

static void cas_free(struct nbdserve_cas *s, uint32_t x) {
  for (; x; x = CAS_AT(s, x, next)) {
    assert(CAS_AT(s, x, ref) == CAS_FREED);
    CAS_AT(s, x, ref) = 0;
    CAS_NFREE(s, x)++;
    s->nfree++;
    s->nwaiting--;
  }
}

/* The segment to take slots from next, from x on: one with room enough, or a
 * new one at the file's end while that has little to spare. */
static uint32_t cas_segment(struct nbdserve_cas *s, uint32_t x) {
  int spare = s->nfree > (s->nslots - s->nfree) / 10 + CAS_SLACK;
  uint32_t want = spare ? CAS_SEGMENT / 4 : CAS_SEGMENT * 3 / 4;
  for (uint32_t i = 1;; i++, x += CAS_SEGMENT) {
    if (x >= s->nslots) x = 0;
    if (CAS_NFREE(s, x) >= want) return x;
    if (i % 4096 && i < s->nslots / CAS_SEGMENT) continue;
    if (!spare && cas_grow(s) == 0) return s->nslots - CAS_SEGMENT;
    want = want > 4 ? want / 4 : 1; /* there is one: nfree > 0 */
    i = 0;
  }
}

/* Takes a free slot; the caller knows that there is one. */
static uint32_t cas_alloc(struct nbdserve_cas *s) {
  assert(s->nfree > 0);
  for (;; s->cursor++) {
    if (s->cursor % CAS_SEGMENT == 0) s->cursor = cas_segment(s, s->cursor);
    if (!CAS_AT(s, s->cursor, ref)) break;
  }
  cas_hold(s, s->cursor);
  return s->cursor++;
}

/* ---- Data, pages, log ---------------------------------------------------- */

/* A block, or a page, on its way between a request and the file */
struct cas_item {
  uint64_t lba;             /* number of the block in its image */
  unsigned char *data;      /* [block_size] */
  struct nbdserve_req *req; /* the request that it is a part of */
  uint32_t slot;            /* where it lies, or 0 */
  uint32_t expect;          /* slot that the map must have, or CAS_ANY */
  int state;                /* bits: CAS_DATA, CAS_DIGEST, CAS_DUP */
  int err;                  /* 0 or -errno */
  unsigned char sum[32];    /* SHA-256 of data */
  unsigned char digest[32]; /* the slot's digest, if it was read */
};

static int cas_io(struct nbdserve_cas *s, int writing, void *buf, size_t len,
                  uint64_t off) {
  struct iovec v = {buf, len};
  return os_transfer(s->fd, writing, &v, 1, off);
}

/* Reads or writes what of the items, in few calls.  0 or the last error. */
static int cas_transfer(struct nbdserve_cas *s, struct cas_item *it, size_t n,
                        int what, int writing) {
  struct iovec v[CAS_RUN];
  int err = 0;
  for (size_t k; n > 0; it += k, n -= k) {
    for (k = 0; k < n && k < CAS_RUN && it[k].state & what; k++) {
      if (k && (it[k].slot % CAS_SLOTS == 0 || it[k].slot - k != it->slot))
        break;
      v[k] = (struct iovec){writing ? it[k].sum : it[k].digest, 32};
      if (what == CAS_DATA) v[k] = (struct iovec){it[k].data, s->bs};
    }
    int e =
        k ? os_transfer(s->fd, writing, v, (int)k, cas_off(s, it->slot, what))
          : 0;
    if (e && k == 1) err = it->err = e;
    for (size_t i = 0; e && k > 1 && i < k; i++) /* what fails alone failed */
      if (cas_transfer(s, it + i, 1, what, writing)) err = it[i].err;
    if (!k) k = 1;
  }
  return err;
}

/* Writes what is to be written; first the digests: who finds data finds both */
static int cas_store(struct nbdserve_cas *s, struct cas_item *it, size_t n) {
  int err = cas_transfer(s, it, n, CAS_DIGEST, 1);
  return err ? err : cas_transfer(s, it, n, CAS_DATA, 1);
}

static void cas_hash(struct nbdserve_cas *s, struct cas_item *it, size_t n) {
  struct cas_item *first = NULL;
  for (; n > 0; it++, n--) {
    if (~it->state & (CAS_DATA | CAS_DIGEST) || it->err) continue;
    if (first)
      sha_256(s->hw, first->data, it->data, s->bs, first->sum, it->sum);
    first = first ? NULL : it;
  }
  if (first) sha_256(s->hw, first->data, NULL, s->bs, first->sum, NULL);
}

/* Puts its sum into a page, superblock or log page, at.  Was it there? */
static int cas_stamp(const struct nbdserve_cas *s, unsigned char *p, int at) {
  unsigned char was[32], sum[32];
  size_t len = at == CAS_SUM ? CAS_SUM : s->bs, n = at == CAS_SUM ? 32 : 16;
  memcpy(was, p + at, n);
  memset(p + at, 0, n);
  sha_256(s->hw, p, NULL, len, sum, NULL);
  memcpy(p + at, sum, n);
  return memcmp(was, sum, n) == 0;
}

/* Reads a page.  -EIO: it is not what it should be. */
static int cas_get_page(struct nbdserve_cas *s, uint32_t x, uint32_t magic,
                        int level, uint32_t index, unsigned char *p) {
  if (x >= s->nslots) return -EIO;
  int err = cas_io(s, 0, p, s->bs, cas_off(s, x, CAS_DATA));
  if (err) return err;
  return cas_stamp(s, p, CAS_CHECK) && u_get32(p) == magic &&
                 u_get32(p + 4) == (uint32_t)level && u_get32(p + 8) == index
             ? 0
             : -EIO;
}

/* Nothing is written any more (C14). */
static int cas_fail(struct nbdserve_cas *s, int err) {
  if (err) s->failed = -EIO;
  if (err) os_wake_all(&s->lock);
  return err;
}

static int cas_log_write(struct nbdserve_cas *s) {
  uint64_t off = 2 * CAS_UNIT + s->seq % s->log_pages * CAS_PAGE;
  if (!s->nlog || s->failed) return s->failed;
  assert(s->seq - s->tail < s->log_pages);
  u_put32(s->log, CAS_LOG);
  u_put16(s->log + 4, s->nlog);
  u_put64(s->log + 8, s->seq++); /* (C3) */
  u_put64(s->log + 16, s->durable);
  memcpy(s->log + 24, s->super + 16, 8);
  cas_stamp(s, s->log, CAS_SUM);
  s->nlog = 0;
  return cas_fail(s, cas_io(s, 1, s->log, CAS_PAGE, off));
}

/* Logs that a block of an image is now in a slot, or count of them zeroes. */
static void cas_log(struct nbdserve_cas *s, const struct cas_image *im,
                    const struct cas_item *it, uint64_t count) {
  unsigned char *p = s->log + 32 + CAS_ENTRY * s->nlog;
  if (s->replaying) return;
  memset(p, 0, CAS_ENTRY);
  memcpy(p, im->record + CAS_ID, 4);
  u_put32(p + 4, it->slot);
  u_put64(p + 8, it->lba);
  if (!it->slot) u_put64(p + 16, count);
  if (it->slot) memcpy(p + 16, it->sum, 32);
  s->nlogged++;
  if (++s->nlog == CAS_ENTRIES) cas_log_write(s); /* s->failed tells */
}

/* Makes all that was written so far durable; one caller syncs for those that
 * wait meanwhile, unless it is told to. */
static int cas_sync(struct nbdserve_cas *s, int always) {
  os_lock(&s->lock);
  uint64_t mine = s->nlogged;
  while (s->syncing)
    os_wait(&s->lock);
  int err = s->failed;
  if (!err && (always || s->nsynced < mine)) {
    s->syncing = 1;
    mine = s->nlogged;
    err = cas_log_write(s);
    uint64_t seq = s->seq;
    uint32_t dropped = s->dropped;
    s->dropped = 0;
    os_unlock(&s->lock);
    if (!err) err = os_datasync(s->fd);
    os_lock(&s->lock);
    cas_fail(s, err);
    if (!err) s->durable = seq; /* (C4) */
    if (!err) s->nsynced = mine;
    if (!err) cas_free(s, dropped); /* (C5) */
    s->syncing = 0;
    os_wake_all(&s->lock);
  }
  os_unlock(&s->lock);
  return err;
}

/* ---- Maps and the catalog ------------------------------------------------ */

/* Takes an edge off a page, after the last off all below, and yields lock. */
static void cas_unref(struct nbdserve_cas *s, struct cas_node *b) {
  if (!b || --b->refs > 0) return;
  for (uint32_t c = 0; b->level && c < s->fanout; c++)
    cas_unref(s, b->kid[c]);
  for (uint32_t c = 0; !b->level && c < s->fanout; c++)
    cas_drop(s, b->e[c], &s->retired);
  if (!b->slot) s->ndirty--;
  cas_drop(s, b->slot, &s->retired);
  NBDSERVE_FREE(b);
  os_unlock(&s->lock);
  os_lock(&s->lock);
}

/* Makes the page at *p, which is to change or new, the image's own (C13). */
static int cas_own(struct nbdserve_cas *s, struct cas_node **p, int level) {
  struct cas_node *b = *p;
  if (b && b->refs == 1) {
    if (b->slot) s->ndirty++;
    cas_drop(s, b->slot, &s->retired);
    b->slot = 0;
    return 0;
  }
  struct cas_node *n =
      u_zalloc(sizeof *n + s->fanout * (level ? sizeof *n->kid : sizeof *n->e));
  if (!n) return -ENOMEM;
  n->refs = 1;
  n->level = level;
  n->e = (uint32_t *)(void *)n->kid;
  for (uint32_t c = 0; b && c < s->fanout; c++)
    if (!level)
      cas_hold(s, n->e[c] = b->e[c]);
    else if ((n->kid[c] = b->kid[c]))
      n->kid[c]->refs++;
  if (b) b->refs--;
  s->ndirty++;
  *p = n;
  return 0;
}

/* Gets the slot of block lba to *x, and *span blocks that are as that one if
 * span is not NULL; set: puts *x there, and the caller's hold passes to it. */
static int cas_map(struct nbdserve_cas *s, struct cas_image *im, uint64_t lba,
                   int set, uint32_t *x, uint64_t *span) {
  struct cas_node **p = &im->root, *b;
  uint64_t size = s->max_blocks, i = lba % s->fanout; /* size: below *p */
  int level, err;
  for (level = CAS_LEVELS - 1;; level--) {
    if (*p && (*p)->bad) return -EIO;
    if (set && (err = cas_own(s, p, level))) return err;
    b = *p;
    if (!b || !level) break;
    size /= s->fanout;
    p = &b->kid[lba / size % s->fanout];
  }
  if (set) cas_drop(s, b->e[i], &s->dropped);
  if (set) b->e[i] = *x;
  *x = b ? b->e[i] : 0;
  if (!span) return 0;
  *span = b ? 1 : size - lba % size;
  while (b && !*x && i + *span < s->fanout && !b->e[i + *span])
    ++*span;
  return 0;
}

static const char *cas_name(const struct cas_image *im, char out[CAS_PATH]) {
  const char *up = im->parent ? (char *)im->parent->record + CAS_NAMED : "";
  snprintf(out, CAS_PATH, "%s%s%s", up, im->parent ? "@" : "",
           (const char *)im->record + CAS_NAMED);
  return out;
}

/* Its "sha256-HEX", or "". */
static char *cas_spell(const struct cas_image *im, char id[72]) {
  const unsigned char *h = im->record + CAS_CID;
  strcpy(id, u_is_zero(h, 32) ? "" : "sha256-");
  for (int i = 0; *id && i < 32; i += 8)
    snprintf(id + 7 + 2 * i, 17, "%016" PRIx64, u_get64(h + i));
  return id;
}

/* The volume or snapshot of that name, of n bytes, or content id. */
static struct cas_image *cas_find(struct nbdserve_cas *s, const char *name,
                                  size_t n) {
  char full[CAS_PATH], id[72];
  struct cas_image *im = s->images;
  for (; im; im = im->next)
    if ((strncmp(cas_name(im, full), name, n) == 0 && !full[n]) ||
        (n == 71 && strncmp(cas_spell(im, id), name, n) == 0))
      break;
  return im;
}

static int cas_is_name(const char *p) {
  size_t n = strncmp(p, "sha256-", 7) ? strlen(p) : 0;
  while (*p && u_utf8_len(p) && !strchr("/@\"\\", *p))
    p += u_utf8_len(p);
  return n > 0 && n <= CAS_NAME && !*p;
}

static int cas_give_name(struct nbdserve_cas *s, struct cas_image *im,
                         const char *name) {
  const char *at = strchr(name, '@'), *part = at ? at + 1 : name;
  if (!cas_is_name(part) || strncmp(name, "sha256-", 7) == 0 ||
      !at != !im->parent ||
      im->parent != (at ? cas_find(s, name, (size_t)(at - name)) : NULL))
    return -EINVAL;
  if (cas_find(s, name, strlen(name))) return -EEXIST;
  memset(im->record + CAS_NAMED, 0, CAS_RECORD - CAS_NAMED);
  memcpy(im->record + CAS_NAMED, part, strlen(part));
  return 0;
}

/* The arguments of nbdserve_cas_change */
struct cas_op {
  int verb;         /* NBDSERVE_CAS_CREATE..., maybe with _DRY_RUN */
  const char *name; /* what is changed or made */
  const char *to;   /* the new name, for verbs that have one, else NULL */
  uint64_t size;    /* bytes, for verbs that have a size, else 0 */
};

/* Applies a change to the catalog.  *gone: a map that nothing leads to then. */
static int cas_apply(struct nbdserve_cas *s, const struct cas_op *op,
                     struct cas_node **gone) {
  int verb = op->verb & ~NBDSERVE_CAS_DRY_RUN, dry_run = verb != op->verb;
  int is_new = verb < NBDSERVE_CAS_RENAME, err = 0;
  size_t n = strcspn(op->name, verb == NBDSERVE_CAS_SNAPSHOT ? "@" : "");
  struct cas_image *im = cas_find(s, op->name, n), *to, *kid, **p = &s->images;
  if (verb < NBDSERVE_CAS_CREATE || verb > NBDSERVE_CAS_RM ||
      cas_blocks(s, op->size) > s->max_blocks || op->size > INT64_MAX ||
      (dry_run && verb < NBDSERVE_CAS_ROLLBACK))
    return -EINVAL;
  if (!im && verb != NBDSERVE_CAS_CREATE) return -ENOENT;
  if (is_new)
    to = u_zalloc(sizeof *to);
  else if (verb == NBDSERVE_CAS_ROLLBACK)
    to = im->parent;
  else
    to = im;
  if (!to || (verb == NBDSERVE_CAS_RESIZE && im->parent))
    return is_new ? -ENOMEM : -EINVAL;
  if (verb >= NBDSERVE_CAS_ROLLBACK &&
      to->clients > (op->verb == NBDSERVE_CAS_RESIZE))
    return -EBUSY;
  for (kid = s->images; kid && verb == NBDSERVE_CAS_RM; kid = kid->next)
    if (kid->parent == im) return -ENOTEMPTY;
  if (dry_run) return 0;
  if (verb == NBDSERVE_CAS_SNAPSHOT) to->parent = im;
  if (verb <= NBDSERVE_CAS_RENAME)
    err = cas_give_name(s, to, verb < NBDSERVE_CAS_CLONE ? op->name : op->to);
  if (err && is_new) NBDSERVE_FREE(to);
  if (err || verb == NBDSERVE_CAS_RENAME) return err;
  while (*p && (is_new || *p != im))
    p = &(*p)->next;
  if (is_new) {
    u_put32(to->record + CAS_ID, s->next_id++);
    u_put32(to->record + CAS_IS_SNAPSHOT, to->parent != NULL);
    u_put32(to->record + CAS_DEPTH, CAS_LEVELS);
    u_put64(to->record + CAS_CREATED, (uint64_t)time(NULL));
    if (im) memcpy(to->record + CAS_ORIGIN, im->record + CAS_ID, 4);
    to->s = s;
    *p = to;
    s->nimages++;
  }
  if (verb == NBDSERVE_CAS_RM) {
    *p = im->next;
    *gone = im->root;
    s->nimages--;
    NBDSERVE_FREE(im);
  } else if (verb == NBDSERVE_CAS_CREATE || verb == NBDSERVE_CAS_RESIZE) {
    to->size = op->size;
  } else { /* it gets what im has */
    *gone = to->root;
    to->size = im->size;
    to->root = im->root;
    if (to->root) to->root->refs++;
  }
  return 0;
}

/* ---- Checkpoints --------------------------------------------------------- */

static uint32_t cas_take_page(struct nbdserve_cas *s, uint32_t magic, int level,
                              uint32_t index) {
  struct cas_item *it = s->pages + s->npages++;
  u_put32(it->data, magic);
  u_put32(it->data + 4, (uint32_t)level);
  u_put32(it->data + 8, index);
  it->state = CAS_DATA | CAS_DIGEST;
  it->slot = cas_alloc(s);
  CAS_AT(s, it->slot, tag) = 1; /* in no bucket: cas_work skips it */
  return it->slot;
}

/* Takes slots for pages from *at down that have none; empty ones go. */
static void cas_take_map(struct nbdserve_cas *s, struct cas_node **at,
                         int level, uint32_t index) {
  struct cas_node *b = *at;
  if (!b || b->slot) return;
  for (uint32_t i = 0; level && i < s->fanout; i++)
    cas_take_map(s, &b->kid[i], level - 1, index * s->fanout + i);
  unsigned char *p = s->pages[s->npages].data;
  for (uint32_t i = 0; i < s->fanout; i++) {
    uint32_t slot = 0;
    if (!level)
      slot = b->e[i];
    else if (b->kid[i])
      slot = b->kid[i]->slot;
    u_put32(p + CAS_HEAD + 4 * i, slot);
  }
  int empty = b->refs == 1 && u_is_zero(p, s->bs);
  s->ndirty--;
  if (!empty) b->slot = cas_take_page(s, CAS_MAP, level, index);
  if (empty) NBDSERVE_FREE(b);
  if (empty) *at = NULL;
}

static void cas_take_catalog(struct nbdserve_cas *s) {
  struct cas_image *im = s->images;
  uint32_t x, next;
  for (x = s->catalog; x; x = next) {
    next = CAS_AT(s, x, next);
    cas_drop(s, x, &s->retired);
  }
  for (s->catalog = 0; im; s->catalog = x) {
    unsigned char *p = s->pages[s->npages].data;
    for (uint32_t k = CAS_HEAD; k + CAS_RECORD <= s->bs && im; im = im->next) {
      u_put64(im->record + CAS_SIZE, im->size);
      u_put32(im->record + CAS_ROOT, im->root ? im->root->slot : 0);
      memcpy(p + k, im->record, CAS_RECORD);
      k += CAS_RECORD;
    }
    u_put32(p + 12, s->catalog);
    x = cas_take_page(s, CAS_CAT, 0, 0);
    CAS_AT(s, x, next) = s->catalog;
  }
}

/* Writes all changed pages and the catalog, with a change to it if op is not
 * NULL, so that the log up to now is not needed any more.  The error of op,
 * -ENOSPC or -ENOMEM: nothing has changed; others last. */
static int cas_checkpoint(struct nbdserve_cas *s, const struct cas_op *op) {
  struct cas_node *gone = NULL;
  os_lock(&s->ckpt);
  os_lock(&s->lock);
  if (cas_want(s, 0)) {
    os_unlock(&s->lock);
    cas_sync(s, 1); /* may give some back */
    os_lock(&s->lock);
  }
  uint32_t max = CAS_NEEDED(s);
  s->pages = u_zalloc(max * (sizeof *s->pages + s->bs));
  int err = s->pages ? cas_want(s, 0) : -ENOMEM;
  if (!err) err = cas_log_write(s);
  if (!err && op) err = cas_apply(s, op, &gone);
  if (err) goto out;
  for (uint32_t i = 0; i < max; i++)
    s->pages[i].data = (unsigned char *)(s->pages + max) + (size_t)i * s->bs;
  s->npages = 0;
  for (struct cas_image *im = s->images; im; im = im->next)
    cas_take_map(s, &im->root, CAS_LEVELS - 1, 0);
  cas_take_catalog(s);
  assert(s->npages <= max);
  uint64_t seq = s->seq;
  uint32_t retired = s->retired;
  s->retired = 0;
  u_put64(s->super + 32, u_get64(s->super + 32) + 1);
  u_put64(s->super + 40, seq);
  u_put32(s->super + 52, s->nslots);
  u_put32(s->super + 56, s->catalog);
  u_put32(s->super + 60, s->next_id);
  cas_stamp(s, s->super, CAS_SUM);
  os_unlock(&s->lock);
  for (uint32_t i = 0; i < s->npages; i++)
    cas_stamp(s, s->pages[i].data, CAS_CHECK);
  err = cas_store(s, s->pages, s->npages); /* their digests: zeroes (C11) */
  if (!err) err = cas_sync(s, 1);          /* (C7) */
  if (!err) err = cas_io(s, 1, s->super, CAS_PAGE, 0);
  if (!err) err = cas_sync(s, 1);
  if (!err) err = cas_io(s, 1, s->super, CAS_PAGE, CAS_UNIT);
  os_lock(&s->lock);
  cas_fail(s, err);
  if (!err) s->tail = seq;
  if (!err) cas_free(s, retired); /* (C6) */
  cas_unref(s, gone);
out:
  os_unlock(&s->lock);
  NBDSERVE_FREE(s->pages);
  os_unlock(&s->ckpt);
  return err;
}

/* What is to be done beside requests?  1: fill the index, 2: a checkpoint. */
static int cas_due(const struct nbdserve_cas *s) {
  if (s->failed || s->readonly || s->replaying || s->closing) return 0;
  if (s->seq - s->tail > s->log_pages / 2 || s->ndirty > CAS_DIRTY ||
      s->nwaiting > CAS_WAITING ||
      (s->nwaiting > 0 && s->nfree < CAS_NEEDED(s) + CAS_SEGMENT))
    return 2;
  return s->filled < s->to_fill;
}

static void *cas_work(void *arg) {
  unsigned char d[CAS_FILL][32];
  struct nbdserve_cas *s = arg;
  os_lock(&s->lock);
  for (int err = 0, due; !err && (due = cas_due(s));) {
    uint32_t x = s->filled;
    if (due == 1) s->filled += CAS_FILL;
    if (due == 1 && !cas_io(s, 0, d, sizeof d, cas_off(s, x, CAS_DIGEST)))
      for (uint32_t i = x ? 0 : 1; i < CAS_FILL; i++)
        if (CAS_AT(s, x + i, ref) > 0 && !(CAS_AT(s, x + i, tag) & ~CAS_GOOD) &&
            !u_is_zero(d[i], 32)) /* (C11) */
          cas_index(s, x + i, CAS_TAG(d[i]));
    os_unlock(&s->lock); /* others may want it */
    if (due == 2) err = cas_checkpoint(s, NULL);
    os_lock(&s->lock);
  }
  s->busy = 0;
  os_wake_all(&s->lock);
  os_unlock(&s->lock);
  return NULL;
}

static void cas_kick(struct nbdserve_cas *s) {
  os_lock(&s->lock);
  int start = !s->busy && cas_due(s);
  if (start) s->busy = 1;
  os_unlock(&s->lock);
  if (start && os_thread(cas_work, s)) cas_work(s);
}

/* ---- Requests ------------------------------------------------------------ */

/* Waits, without lock, for room for an entry in the log, whose last quarter is
 * for pages that are not full, and for the pages that it may dirty. */
static int cas_room(struct nbdserve_cas *s) {
  int err = 0, tried = 0;
  while (!s->failed && !s->replaying) {
    int tight = cas_want(s, CAS_SEGMENT) != 0;
    if (!tight && s->seq - s->tail < s->log_pages / 4 * 3) return 0;
    if (err || (tight && tried)) return err ? err : -ENOSPC;
    if (s->busy) {
      os_wait(&s->lock);
    } else {
      os_unlock(&s->lock);
      err = cas_checkpoint(s, NULL);
      os_lock(&s->lock);
      tried = 1;
    }
  }
  return s->failed;
}

/* Takes a slot for a block: one that may have the same data, or a new one. */
static int cas_choose(struct nbdserve_cas *s, struct cas_item *it, int hint) {
  uint32_t tag = CAS_TAG(it->sum), x = hint ? *cas_bucket(s, tag) : 0;
  while (x && ((CAS_AT(s, x, tag) & ~CAS_GOOD) != tag ||
               CAS_AT(s, x, ref) > INT32_MAX / 2))
    x = CAS_AT(s, x, next);
  int err = x ? 0 : cas_want(s, CAS_RESERVE + 1);
  it->state = x ? CAS_DUP : CAS_DATA | CAS_DIGEST;
  if (x) cas_hold(s, x);
  if (!x && !err) cas_index(s, x = cas_alloc(s), tag);
  it->slot = x;
  return err;
}

/* Stores blocks; no slots are set.  0, or an error, which is that of all that
 * fail; -EAGAIN: the map does not have what was expected. */
static int cas_put(struct nbdserve_cas *s, struct cas_image *im,
                   struct cas_item *it, size_t n) {
  unsigned char *same = NULL;
  uint32_t was = 0;
  for (size_t i = 0; i < n; i++)
    it[i].state = u_is_zero(it[i].data, s->bs) ? 0 : CAS_DATA | CAS_DIGEST;
  cas_hash(s, it, n);
  os_lock(&s->lock);
  int err = s->failed;
  for (size_t i = 0; i < n && !err; i++)
    if (it[i].state) err = cas_choose(s, it + i, 1);
  os_unlock(&s->lock);
  if (!err) err = cas_store(s, it, n);
  for (size_t i = 0; i < n && !err; i++) {
    if (it[i].state != CAS_DUP) continue; /* maybe of a block of this call */
    uint64_t off = cas_off(s, it[i].slot, CAS_DATA);
    if (!same && !(same = NBDSERVE_MALLOC(s->bs))) err = -ENOMEM;
    if (err || (!cas_io(s, 0, same, s->bs, off) &&
                memcmp(same, it[i].data, s->bs) == 0))
      continue;
    os_lock(&s->lock); /* it is not: take another one (C12) */
    cas_drop(s, it[i].slot, &s->dropped);
    err = cas_choose(s, it + i, 0);
    os_unlock(&s->lock);
    if (!err) err = cas_store(s, it + i, 1);
  }
  NBDSERVE_FREE(same);
  os_lock(&s->lock);
  for (size_t i = 0; i < n; i++) { /* into the map and the log (C2) */
    if (!err) err = cas_room(s);
    if (!err) err = cas_map(s, im, it[i].lba, 0, &was, NULL);
    if (!err && it[i].expect != CAS_ANY && it[i].expect != was) err = -EAGAIN;
    if (!err && it[i].state & CAS_DATA) CAS_AT(s, it[i].slot, tag) |= CAS_GOOD;
    if (!err && it[i].slot != was &&
        !(err = cas_map(s, im, it[i].lba, 1, &it[i].slot, NULL))) {
      cas_log(s, im, it + i, 1);
      it[i].slot = 0; /* it is the map's */
      err = s->failed;
    }
    cas_drop(s, it[i].slot, &s->dropped);
    it[i].err = err;
  }
  os_unlock(&s->lock);
  return err;
}

/* Pins the slots of blocks and reads what is wanted, CAS_DATA, CAS_DIGEST or 0,
 * of them, and both of those that are not known to be good, which are checked:
 * for data only if s->verify.  0 or the last of their errors. */
static int cas_read(struct nbdserve_cas *s, struct cas_image *im,
                    struct cas_item *it, size_t n, int want) {
  int err = 0, trust = want == CAS_DATA && !s->verify;
  os_lock(&s->lock);
  for (size_t i = 0; i < n; i++) {
    it[i].slot = 0;
    it[i].err = cas_map(s, im, it[i].lba, 0, &it[i].slot, NULL);
    int good = CAS_AT(s, it[i].slot, tag) & CAS_GOOD && !s->failed;
    if (!it[i].slot)
      it[i].state = 0;
    else if (good || trust)
      it[i].state = want;
    else
      it[i].state = CAS_DATA | CAS_DIGEST;
    cas_hold(s, it[i].slot);
  }
  os_unlock(&s->lock);
  cas_transfer(s, it, n, CAS_DATA, 0);
  cas_transfer(s, it, n, CAS_DIGEST, 0);
  cas_hash(s, it, n);
  for (size_t i = 0; i < n; i++) {
    if (!it[i].slot && want == CAS_DATA) memset(it[i].data, 0, s->bs);
    if (it[i].state == (CAS_DATA | CAS_DIGEST) && !it[i].err &&
        memcmp(it[i].digest, it[i].sum, 32) != 0)
      it[i].err = -EIO;
    if (it[i].err) err = it[i].err;
  }
  return err;
}

/* Takes the pins away again.  What is bad is not used again: writing heals. */
static void cas_unpin(struct nbdserve_cas *s, struct cas_item *it, size_t n) {
  os_lock(&s->lock);
  for (; n-- > 0; it++) {
    if (it->slot && it->err) cas_unindex(s, it->slot);
    if (it->state & CAS_DIGEST && !it->err)
      CAS_AT(s, it->slot, tag) |= CAS_GOOD;
    cas_drop(s, it->slot, &s->dropped);
  }
  os_unlock(&s->lock);
}

/* READs, WRITEs or WRITE_ZEROES a part of one block. */
static int cas_part(struct nbdserve_cas *s, struct cas_image *im, int what,
                    unsigned char *buf, uint64_t off, uint64_t len) {
  struct cas_item it = {.lba = off / s->bs, .data = NBDSERVE_MALLOC(s->bs)};
  if (!it.data) return -ENOMEM;
  unsigned char *part = it.data + off % s->bs;
  int err;
  do {
    err = cas_read(s, im, &it, 1, CAS_DATA);
    if (!err && what == NBD_CMD_READ) memcpy(buf, part, (size_t)len);
    if (!err && what != NBD_CMD_READ) {
      if (what == NBD_CMD_WRITE) memcpy(part, buf, (size_t)len);
      if (what != NBD_CMD_WRITE) memset(part, 0, (size_t)len);
      struct cas_item w = {.lba = it.lba, .data = it.data, .expect = it.slot};
      err = cas_put(s, im, &w, 1); /* that is pinned: no other can become it */
    }
    cas_unpin(s, &it, 1);
  } while (err == -EAGAIN);
  NBDSERVE_FREE(it.data);
  return err;
}

/* Is block lba of two images in the same slot?  *span: for how many blocks that
 * is so; pages that they share are not looked at.  Where only one ends inside
 * the block, it is not the same. */
static int cas_same(struct nbdserve_cas *s, struct cas_image **im, uint64_t lba,
                    uint64_t *span, int *same) {
  struct cas_node *b[2];
  uint32_t slot[2] = {0, 0};
  uint64_t below = s->max_blocks; /* blocks below b */
  int err = 0, odd = 0;
  *span = below;
  os_lock(&s->lock);
  for (int i = 0; i < 2; i++) {
    uint64_t whole = im[i]->size / s->bs;
    b[i] = lba < cas_blocks(s, im[i]->size) ? im[i]->root : NULL;
    if (lba < whole) *span = u_min(*span, whole - lba);
    odd |= lba == whole && b[i] && im[0]->size != im[1]->size;
  }
  for (int level = CAS_LEVELS; level-- > 0 && (odd || b[0] != b[1]);) {
    below /= s->fanout;
    for (int i = 0; i < 2; i++) {
      uint64_t c = lba / below % s->fanout;
      if (b[i] && b[i]->bad) err = -EIO;
      if (b[i] && !level) slot[i] = b[i]->e[c];
      b[i] = b[i] && level ? b[i]->kid[c] : NULL;
    }
  }
  os_unlock(&s->lock);
  *span = u_min(*span, below - lba % below);
  *same = slot[0] == slot[1] && !(odd && slot[0]);
  return err;
}

/* READs and WRITEs: whole blocks together, parts of blocks one by one. */
static void cas_batch(void *ctx, struct nbdserve_req *r, size_t n) {
  struct cas_image *im = ctx;
  struct nbdserve_cas *s = im->s;
  struct cas_item it[CAS_BATCH];
  uint64_t bs = s->bs, len;
  size_t k = 0;
  for (; n > 0; r++, n--) {
    int writing = r->type == NBD_CMD_WRITE, err = r->err = 0;
    for (uint64_t at = 0; at < r->len; at += len) { /* in the request */
      len = u_min(bs - (r->off + at) % bs, r->len - at);
      if (len == bs)
        it[k++] = (struct cas_item){.lba = (r->off + at) / bs,
                                    .req = r,
                                    .data = r->buf + at,
                                    .expect = CAS_ANY};
      else if ((err = cas_part(s, im, r->type, r->buf + at, r->off + at, len)))
        r->err = err;
      if (k < CAS_BATCH &&
          (at + len < r->len || (n > 1 && r->type == r[1].type)))
        continue;
      if (writing) cas_put(s, im, it, k);
      if (writing) cas_kick(s);
      if (!writing) cas_read(s, im, it, k, CAS_DATA);
      if (!writing) cas_unpin(s, it, k);
      for (; k > 0; k--)
        if (it[k - 1].err) it[k - 1].req->err = it[k - 1].err;
    }
  }
}

/* Makes the whole blocks of a range holes: one log entry for many leaves. */
static int cas_trim(void *ctx, uint64_t off, uint64_t len, uint32_t flags) {
  (void)flags;
  struct cas_image *im = ctx;
  struct nbdserve_cas *s = im->s;
  uint64_t from = cas_blocks(s, off), to = (off + len) / s->bs, span;
  uint32_t x;
  int err = 0;
  while (from < to && !err) {
    struct cas_item hole = {.lba = from};
    int k = 0, changed = 0;
    os_lock(&s->lock);
    err = cas_room(s);
    while (k < CAS_SEGMENT / CAS_LEVELS && from < to && !err) {
      err = cas_map(s, im, from, 0, &x, &span);
      if (!err && x) err = cas_map(s, im, from, 1, &hole.slot, NULL);
      if (err) break;
      if (x) changed = 1;
      from += u_min(span, to - from);
      if (from % s->fanout == 0) k++;
    }
    if (changed) cas_log(s, im, &hole, from - hole.lba);
    if (!err) err = s->failed;
    os_unlock(&s->lock);
  }
  cas_kick(s);
  return err;
}

static int cas_zero(void *ctx, uint64_t off, uint64_t len, uint32_t flags) {
  struct cas_image *im = ctx;
  uint64_t bs = im->s->bs, tail = (off + len) % bs;
  uint64_t head = u_min((bs - off % bs) % bs, len);
  int zero = NBD_CMD_WRITE_ZEROES, err = 0;
  if (head) err = cas_part(im->s, im, zero, NULL, off, head);
  if (!err) err = cas_trim(ctx, off, len, flags);
  if (err || !tail || tail > len - head) return err;
  return cas_part(im->s, im, zero, NULL, off + len - tail, tail);
}

static int cas_extents(void *ctx, uint64_t off, uint64_t len, uint32_t flags,
                       struct nbdserve_extents *out) {
  (void)flags;
  struct cas_image *im = ctx;
  uint64_t bs = im->s->bs, end = off + len, span;
  uint32_t slot, hole = NBDSERVE_EXTENT_HOLE | NBDSERVE_EXTENT_ZERO;
  int err = 0, enough = 0;
  os_lock(&im->s->lock);
  while (off < end && !enough) {
    err = cas_map(im->s, im, off / bs, 0, &slot, &span);
    if (err) break;
    uint64_t next = u_min((off / bs + span) * bs, end);
    enough = nbdserve_extent(out, next - off, slot ? 0 : hole);
    off = next;
  }
  os_unlock(&im->s->lock);
  return err;
}

static int cas_flush(void *ctx, uint32_t flags) {
  (void)flags;
  struct cas_image *im = ctx;
  return cas_sync(im->s, 0);
}

static void cas_close(void *ctx) {
  struct cas_image *im = ctx;
  os_lock(&im->s->lock);
  im->clients--;
  os_unlock(&im->s->lock);
}

/* ---- Opening ------------------------------------------------------------- */

/* A superblock's number; or -EINVAL: it is none, -EUCLEAN: damaged, others. */
static int64_t cas_get_super(struct nbdserve_cas *s, uint64_t off,
                             unsigned char *p) {
  int err = off + CAS_PAGE > s->end ? -EINVAL : cas_io(s, 0, p, CAS_PAGE, off);
  if (err || memcmp(p, CAS_MAGIC, 8) != 0) return err ? err : -EINVAL;
  if (!cas_stamp(s, p, CAS_SUM)) return -EUCLEAN;
  if (u_get32(p + 8) != 1 || u_get32(p + 64) ||
      (u_get32(p + 68) && !s->readonly))
    return -EOPNOTSUPP;
  return (int64_t)(u_get64(p + 32) & INT64_MAX);
}

static int cas_place(struct nbdserve_cas *s) {
  uint64_t end = 2 * CAS_UNIT + (uint64_t)s->log_pages * CAS_PAGE;
  if (!u_is_power_of_2(s->bs) || s->bs < CAS_MIN_BLOCK || s->bs > 65536 ||
      s->log_pages < 8 || s->log_pages > 1 << 24)
    return -EINVAL;
  s->data_off = (end + CAS_UNIT - 1) / CAS_UNIT * CAS_UNIT;
  s->fanout = CAS_FANOUT(s->bs);
  s->max_blocks = (uint64_t)s->fanout * s->fanout * s->fanout * s->fanout;
  return 0;
}

/* Takes what the newest superblock says, and makes both alike (C8). */
static int cas_open_super(struct nbdserve_cas *s) {
  unsigned char copy[2][CAS_PAGE];
  int64_t a = cas_get_super(s, 0, copy[0]);
  int64_t b = cas_get_super(s, CAS_UNIT, copy[1]);
  if (a < 0 && a != -EUCLEAN && (a != -EINVAL || b <= 0)) return (int)a;
  if (b == -EIO || (a < 0 && b < 0)) return -EIO; /* one may be damaged only */
  unsigned char *p = memcpy(s->super, copy[b > a], CAS_PAGE);
  s->bs = u_get32(p + 12);
  s->seq = s->tail = s->durable = u_get64(p + 40);
  s->log_pages = u_get32(p + 48);
  s->to_fill = u_get32(p + 52);
  s->next_id = u_get32(p + 60);
  if (cas_place(s) || s->to_fill < CAS_SEGMENT) return -EIO;
  if (a == b || s->readonly) return 0;
  int err = os_datasync(s->fd); /* what was read may be only in memory */
  if (!err) err = cas_io(s, 1, p, CAS_PAGE, b > a ? 0 : CAS_UNIT);
  return err ? err : os_datasync(s->fd);
}

/* Puts the page in slot x and all that hangs on it into memory, and counts
 * references.  While that goes on tag and next of a page say where it is. */
static int cas_load(struct nbdserve_cas *s, uint32_t x, int level,
                    uint32_t index, struct cas_node **out) {
  struct cas_node *b;
  int err = 0;
  if (!x) return 0;
  if (x >= s->nslots) return -EIO;
  if (CAS_AT(s, x, ref)) {
    b = (struct cas_node *)((uintptr_t)CAS_AT(s, x, tag) |
                            (uintptr_t)CAS_AT(s, x, next) << 16 << 16);
    if (!b || b->level != level) return -EIO;
    b->refs++;
    *out = b;
    return 0;
  }
  if (cas_own(s, out, level)) return -ENOMEM;
  b = *out;
  s->ndirty--;
  cas_hold(s, b->slot = x);
  CAS_AT(s, x, tag) = (uint32_t)(uintptr_t)b;
  CAS_AT(s, x, next) = (uint32_t)((uintptr_t)b >> 16 >> 16);
  unsigned char *page = NBDSERVE_MALLOC(s->bs);
  if (!page) return -ENOMEM;
  if (cas_get_page(s, x, CAS_MAP, level, index, page)) s->damaged = b->bad = 1;
  for (uint32_t c = 0; c < s->fanout && !b->bad && !err; c++) {
    uint32_t v = u_get32(page + CAS_HEAD + 4 * c);
    if (level)
      err = cas_load(s, v, level - 1, index * s->fanout + c, b->kid + c);
    else if (v >= s->nslots)
      err = -EIO;
    else
      cas_hold(s, b->e[c] = v);
  }
  NBDSERVE_FREE(page);
  return err;
}

static int cas_open_catalog(struct nbdserve_cas *s) {
  struct cas_image *im, *p;
  int err = 0;
  for (uint32_t x = u_get32(s->super + 56), k; x; x = u_get32(s->page + 12)) {
    err = cas_get_page(s, x, CAS_CAT, 0, 0, s->page);
    if (err || CAS_AT(s, x, ref)) return err ? err : -EIO; /* a loop */
    cas_hold(s, x); /* until there is a new one */
    cas_drop(s, x, &s->retired);
    for (k = (s->bs - CAS_HEAD) / CAS_RECORD; k-- > 0;) { /* last first */
      const unsigned char *record = s->page + CAS_HEAD + k * CAS_RECORD;
      if (!u_get32(record)) continue;
      im = u_zalloc(sizeof *im);
      if (!im) return -ENOMEM;
      memcpy(im->record, record, CAS_RECORD);
      im->record[CAS_RECORD - 1] = 0; /* a name ends */
      im->s = s;
      im->size = u_get64(im->record + CAS_SIZE);
      im->next = s->images;
      s->images = im;
      s->nimages++;
    }
  }
  for (im = s->images; im && !err; im = im->next) {
    for (p = s->images; p && u_get32(im->record + CAS_IS_SNAPSHOT); p = p->next)
      if (memcmp(p->record + CAS_ID, im->record + CAS_ORIGIN, 4) == 0)
        im->parent = p;
    if (!cas_is_name((char *)im->record + CAS_NAMED) ||
        cas_blocks(s, im->size) > s->max_blocks)
      err = -EIO;
    else if (u_get32(im->record + CAS_DEPTH) != CAS_LEVELS)
      err = -EOPNOTSUPP;
    else
      err = cas_load(s, u_get32(im->record + CAS_ROOT), CAS_LEVELS - 1, 0,
                     &im->root);
  }
  for (uint32_t x = 1; x < s->nslots; x++) {
    CAS_AT(s, x, tag) = CAS_AT(s, x, tag) || CAS_AT(s, x, next); /* a page */
    CAS_AT(s, x, next) = 0;
    if (s->damaged && !CAS_AT(s, x, ref)) cas_hold(s, x); /* who knows */
  }
  return err;
}

static int cas_log_read(struct nbdserve_cas *s, uint64_t seq) {
  uint64_t off = 2 * CAS_UNIT + seq % s->log_pages * CAS_PAGE;
  if (off + CAS_PAGE > s->end) return 0; /* not written so far */
  int err = cas_io(s, 0, s->log, CAS_PAGE, off);
  if (err) s->log_damaged = 1;
  return !err && u_get32(s->log) == CAS_LOG &&
         u_get16(s->log + 4) <= CAS_ENTRIES && u_get64(s->log + 8) == seq &&
         !memcmp(s->log + 24, s->super + 16, 8) &&
         cas_stamp(s, s->log, CAS_SUM);
}

static int cas_redo(struct nbdserve_cas *s, const unsigned char *p, int known) {
  struct cas_item it = {.lba = u_get64(p + 8),
                        .slot = u_get32(p + 4),
                        .data = s->page,
                        .state = known ? CAS_DIGEST : CAS_DATA | CAS_DIGEST};
  struct cas_image *im = s->images;
  while (im && memcmp(im->record + CAS_ID, p, 4) != 0)
    im = im->next;
  uint64_t blocks = im ? cas_blocks(s, im->size) : 0;
  if (it.lba >= blocks) return 0;
  if (!it.slot)
    return cas_trim(im, it.lba * s->bs,
                    u_min(blocks - it.lba, u_get64(p + 16)) * s->bs, 0);
  if (!known) { /* (C9) */
    if (cas_off(s, it.slot, CAS_DATA) + s->bs > s->end) return 0;
    if (cas_transfer(s, &it, 1, CAS_DATA, 0)) return it.err;
    cas_hash(s, &it, 1);
    if (memcmp(it.sum, p + 16, 32) != 0) return 0;
  }
  memcpy(it.sum, p + 16, 32);
  int err = cas_extend(s, it.slot);
  /* data, too: if that has failed it may be in memory only */
  if (!err && !s->readonly) err = cas_store(s, &it, 1);
  if (err) return err;
  cas_hold(s, it.slot);
  if (!known) CAS_AT(s, it.slot, tag) |= CAS_GOOD;
  return cas_map(s, im, it.lba, 1, &it.slot, NULL);
}

/* Brings the maps up to what the log says (C9). */
static int cas_replay(struct nbdserve_cas *s) {
  uint64_t end = s->tail;
  int err = 0;
  for (; end - s->tail < s->log_pages && cas_log_read(s, end); end++)
    s->durable = u_get64(s->log + 16);
  for (uint32_t i = 1; i < s->log_pages; i++)
    s->log_damaged |= cas_log_read(s, end + i) && u_get64(s->log + 16) > end;
  if (s->log_damaged && !s->readonly) return -EIO;
  for (uint64_t seq = s->tail; seq < end && !err; seq++) {
    if (!cas_log_read(s, seq)) return -EIO;
    for (unsigned i = 0; i < u_get16(s->log + 4) && !err; i++)
      if ((err = cas_redo(s, s->log + 32 + CAS_ENTRY * i, seq < s->durable)) ==
              -EIO &&
          s->damaged && s->readonly)
        err = 0; /* it is below a page that cannot be read */
  }
  s->seq = s->tail = s->durable = end + s->log_pages; /* (C10) */
  return err;
}

static void cas_destroy(struct nbdserve_cas *s) {
  os_lock(&s->lock);
  for (struct cas_image *im; (im = s->images);) {
    s->images = im->next;
    cas_unref(s, im->root);
    NBDSERVE_FREE(im);
  }
  os_unlock(&s->lock);
  while (s->ngroups > 0)
    NBDSERVE_FREE(s->groups[--s->ngroups]);
  os_monitor_free(&s->ckpt);
  os_monitor_free(&s->lock);
  if (s->fd >= 0) close(s->fd);
  NBDSERVE_FREE(s);
}

static struct nbdserve_cas *cas_new(const struct nbdserve_cas_options *o) {
  struct nbdserve_cas *s = u_zalloc(sizeof *s);
  uint32_t flags = o ? o->flags : 0;
  if (!s) return NULL;
  s->fd = -1;
  s->readonly = (flags & NBDSERVE_CAS_READONLY) != 0;
  s->hw = os_has_hwsha();
  s->verify = flags & NBDSERVE_CAS_VERIFY ||
              (s->hw && !(flags & NBDSERVE_CAS_NO_VERIFY));
  if (!os_monitor_init(&s->ckpt) && !os_monitor_init(&s->lock)) return s;
  cas_destroy(s);
  return NULL;
}

static int cas_open_file(struct nbdserve_cas *s, const char *path, int flags) {
  struct stat st;
  s->fd = open(path, flags | O_CLOEXEC | O_NOCTTY | O_NONBLOCK, 0666);
  if (s->fd < 0 || fstat(s->fd, &st) < 0) return -errno;
  s->is_device = S_ISBLK(st.st_mode);
  s->end = (uint64_t)lseek(s->fd, 0, SEEK_END);
  return os_lock_file(s->fd, s->readonly);
}

int nbdserve_cas_open(const char *path, const struct nbdserve_cas_options *o,
                      struct nbdserve_cas **out) {
  struct nbdserve_cas *s = cas_new(o);
  if (!s) return -ENOMEM;
  int err = cas_open_file(s, path, s->readonly ? O_RDONLY : O_RDWR);
  if (!err) err = cas_open_super(s);
  if (!err) err = cas_extend(s, s->to_fill - 1);
  s->replaying = 1;
  if (!err) err = cas_open_catalog(s);
  if (!err) err = cas_replay(s);
  s->replaying = 0;
  for (uint32_t x = 1; x < s->nslots && !err; x++) {
    if (CAS_AT(s, x, ref) != CAS_FREED) continue;
    CAS_AT(s, x, ref) = 1;
    cas_drop(s, x, &s->retired);
  }
  if (!err && !s->readonly) err = cas_checkpoint(s, NULL);
  s->to_fill = s->nslots;
  if (!err) cas_kick(s);
  if (err) cas_destroy(s);
  if (!err) *out = s;
  return err;
}

int nbdserve_cas_close(struct nbdserve_cas *s) {
  os_lock(&s->lock);
  s->closing = 1;
  while (s->busy)
    os_wait(&s->lock);
  int err = s->failed;
  os_unlock(&s->lock);
  if (!err && !s->readonly && (s->nlogged > s->nsynced || s->seq > s->tail))
    err = cas_checkpoint(s, NULL);
  cas_destroy(s);
  return err;
}

int nbdserve_cas_init(const char *path, const struct nbdserve_cas_options *o) {
  struct nbdserve_cas *s = cas_new(o);
  if (!s) return -ENOMEM;
  s->bs = o && o->block_size ? o->block_size : CAS_MIN_BLOCK;
  s->log_pages = o && o->log_pages ? o->log_pages : 4096;
  s->seq = s->next_id = 1;
  int err = cas_place(s);
  if (!err) err = cas_open_file(s, path, O_RDWR | O_CREAT | O_EXCL);
  int is_new = s->fd >= 0;
  if (err == -EEXIST && !cas_open_file(s, path, O_RDWR) && s->is_device &&
      !cas_io(s, 0, s->super, CAS_PAGE, 0) && u_is_zero(s->super, CAS_PAGE))
    err = 0; /* an unused block device will do */
  struct timespec t;
  clock_gettime(CLOCK_REALTIME, &t); /* for an id that no other store has */
  memcpy(s->super, CAS_MAGIC, 8);
  u_put32(s->super + 8, 1);
  u_put32(s->super + 12, s->bs);
  u_put64(s->super + 16, (uint64_t)t.tv_sec << 30 ^ (uint64_t)t.tv_nsec);
  u_put64(s->super + 24, (uint64_t)getpid() << 32 ^ (uint64_t)(uintptr_t)s);
  u_put32(s->super + 48, s->log_pages);
  if (!err) err = cas_checkpoint(s, NULL); /* of nothing at all */
  if (!err) err = os_sync_new_file(s->fd, path);
  if (err && is_new) unlink(path);
  cas_destroy(s);
  return err;
}

/* ---- The public calls ---------------------------------------------------- */

static const struct nbdserve_ops cas_ops = {
    .read = ex_batched_read,
    .write = ex_batched_write,
    .flush = cas_flush,
    .trim = cas_trim,
    .zero = cas_zero,
    .extents = cas_extents,
    .close = cas_close,
    .run_batch = cas_batch,
};

int nbdserve_cas_volume(struct nbdserve_cas *s, const char *name,
                        struct nbdserve_export *out) {
  os_lock(&s->ckpt); /* one that is under way may be changing what it is */
  os_lock(&s->lock);
  struct cas_image *im = cas_find(s, name, strlen(name));
  int err = s->failed;
  if (!err && !im) err = -ENOENT;
  if (!err) {
    if (!im->own.run_batch)
      im->own.run_batch = cas_batch; /* others may be using it */
    im->clients++;
    out->size = im->size;
    out->preferred_block = s->bs;
    out->flags |= NBDSERVE_EXPORT_MULTI_CONN;
    if (im->parent || s->readonly) out->flags |= NBDSERVE_EXPORT_READONLY;
    out->ops = &cas_ops;
    out->ctx = im;
  }
  os_unlock(&s->lock);
  os_unlock(&s->ckpt);
  return err;
}

/* Zeroes what is behind the end of a volume: that is of no account while it is
 * there, but has to be zero when it grows, and takes space after it shrank; and
 * in a snapshot it would count for the id. */
static int cas_clear_tail(struct cas_image *im) {
  uint64_t bs = im->s->bs, end = u_min(im->s->max_blocks, INT64_MAX / bs) * bs;
  return im->size < end ? cas_zero(im, im->size, end - im->size, 0) : 0;
}

int nbdserve_cas_change(struct nbdserve_cas *s, int verb, const char *name,
                        const char *to, uint64_t size) {
  struct cas_op op = {verb, name, to, size};
  struct nbdserve_export e = {0}; /* open: no other one may resize it */
  char part[CAS_PATH];
  int resize = verb == NBDSERVE_CAS_RESIZE, err = s->readonly ? -EROFS : 0;
  os_lock(&s->lock); /* what is to be written now may be there already */
  while (verb == NBDSERVE_CAS_CREATE && s->busy)
    os_wait(&s->lock);
  os_unlock(&s->lock);
  snprintf(part, sizeof part, "%.*s", (int)strcspn(name, "@"), name);
  if (!err && (resize || verb == NBDSERVE_CAS_SNAPSHOT))
    err = nbdserve_cas_volume(s, part, &e);
  if (!err && e.ctx) err = cas_clear_tail(e.ctx);
  if (!err) err = cas_checkpoint(s, &op);
  if (!err && resize) cas_clear_tail(e.ctx);
  if (e.ctx) cas_close(e.ctx);
  return err;
}

int nbdserve_cas_list(struct nbdserve_cas *s, nbdserve_list_fn *each,
                      void *arg) {
  char name[CAS_PATH], id[72];
  int r = 0;
  os_lock(&s->lock);
  for (struct cas_image *im = s->images; im && !r; im = im->next) {
    struct nbdserve_cas_info info = {cas_name(im, name),
                                     im->size,
                                     u_get64(im->record + CAS_CREATED),
                                     (uint32_t)im->clients,
                                     im->parent != NULL,
                                     cas_spell(im, id)};
    im->clients++; /* it stays in the list */
    os_unlock(&s->lock);
    r = each(arg, &info);
    os_lock(&s->lock);
    im->clients--;
  }
  os_unlock(&s->lock);
  return r;
}

int nbdserve_cas_seal(struct nbdserve_cas *s, const char *name, char id[72],
                      nbdserve_progress_fn *progress, void *arg) {
  unsigned char run[32 + 32 * CAS_BATCH], *data; /* see the format of an id */
  struct cas_item it[CAS_BATCH];
  struct nbdserve_export e = {0};
  int err = nbdserve_cas_volume(s, name, &e);
  *id = 0;
  if (err) return err;
  struct cas_image *im = e.ctx;
  os_lock(&s->lock);
  int sealed = *cas_spell(im, id) != 0;
  os_unlock(&s->lock);
  uint64_t blocks = sealed ? 0 : cas_blocks(s, im->size);
  if (!im->parent) err = -EINVAL;
  if (!err && !sealed && s->readonly) err = -EROFS;
  if (!(data = NBDSERVE_MALLOC(CAS_BATCH * s->bs))) err = -ENOMEM;
  memcpy(run, "nbdserve-cid-1", 14);
  u_put32(run + 14, s->bs);
  u_put64(run + 18, im->size);
  sha_256(s->hw, run, NULL, 26, run, NULL);
  for (uint64_t lba = 0; lba < blocks && !err; lba += CAS_BATCH) {
    size_t n = (size_t)u_min(blocks - lba, CAS_BATCH), i;
    for (i = 0; i < n; i++)
      it[i] = (struct cas_item){.lba = lba + i, .data = data + i * s->bs};
    err = progress && progress(arg, lba * s->bs, im->size)
              ? -ECANCELED
              : cas_read(s, im, it, n, CAS_DIGEST);
    cas_unpin(s, it, n);
    memset(run + 32, 0, sizeof run - 32);
    for (i = 0; i < n; i++)
      memcpy(run + 32 + 32 * i, it[i].digest, 32);
    sha_256(s->hw, run, NULL, sizeof run, run, NULL);
  }
  NBDSERVE_FREE(data);
  if (!err && !sealed) {
    os_lock(&s->lock);
    memcpy(im->record + CAS_CID, run, 32); /* and it stays true if this fails */
    os_unlock(&s->lock);
    err = cas_checkpoint(s, NULL);
  }
  if (!err) cas_spell(im, id); /* from now on it is fixed */
  if (err) *id = 0;
  cas_close(im);
  return err;
}

int nbdserve_cas_diff(struct nbdserve_cas *s, const char *a, const char *b,
                      nbdserve_range_fn *each, void *arg) {
  struct nbdserve_export e = {0}, f = {0};
  int err = nbdserve_cas_volume(s, a, &e), same;
  if (err) return err;
  err = nbdserve_cas_volume(s, b, &f);
  struct cas_image *im[2] = {e.ctx, f.ctx};
  uint64_t size = e.size > f.size ? e.size : f.size, from = 0, lba = 0, span;
  for (; lba < cas_blocks(s, size) && !err; lba += span) {
    err = cas_same(s, im, lba, &span, &same);
    if (err || !same) continue;
    if (from < lba) err = each(arg, from * s->bs, (lba - from) * s->bs);
    from = lba + span;
  }
  if (!err && from < lba) err = each(arg, from * s->bs, size - from * s->bs);
  if (f.ctx) cas_close(f.ctx);
  cas_close(e.ctx);
  return err;
}

void nbdserve_cas_stat(struct nbdserve_cas *s, struct nbdserve_cas_stat *out) {
  os_lock(&s->lock);
  *out = (struct nbdserve_cas_stat){
      .block_size = s->bs,
      .free = (uint64_t)s->nfree * s->bs,
      .stored = (uint64_t)(s->nslots - s->nfree - s->nwaiting - 1) * s->bs,
      .file = (uint64_t)lseek(s->fd, 0, SEEK_END),
      .log = (s->seq - s->tail) * 100 / s->log_pages};
  os_unlock(&s->lock);
}

int nbdserve_cas_verify(struct nbdserve_cas *s, nbdserve_damage_fn *each,
                        nbdserve_progress_fn *progress, void *arg) {
  unsigned char *data = NBDSERVE_MALLOC(CAS_BATCH * s->bs);
  int found = s->log_damaged, stop = 0;
  struct cas_item it[CAS_BATCH];
  uint64_t done = 0, total = 0;
  char name[CAS_PATH];
  struct cas_image *im;
  if (!data) return -ENOMEM;
  if (found) each(arg, "", 0, 0, "the log is damaged");
  os_lock(&s->ckpt);
  for (unsigned i = 0; i < 2; i++) {
    if (cas_get_super(s, i * CAS_UNIT, data) >= 0) continue;
    each(arg, "", 0, 0,
         i ? "the second superblock is damaged"
           : "the first superblock is damaged");
    found = 1;
  }
  os_lock(&s->lock); /* read-only: what is in memory has been checked */
  for (uint32_t x = 1; x < s->nslots && !s->readonly; x++) {
    if (CAS_AT(s, x, tag) != 1) continue; /* cas_take_page */
    os_unlock(&s->lock);
    int bad = cas_io(s, 0, data, s->bs, cas_off(s, x, CAS_DATA)) ||
              !cas_stamp(s, data, CAS_CHECK);
    if (bad) each(arg, "", 0, 0, "a page of a map or the catalog is damaged");
    found |= bad;
    os_lock(&s->lock);
  }
  os_unlock(&s->ckpt);
  for (uint32_t x = 0; x < s->nslots && !s->readonly; x++)
    CAS_AT(s, x, tag) &= ~CAS_GOOD;
  for (im = s->images; im; im = im->next)
    total += im->size;
  for (im = s->images; im && !stop; im = im->next) {
    im->clients++; /* it stays in the list */
    cas_name(im, name);
    os_unlock(&s->lock);
    const char *why = NULL;
    uint64_t blocks = cas_blocks(s, im->size), from = 0;
    for (uint64_t lba = 0, n; lba < blocks && !stop; lba += n) {
      n = u_min(blocks - lba, CAS_BATCH);
      stop = progress && progress(arg, done += n * s->bs, total);
      for (size_t i = 0; i < n; i++)
        it[i] = (struct cas_item){.lba = lba + i, .data = data + i * s->bs};
      if (cas_read(s, im, it, (size_t)n, 0)) found = 1;
      for (size_t i = 0; i < n; i++) {
        const char *next = !it[i].err   ? NULL
                           : it[i].slot ? "the data is not what it was"
                                        : "the map cannot be read";
        if (next == why) continue;
        if (why) each(arg, name, from, (lba + i) * s->bs - from, why);
        from = (lba + i) * s->bs;
        why = next;
      }
      cas_unpin(s, it, (size_t)n);
    }
    if (why && !stop) each(arg, name, from, im->size - from, why);
    os_lock(&s->lock);
    im->clients--;
  }
  os_unlock(&s->lock);
  NBDSERVE_FREE(data);
  return stop ? -ECANCELED : found ? -EUCLEAN : 0;
}

int nbdserve_cas_gc(struct nbdserve_cas *s, uint64_t *bytes,
                    nbdserve_progress_fn *progress, void *arg) {
  int err = s->readonly ? -EROFS : cas_checkpoint(s, NULL);
  if (!err && s->damaged) err = -EUCLEAN; /* who knows what is free */
  os_lock(&s->lock);
  uint32_t nslots = s->nslots;
  *bytes = (uint64_t)s->nfree * s->bs;
  os_unlock(&s->lock);
  for (uint32_t x = 0; !err && x < nslots; x += CAS_SEGMENT) {
    os_lock(&s->lock); /* what is free stays so meanwhile */
    for (uint32_t i = x, n; i < x + CAS_SEGMENT && !err; i += n + 1) {
      for (n = 0; i + n < x + CAS_SEGMENT && !CAS_AT(s, i + n, ref);)
        n++;
      if (n)
        err = os_fallocate(s->fd, OS_PUNCH_HOLE, cas_off(s, i, CAS_DATA),
                           (uint64_t)n * s->bs);
    }
    os_unlock(&s->lock);
    if (!err && progress && progress(arg, x, nslots)) err = -ECANCELED;
  }
  return err;
}

#endif /* !NBDSERVE_NO_CAS */

/* ==== [12] SERVER (srv_) =================================================
 * Listeners, clients and the public calls.
 *
 * (S1) A client is on s->conns while it is there, so that srv_finish finds it.
 * (S2) The last thing a client's thread does with s is to leave that list.
 * (S3) Stopping: no more clients; those that are there get no further requests,
 *      but what they have sent is done and answered, for IO_GRACE_MS at most
 *      where they do not read; then all exports are flushed. */
enum {
  SRV_BACKLOG = 128,
  SRV_PAUSE_MS = 100,
  SRV_WAKE = 'w',
  SRV_ELSE = '-'
};

union srv_address {
  struct sockaddr sa;
  struct sockaddr_un un;
  struct sockaddr_in in;   /* its port lies where that of... */
  struct sockaddr_in6 in6; /* ...this one does, on every system */
};

const char *nbdserve_version(void) {
  return NBDSERVE_VERSION;
}

int nbdserve_new(struct nbdserve **out, const struct nbdserve_config *config) {
  struct nbdserve_config k = {.version = NBDSERVE_VERSION_NUMBER};
  *out = NULL;
  if (config && config->version / 100 != NBDSERVE_VERSION_NUMBER / 100)
    return -EINVAL; /* the rest of *config may not even be there */
  if (config) k = *config;
  if (!k.threads) k.threads = 16;
  if (!k.max_conn) k.max_conn = 128;
  if (NBDSERVE_NO_THREADS) k.max_conn = k.threads = 1;
  if (!k.handshake_ms) k.handshake_ms = 10000;
  if (!k.stall_ms) k.stall_ms = 120000;
  k.without |= (k.without & NBD_FLAG_SEND_WRITE_ZEROES) << 5 | /* FAST_ZERO */
               (k.without & 65536u << NBD_OPT_GO) << 4; /* EXTENDED_HEADERS */
  if (k.threads > 1024 || k.max_conn > 1 << 20 ||
      k.flags & ~NBDSERVE_CONFIG_ONCE)
    return -EINVAL;
  struct nbdserve *s = u_zalloc(sizeof *s);
  if (!s) return -ENOMEM;
  s->config = k;
  s->stop[0] = s->stop[1] = s->wake[0] = s->wake[1] = -1;
  s->last_export = &s->exports;
  int err = os_monitor_init(&s->lock);
  if (!err) err = os_pipe(s->stop);
  if (!err) err = os_pipe(s->wake);
  if (err)
    nbdserve_free(s);
  else
    *out = s;
  return err;
}

int nbdserve_add(struct nbdserve *s, const struct nbdserve_export *e) {
  struct ex *ex = NULL;
  os_lock(&s->lock);
  int err = ex_by_name(s, e->name ? e->name : "") ? -EEXIST : ex_new(&ex, e);
  if (!err) {
    *s->last_export = ex;
    s->last_export = &ex->next;
  }
  os_unlock(&s->lock);
  return err;
}

int nbdserve_resize(struct nbdserve *s, const char *name, uint64_t size) {
  if (size > INT64_MAX) return -EINVAL;
  os_lock(&s->lock);
  struct ex *ex = ex_by_name(s, name ? name : "");
  if (ex) ex->e.size = size;
  os_unlock(&s->lock);
  return ex ? 0 : -ENOENT;
}

/* Is all of s a number up to max? */
static int u_parse_number(const char *s, uint64_t max, uint64_t *out) {
  const char *rest = u_parse_size(s, out);
  return rest && !*rest && *out <= max;
}

/* Adds a listener on fd, which it owns then; a negative fd is the error. */
static int srv_add(struct nbdserve *s, int fd, int is_unix, const char *text) {
  if (fd < 0) return fd;
  struct srv_listener *l = &s->listeners[s->nlisteners++];
  os_set_fd_flags(fd, 1);
  l->fd = fd;
  l->is_unix = is_unix && lstat(text, &l->st) == 0;
  snprintf(l->text, sizeof l->text, "%s", text);
  return 0;
}

/* A socket that listens at an address or is connected to it, or -errno. */
enum {
  SRV_LISTEN,
  SRV_CONNECT,
  SRV_PROBE /* without waiting */
};
static int srv_socket(const union srv_address *a, socklen_t len, int how) {
  int fd = socket(a->sa.sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
  if (fd < 0) return -errno;
  os_set_fd_flags(fd, how != SRV_CONNECT);
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one); /* TCP heeds it */
  setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &one, sizeof one); /* IPv6 does */
  if (how != SRV_LISTEN
          ? connect(fd, &a->sa, len) == 0
          : bind(fd, &a->sa, len) == 0 && listen(fd, SRV_BACKLOG) == 0)
    return fd;
  int err = -errno;
  close(fd);
  return err;
}

/* The same for a unix socket.  One that nobody listens on is replaced. */
static int srv_unix(const char *path, int how) {
  union srv_address a = {.un = {.sun_family = AF_UNIX}};
  struct stat st;
  if (!*path) return -EINVAL;
  if (strlen(path) >= sizeof a.un.sun_path) return -ENAMETOOLONG;
  strcpy(a.un.sun_path, path);
  if (how != SRV_LISTEN) return srv_socket(&a, sizeof a.un, how);
  int dir = os_open_dir(path); /* until it listens it looks stale to others */
  for (int i = 0;
       i < 100 && flock(dir, LOCK_EX | LOCK_NB) < 0 && errno == EWOULDBLOCK;
       i++)
    poll(NULL, 0, 10);
  int fd = srv_socket(&a, sizeof a.un, SRV_LISTEN);
  if (fd == -EADDRINUSE && lstat(path, &st) == 0 && S_ISSOCK(st.st_mode)) {
    int probe = srv_socket(&a, sizeof a.un, SRV_PROBE);
    if (probe == -ECONNREFUSED && unlink(path) == 0) /* a leftover */
      fd = srv_socket(&a, sizeof a.un, SRV_LISTEN);
    if (probe >= 0) close(probe);
  }
  if (dir >= 0) close(dir);
  return fd;
}

/* Writes an internet address for humans and URIs to out, if it is one. */
static void srv_name(const union srv_address *a, char *out, size_t size) {
#if !NBDSERVE_NO_TCP
  char host[INET6_ADDRSTRLEN];
  int v6 = a->sa.sa_family == AF_INET6;
  const void *ip = v6 ? (const void *)&a->in6.sin6_addr : &a->in.sin_addr;
  if (inet_ntop(a->sa.sa_family, ip, host, sizeof host))
    snprintf(out, size, v6 ? "[%s]:%d" : "%s:%d", host, ntohs(a->in.sin_port));
#endif
  (void)a, (void)out, (void)size;
}

#if !NBDSERVE_NO_TCP
/* Listens on a numeric address; *port 0 becomes what the kernel picked. */
static int srv_listen_ip(struct nbdserve *s, const char *host, uint64_t *port) {
  union srv_address a = {.in6 = {.sin6_port = htons((uint16_t)*port)}};
  int v6 = strchr(host, ':') != NULL;
  void *ip = v6 ? (void *)&a.in6.sin6_addr : &a.in.sin_addr;
  socklen_t len = v6 ? sizeof a.in6 : sizeof a.in;
  char text[64] = "";
  a.sa.sa_family = v6 ? AF_INET6 : AF_INET;
  if (inet_pton(a.sa.sa_family, host, ip) != 1) return -EINVAL;
  int fd = srv_socket(&a, len, SRV_LISTEN);
  if (fd >= 0) getsockname(fd, &a.sa, &len);
  *port = ntohs(a.in.sin_port);
  srv_name(&a, text, sizeof text);
  return srv_add(s, fd, 0, text);
}

static int srv_listen_tcp(struct nbdserve *s, const char *address) {
  uint64_t port = 0;
  const char *colon = strrchr(address, ':');
  if (!colon || !u_parse_number(colon + 1, 65535, &port)) return -EINVAL;
  int n = (int)(colon - address);
  int brackets = n && *address == '[' && colon[-1] == ']';
  char host[64];
  snprintf(host, sizeof host, "%.*s", n - 2 * brackets, address + brackets);
  if (strcmp(host, "localhost") != 0) return srv_listen_ip(s, host, &port);
  int err = srv_listen_ip(s, "127.0.0.1", &port);
  if (!err) err = srv_listen_ip(s, "::1", &port);
  return err == -EAFNOSUPPORT || err == -EADDRNOTAVAIL ? 0 : err; /* no IPv6 */
}
#endif

int nbdserve_listen(struct nbdserve *s, const char *address) {
  if (s->nlisteners >= SRV_LISTENERS) return -EMFILE;
  if (strncmp(address, "unix:", 5) == 0)
    return srv_add(s, srv_unix(address + 5, SRV_LISTEN), 1, address + 5);
#if !NBDSERVE_NO_TCP
  if (strncmp(address, "tcp:", 4) == 0) return srv_listen_tcp(s, address + 4);
#endif
  uint64_t fd;
  int listens = 0;
  socklen_t len = sizeof listens;
  if (strncmp(address, "fd:", 3) || !u_parse_number(address + 3, INT_MAX, &fd))
    return -EINVAL;
  if (getsockopt((int)fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &len) < 0)
    return -errno;
  return listens ? srv_add(s, (int)fd, 0, "") : -EINVAL;
}

int nbdserve_uri(struct nbdserve *s, const char *name, char *buf, size_t size) {
  const struct srv_listener *l = s->listeners;
  if (!s->nlisteners || !*l->text) return -ENOENT;
  int n = snprintf(buf, size, "nbd%s://%s/", l->is_unix ? "+unix" : "",
                   l->is_unix ? "" : l->text);
  if ((size_t)n >= size || !u_append_uri(buf, size, name ? name : "") ||
      (l->is_unix && (strlen(buf) + 8 >= size ||
                      !u_append_uri(strcat(buf, "?socket="), size, l->text))))
    return -ERANGE;
  return 0;
}

/* Puts a byte into a pipe that nbdserve_run looks at.  Keeps errno: it may be
 * in a handler.  A full pipe has said it already. */
static void srv_poke(int fd, char what) {
  int saved = errno;
  (void)!write(fd, &what, 1);
  errno = saved;
}

void nbdserve_stop(struct nbdserve *s) {
  srv_poke(s->stop[1], SRV_ELSE);
}
void nbdserve_wake(struct nbdserve *s) {
  srv_poke(s->wake[1], SRV_WAKE);
}

void nbdserve_stats(struct nbdserve *s, struct nbdserve_stats *out) {
  os_lock(&s->lock);
  *out = s->stats;
  out->clients_now = s->nconns;
  for (struct ex *ex = s->exports; ex; ex = ex->next) {
    os_lock(&ex->lock);
    out->flushes += ex->nflushes;
    os_unlock(&ex->lock);
  }
  os_unlock(&s->lock);
}

/* A client, registered (S1); NULL without memory.  own: close in its end. */
static struct conn *srv_client(struct nbdserve *s, int in, int out, int own) {
  struct conn *c = NBDSERVE_MALLOC(sizeof *c);
  if (!c) return NULL;
  memset(c, 0, offsetof(struct conn, rbuf)); /* the rest stays untouched */
  c->s = s;
  c->fd = own ? in : -1;
  c->io = (struct io){.in = in,
                      .out = out,
                      .stall_ms = s->config.stall_ms,
                      .stop = own && !NBDSERVE_NO_THREADS ? -1 : s->stop[0]};
  c->queue_end = &c->queue;
  if (os_monitor_init(&c->lock) || os_monitor_init(&c->sending)) {
    NBDSERVE_FREE(c);
    return NULL;
  }
  os_lock(&s->lock);
  c->id = (int)++s->stats.clients;
  c->next = s->conns;
  s->conns = c;
  s->nconns++;
  os_unlock(&s->lock);
  return c;
}

static void srv_free_client(struct conn *c) {
  struct nbdserve *s = c->s;
  NBDSERVE_FREE(c->big);
  assert(!c->nworkers && !c->ndeferred);
  os_lock(&s->lock);
  struct conn **p = &s->conns;
  while (*p != c)
    p = &(*p)->next;
  *p = c->next;
  s->nconns--;
  if (c->fd >= 0) close(c->fd); /* locked: srv_finish must not hit another */
  os_monitor_free(&c->lock);
  os_monitor_free(&c->sending);
  NBDSERVE_FREE(c);
  srv_poke(s->wake[1], SRV_ELSE);
  os_unlock(&s->lock); /* (S2) */
}

/* Serves a client to its end and forgets it.  name: as in nbdserve_serve. */
static int srv_serve_client(struct conn *c, const char *name) {
  char peer[64] = "this machine";
  union srv_address a;
  socklen_t len = sizeof a;
  struct ex *ex = NULL;
  if (getpeername(c->io.in, &a.sa, &len) == 0) srv_name(&a, peer, sizeof peer);
  HS_LOG(c, NBDSERVE_LOG_INFO, "%d: connected from %s", c->id, peer);
  os_setup_client(c->io.in, c->s->config.stall_ms);
  os_setup_client(c->io.out, c->s->config.stall_ms);
  int err = name ? ex_get(c->s, name, &ex, &c->size) : hs_run(c);
  if (name && !err) hs_settle(c, ex, name);
  if (err == HS_ENTER) err = tx_run(c);
  if (c->ex && c->ex->dynamic && !(c->tflags & NBD_FLAG_READ_ONLY))
    ex_flush(c->ex); /* a courtesy before it is closed: nobody waits for it */
  ex_put(c->ex);
  if (err == HS_END) err = 0;
  int calm = !err || err == -EPIPE || err == -ECONNRESET || err == -ESHUTDOWN;
  HS_LOG(c, calm ? NBDSERVE_LOG_INFO : NBDSERVE_LOG_WARNING, "%d: gone: %s",
         c->id, err ? u_errno_text(err) : "disconnected");
  srv_free_client(c);
  return err == -ESHUTDOWN ? 0 : err;
}

static void *srv_thread(void *client) {
  return (void)srv_serve_client(client, NULL), NULL;
}

static int srv_woken(struct nbdserve *s) {
  char buf[64];
  int woken = 0;
  for (ssize_t n; (n = read(s->wake[0], buf, sizeof buf)) > 0;)
    woken |= memchr(buf, SRV_WAKE, (size_t)n) != NULL;
  return woken;
}

static int srv_finish(struct nbdserve *s) {
  int64_t until = os_now_ms() + IO_GRACE_MS;
  struct pollfd p = {s->wake[0], POLLIN, 0}; /* a client has gone */
  int err = 0;
  nbdserve_stop(s);
  for (int busy = 1; busy; srv_woken(s)) {
    int64_t left = until - os_now_ms();
    os_lock(&s->lock);
    busy = s->nconns > 0;
    for (struct conn *c = s->conns; c; c = c->next)
      if (c->fd >= 0) shutdown(c->fd, left > 0 ? SHUT_RD : SHUT_RDWR);
    os_unlock(&s->lock);
    if (busy) poll(&p, 1, left > 0 ? (int)left : -1);
  }
  for (struct ex *ex = s->exports; ex; ex = ex->next) { /* no more are added */
    int e = ex->e.flags & NBDSERVE_EXPORT_READONLY ? 0 : ex_flush(ex);
    if (e)
      u_log(&s->config, NBDSERVE_LOG_ERROR,
            "export '%s': the last flush: %s; written data may be lost",
            ex->e.name, u_errno_text(e));
    if (!err) err = e;
  }
  return err;
}

int nbdserve_run(struct nbdserve *s) {
  struct pollfd p[SRV_LISTENERS + 3] = {{s->stop[0], POLLIN, 0},
                                        {s->wake[0], POLLIN, 0}};
  int n = s->nlisteners;
  int64_t pause = 0;
  for (;;) {
    os_lock(&s->lock);
    int busy = s->nconns > 0;
    int room = (int)s->config.max_conn - (int)s->nconns;
    int over =
        !busy && s->stats.clients && (s->config.flags & NBDSERVE_CONFIG_ONCE);
    os_unlock(&s->lock);
    int64_t now = os_now_ms(), wait = pause > now ? pause - now : INT_MAX;
    if (pause > now) room = 0;
    if (busy || !s->idle_from) s->idle_from = now;
    int64_t idle = s->idle_from + s->config.idle_exit_ms - now;
    if (!busy && s->config.idle_exit_ms && idle < wait) wait = idle;
    if (over || wait < 0) wait = 0; /* a last look whether somebody waits */
    over |= wait == 0;
    for (int i = 0; i < n; i++)
      p[i + 2] = (struct pollfd){room > 0 ? s->listeners[i].fd : -1, POLLIN, 0};
    if (poll(p, (nfds_t)n + 2, (int)wait) < 0 && errno != EINTR) return -errno;
    if (p[0].revents) return srv_finish(s);
    if (p[1].revents && srv_woken(s)) return -EINTR;
    for (int i = 0; i < n; i++) {
      if (!p[i + 2].revents || room-- <= 0) continue;
      over = 0;
      int fd = os_accept(s->listeners[i].fd), err = fd < 0 ? fd : -ENOMEM;
      if (fd == -EAGAIN || fd == -ECONNABORTED || fd == -EINTR) continue;
      struct conn *c = fd < 0 ? NULL : srv_client(s, fd, fd, 1);
      if (c) err = os_thread(srv_thread, c);
      if (err && c)
        srv_free_client(c); /* closes it */
      else if (err && fd >= 0)
        close(fd);
      if (err && now - pause > SRV_PAUSE_MS) /* once, not in every round */
        u_log(&s->config, NBDSERVE_LOG_WARNING, "clients have to wait: %s",
              u_errno_text(err));
      if (err) pause = os_now_ms() + SRV_PAUSE_MS; /* the loop must not spin */
    }
    if (over) return srv_finish(s);
  }
}

int nbdserve_serve(struct nbdserve *s, int in, int out, const char *name) {
  struct conn *c = srv_client(s, in, out, 0);
  return c ? srv_serve_client(c, name) : -ENOMEM;
}

void nbdserve_unlisten(struct nbdserve *s) {
  struct stat st;
  while (s->nlisteners > 0) {
    struct srv_listener *l = &s->listeners[--s->nlisteners];
    close(l->fd);
    if (l->is_unix && lstat(l->text, &st) == 0 && st.st_ino == l->st.st_ino &&
        st.st_dev == l->st.st_dev)
      unlink(l->text);
  }
}

void nbdserve_free(struct nbdserve *s) {
  if (!s) return;
  if (s->nconns > 0) srv_finish(s); /* nbdserve_run was left with -EINTR */
  assert(!s->conns);
  nbdserve_unlisten(s);
  for (struct ex *ex = s->exports, *next; ex; ex = next) {
    next = ex->next;
    ex_free(ex);
  }
  for (int i = 0; i < 4; i++) /* closing -1 is no harm */
    close((i % 2 ? s->stop : s->wake)[i / 2]);
  os_monitor_free(&s->lock);
  NBDSERVE_FREE(s);
}

/* ==== [13] CLI (cli_) ====================================================
 * The command, on top of nbdserve.h.  What a process has only one of (signals,
 * standard streams, environment, its end) is touched here and nowhere else. */
#if !NBDSERVE_NO_MAIN
#include <sys/wait.h>

enum {
  CLI_FAILED = 1,
  CLI_USAGE,
  CLI_DAMAGED,
  CLI_IN_USE
}; /* exit status */

static const struct cli_option {
  int letter; /* negative: only a name, but to us it is cli.v[letter] */
  const char *name, *arg;
  uint64_t min, max; /* of a number; max 0: it is text */
  const char *help;
} cli_options[] = {
    {'U', "unix", "PATH", 0, 0, "listen on a unix socket (else: private)"},
    {'p', "port", "N", 0, 65535, "listen on TCP (usual: 10809; 0: any free)"},
    {'i', "bind", "ADDR", 0, 0, "TCP address instead of the two loopbacks"},
    {'s', "stdin", NULL, 0, 0, "serve one client on standard input and output"},
    {-'f', "fd", "N", 0, INT_MAX, "serve a listening or a connected socket"},
    {'r', "read-only", NULL, 0, 0, "refuse writes"},
    {'e', "export", "NAME", 0, 0, "export name (else: any name will do)"},
    {'D', "description", "TEXT", 0, 0, "for clients that list the exports"},
    {'o', "offset", "N", 0, INT64_MAX, "serve the target from this byte on"},
    {-'S', "size", "N", 1, INT64_MAX, "and that many bytes of it"},
    {'b', "block-size", "SIZES", 0, 0, "MIN:PREFERRED:MAX (1:4096:32M)"},
    {-'C', "create", "SIZE", 1, INT64_MAX, "make a missing target, sparse"},
    {'T', "temporary", NULL, 0, 0, "what is written is gone at exit"},
    {-'c', "cache", "MODE", 0, 0, "writeback (default), writethrough, unsafe"},
    {'t', "threads", "N", 1, 1024, "slow requests at a time per client (16)"},
    {'m', "max-conn", "N", 1, 1 << 20, "clients at a time (128)"},
    {-'a', "stall", "SEC", 1, 4000000, "to end what a client has begun (120)"},
    {'1', "once", NULL, 0, 0, "exit when the last client has gone"},
    {-'I', "idle-exit", "SEC", 1, 4000000, "exit after a time without clients"},
    {-'R', "run", "CMD", 0, 0, "serve while a shell command runs ($uri, $nbd)"},
    {-'F', "fork", NULL, 0, 0, "go into the background, once listening"},
    {'P', "pidfile", "FILE", 0, 0, "write the process id there, then"},
    {-'y', "ready-fd", "N", 3, INT_MAX, "write the URI there, once listening"},
    {'q', "quiet", NULL, 0, 0, "errors only"},
    {'v', "verbose", NULL, 0, 0, "tell of clients; twice: of every request"},
    {-'z', "stats", NULL, 0, 0, "print totals at exit (and always on SIGUSR1)"},
    {-'j', "json", NULL, 0, 0, "print them, or a command's output, as JSON"},
    {-'w', "without", "LIST", 0, 0, "hide features from clients: see README"},
    {-'x', "fault", "CMD:ERR:RATE", 0, 0, "let commands fail: write:EIO:0.1"},
    {-'d', "delay", "CMD:MS", 0, 0, "let commands wait before they are done"},
    {'n', "dry-run", NULL, 0, 0, "change nothing in a store"},
    {-'N', "no-verify", NULL, 0, 0, "a store's blocks are read unchecked"},
    {'V', "version", NULL, 0, 0, "print version and features"},
    {'h', "help", NULL, 0, 0, "print this"},
    {'-', "", NULL, 0, 0, NULL}}; /* what stands before CMD; no other */

static struct {
  const char *v[128];        /* values by letter; NULL: not given */
  uint64_t n[128];           /* as numbers; how often, for those without */
  char **command, **targets; /* behind --, or NULL; [NAME=]TARGET */
  int ntargets;
  const char *name;          /* of a single export, or "" */
  struct nbdserve_export ex; /* what all exports have in common */
  uint32_t without;          /* as in nbdserve_config */
  struct nbdserve *server;
  volatile sig_atomic_t usr1, ending; /* signals that came */
  int in, out, report; /* one client's; pipe to --fork's parent; or -1 */
  pid_t child;         /* the captive command; 0: none, or... */
  int status;          /* ...it has ended with this exit status */
  const char *pidfile, *store; /* to remove; its path, or NULL */
  struct nbdserve_cas *cas;
  int ctl, ended[2]; /* control socket, or -1; pipe: its thread has */
  char ctl_path[PATH_MAX], dir[100]; /* private directory, or "" */
  char uri[3 * WIRE_STRING_MAX + 1024];
} cli = {.name = "", .in = -1, .out = 1, .report = -1, .ctl = -1};

/* A line on standard error, in one write: threads do not mix.  The status. */
static int OS_PRINTF(2, 3) cli_say(int status, const char *fmt, ...) {
  char line[PATH_MAX + 600] = "nbdserve: ";
  size_t n = strlen(line);
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(line + n, sizeof line - n - 1, fmt, ap);
  va_end(ap);
  strcat(line, "\n");
  (void)!write(2, line, strlen(line)); /* there is nobody to tell */
  return status;
}

static void cli_log(void *ctx, int level, const char *message) {
  (void)ctx, (void)level, cli_say(0, "%s", message);
}

static void cli_on_signal(int sig) {
  if (sig == SIGUSR1) cli.usr1 = 1;
  nbdserve_wake(cli.server); /* cli_serve looks what it was */
  if (sig == SIGUSR1 || sig == SIGCHLD) return;
  if (cli.ending && sig == SIGINT) _exit(130);
  cli.ending = 1;
  nbdserve_stop(cli.server);
}

static void cli_catch_signals(void (*handler)(int)) {
  static const int signals[] = {SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGCHLD};
  struct sigaction sa = {.sa_handler = handler, .sa_flags = SA_RESTART}, was;
  for (size_t i = 0; i < sizeof signals / sizeof *signals; i++)
    if (i > 1 || (sigaction(signals[i], NULL, &was) == 0 &&
                  was.sa_handler != SIG_IGN)) /* nohup: it stays so */
      sigaction(signals[i], &sa, NULL);
  sa.sa_handler = handler == SIG_DFL ? SIG_DFL : SIG_IGN;
  sigaction(SIGPIPE, &sa, NULL);
  sigaction(SIGXFSZ, &sa, NULL); /* writes get EFBIG then */
}

/* When the process exits: what it has is closed, what it made removed. */
static void cli_close(void) {
  struct pollfd p = {cli.ended[0], POLLIN, 0};
  const char *why = NULL;
  char c;
  cli_catch_signals(SIG_IGN);
  if (cli.pidfile) unlink(cli.pidfile);
  if (cli.ctl >= 0) unlink(cli.ctl_path);
  if (p.fd > 0) nbdserve_stop(cli.server);
  if (p.fd > 0 && (poll(&p, 1, IO_GRACE_MS) <= 0 || read(p.fd, &c, 1) != 1))
    why = "a command was not finished"; /* to open it will repair it */
  nbdserve_free(cli.server);
#if !NBDSERVE_NO_CAS
  int err = !why && cli.cas ? nbdserve_cas_close(cli.cas) : 0;
  if (err) why = u_errno_text(err);
#endif
  if (*cli.dir) rmdir(cli.dir);
  if (why) _exit(cli_say(CLI_FAILED, "%s: %s", cli.store, why));
}

#define cli_die(...) exit(cli_say(__VA_ARGS__))
#define cli_usage(...) cli_die(CLI_USAGE, __VA_ARGS__)
#define cli_failed(...) cli_die(CLI_FAILED, __VA_ARGS__)

static void cli_fail(int err, const char *object) {
  if (err)
    cli_die(err == -EBUSY ? CLI_IN_USE : CLI_FAILED, "%s: %s%s", object,
            u_errno_text(err),
            err == -EBUSY        ? "; another server has it"
            : err == -EADDRINUSE ? "; not replaced"
                                 : "");
}

/* ---- What --without, --fault and --delay do to clients ------------------- */

static const char *const cli_features[] =
    {/* by bit of config.without */
     "",           "",          "flush", "fua",       "", "trim", "zero", "df",
     "multi-conn", "",          "cache", "fast-zero", "", "",     "",     "",
     "",           "",          "",      "list",      "", "",     "info", "go",
     "structured", "list-meta", "meta",  "extended"};
static const char *const cli_commands[] = {
    "read", "write", "", "flush", "trim", "cache", "zero", "status", "all"};
static const char *const cli_errors[] = {"EPERM",   "EIO",      "ENOMEM",
                                         "EINVAL",  "ENOSPC",   "EOVERFLOW",
                                         "ENOTSUP", "ESHUTDOWN"};
static const int cli_errnos[] = {EPERM,  EIO,       ENOMEM,  EINVAL,
                                 ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN};
static struct {
  int err, ms;
  unsigned ppm, sum;
} cli_faults[8]; /* commands */
#define CLI_WORD(words, s, ends) \
  cli_word(words, (int)(sizeof words / sizeof *words), s, ends)

/* Takes a word, up to one of ends, off *s.  Its number, or -1. */
static int cli_word(const char *const *words, int n, const char **s,
                    const char *ends) {
  size_t len = strcspn(*s, ends);
  while (--n >= 0 && (!len || strncmp(words[n], *s, len) || words[n][len])) {
  }
  *s += len + ((*s)[len] != 0);
  return n;
}

static int cli_disturb(const char *s, int is_delay) {
  int cmd = CLI_WORD(cli_commands, &s, ":");
  int err = is_delay ? 0 : CLI_WORD(cli_errors, &s, ":");
  char *end;
  double x = strtod(s, &end); /* milliseconds, or a share */
  if (cmd < 0 || err < 0 || end == s || *end ||
      !(x >= 0 && x <= (is_delay ? 1e6 : 1)))
    return 0; /* no NaN either */
  for (int i = cmd % 8; i < 8 && (i == cmd || cmd == 8); i++) {
    if (is_delay) cli_faults[i].ms = (int)(x + .999);
    if (!is_delay) cli_faults[i].err = -cli_errnos[err];
    if (!is_delay) cli_faults[i].ppm = (unsigned)(x * 1e6 + .999);
  }
  return 1;
}

/* The same share of requests always fails, so that tests can rely on it. */
static int cli_before(void *ctx, unsigned type, uint64_t off, uint64_t len) {
  (void)ctx, (void)off, (void)len;
  if (cli_faults[type].ms) poll(NULL, 0, cli_faults[type].ms);
  os_lock(&cli.server->lock);
  int hit = (cli_faults[type].sum += cli_faults[type].ppm) >= 1000000;
  if (hit) cli_faults[type].sum -= 1000000;
  os_unlock(&cli.server->lock);
  return hit ? cli_faults[type].err : 0;
}

static void cli_set(const struct cli_option *o, const char *value) {
  uint32_t *block[] = {&cli.ex.min_block, &cli.ex.preferred_block,
                       &cli.ex.max_request};
  const char *rest = value;
  int c = abs(o->letter), ok = 1;
  cli.v[c] = value;
  cli.n[c]++;
  if (o->max)
    ok = u_parse_number(value, o->max, &cli.n[c]) && cli.n[c] >= o->min;
  if (ok && (c == 'f' || c == 'y')) /* or it could become ours */
    ok = fcntl((int)cli.n[c], F_GETFD) >= 0;
  for (int i = 0; c == 'b' && ok && i < 3; i++) {
    uint64_t v = 0;
    rest = u_parse_size(rest, &v);
    ok = rest && v >= 1 && v <= UINT32_MAX && *rest++ == (i < 2 ? ':' : 0);
    *block[i] = (uint32_t)v;
  }
  if (c == 'c') {
    static const char *const modes[] = {"writeback", "writethrough", "unsafe"};
    int mode = CLI_WORD(modes, &rest, "");
    ok = mode >= 0;
    cli.ex.flags =
        (uint32_t)mode * NBDSERVE_EXPORT_WRITETHROUGH; /* twice: UNSAFE */
  }
  if (c == 'x' || c == 'd') ok = cli_disturb(value, c == 'd');
  for (int bit; c == 'w' && ok && *rest; cli.without |= 1u << (bit & 31))
    ok = (bit = CLI_WORD(cli_features, &rest, ",")) >= 0;
  if (!ok)
    cli_usage("--%s %s: no such %s, or out of range", o->name, value, o->arg);
}

static const struct cli_option *cli_find(int letter, const char *name) {
  const struct cli_option *o = cli_options;
  size_t n = name ? strcspn(name, "=") : 0;
  while (*o->name && (name ? strncmp(o->name, name, n) != 0 || o->name[n]
                           : abs(o->letter) != letter))
    o++;
  return o;
}

static void cli_parse(char **argv) {
  for (const char *a; !cli.command && (a = *++argv) != NULL;) {
    if (a[0] != '-' || !a[1]) {
      cli.targets[cli.ntargets++] = *argv;
      continue;
    }
    int is_long = *++a == '-', more = 1;
    if (is_long && !*++a) {
      cli.command = argv + 1;
      cli.v['-'] = "";
      more = 0;
    }
    while (more) {
      const struct cli_option *o = cli_find(*a, is_long ? a : NULL);
      if (!*o->name || (!is_long && o->letter < 0))
        cli_usage("%s: unknown option; try --help", *argv);
      a += is_long ? strcspn(a, "=") : 1;
      more = *a && !is_long && !o->arg;
      const char *value = !o->arg ? is_long && *a ? NULL : ""
                          : *a    ? a + is_long
                                  : *++argv;
      if (!value)
        cli_usage("--%s takes %s", o->name, o->arg ? o->arg : "no value");
      cli_set(o, value);
    }
  }
}

static void cli_check(void) {
  const char *p = "sUspsisfsFfUfpfiRsRfRFR1RICr-R-s-f-F-1-ITrTC"; /* not both */
  for (; *p; p += 2)
    if (cli.v[(int)p[0]] && cli.v[(int)p[1]])
      cli_usage("--%s: not together with --%s", cli_find(p[0], NULL)->name,
                cli_find(p[1], NULL)->name);
  if (cli.command && !*cli.command) cli_usage("--: no command behind it");
  if (!cli.ntargets) cli_usage("no target; try --help");
  if (cli.v['e'] && cli.ntargets > 1)
    cli_usage("--export: for a single target; use NAME=TARGET");
}

#if !NBDSERVE_NO_CAS
/* ---- Stores: serving one, and commands on them ---------------------------
 * A command on a store that is being served is done by who serves it: it goes
 * to STORE.ctl, with the descriptors it needs, and a status comes back. */
enum {
  CLI_INIT = 10,
  CLI_IMPORT,
  CLI_EXPORT,
  CLI_LIST,
  CLI_SEAL,
  CLI_DIFF,
  CLI_VERIFY,
  CLI_GC,
  CLI_STAT,
  CLI_MANY = 1 << 20
};

static const struct cli_verb {
  const char *name;
  int verb, min, max; /* NBDSERVE_CAS_* or CLI_*; operands besides STORE */
  const char *traits; /* R: only reads; N: takes -n; S: the last operand is a
                         size; T: takes time, to end; then see cli_row */
  const char *help;
} cli_verbs[] = {
    {"init", CLI_INIT, 0, 1, "S", "STORE [BLOCK-SIZE]"},
    {"create", NBDSERVE_CAS_CREATE, 2, 2, "S", "STORE::VOLUME SIZE"},
    {"import", CLI_IMPORT, 2, 2, "T", "STORE::VOLUME FILE"},
    {"export", CLI_EXPORT, 2, 2, "R", "STORE::NAME FILE (-: standard output)"},
    {"list", CLI_LIST, 0, 0, "R[name=size#created=id=", "STORE"},
    {"snapshot", NBDSERVE_CAS_SNAPSHOT, 1, 1, "", "STORE::VOLUME@SNAPSHOT"},
    {"seal", CLI_SEAL, 1, 1, "T{id=", "STORE::VOLUME@SNAPSHOT (prints its id)"},
    {"rollback", NBDSERVE_CAS_ROLLBACK, 1, 1, "N", "STORE::VOLUME@SNAPSHOT"},
    {"clone", NBDSERVE_CAS_CLONE, 2, CLI_MANY, "", "STORE::NAME VOLUME..."},
    {"rename", NBDSERVE_CAS_RENAME, 2, 2, "", "STORE::NAME NEW"},
    {"resize", NBDSERVE_CAS_RESIZE, 2, 2, "NS", "STORE::VOLUME SIZE"},
    {"rm", NBDSERVE_CAS_RM, 1, CLI_MANY, "N", "STORE::NAME [NAME...]"},
    {"diff", CLI_DIFF, 2, 2, "R[offset#length#", "STORE::NAME NAME"},
    {"verify", CLI_VERIFY, 0, 0, "RT[name=offset#length#why=", "STORE"},
    {"gc", CLI_GC, 0, 0, "T{bytes#", "STORE"},
    {"stat", CLI_STAT, 0, 0, "R|block_size#stored#free#file#log#", "STORE"}};

enum {
  CLI_VERBS = sizeof cli_verbs / sizeof *cli_verbs,
  CLI_JSON = 1
};

struct cli_job {
  int fd[2];        /* output, or the file of import and export; messages */
  int client, rows; /* who waits for it, or -1; printed so far, of an array */
  int64_t begun;    /* in os_now_ms */
  double shown;     /* seconds after that: its progress; 0: is not */
  struct {          /* what goes over the control socket */
    uint64_t size;
    unsigned char verb, flags; /* index; CLI_JSON, NBDSERVE_CAS_DRY_RUN */
    char name[PATH_MAX], to[PATH_MAX]; /* operands */
  } ask;
};

/* Shows on a terminal how far it is, after a second, ten times a second; with a
 * total of 0 it goes away.  Not 0: what is done shall end, for a signal has
 * come, or the client has gone. */
static int cli_progress(void *job, uint64_t done, uint64_t total) {
  struct cli_job *j = job;
  struct pollfd p[] = {{cli.server->stop[0], POLLIN, 0},
                       {j->client, POLLIN, 0}};
  double s = (double)(os_now_ms() - j->begun) / 1000, n = (double)(done >> 20);
  if (!total && j->shown > 0) dprintf(j->fd[1], "\r%60s\r", "");
  if (!total) j->shown = 0;
  if (s > 1 && s - j->shown > .1 && done && isatty(j->fd[1])) {
    double left = s * ((double)total / (double)done - 1);
    dprintf(j->fd[1], "\r%3.0f%% %8.0f MiB %8.1f MiB/s %6.0f s left",
            s / (s + left) * 100, n, n / s, left);
    j->shown = s;
  }
  return poll(p, 2, 0) > 0;
}

/* Prints a row of values, for which the traits say NAME= for a string, NAME#
 * for a uint64_t; with { in front there is only one, with [ in JSON an array,
 * with | each value is a line, with its name.  No string is one that JSON would
 * want escaped: the store refuses such names. */
static int cli_row(struct cli_job *j, ...) {
  const char *f = strpbrk(cli_verbs[j->ask.verb].traits, "{[|");
  const char *open = *f != '[' ? "{" : j->rows++ ? ",{" : "[{";
  int fd = j->fd[0], json = j->ask.flags & CLI_JSON, lines = *f == '|', len;
  int tty = !lines && !json && isatty(fd), n = 0;
  va_list ap;
  cli_progress(j, 0, 0);
  va_start(ap, j);
  for (f++; *f; f += len + 1, n++) {
    len = (int)strcspn(f, "=#");
    if (json)
      dprintf(fd, "%s\"%.*s\":", n ? "," : open, len, f);
    else if (lines)
      dprintf(fd, "%s%.*s\t", n ? "\n" : "", len, f);
    else if (n)
      dprintf(fd, tty ? "  " : "\t");
    if (f[len] == '#')
      dprintf(fd, "%*" PRIu64, tty ? 16 : 0, va_arg(ap, uint64_t));
    else
      dprintf(fd, json ? "\"%*s\"" : "%*s", tty && !n ? -40 : 0,
              va_arg(ap, const char *));
  }
  va_end(ap);
  return dprintf(fd, json ? "}\n" : "\n") < 0 ? -errno : 0;
}

static int cli_range(void *job, uint64_t off, uint64_t len) {
  return cli_row(job, off, len);
}

static int cli_list_row(void *job, const struct nbdserve_cas_info *info) {
  time_t t = (time_t)info->created;
  char created[32];
  struct tm tm;
  strftime(created, sizeof created, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&t, &tm));
  return cli_row(job, info->name, info->size, created, info->id);
}

static void cli_damage_row(void *job, const char *name, uint64_t off,
                           uint64_t len, const char *why) {
  int json = ((struct cli_job *)job)->ask.flags & CLI_JSON;
  cli_row(job, *name || json ? name : "-", off, len, why);
}

/* Copies a file into a new volume, or a volume or snapshot out. */
static int cli_copy(struct cli_job *j, struct nbdserve_cas *cas, int in) {
  static unsigned char buf[65536];
  off_t end = in ? lseek(j->fd[0], 0, SEEK_END) : 0;
  struct nbdserve_export ex = {0};
  int fd = j->fd[0], err = end < 0 ? -errno : 0;
  ssize_t done = 0;
  if (!err && in) err = nbdserve_cas_create(cas, j->ask.name, (uint64_t)end);
  if (!err) err = nbdserve_cas_volume(cas, j->ask.name, &ex);
  if (err) return err;
  int is_file = !in && strcmp(j->ask.to, "-") != 0 && !ftruncate(fd, 0) &&
                !ftruncate(fd, (off_t)ex.size);
  for (uint64_t off = 0, n; off < ex.size && !err; off += n) {
    n = u_min(sizeof buf, ex.size - off);
    struct iovec v = {buf, (size_t)n};
    err = cli_progress(j, off, ex.size) ? -ECANCELED
          : in                          ? os_transfer(fd, 0, &v, 1, off)
                                        : ex.ops->read(ex.ctx, buf, off, n, 0);
    if (err) break;
    if (in)
      err = ex.ops->write(ex.ctx, buf, off, n, 0);
    else if (is_file && u_is_zero(buf, (size_t)n))
      err = 0;
    else if (is_file)
      err = os_transfer(fd, 1, &v, 1, off);
    else
      n = (uint64_t)(done = write(fd, buf, (size_t)n));
    if (done < 0) err = -errno;
  }
  if (!err) err = in ? ex.ops->flush(ex.ctx, 0) : is_file ? os_datasync(fd) : 0;
  ex.ops->close(ex.ctx);
  if (err && in) nbdserve_cas_rm(cas, j->ask.name);
  return err;
}

static int cli_do(struct cli_job *j, struct nbdserve_cas *cas) {
  const struct cli_verb *v = cli_verbs + j->ask.verb;
  const char *name = j->ask.name, *to = j->ask.to;
  int dry = j->ask.flags & NBDSERVE_CAS_DRY_RUN, err;
  struct nbdserve_cas_stat t;
  uint64_t bytes;
  char id[72];
  j->rows = 0;
  j->begun = os_now_ms();
  switch (v->verb) {
  case CLI_IMPORT:
    err = cli_copy(j, cas, 1);
    break;
  case CLI_EXPORT:
    err = cli_copy(j, cas, 0);
    break;
  case CLI_LIST:
    err = nbdserve_cas_list(cas, cli_list_row, j);
    break;
  case CLI_DIFF:
    err = nbdserve_cas_diff(cas, name, to, cli_range, j);
    break;
  case CLI_SEAL:
    err = nbdserve_cas_seal(cas, name, id, cli_progress, j);
    if (!err) err = cli_row(j, id);
    break;
  case CLI_STAT:
    nbdserve_cas_stat(cas, &t);
    err = cli_row(j, t.block_size, t.stored, t.free, t.file, t.log);
    break;
  case CLI_VERIFY:
    err = nbdserve_cas_verify(cas, cli_damage_row, cli_progress, j);
    break;
  case CLI_GC:
    err = nbdserve_cas_gc(cas, &bytes, cli_progress, j);
    if (!err) err = cli_row(j, bytes);
    break;
  default:
    err = nbdserve_cas_change(cas, v->verb | dry, name, to, j->ask.size);
  }
  cli_progress(j, 0, 0);
  if (j->ask.flags & CLI_JSON && strchr(v->traits, '['))
    dprintf(j->fd[0], j->rows ? "]\n" : "[]\n");
  if (err == -EUCLEAN) return CLI_DAMAGED;
  if (v->verb == CLI_IMPORT) to = ""; /* what a File exists is not about */
  if (err)
    dprintf(j->fd[1], "nbdserve: %s%s%s%s%s: %s\n", v->name, *name ? " " : "",
            name, *to ? " " : "", to,
            err == -EINVAL ? "not with such a name or size"
                           : u_errno_text(err));
  return err ? CLI_FAILED : 0;
}

/* Sends or receives a command; descriptors that do not come stay as they are */
static int cli_pass(const struct io *io, struct cli_job *j, int sending) {
  union {
    struct cmsghdr h;
    char room[CMSG_SPACE(sizeof j->fd)];
  } c = {.h = {.cmsg_level = SOL_SOCKET,
               .cmsg_type = SCM_RIGHTS,
               .cmsg_len = CMSG_LEN(sizeof j->fd)}};
  struct iovec v = {&j->ask, sizeof j->ask};
  struct msghdr m = {.msg_iov = &v,
                     .msg_iovlen = 1,
                     .msg_control = &c,
                     .msg_controllen = CMSG_LEN(sizeof j->fd)}; /* no more */
  memcpy(CMSG_DATA(&c.h), j->fd, sizeof j->fd);
  if (sending)
    return sendmsg(io->out, &m, MSG_NOSIGNAL) == sizeof j->ask ? 0 : -EPIPE;
  ssize_t n = recvmsg(io->in, &m, 0); /* the first part: descriptors end it */
  memcpy(j->fd, CMSG_DATA(&c.h), sizeof j->fd);
  return n <= 0 ? -EPIPE
                : io_recv_all(io, (unsigned char *)&j->ask + n,
                              sizeof j->ask - (size_t)n);
}

static int cli_remote(struct cli_job *j) {
  unsigned char status;
  int fd = srv_unix(cli.ctl_path, SRV_CONNECT);
  struct io io = {.in = fd, .out = fd, .stop = -1};
  if (fd < 0) cli_die(CLI_IN_USE, "%s: in use by another process", cli.store);
  if (cli_pass(&io, j, 1) || io_recv_all(&io, &status, 1))
    cli_failed("%s: no answer", cli.ctl_path);
  close(fd);
  return status;
}

/* Does what comes over the control socket until the server stops. */
static void *cli_control(void *unused) {
  static struct cli_job j;
  struct io io = {.in = cli.ctl, .stop = cli.server->stop[0]};
  while (io_wait(&io, 0) == 0) {
    int fd = os_accept(cli.ctl);
    struct io client = {fd, fd, io.stop, os_now_ms() + IO_GRACE_MS,
                        IO_GRACE_MS};
    if (fd < 0) poll(NULL, 0, SRV_PAUSE_MS); /* the loop must not spin */
    j.fd[0] = j.fd[1] = -1;
    j.client = fd;
    if (fd >= 0 && io_wait(&client, 0) == 0 && cli_pass(&client, &j, 0) == 0 &&
        j.fd[1] >= 0 && j.ask.verb < CLI_VERBS) {
      j.ask.name[PATH_MAX - 1] = j.ask.to[PATH_MAX - 1] = 0;
      unsigned char status = (unsigned char)cli_do(&j, cli.cas);
      (void)!write(fd, &status, 1);
    }
    close(j.fd[0]); /* of -1 is no harm */
    close(j.fd[1]);
    close(fd);
  }
  (void)!write(cli.ended[1], "", 1);
  return unused;
}

static int cli_find_volume(void *unused, const char *name,
                           struct nbdserve_export *out) {
  *out = cli.ex;
  return (void)unused, nbdserve_cas_volume(cli.cas, name, out);
}

struct cli_emit {
  nbdserve_emit_fn *emit;
  void *arg;
};

static int cli_emit_volume(void *to, const struct nbdserve_cas_info *info) {
  struct cli_emit *e = to;
  return e->emit(e->arg, info->name, info->readonly ? "snapshot" : "");
}

static int cli_list_volumes(void *unused, nbdserve_emit_fn *emit, void *arg) {
  struct cli_emit e = {emit, arg};
  return (void)unused, nbdserve_cas_list(cli.cas, cli_emit_volume, &e);
}

static int cli_open_store(const char *path, int readonly) {
  struct nbdserve_cas_options o = {
      .flags = (readonly ? NBDSERVE_CAS_READONLY : 0u) |
               (cli.v['N'] ? NBDSERVE_CAS_NO_VERIFY : 0u)};
  cli.store = path;
  snprintf(cli.ctl_path, PATH_MAX, "%s.ctl", path);
  int err = nbdserve_cas_open(path, &o, &cli.cas);
  if (err == -EINVAL) cli_failed("%s: not a store", path);
  return err;
}

/* Opens a volume or, with the name "", all of a store; and its socket. */
static int cli_open_volume(const char *path, const char *name,
                           struct nbdserve_export *ex) {
  if (cli.store && strcmp(cli.store, path) != 0)
    cli_failed("%s: one store at a time", path);
  int err = cli.store ? 0 : cli_open_store(path, cli.v['r'] != NULL);
  if (err) return err;
  if (cli.ctl < 0 && !cli.v['r'] && !NBDSERVE_NO_THREADS) {
    mode_t was = umask(0177);
    cli.ctl = srv_unix(cli.ctl_path, SRV_LISTEN);
    umask(was);
  }
  if (*name) return nbdserve_cas_volume(cli.cas, name, ex);
  cli.server->config.find = cli_find_volume;
  cli.server->config.list = cli_list_volumes;
  return 0;
}

/* Does the command that the command line may be, and exits. */
static void cli_command(void) {
  static struct cli_job j = {.fd = {1, 2}, .client = -1};
  char **arg = cli.targets, *store = getenv("NBDSERVE_STORE"), *colons;
  int n = cli.ntargets - 1, i = 0, status = 0;
  while (n >= 0 && i < CLI_VERBS && strcmp(cli_verbs[i].name, *arg) != 0)
    i++;
  if (n < 0 || i == CLI_VERBS) return;
  const struct cli_verb *v = cli_verbs + i;
  colons = n > 0 ? strstr(*++arg, "::") : NULL;
  int only_size = v->verb == CLI_INIT && n == 1 && store &&
                  u_parse_number(*arg, INT64_MAX, &j.ask.size);
  if (colons || (n > 0 && !v->min && !only_size)) {
    store = *arg;
    *arg = colons ? colons + 2 : store + strlen(store);
    if (colons) *colons = 0;
    int none = !v->min && !**arg;
    arg += none;
    n -= none;
  }
  if (!store || n < v->min || n > v->max ||
      (cli.v['n'] && !strchr(v->traits, 'N')))
    cli_usage("usage: nbdserve %s %s", v->name, v->help);
  j.ask.verb = (unsigned char)i;
  j.ask.flags =
      (cli.v['n'] ? NBDSERVE_CAS_DRY_RUN : 0) | (cli.v['j'] ? CLI_JSON : 0);
  if (n > 0 && strchr(v->traits, 'S') &&
      !u_parse_number(arg[n - 1], INT64_MAX, &j.ask.size))
    cli_usage("%s %s: no size", v->name, arg[n - 1]);
  if (v->verb == CLI_INIT) {
    struct nbdserve_cas_options o = {
        .block_size = (uint32_t)u_min(j.ask.size, UINT32_MAX)};
    int err = nbdserve_cas_init(store, &o);
    if (err == -EINVAL && n) cli_usage("%s: no block size", *arg);
    cli_fail(err, store);
    exit(0);
  }
  int in = v->verb == CLI_IMPORT;
  if (in || (v->verb == CLI_EXPORT && strcmp(arg[1], "-") != 0)) {
    j.fd[0] = open(arg[1], in ? O_RDONLY : O_RDWR | O_CREAT, 0666);
    if (j.fd[0] < 0) cli_fail(-errno, arg[1]);
    if (!in && os_lock_file(j.fd[0], 0)) /* a store, maybe this one */
      cli_die(CLI_IN_USE, "%s: in use", arg[1]);
  }
  int err = cli_open_store(store, strchr(v->traits, 'R') != NULL);
  if (err != -EBUSY) cli_fail(err, store);
  if (!err && strchr(v->traits, 'T')) cli_catch_signals(cli_on_signal);
  for (i = 0; !status && (i < n || !i); i++) {
    char *operand = i && v->min > 1 ? j.ask.to : j.ask.name;
    if (i < n && snprintf(operand, PATH_MAX, "%s", arg[i]) >= PATH_MAX)
      cli_usage("%s: a name is too long", v->name);
    if (i + 1 >= v->min) /* the last one may come many times */
      status = err ? cli_remote(&j) : cli_do(&j, cli.cas);
  }
  exit(status);
}
#else
#define cli_open_volume(path, name, ex) (-EOPNOTSUPP)
#define cli_command() ((void)0)
#endif

/* Opens a target and adds it. */
static void cli_add(char *path) {
  struct nbdserve_export ex = cli.ex;
  struct nbdserve_flat flat = {.offset = cli.n['o'],
                               .size = cli.n['S'],
                               .create = cli.n['C'],
                               .flags = cli.v['r']   ? NBDSERVE_FLAT_READONLY
                                        : cli.v['T'] ? NBDSERVE_FLAT_TEMPORARY
                                                     : 0};
  flat.dir = getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp";
  if (cli.v['T'] && access(flat.dir, W_OK) < 0) cli_fail(-errno, flat.dir);
  char *equals = path + strcspn(path, "/="), *slash = strrchr(path, '/');
  ex.name = cli.v['e'];
  ex.description = cli.v['D'];
  if (*equals == '=') {
    *equals = 0;
    ex.name = path;
    path = equals + 1;
  }
  char *colons = strstr(path, "::");
  if (!ex.name && cli.ntargets > 1)
    ex.name = colons ? colons + 2 : slash ? slash + 1 : path;
  if (cli.ntargets == 1 && !ex.name) ex.flags |= NBDSERVE_EXPORT_FALLBACK;
  if (cli.ntargets == 1 && ex.name) cli.name = ex.name;
  if (colons && (cli.v['o'] || cli.v['S'] || cli.v['C'] || cli.v['T']))
    cli_usage("%s: no --offset, --size, --create; for -T, clone it", path);
  if (colons) *colons = 0;
  int err = colons ? cli_open_volume(path, colons + 2, &ex) : -EOPNOTSUPP;
  if (colons && !err && !ex.ops) return; /* all of it */
#if !NBDSERVE_NO_FLAT
  if (!colons) err = nbdserve_flat_open(path, &flat, &ex);
#endif
  if ((err == -EACCES || err == -EROFS) && !flat.flags)
    cli_failed("%s: %s; -r serves it read-only", path, u_errno_text(err));
  if (err == -ENOENT && !flat.flags && !flat.create && !colons)
    cli_failed("%s: %s; --create SIZE makes it", path, u_errno_text(err));
  if (err == -EINVAL)
    cli_failed("%s: no file, device or mem:SIZE, or it is not that long", path);
  cli_fail(err, path);
  err = nbdserve_add(cli.server, &ex);
  if (!err) return;
  ex.ops->close(ex.ctx);
  cli_usage("%s: %s", path,
            err == -EEXIST ? "another target has that export name"
                           : "--block-size, name or description out of range");
}

/* Listens; a connected socket, which cannot, is the only client. */
static void cli_listen_on(const char *address) {
  int err = nbdserve_listen(cli.server, address);
  if (err == -ENAMETOOLONG)
    cli_failed("%s: a socket path has at most %u bytes", address,
               (unsigned)sizeof(((struct sockaddr_un *)0)->sun_path) - 1);
  if (err == -EINVAL && cli.in < 0 && strncmp(address, "fd:", 3) == 0)
    cli.in = cli.out = atoi(address + 3);
  else
    cli_fail(err, address);
}

static void cli_listen(void) {
  const char *dirs[] = {getenv("XDG_RUNTIME_DIR"), getenv("TMPDIR"), "/tmp"};
  const char *path = cli.v['U'], *host = cli.v['i'] ? cli.v['i'] : "localhost";
  const char *pid = getenv("LISTEN_PID"), *fds = getenv("LISTEN_FDS");
  char address[PATH_MAX + 8] = "unix:", *sock = address + 5;
  int is_tcp = cli.v['p'] || cli.v['i'], fd = cli.v['f'] ? (int)cli.n['f'] : 3;
  uint64_t n = cli.v['f'] != NULL; /* sockets of who started us, from fd on */
  if (cli.v['s']) cli.in = 0;
  if (cli.v['s']) return;
  if (!n && !path && !is_tcp && pid && fds &&
      strtol(pid, NULL, 10) == (long)getpid())
    u_parse_size(fds, &n); /* systemd, or nbdinfo and its like */
  if (n > SRV_LISTENERS) cli_fail(-EMFILE, "LISTEN_FDS");
  for (uint64_t i = 0; i < n; i++) {
    snprintf(address, sizeof address, "fd:%d", fd + (int)i);
    cli_listen_on(address);
  }
  if (n > 0) return;
  if (path && strcmp(path, "-") != 0) {
    /* a whole path, where it fits, so that the URI works from anywhere */
    if (*path != '/' && getcwd(sock, 100 - u_min(strlen(path), 98)))
      strcat(sock, "/");
    strncat(sock, path, PATH_MAX / 2);
    cli_listen_on(address);
  } else if (path || !is_tcp) { /* in a directory only the owner reaches */
    for (int i = 0; i < 3 && !*cli.dir; i++) {
      if (!dirs[i] || *dirs[i] != '/' || strlen(dirs[i]) > 80)
        continue; /* with the rest it must fit into every system's address */
      snprintf(cli.dir, sizeof cli.dir, "%s/nbdXXXXXX", dirs[i]);
      if (!mkdtemp(cli.dir)) *cli.dir = 0;
    }
    if (!*cli.dir) cli_failed("private socket: no directory for it; use -U");
    strcat(strcpy(sock, cli.dir), "/sock");
    cli_listen_on(address);
    if (chmod(sock, 0600) < 0) cli_fail(-errno, sock);
  }
  if (is_tcp) {
    snprintf(address, sizeof address, "tcp:%s:%s", host,
             cli.v['p'] ? cli.v['p'] : "10809");
    cli_listen_on(address);
    if (strcmp(host, "localhost") != 0 && strcmp(host, "::1") != 0 &&
        strncmp(host, "127.", 4) != 0 && !cli.v['q'])
      cli_say(0, "%s: no authentication: anyone can read and write", host);
  }
  nbdserve_uri(cli.server, cli.name, cli.uri, sizeof cli.uri);
}

/* --run gets variables, as nbdkit has them; the ARGs of a command the URI. */
static void cli_start_command(void) {
  const struct srv_listener *l = cli.server->listeners;
  char nbd[sizeof l->text + 16], **command = cli.command, **p;
  if (!*cli.uri) cli_usage("no URI for the command to use");
  cli.child = fork();
  if (cli.child < 0) cli_fail(-errno, "fork");
  if (cli.child) return;
  cli_catch_signals(SIG_DFL);
  if (command) {
    for (p = command; *p; p++) {
      char *out = u_zalloc(strlen(*p) * (strlen(cli.uri) + 1) + 1), *hit;
      for (; out && (hit = strstr(*p, "{}")) != NULL; *p = hit + 2)
        strcat(strncat(out, *p, (size_t)(hit - *p)), cli.uri);
      if (out) *p = strcat(out, *p);
    }
    execvp(*command, command);
  } else {
    snprintf(nbd, sizeof nbd, "nbd:%s%s", l->is_unix ? "unix:" : "", l->text);
    setenv("nbd", nbd, 1);
    setenv("uri", cli.uri, 1);
    setenv("unixsocket", l->is_unix ? l->text : "", 1);
    setenv("port", l->is_unix ? "" : strrchr(l->text, ':') + 1, 1);
    setenv("exportname", cli.name, 1);
    execl("/bin/sh", "sh", "-c", cli.v['R'], (char *)NULL);
  }
  _exit(cli_say(127, "%s: %s", command ? *command : "/bin/sh",
                u_errno_text(-errno)));
}

static int cli_command_ended(int wait) {
  int st = 0;
  if (!cli.child || waitpid(cli.child, &st, wait ? 0 : WNOHANG) <= 0) return 0;
  cli.status = WIFSIGNALED(st) ? 128 + WTERMSIG(st) : WEXITSTATUS(st);
  cli.child = 0;
  return 1;
}

/* All is open and listening: tells everybody who asked. */
static void cli_ready(void) {
  if (cli.v['P']) { /* in one step: who sees it may connect */
    char temp[PATH_MAX];
    snprintf(temp, sizeof temp, "%.*s.new", PATH_MAX - 8, cli.v['P']);
    int fd = open(temp, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0 || dprintf(fd, "%ld\n", (long)getpid()) < 0 || close(fd) < 0 ||
        rename(temp, cli.v['P']) < 0)
      cli_fail(-errno, cli.v['P']);
    cli.pidfile = cli.v['P'];
  }
  int ready = (int)cli.n['y'];
  if (ready &&
      ((*cli.uri && dprintf(ready, "%s\n", cli.uri) < 0) || close(ready) < 0))
    cli_fail(-errno, "--ready-fd");
  if (cli.v['R'] || cli.command)
    cli_start_command();
  else if (*cli.uri && dprintf(1, "%s\n", cli.uri) < 0)
    cli_fail(-errno, "standard output");
  if (cli.report < 0) return;
  int null = open("/dev/null", O_RDWR);
  if (null < 0 || dup2(null, 0) < 0 || dup2(null, 1) < 0 || dup2(null, 2) < 0)
    cli_fail(-errno, "/dev/null");
  close(null);
  (void)!write(cli.report, "", 1); /* a parent that is gone waits for nothing */
  close(cli.report);
}

/* --fork: the parent waits until the child serves or fails; that returns. */
static void cli_fork(void) {
  int fd[2];
  char ready;
  if (pipe(fd) < 0 || (cli.child = fork()) < 0) cli_fail(-errno, "--fork");
  if (cli.child > 0) {
    close(fd[1]);
    if (read(fd[0], &ready, 1) == 1) _exit(0);
    cli_command_ended(1);
    _exit(cli.status ? cli.status : CLI_FAILED);
  }
  close(fd[0]);
  cli.report = fd[1];
  if (setsid() < 0) cli_fail(-errno, "--fork");
}

static void cli_print_stats(void) {
#define N "%" PRIu64 /* a number */
  struct nbdserve_stats t;
  cli.usr1 = 0;
  nbdserve_stats(cli.server, &t);
  fprintf(stderr,
          cli.v['j'] ? "{\"clients\":" N ",\"clients_now\":" N
                       ",\"requests\":" N ",\"errors\":" N ",\"bytes_read\":" N
                       ",\"bytes_written\":" N ",\"flushes\":" N "}\n"
                     : "nbdserve: " N " clients (" N " now), " N " requests (" N
                       " failed), " N " bytes read, " N " written, " N
                       " flushes\n",
          t.clients, t.clients_now, t.requests, t.errors, t.bytes_read,
          t.bytes_written, t.flushes);
}

static int cli_serve(void) {
  int err = 0, run;
#if !NBDSERVE_NO_CAS /* no other process is made now, to inherit from it */
  if (cli.ctl >= 0 && (os_pipe(cli.ended) || os_thread(cli_control, NULL)))
    cli.ended[0] = 0;
#endif
  if (cli.in >= 0) {
    err = nbdserve_serve(cli.server, cli.in, cli.out, NULL);
    nbdserve_stop(cli.server); /* what follows only flushes */
  }
  while ((run = nbdserve_run(cli.server)) == -EINTR) {
    if (cli.usr1) cli_print_stats();
    if (cli_command_ended(0)) nbdserve_stop(cli.server);
  }
  if (cli.v['z']) cli_print_stats();
  if (cli.child) kill(cli.child, SIGTERM);
  cli_command_ended(1);
  return cli.status ? cli.status : err || run ? CLI_FAILED : 0;
}

static int cli_help(void) {
  puts("usage: nbdserve [OPTION]... [NAME=]TARGET... [-- CMD ARG...]\n"
       "       nbdserve COMMAND ARG...\n"
       "Serves disks over NBD.  TARGET is a file, a block device, mem:SIZE or\n"
       "STORE::VOLUME, STORE::VOLUME@SNAPSHOT or, for all of it, STORE::.\n"
       "With CMD: serves while it runs; {} in an ARG becomes the URI.\n");
  for (const struct cli_option *o = cli_options; *o->name; o++) {
    char letter[] = {'-', (char)o->letter, ',', 0};
    printf("  %3s --%s %-*s %s\n", o->letter > 0 ? letter : "", o->name,
           18 - (int)strlen(o->name), o->arg ? o->arg : "", o->help);
  }
#if !NBDSERVE_NO_CAS
  puts("\nCommands on stores, also while they are served; NAME: VOLUME, "
       "VOLUME@SNAPSHOT\nor the id of a snapshot that was sealed:");
  for (int i = 0; i < CLI_VERBS; i++)
    printf("  %-9s %s\n", cli_verbs[i].name, cli_verbs[i].help);
#endif
  puts("\nNumbers take K, M, G, T, P and E (powers of 1024).  When it listens, "
       "the URI is\nprinted.  Exit status: 0 ok, 1 failed, 2 usage, 3 verify "
       "found damage, 4 target\nin use, or CMD's.");
  return fflush(stdout) == EOF ? CLI_FAILED : 0;
}

int main(int argc, char **argv) {
  int fd = 0; /* 0 to 2 get opened: no image may be one and get messages */
  while (fd >= 0 && fd <= 2)
    fd = open("/dev/null", O_RDWR);
  if (fd > 2) close(fd);
  atexit(cli_close);
  cli.targets = argv; /* gathered at its front, behind what has been read */
  if (argc > 0) cli_parse(argv);
  if (cli.v['h']) return cli_help();
  if (cli.v['V'])
    return printf("nbdserve %s%s%s%s%s%s\n", nbdserve_version(),
                  NBDSERVE_NO_FLAT ? "" : " flat",
                  NBDSERVE_NO_CAS ? "" : " cas", NBDSERVE_NO_TCP ? "" : " tcp",
                  NBDSERVE_NO_THREADS ? "" : " threads",
                  NBDSERVE_POSIX_ONLY ? " posix-only" : "") < 0;
  int level = NBDSERVE_LOG_WARNING + (int)u_min(cli.n['v'], 2);
  struct nbdserve_config config = {
      .version = NBDSERVE_VERSION_NUMBER,
      .max_conn = (uint32_t)cli.n['m'],
      .flags = cli.v['1'] ? NBDSERVE_CONFIG_ONCE : 0,
      .threads = (uint32_t)cli.n['t'],
      .idle_exit_ms = (uint32_t)cli.n['I'] * 1000,
      .log = cli_log,
      .stall_ms = (uint32_t)cli.n['a'] * 1000,
      .without = cli.without,
      .before = cli.v['x'] || cli.v['d'] ? cli_before : NULL,
      .log_level = cli.v['q'] ? NBDSERVE_LOG_ERROR : level};
  cli_fail(nbdserve_new(&cli.server, &config), "start");
  cli_command();
  cli_check();
  if (cli.v['F']) cli_fork();
  cli_catch_signals(cli_on_signal);
  for (int i = 0; i < cli.ntargets; i++)
    cli_add(cli.targets[i]);
  cli_listen();
  cli_ready();
  return cli_serve();
}

#endif /* !NBDSERVE_NO_MAIN */
