/* nbdserve.c - a complete NBD server in one file.
 * SPDX-License-Identifier: 0BSD (full text at the end)
 *
 *   cc nbdserve.c -o nbdserve        a server: see README, or nbdserve --help
 *   cc -DNBDSERVE_NO_MAIN -c ...     a library: see nbdserve.h
 *
 * The protocol is doc/proto.md of NetworkBlockDevice/nbd; its names are used
 * as they stand there.
 *
 * ---- Map ----------------------------------------------------------------
 * A section uses only what stands above it.  KEEP IT SO: nothing else makes a
 * file of this length readable.  `grep -n '==== \[' nbdserve.c` prints it.
 *
 *   [1]  CONFIG        NBDSERVE_  compile-time switches
 *   [2]  PLATFORM      os_        the operating system; all #if on it
 *   [3]  UTIL          u_         bytes, numbers, text, log
 *   [4]  SHA-256       sha_       (comes with the store)
 *   [5]  WIRE          wire_      constants and tables of the protocol
 *   [6]  SOCKET I/O    io_        bytes in and out, deadlines
 *   [7]  EXPORT        ex_        exports, lookup, one request on a backend
 *   [8]  HANDSHAKE     hs_        option haggling
 *   [9]  TRANSMISSION  tx_        requests in, replies out
 *   [10] FLAT          flat_      backend: file, block device, memory
 *   [11] CAS           cas_       (comes with the store)
 *   [12] SERVER        srv_       listeners, clients, the public calls
 *   [13] CLI           cli_       the command
 *   [14] LICENCE       -          its text
 *
 * ---- Threads ------------------------------------------------------------
 *
 *   nbdserve_run -- accept --+-> client thread -- recv, batch, send --+
 *   (caller's thread)        |     +-> workers: what may take long ---+ replies
 *                            +-> client thread ...                    v
 *                                                                   socket
 *
 * One thread serves a client: it takes all that has arrived, does it as one
 * batch and sends all replies at once, so an ordinary request costs no lock
 * that another thread wants.  Flushes, trims and everything a host program's
 * own backend does go to that client's workers, which answer by themselves.
 *
 * ---- Locks, in the order they may be taken -------------------------------
 *   1. nbdserve.lock   exports and their sizes, clients
 *   2. conn.lock       a client's queues and counters
 *   3. conn.sending    one writer on a client's socket at a time (the only
 *                      lock held while a client is waited for: it is its own)
 *   4. ex.serial       one call into an NBDSERVE_SERIAL backend at a time
 *   5. ex.lock         an export's group of waiting flushes
 *   6. flat.lock       what a file has turned out not to support
 */

/* ==== [1] CONFIG (NBDSERVE_) =============================================
 * Set these with -D.  Switches are 0 or 1; 1 takes something out.
 */
#ifndef NBDSERVE_NO_MAIN
#define NBDSERVE_NO_MAIN 0 /* a library only: no main(), no command line */
#endif
#ifndef NBDSERVE_NO_FLAT
#define NBDSERVE_NO_FLAT 0 /* no backend for files, devices and memory */
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
#ifndef NBDSERVE_MALLOC /* or functions of yours with the types of these two */
#define NBDSERVE_MALLOC malloc
#define NBDSERVE_FREE free
#endif
#ifndef NBDSERVE_MAX_REQUEST
#define NBDSERVE_MAX_REQUEST 67108864 /* bytes; a longer WRITE disconnects */
#endif
#ifndef NBDSERVE_MAX_OPTION
#define NBDSERVE_MAX_OPTION 65536 /* bytes of option data that are looked at */
#endif
#ifndef NBDSERVE_STACK
#define NBDSERVE_STACK 262144 /* bytes of stack of the library's threads */
#endif

/* ==== [2] PLATFORM (os_) =================================================
 * Everything that differs between systems.  A call that a system lacks, or
 * that a sandbox forbids, ends in a portable way or in -EOPNOTSUPP; no other
 * section asks which system this is.  tcc has no atomics and no thread-locals,
 * so there are none: locks only.
 */
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

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>
#if !NBDSERVE_NO_TCP
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#endif
#if !NBDSERVE_NO_THREADS
#include <pthread.h>
#endif

void *(NBDSERVE_MALLOC)(size_t);
void (NBDSERVE_FREE)(void *);

/* A compile-time check that every compiler accepts. */
#define STATIC_ASSERT(name, cond) enum { assert_##name = 1 / (int)!!(cond) }

STATIC_ASSERT(off_t_has_64_bits, sizeof(off_t) >= 8);

#if defined __linux__ && !NBDSERVE_POSIX_ONLY
#define OS_LINUX 1
#define OS_MSG_MORE MSG_MORE
#else
#define OS_LINUX 0
#define OS_MSG_MORE 0
#endif
#ifndef SOCK_CLOEXEC
#define SOCK_CLOEXEC 0
#endif
#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0 /* SO_NOSIGPIPE does it: see os_tune */
#endif
#ifdef __GNUC__ /* lets printf-like functions be checked */
#define OS_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))
#else
#define OS_PRINTF(fmt, args)
#endif

#if NBDSERVE_NO_THREADS /* nothing to lock, nobody to wait for */
struct os_mutex { char m; };
struct os_cond { char c; };
#define OS_PTHREAD(x, call) ((void)(x), 0)
#define os_thread(fn, arg) ((void)(fn)(arg), 0) /* at once, to its end */
#else
struct os_mutex { pthread_mutex_t m; };
struct os_cond { pthread_cond_t c; };
#define OS_PTHREAD(x, call) call
#endif
#define os_mutex_init(x) (-OS_PTHREAD(x, pthread_mutex_init(&(x)->m, NULL)))
#define os_mutex_free(x) ((void)OS_PTHREAD(x, pthread_mutex_destroy(&(x)->m)))
#define os_lock(x) ((void)OS_PTHREAD(x, pthread_mutex_lock(&(x)->m)))
#define os_unlock(x) ((void)OS_PTHREAD(x, pthread_mutex_unlock(&(x)->m)))
#define os_cond_init(x) (-OS_PTHREAD(x, pthread_cond_init(&(x)->c, NULL)))
#define os_cond_free(x) ((void)OS_PTHREAD(x, pthread_cond_destroy(&(x)->c)))
#define os_wait(x, y) ((void)OS_PTHREAD(x, pthread_cond_wait(&(x)->c, &(y)->m)))
#define os_wake_one(x) ((void)OS_PTHREAD(x, pthread_cond_signal(&(x)->c)))
#define os_wake_all(x) ((void)OS_PTHREAD(x, pthread_cond_broadcast(&(x)->c)))

#if !NBDSERVE_NO_THREADS
/* Starts a detached thread that takes no signals: those are the host's. */
static int os_thread(void *(*fn)(void *), void *arg) {
  pthread_attr_t attr;
  pthread_t t;
  sigset_t all, old;
  int err;
  sigfillset(&all);
  pthread_attr_init(&attr);
  pthread_attr_setstacksize(&attr, NBDSERVE_STACK);
  pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
  pthread_sigmask(SIG_SETMASK, &all, &old);
  err = pthread_create(&t, &attr, fn, arg);
  pthread_sigmask(SIG_SETMASK, &old, NULL);
  pthread_attr_destroy(&attr);
  return -err;
}
#endif

/* Milliseconds of a clock that is never set. */
static int64_t os_now_ms(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* A descriptor of ours does not survive exec; sets or clears O_NONBLOCK. */
static void os_own(int fd, int nonblock) {
  int fl = fcntl(fd, F_GETFL) & ~O_NONBLOCK;
  fcntl(fd, F_SETFL, nonblock ? fl | O_NONBLOCK : fl);
  fcntl(fd, F_SETFD, FD_CLOEXEC);
}

/* A pipe of which neither end blocks or survives exec. */
static int os_pipe(int fd[2]) {
#if OS_LINUX
  return pipe2(fd, O_CLOEXEC | O_NONBLOCK) < 0 ? -errno : 0;
#else
  if (pipe(fd) < 0) return -errno;
  os_own(fd[0], 1);
  os_own(fd[1], 1);
  return 0;
#endif
}

/* The directory that path is in, opened, or -errno. */
static int os_open_dir(const char *path) {
  char dir[PATH_MAX];
  const char *slash = strrchr(path, '/');
  int n = slash ? (int)(slash - path) + 1 : 0, fd;
  if (snprintf(dir, sizeof dir, "%.*s.", n, path) >= (int)sizeof dir)
    return -ENAMETOOLONG;
  fd = open(dir, O_RDONLY | O_CLOEXEC);
  return fd < 0 ? -errno : fd;
}

/* The next client of a listening socket, blocking, or -errno. */
static int os_accept(int fd) {
#if OS_LINUX
  int c = accept4(fd, NULL, NULL, SOCK_CLOEXEC);
#else
  int c = accept(fd, NULL, NULL);
  if (c >= 0) os_own(c, 0); /* the BSDs inherit O_NONBLOCK */
#endif
  return c < 0 ? -errno : c;
}

/* Prepares a client's socket: no Nagle delay (proto.md, Protocol phases), no
 * SIGPIPE, dead peers noticed.  Not a socket: nothing happens. */
static void os_tune(int fd) {
  int one = 1;
  setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one);
#ifdef SO_NOSIGPIPE
  setsockopt(fd, SOL_SOCKET, SO_NOSIGPIPE, &one, sizeof one);
#endif
#if !NBDSERVE_NO_TCP
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
#endif
  one = 2 << 20; /* a long reply fits: 3 times faster on Linux, 10 on macOS */
  setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &one, sizeof one);
}

/* A pipe for size bytes that need not be copied.  False: there is none. */
static int os_splice_pipe(int fd[2], int size) {
#if OS_LINUX
  return os_pipe(fd) == 0 && fcntl(fd[1], F_SETPIPE_SZ, size) >= size;
#else
  (void)fd, (void)size;
  return 0;
#endif
}

/* Moves up to len bytes from one descriptor to another, one of which is a pipe,
 * *off: if not NULL, where in the file from.  Their number or -1 and errno. */
static ssize_t os_splice(int from, uint64_t *off, int to, size_t len) {
#if OS_LINUX
  loff_t at = off ? (loff_t)*off : 0;
  return splice(from, off ? &at : NULL, to, NULL, len, 0);
#else
  (void)from, (void)off, (void)to, (void)len;
  errno = EOPNOTSUPP;
  return -1;
#endif
}

/* Takes the first done bytes off the n pieces at v. */
static void os_advance(struct iovec **v, int *n, size_t done) {
  for (; *n > 0 && done >= (*v)->iov_len; ++*v, --*n) done -= (*v)->iov_len;
  if (!done) return;
  assert(*n > 0);
  (*v)->iov_base = (char *)(*v)->iov_base + done;
  (*v)->iov_len -= done;
}

#if !NBDSERVE_NO_FLAT

/* Reads or writes all of v[0..n) at off; uses v up.  -EIO: the file is over. */
static int os_transfer(int fd, int writing, struct iovec *v, int n,
                       uint64_t off) {
  while (n > 0) {
    off_t at = (off_t)off;
    ssize_t done;
#if OS_LINUX || (!defined __APPLE__ && !NBDSERVE_POSIX_ONLY)
    if (n > 1)
      done = writing ? pwritev(fd, v, n, at) : preadv(fd, v, n, at);
    else
#endif
      done = writing ? pwrite(fd, v->iov_base, v->iov_len, at)
                     : pread(fd, v->iov_base, v->iov_len, at);
    if (done < 0 && errno == EINTR) continue;
    if (done <= 0) return done < 0 ? -errno : -EIO;
    off += (uint64_t)done;
    os_advance(&v, &n, (size_t)done);
  }
  return 0;
}

/* Puts len bytes at off of a file into a pipe that has room for them. */
static int os_fill_pipe(int fd, uint64_t off, int pipe, uint64_t len) {
  while (len > 0) {
    ssize_t done = os_splice(fd, &off, pipe, (size_t)len);
    if (done < 0 && errno == EINTR) continue;
    if (done <= 0) return done < 0 ? -errno : -EIO;
    off += (uint64_t)done;
    len -= (uint64_t)done;
  }
  return 0;
}

/* All that was written to fd is on the medium afterwards. */
static int os_datasync(int fd) {
  int r;
  do {
#ifdef __APPLE__
    r = fcntl(fd, F_FULLFSYNC);
    if (r < 0 && errno != EINTR && errno != EIO) r = fsync(fd);
#else
    r = fdatasync(fd);
#endif
  } while (r < 0 && errno == EINTR);
  return r < 0 ? -errno : 0;
}

/* The space behind a range: KEEP_SIZE allocates it, with PUNCH_HOLE it is given
 * back and reads as zeroes, with ZERO_RANGE it reads as zeroes and stays.
 * -EINVAL: not at these boundaries.  -EOPNOTSUPP: not here. */
enum { OS_KEEP_SIZE = 1, OS_PUNCH_HOLE = 2 + 1, OS_ZERO_RANGE = 16 + 1 };

static int os_fallocate(int fd, int mode, uint64_t off, uint64_t len) {
#if OS_LINUX
  while (fallocate(fd, mode, (off_t)off, (off_t)len) < 0)
    if (errno != EINTR)
      return errno == ENOSYS || errno == EPERM || errno == ENODEV ? -EOPNOTSUPP
                                                                  : -errno;
  return 0;
#else
  (void)fd, (void)mode, (void)off, (void)len;
  return -EOPNOTSUPP;
#endif
}

/* Is there data at off?  *next: where that answer ends, at most end. */
static int os_is_data(int fd, uint64_t off, uint64_t end, uint64_t *next) {
  int is_data = 1;
  *next = end;
#if defined SEEK_HOLE && !NBDSERVE_POSIX_ONLY
  off_t data = lseek(fd, (off_t)off, SEEK_DATA), to = data;
  is_data = data >= 0 ? (uint64_t)data == off
                      : errno != ENXIO || lseek(fd, 0, SEEK_END) < (off_t)end;
  if (data >= 0 && is_data) to = lseek(fd, data, SEEK_HOLE);
  if (to > (off_t)off && (uint64_t)to < end) *next = (uint64_t)to;
#endif
  (void)fd, (void)off;
  return is_data;
}

/* The range will be read soon.  A hint: nothing can go wrong. */
static void os_willneed(int fd, uint64_t off, uint64_t len) {
#if defined POSIX_FADV_WILLNEED && !NBDSERVE_POSIX_ONLY
  posix_fadvise(fd, (off_t)off, (off_t)len, POSIX_FADV_WILLNEED);
#endif
  (void)fd, (void)off, (void)len;
}

/* Keeps other servers out: a writer everyone, a reader writers.  -EBUSY: one
 * is there.  A file system without locks has none. */
static int os_claim(int fd, int readonly) {
  int r = flock(fd, (readonly ? LOCK_SH : LOCK_EX) | LOCK_NB);
  return r < 0 && (errno == EWOULDBLOCK || errno == EAGAIN) ? -EBUSY : 0;
}

/* A file without a name: in memory, or else in /tmp. */
static int os_nameless_file(void) {
  char path[] = "/tmp/nbdserveXXXXXX";
  int fd = -1;
#if OS_LINUX && defined MFD_CLOEXEC
  fd = memfd_create("nbdserve", MFD_CLOEXEC);
#endif
  if (fd >= 0) return fd;
  fd = mkstemp(path);
  if (fd < 0) return -errno;
  unlink(path);
  fcntl(fd, F_SETFD, FD_CLOEXEC);
  return fd;
}

#endif /* !NBDSERVE_NO_FLAT */

/* ==== [3] UTIL (u_) ======================================================
 * Bytes of the network and of disks go through get and put, nowhere else:
 * big-endian, any alignment.
 */
static uint16_t get16(const unsigned char *p) {
  return (uint16_t)(p[0] << 8 | p[1]);
}

static uint32_t get32(const unsigned char *p) {
  return (uint32_t)get16(p) << 16 | get16(p + 2);
}

static uint64_t get64(const unsigned char *p) {
  return (uint64_t)get32(p) << 32 | get32(p + 4);
}

static void put16(unsigned char *p, unsigned v) {
  p[0] = (unsigned char)(v >> 8);
  p[1] = (unsigned char)v;
}

static void put32(unsigned char *p, uint32_t v) {
  put16(p, v >> 16);
  put16(p + 2, v);
}

static void put64(unsigned char *p, uint64_t v) {
  put32(p, (uint32_t)(v >> 32));
  put32(p + 4, (uint32_t)v);
}

static uint64_t u_min(uint64_t a, uint64_t b) { return a < b ? a : b; }

static int u_is_power_of_2(uint64_t v) { return v && !(v & (v - 1)); }

/* Zeroed memory, or NULL. */
static void *u_zalloc(size_t n) {
  void *p = NBDSERVE_MALLOC(n);
  return p ? memset(p, 0, n) : NULL;
}

/* A number with an optional K M G T P E (powers of 1024), up to INT64_MAX.
 * The character behind it, or NULL. */
static const char *u_size(const char *s, uint64_t *out) {
  static const char units[] = "KMGTPEkmgtpe";
  const char *unit;
  uint64_t v = 0;
  int shift = 0;

  if (*s < '0' || *s > '9') return NULL;
  for (; *s >= '0' && *s <= '9'; s++) {
    if (v > (INT64_MAX - (uint64_t)(*s - '0')) / 10) return NULL;
    v = v * 10 + (uint64_t)(*s - '0');
  }
  unit = *s ? strchr(units, *s) : NULL;
  if (unit) shift = (int)((unit - units) % 6 + 1) * 10;
  if (v > (uint64_t)INT64_MAX >> shift) return NULL;
  *out = v << shift;
  return unit ? s + 1 : s;
}

/* The text of a -errno value.  Only for unknown ones some systems' strerror
 * uses memory that threads share. */
static const char *u_error(int err) { return strerror(-err); }

/* Appends s to the string in buf[size], with every byte that a URI may not
 * hold as %XX.  False when it does not fit. */
static int u_append_uri(char *buf, size_t size, const char *s) {
  static const char plain[] = "-._~/0123456789abcdefghijklmnopqrstuvwxyz"
                              "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
  size_t n = strlen(buf);
  for (; *s; s++) {
    int len = strchr(plain, *s) ? 1 : 3;
    if (n + (size_t)len >= size) return 0;
    n += (size_t)snprintf(buf + n, size - n, len == 1 ? "%c" : "%%%02X",
                          (unsigned char)*s);
  }
  return 1;
}

/* Gives the host a message if it wants that level; control characters (and the
 * second byte of C1 ones), which may come from a client, as '?'. */
static void OS_PRINTF(3, 4) u_log(const struct nbdserve_config *config,
                                  int level, const char *fmt, ...) {
  char text[512], *p;
  va_list ap;
  if (!config->log || level > config->log_level) return;
  va_start(ap, fmt);
  vsnprintf(text, sizeof text, fmt, ap);
  va_end(ap);
  for (p = text; *p; p++)
    if ((unsigned char)*p < 32 || *p == 127 ||
        ((unsigned char)*p == 0xc2 && (unsigned char)p[1] < 0xa0))
      *p = '?';
  config->log(config->ctx, level, text);
}

/* ==== [5] WIRE (wire_) ===================================================
 * The protocol's numbers, spelled as in proto.md, and what is true of each
 * command.  Every message has a fixed head; the sizes of those are here too.
 */
#define NBD_INIT_MAGIC UINT64_C(0x4e42444d41474943)   /* "NBDMAGIC" */
#define NBD_OPTION_MAGIC UINT64_C(0x49484156454f5054) /* "IHAVEOPT" */
#define NBD_REP_MAGIC UINT64_C(0x0003e889045565a9)

/* Error replies to options have bit 31 set, which an enum need not hold. */
#define NBD_REP_ERR_UNSUP 0x80000001u
#define NBD_REP_ERR_INVALID 0x80000003u
#define NBD_REP_ERR_UNKNOWN 0x80000006u
#define NBD_REP_ERR_BLOCK_SIZE_REQD 0x80000008u
#define NBD_REP_ERR_TOO_BIG 0x80000009u

enum { /* handshake: flags of server and client, options, replies, infos */
  NBD_FLAG_FIXED_NEWSTYLE = 1 << 0, NBD_FLAG_NO_ZEROES = 1 << 1,
  NBD_FLAG_C_FIXED_NEWSTYLE = 1 << 0, NBD_FLAG_C_NO_ZEROES = 1 << 1,
  NBD_OPT_EXPORT_NAME = 1, NBD_OPT_ABORT = 2, NBD_OPT_LIST = 3,
  NBD_OPT_INFO = 6, NBD_OPT_GO = 7, NBD_OPT_STRUCTURED_REPLY = 8,
  NBD_OPT_LIST_META_CONTEXT = 9, NBD_OPT_SET_META_CONTEXT = 10,
  NBD_REP_ACK = 1, NBD_REP_SERVER = 2, NBD_REP_INFO = 3,
  NBD_REP_META_CONTEXT = 4,
  NBD_INFO_EXPORT = 0, NBD_INFO_NAME = 1, NBD_INFO_DESCRIPTION = 2,
  NBD_INFO_BLOCK_SIZE = 3
};

enum { /* transmission: magics, flags of the export, commands, replies */
  NBD_REQUEST_MAGIC = 0x25609513, NBD_SIMPLE_REPLY_MAGIC = 0x67446698,
  NBD_STRUCTURED_REPLY_MAGIC = 0x668e33ef,
  NBD_FLAG_HAS_FLAGS = 1 << 0, NBD_FLAG_READ_ONLY = 1 << 1,
  NBD_FLAG_SEND_FLUSH = 1 << 2, NBD_FLAG_SEND_FUA = 1 << 3,
  NBD_FLAG_ROTATIONAL = 1 << 4, NBD_FLAG_SEND_TRIM = 1 << 5,
  NBD_FLAG_SEND_WRITE_ZEROES = 1 << 6, NBD_FLAG_SEND_DF = 1 << 7,
  NBD_FLAG_CAN_MULTI_CONN = 1 << 8, NBD_FLAG_SEND_CACHE = 1 << 10,
  NBD_FLAG_SEND_FAST_ZERO = 1 << 11,
  NBD_CMD_READ = 0, NBD_CMD_WRITE = 1, NBD_CMD_DISC = 2, NBD_CMD_FLUSH = 3,
  NBD_CMD_TRIM = 4, NBD_CMD_CACHE = 5, NBD_CMD_WRITE_ZEROES = 6,
  NBD_CMD_BLOCK_STATUS = 7,
  NBD_CMD_FLAG_FUA = 1 << 0, NBD_CMD_FLAG_NO_HOLE = 1 << 1,
  NBD_CMD_FLAG_DF = 1 << 2, NBD_CMD_FLAG_REQ_ONE = 1 << 3,
  NBD_CMD_FLAG_FAST_ZERO = 1 << 4,
  NBD_REPLY_FLAG_DONE = 1 << 0, NBD_REPLY_TYPE_NONE = 0,
  NBD_REPLY_TYPE_OFFSET_DATA = 1, NBD_REPLY_TYPE_BLOCK_STATUS = 5,
  NBD_REPLY_TYPE_ERROR = (1 << 15) + 1,
  NBD_EPERM = 1, NBD_EIO = 5, NBD_ENOMEM = 12, NBD_EINVAL = 22,
  NBD_ENOSPC = 28, NBD_EOVERFLOW = 75, NBD_ENOTSUP = 95, NBD_ESHUTDOWN = 108
};

enum { /* sizes of messages without their data */
  WIRE_OPTION = 16,   /* magic, option, length */
  WIRE_REP = 20,      /* magic, option, type, length */
  WIRE_REQUEST = 28,  /* magic, flags, type, cookie, offset, length */
  WIRE_SIMPLE = 16,   /* magic, error, cookie */
  WIRE_CHUNK = 20,    /* magic, flags, type, cookie, length */
  WIRE_STRING = 4096  /* the longest name or message */
};

/* What is true of each command: validation and dispatch read it here. */
static const struct wire_cmd {
  const char *name;
  uint16_t flags; /* besides FUA, which any command may carry */
  uint16_t needs; /* transmission flags it is an answer to; 0: always there */
  uint8_t writes; /* refused on a read-only export */
  int beyond;     /* error of a range beyond the end, 0: no range */
} wire_cmds[] = {
    {"NBD_CMD_READ", NBD_CMD_FLAG_DF, 0, 0, -EINVAL},
    {"NBD_CMD_WRITE", 0, 0, 1, -ENOSPC},
    {"NBD_CMD_DISC", 0, 0, 0, 0},
    {"NBD_CMD_FLUSH", 0, NBD_FLAG_SEND_FLUSH, 0, 0},
    {"NBD_CMD_TRIM", 0, NBD_FLAG_SEND_TRIM, 1, -EINVAL},
    {"NBD_CMD_CACHE", 0, NBD_FLAG_SEND_CACHE, 0, -EINVAL},
    {"NBD_CMD_WRITE_ZEROES", NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO,
     NBD_FLAG_SEND_WRITE_ZEROES, 1, -ENOSPC},
    {"NBD_CMD_BLOCK_STATUS", NBD_CMD_FLAG_REQ_ONE, 0, 0, -EINVAL}};

/* The entry of a command from the network, or NULL. */
static const struct wire_cmd *wire_cmd(unsigned type) {
  return type < sizeof wire_cmds / sizeof *wire_cmds ? &wire_cmds[type] : NULL;
}

/* The NBD error nearest to a -errno value (proto.md, Error values). */
static uint32_t wire_error(int err) {
  switch (-err) {
  case 0: return 0;
  case EPERM: case EACCES: case EROFS: return NBD_EPERM;
  case ENOMEM: return NBD_ENOMEM;
  case EINVAL: return NBD_EINVAL;
  case ENOSPC: case EDQUOT: case EFBIG: return NBD_ENOSPC;
  case EOVERFLOW: return NBD_EOVERFLOW;
  case ENOTSUP: return NBD_ENOTSUP;
  case ESHUTDOWN: return NBD_ESHUTDOWN;
  default: return -err == EOPNOTSUPP ? NBD_ENOTSUP : NBD_EIO;
  }
}

/* The head of a last chunk with len bytes of payload; the bytes written. */
static size_t wire_put_chunk(unsigned char *p, unsigned type, uint64_t cookie,
                             uint64_t len) {
  put32(p, NBD_STRUCTURED_REPLY_MAGIC);
  put16(p + 4, NBD_REPLY_FLAG_DONE);
  put16(p + 6, type);
  put64(p + 8, cookie);
  put32(p + 16, (uint32_t)len);
  return WIRE_CHUNK;
}

/* ==== [6] SOCKET I/O (io_) ===============================================
 * Whole messages over sockets and pipes.  -ETIMEDOUT: the deadline has passed.
 * A connection that has a stop pipe looks at it before it waits for input, and
 * gets -ESHUTDOWN; the others are woken by shutdown(2).
 */
enum { IO_GRACE_MS = 5000 };

struct io {
  int in, out;      /* sockets or pipes */
  int stop;         /* readable from nbdserve_stop on; -1: shutdown() is used */
  int64_t deadline; /* in os_now_ms; 0: none */
  int pipe[2];      /* for data that need not be copied */
};

/* Waits until the input can be read, or the output written. */
static int io_wait(const struct io *io, int writing) {
  struct pollfd p[2] = {
      {writing ? io->out : io->in, writing ? POLLOUT : POLLIN, 0},
      {io->stop, POLLIN, 0}}; /* poll skips a negative one */
  int64_t left, deadline = io->deadline;
  int r;

  for (;;) {
    left = deadline ? deadline - os_now_ms() : -1;
    if (deadline && left <= 0) return -ETIMEDOUT;
    r = poll(p, 2, (int)(left > INT_MAX ? INT_MAX : left));
    if (r < 0 && errno != EINTR) return -errno;
    if (r > 0 && p[1].revents && !writing) return -ESHUTDOWN;
    if (r > 0 && p[0].revents) return 0;
    if (r > 0) { /* stopping: what is being sent gets a little longer */
      p[1].fd = -1;
      deadline = os_now_ms() + IO_GRACE_MS;
    }
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
  return io_wait(io, writing);
}

/* Receives up to len bytes, at least one.  Their number, 0 at the end of the
 * stream, or -errno.  all: waits for all of them where that is cheap. */
static ssize_t io_recv(const struct io *io, void *buf, size_t len, int all) {
  int flags = io_flags(io, all ? MSG_WAITALL : 0);
  int err = flags == MSG_DONTWAIT ? io_wait(io, 0) : 0;
  ssize_t n = 0;
  assert(len > 0);
  while (!err) {
    n = recv(io->in, buf, len, flags);
    if (n < 0 && errno == ENOTSOCK) n = read(io->in, buf, len);
    if (n >= 0) return n;
    err = io_again(io, 0);
  }
  return err;
}

/* Receives exactly len bytes: 0, -EPIPE when the stream ends before, -errno. */
static int io_recv_all(const struct io *io, void *buf, size_t len) {
  unsigned char *p = buf;
  while (len > 0) {
    ssize_t n = io_recv(io, p, len, 1);
    if (n <= 0) return n < 0 ? (int)n : -EPIPE;
    p += n;
    len -= (size_t)n;
  }
  return 0;
}

/* Sends all of v[0..n), which it uses up, and then piped bytes out of the
 * pipe.  more: MSG_MORE where other data follows at once, or 0. */
static int io_send(const struct io *io, struct iovec *v, int n, size_t piped,
                   int more) {
  int flags = io_flags(io, 0) | MSG_NOSIGNAL | more, err = 0;
  struct msghdr m = {0};
  ssize_t done;

  assert(n > 0);
  while (n > 0 && !err) {
    m.msg_iov = v;
    m.msg_iovlen = (unsigned)n;
    done = sendmsg(io->out, &m, flags);
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
  while (piped > 0 && !err) {
    done = os_splice(io->pipe[0], NULL, io->out, piped);
    if (done <= 0)
      err = done < 0 ? io_again(io, 1) : -EIO;
    else
      piped -= (size_t)done;
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
 *      wait while one is running are answered together by the next one, with
 *      its result.
 */
struct nbdserve_req {
  uint16_t type, flags; /* NBD_CMD_*, NBD_CMD_FLAG_* */
  uint64_t cookie, off, len;
  unsigned char *buf; /* data of READ and WRITE; reply of BLOCK_STATUS */
  size_t owned;       /* bytes at buf if they are the request's own, else 0 */
  int pipe;           /* READ: takes the data instead of buf; 0: none */
  int err;            /* 0 or -errno */
  const char *why;    /* of an error, for humans; NULL: u_error */
  int written;        /* only the flush that FUA asks for is left to do */
  int deferred;       /* a worker answers it */
  int more;           /* READ: other chunks follow this one */
  int ready;          /* READ: the reply is in the send buffer, or sent */
  struct nbdserve_req *next;
};

struct ex {
  struct nbdserve_export e; /* size: under s->lock */
  int dynamic;              /* from the find callback */
  struct ex *next;
  struct os_mutex serial;
  struct os_mutex lock; /* guards what follows */
  struct os_cond flushed;
  uint64_t nflushes; /* begun so far */
  int flushing;      /* the last of them has not returned */
  uint64_t failed;   /* the number of the last one that failed */
  int failure;       /* and its error */
  char strings[];    /* name and description */
};

enum { SRV_LISTENERS = 32 };

struct srv_listener {
  int fd;
  int is_unix;    /* text is a path that is ours to unlink... */
  struct stat st; /* ...if it still is this socket */
  char text[128]; /* that, HOST:PORT, or "" */
};

struct nbdserve {
  struct nbdserve_config config; /* fixed; defaults filled in */
  int stop[2];                   /* pipe: readable from nbdserve_stop on */
  int wake[2];                   /* pipe: nbdserve_run looks around */
  struct srv_listener listeners[SRV_LISTENERS + 1]; /* localhost is two */
  int nlisteners;
  int64_t idle_from; /* nbdserve_run: when the last client had gone */
  struct os_mutex lock; /* guards what follows */
  struct ex *exports, **last_export;
  struct conn *conns; /* clients being served */
  unsigned nconns;
  struct nbdserve_stats stats; /* of clients that have gone */
};

enum {
  EX_FLAGS = 2 * NBDSERVE_UNSAFE - 1, /* all that there are */
  EX_ZEROES = 1 << 20,             /* bytes of zeroes written at a time */
  EX_EXTENTS = 2048,               /* in one reply, at most */
  EX_EXTENT_HEAD = WIRE_CHUNK + 4, /* in front of them: chunk, context id */
  EX_EXTENTS_SIZE = EX_EXTENT_HEAD + 8 * EX_EXTENTS
};

/* The extents that a backend reports, in the form of the wire. */
struct nbdserve_extents {
  uint64_t left;   /* bytes of the request not yet described */
  uint64_t skip;   /* bytes described already, see nbdserve_extent */
  uint64_t align;  /* boundaries are multiples of it */
  unsigned n, max;
  unsigned char *data; /* [EX_EXTENTS_SIZE] */
};

static void ex_free(struct ex *ex) {
  assert(!ex->flushing);
  if (ex->e.ops && ex->e.ops->close) ex->e.ops->close(ex->e.ctx);
  os_cond_free(&ex->flushed);
  os_mutex_free(&ex->lock);
  os_mutex_free(&ex->serial);
  NBDSERVE_FREE(ex);
}

/* Checks an export as the host describes it and makes a copy with the defaults
 * filled in; the copy owns ctx.  -EINVAL, -ENOMEM: the caller keeps it. */
static int ex_new(struct ex **out, const struct nbdserve_export *from) {
  struct nbdserve_export e = *from;
  size_t n = e.name ? strlen(e.name) : 0;
  size_t d = e.description ? strlen(e.description) : 0;
  struct ex *ex;

  if (!e.min_block) e.min_block = 1;
  if (!e.preferred_block)
    e.preferred_block = e.min_block > 4096 ? e.min_block : 4096;
  if (!e.max_request)
    e.max_request = (uint32_t)u_min(32u << 20, NBDSERVE_MAX_REQUEST);
  if (!e.ops || !e.ops->read || e.size > INT64_MAX || e.flags > EX_FLAGS ||
      !u_is_power_of_2(e.min_block) || e.min_block > 65536 ||
      !u_is_power_of_2(e.preferred_block) || e.preferred_block < 512 ||
      e.preferred_block < e.min_block || e.max_request < e.preferred_block ||
      e.max_request > NBDSERVE_MAX_REQUEST || n > WIRE_STRING ||
      d > WIRE_STRING)
    return -EINVAL;
  if (!e.ops->write) e.flags |= NBDSERVE_READONLY;
  ex = u_zalloc(sizeof *ex + n + d + 2);
  if (!ex) return -ENOMEM;
  if (os_mutex_init(&ex->serial) || os_mutex_init(&ex->lock) ||
      os_cond_init(&ex->flushed)) {
    ex_free(ex); /* without ops: ctx stays the caller's */
    return -ENOMEM;
  }
  if (n) memcpy(ex->strings, e.name, n);
  if (d) memcpy(ex->strings + n + 1, e.description, d);
  e.name = ex->strings;
  e.description = ex->strings + n + 1;
  ex->e = e;
  *out = ex;
  return 0;
}

/* The added export of exactly that name, or NULL.  Holds s->lock. */
static struct ex *ex_by_name(struct nbdserve *s, const char *name) {
  struct ex *ex = s->exports;
  while (ex && strcmp(ex->e.name, name) != 0) ex = ex->next;
  return ex;
}

/* The export a client means: an added one of that name, what the find callback
 * has, for the empty name the first one added, one that takes any name.
 * -ENOENT or what the callback said.  ex_put gives it back. */
static int ex_get(struct nbdserve *s, const char *name, struct ex **out) {
  struct nbdserve_export e = {0};
  struct ex *any;
  int err;

  os_lock(&s->lock);
  *out = ex_by_name(s, name);
  for (any = s->exports; any; any = any->next)
    if ((any->e.flags & NBDSERVE_ANY_NAME) || (!*name && any == s->exports))
      break;
  os_unlock(&s->lock);
  if (*out) return 0;
  *out = any;
  err = s->config.find ? s->config.find(s->config.ctx, name, &e) : -ENOENT;
  if (err) return err == -ENOENT && any ? 0 : err;
  err = ex_new(out, &e);
  if (!err)
    (*out)->dynamic = 1;
  else if (e.ops && e.ops->close)
    e.ops->close(e.ctx);
  return err;
}

static void ex_put(struct ex *ex) {
  if (ex && ex->dynamic) ex_free(ex); /* (E1) */
}

/* The transmission flags of a client: each exactly when it is so. */
static unsigned ex_flags(const struct nbdserve *s, const struct ex *ex,
                         int structured) {
  const struct nbdserve_ops *ops = ex->e.ops;
  unsigned f = NBD_FLAG_HAS_FLAGS;
  if (ex->e.flags & NBDSERVE_READONLY) {
    f |= NBD_FLAG_READ_ONLY;
  } else {
    f |= NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO;
    if (ops->flush) f |= NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA;
    if (ops->trim) f |= NBD_FLAG_SEND_TRIM;
  }
  if (ex->e.flags & NBDSERVE_ROTATIONAL) f |= NBD_FLAG_ROTATIONAL;
  if ((ex->e.flags & NBDSERVE_MULTI_CONN) && s->config.max_conn > 1)
    f |= NBD_FLAG_CAN_MULTI_CONN; /* a second one would wait for ever */
  if (ops->cache) f |= NBD_FLAG_SEND_CACHE;
  if (structured) f |= NBD_FLAG_SEND_DF;
  return f;
}

/* All writes that returned before this call are on permanent storage when it
 * returns 0.  One caller flushes for all that wait (E3). */
static int ex_flush(struct ex *ex) {
  uint64_t mine;
  int err;

  if (!ex->e.ops->flush || (ex->e.flags & NBDSERVE_UNSAFE)) return 0;
  os_lock(&ex->lock);
  mine = ex->nflushes + 1; /* the first that has not begun yet */
  while (ex->flushing && ex->nflushes <= mine)
    os_wait(&ex->flushed, &ex->lock);
  if (ex->nflushes < mine) {
    ex->nflushes = mine;
    ex->flushing = 1;
    os_unlock(&ex->lock);
    if (ex->e.flags & NBDSERVE_SERIAL) os_lock(&ex->serial);
    err = ex->e.ops->flush(ex->e.ctx, 0);
    if (ex->e.flags & NBDSERVE_SERIAL) os_unlock(&ex->serial);
    os_lock(&ex->lock);
    ex->flushing = 0;
    if (err) {
      ex->failed = mine;
      ex->failure = err;
    }
    os_wake_all(&ex->flushed);
  }
  err = ex->failed >= mine ? ex->failure : 0;
  os_unlock(&ex->lock);
  return err;
}

/* Must r be on permanent storage before it is answered? */
static int ex_wants_fua(const struct ex *ex, const struct nbdserve_req *r) {
  return wire_cmd(r->type)->writes && r->len > 0 &&
         ((r->flags & NBD_CMD_FLAG_FUA) ||
          (ex->e.flags & NBDSERVE_WRITETHROUGH));
}

/* And must a flush follow it for that? */
static int ex_wants_flush(const struct ex *ex, const struct nbdserve_req *r) {
  return ex_wants_fua(ex, r) && !(ex->e.flags & NBDSERVE_NATIVE_FUA);
}

/* Appends one extent in the form of the wire, or makes the last one longer. */
static void ex_put_extent(struct nbdserve_extents *x, uint64_t len,
                          uint32_t status) {
  unsigned char *p = x->data + EX_EXTENT_HEAD + 8 * x->n;
  assert(len > 0 && len <= x->left);
  x->left -= len;
  if (x->n && get32(p - 4) == status) {
    put32(p - 8, get32(p - 8) + (uint32_t)len);
  } else if (x->n < x->max) {
    put32(p, (uint32_t)len);
    put32(p + 4, status);
    x->n++;
  } else {
    x->left = 0;
  }
}

int nbdserve_extent(struct nbdserve_extents *x, uint64_t len, uint32_t status) {
  uint64_t part = u_min(len, x->skip), tail;
  x->skip -= part;
  len = u_min(len - part, x->left);
  tail = len == x->left ? 0 : len % x->align;
  if (len > tail) ex_put_extent(x, len - tail, status);
  if (tail && x->left) { /* a boundary inside a block: that block is data */
    part = u_min(x->align, x->left);
    x->skip = part - tail;
    ex_put_extent(x, part, 0);
  }
  return x->left == 0;
}

/* The extents of a request, as the reply that goes out: r->buf, r->owned. */
static int ex_extents(struct ex *ex, struct nbdserve_req *r) {
  int one = (r->flags & NBD_CMD_FLAG_REQ_ONE) != 0, err = 0;
  struct nbdserve_extents x = {.left = r->len, .align = ex->e.min_block,
                               .max = one ? 1 : EX_EXTENTS};
  x.data = NBDSERVE_MALLOC(EX_EXTENTS_SIZE);
  if (!x.data) return -ENOMEM;
  if (ex->e.ops->extents)
    err = ex->e.ops->extents(ex->e.ctx, r->off, r->len,
                             one ? NBDSERVE_REQ_ONE : 0, &x);
  if (!err && !x.n) nbdserve_extent(&x, r->len, 0); /* proto.md: at least one */
  r->buf = x.data; /* freed with r, also when this failed */
  r->owned = EX_EXTENT_HEAD + 8 * x.n;
  return err;
}

static int ex_do(struct ex *ex, struct nbdserve_req *r);

/* Zeroes by writing them, for a backend that has nothing better. */
static int ex_write_zeroes(struct ex *ex, const struct nbdserve_req *r) {
  uint64_t step = u_min(u_min(r->len, EX_ZEROES), ex->e.max_request);
  struct nbdserve_req w = *r;
  int err = 0;

  step -= step % ex->e.min_block; /* both are multiples of it */
  w.type = NBD_CMD_WRITE;
  w.flags &= NBD_CMD_FLAG_FUA;
  w.buf = u_zalloc((size_t)step);
  if (!w.buf) return -ENOMEM;
  for (; w.off < r->off + r->len && !err; w.off += step) {
    w.len = u_min(step, r->off + r->len - w.off);
    err = ex_do(ex, &w);
  }
  NBDSERVE_FREE(w.buf);
  return err;
}

/* Does a request on the backend, but not the flush that may have to follow. */
static int ex_do(struct ex *ex, struct nbdserve_req *r) {
  const struct nbdserve_ops *ops = ex->e.ops;
  uint32_t how = ex->e.flags & (NBDSERVE_NATIVE_FUA | NBDSERVE_UNSAFE);
  uint32_t f = ex_wants_fua(ex, r) && how == NBDSERVE_NATIVE_FUA;
  void *ctx = ex->e.ctx;
  int err = -EINVAL;

  assert(f == 0 || f == NBDSERVE_FUA);
  assert(r->len > 0 && r->off <= INT64_MAX && r->len <= INT64_MAX - r->off);
  assert(r->off % ex->e.min_block == 0); /* (E2) */
  assert(!wire_cmd(r->type)->writes || !(ex->e.flags & NBDSERVE_READONLY));
  if (r->flags & NBD_CMD_FLAG_NO_HOLE) f |= NBDSERVE_NO_HOLE;
  if (r->flags & NBD_CMD_FLAG_FAST_ZERO) f |= NBDSERVE_FAST_ZERO;
  if (ex->e.flags & NBDSERVE_SERIAL) os_lock(&ex->serial);
  switch (r->type) {
  case NBD_CMD_READ: err = ops->read(ctx, r->buf, r->off, r->len, 0); break;
  case NBD_CMD_WRITE: err = ops->write(ctx, r->buf, r->off, r->len, f); break;
  case NBD_CMD_TRIM: err = ops->trim(ctx, r->off, r->len, f); break;
  case NBD_CMD_CACHE: err = ops->cache(ctx, r->off, r->len, 0); break;
  case NBD_CMD_WRITE_ZEROES:
    err = ops->zero ? ops->zero(ctx, r->off, r->len, f) : -ENOTSUP;
    break;
  case NBD_CMD_BLOCK_STATUS: err = ex_extents(ex, r); break;
  default: assert(0); /* (E2) */
  }
  if (ex->e.flags & NBDSERVE_SERIAL) os_unlock(&ex->serial);
  if (err == -ENOTSUP && r->type == NBD_CMD_WRITE_ZEROES &&
      !(f & NBDSERVE_FAST_ZERO))
    err = ex_write_zeroes(ex, r);
  assert(err <= 0);
  return err;
}

/* ==== [8] HANDSHAKE (hs_) ================================================
 * Fixed newstyle negotiation (proto.md, Handshake and Option types).
 *
 * (H1) The length in an option's head alone frames it: all its data is taken
 *      before anything is answered, so the stream stays in step whatever the
 *      data says.
 * (H2) What a client claims is never allocated: data beyond NBDSERVE_MAX_OPTION
 *      is thrown away in pieces.
 * (H3) One deadline covers the whole handshake.
 *
 * Replies gather in the client's send buffer and leave once per option.
 */
enum {
  TX_RBUF = 256 << 10,           /* bytes received at a time */
  TX_WBUF = (256 + 32) << 10,    /* bytes sent at a time */
  TX_SMALL = 128 << 10,          /* longer requests are done one by one */
  TX_SPLICE = 32 << 10,          /* so are READs from here on, if not copied */
  TX_KEEP = 1 << 20,             /* buffer for those; they are in pieces then */
  TX_BATCH = 128,                /* requests in a batch */
  TX_WHY = 80,                   /* bytes of an error's text */
  TX_HEAD = WIRE_CHUNK + 6 + TX_WHY, /* longest reply without its data */
  TX_DEFERRED = 1024,            /* requests waiting for a worker */
  TX_LOGGED = 10                 /* failures of one client in the log */
};

STATIC_ASSERT(option_fits, (int)NBDSERVE_MAX_OPTION <= (int)TX_RBUF);
STATIC_ASSERT(small_fits_in, (int)TX_SMALL + (int)WIRE_REQUEST <= (int)TX_RBUF);
STATIC_ASSERT(small_fits_out, TX_SMALL + TX_HEAD <= TX_WBUF);

/* One client. */
struct conn {
  /* fixed */
  struct nbdserve *s;
  struct conn *next; /* guarded by s->lock */
  struct io io;
  int fd; /* to close; -1: the caller's */
  unsigned id;

  /* the handshake's; what transmission needs is fixed then */
  uint32_t opt; /* the option being answered, and its data */
  const unsigned char *data;
  size_t len;
  int no_zeroes, structured;
  int meta; /* base:allocation may be asked for, of this export: */
  char meta_name[WIRE_STRING + 1];
  struct ex *ex;
  uint64_t size;
  unsigned tflags;
  size_t read_head; /* bytes in front of the data of a READ */
  unsigned max_workers, max_deferred;

  /* the client's thread only */
  unsigned char *big;
  size_t rpos, rend; /* received and not yet looked at */
  size_t wlen;
  struct nbdserve_req reqs[TX_BATCH];
  size_t nreqs;
  int big_write; /* the last request was one: expect another */
  int can_splice; /* long READs go through io.pipe */

  struct os_mutex sending; /* guards out and: */
  int broken;              /* why a send failed: nothing more goes out */

  struct os_mutex lock; /* guards the rest */
  struct os_cond work;  /* something is in the queues, or closing */
  struct os_cond room;  /* something left them, or a worker has gone */
  struct nbdserve_req *queue, **queue_end; /* one worker each */
  struct nbdserve_req *flushes;            /* one worker for all of them */
  int flusher;                             /* which is at it */
  unsigned nqueue, ndeferred, nworkers, nidle;
  int closing; /* the client has gone: workers finish and end */
  unsigned nlogged;
  struct nbdserve_stats stats;

  unsigned char rbuf[TX_RBUF], wbuf[TX_WBUF]; /* the client's thread only */
};

enum { HS_ENTER, HS_MORE, HS_END }; /* what follows an option; or -errno */

/* Tells the log about a client; the text begins with its number. */
#define HS_LOG(c, level, ...) \
  u_log(&(c)->s->config, level, "client " __VA_ARGS__)

/* Sends the replies that have gathered. */
static int hs_send(struct conn *c) {
  struct iovec v = {c->wbuf, c->wlen};
  c->wlen = 0;
  if (!c->broken) c->broken = io_send(&c->io, &v, 1, 0, 0);
  return c->broken;
}

/* Room for len more bytes to send; hs_run sees it when the client is gone. */
static unsigned char *hs_room(struct conn *c, size_t len) {
  assert(len <= TX_WBUF);
  if (c->wlen + len > TX_WBUF) hs_send(c);
  c->wlen += len;
  return c->wbuf + c->wlen - len;
}

/* A reply with len bytes of data, which the caller fills in. */
static unsigned char *hs_reply(struct conn *c, uint32_t type, size_t len) {
  unsigned char *p = hs_room(c, WIRE_REP + len);
  put64(p, NBD_REP_MAGIC);
  put32(p + 8, c->opt);
  put32(p + 12, type);
  put32(p + 16, (uint32_t)len);
  return p + WIRE_REP;
}

static int hs_ack(struct conn *c) {
  hs_reply(c, NBD_REP_ACK, 0);
  return HS_MORE;
}

/* An error reply with a message for humans; haggling goes on. */
static int hs_fail(struct conn *c, uint32_t type, const char *why) {
  size_t n = strlen(why);
  memcpy(hs_reply(c, type, n), why, n);
  HS_LOG(c, NBDSERVE_LOG_INFO, "%u: option %" PRIu32 " refused: %s", c->id,
         c->opt, why);
  return HS_MORE;
}

/* Copies a client's string to out[WIRE_STRING + 1].  0, or an error reply. */
static uint32_t hs_string(const unsigned char *p, size_t n, char *out) {
  if (n > WIRE_STRING) return NBD_REP_ERR_TOO_BIG;
  memcpy(out, p, n);
  out[n] = 0;
  return memchr(out, 0, n) ? NBD_REP_ERR_INVALID : 0;
}

/* Takes a string with its 32-bit length off the option's data, likewise. */
static uint32_t hs_take_string(struct conn *c, char *out) {
  const unsigned char *p = c->data;
  if (c->len < 4 || get32(p) > c->len - 4) return NBD_REP_ERR_INVALID;
  c->data += 4 + get32(p);
  c->len -= 4 + get32(p);
  return hs_string(p + 4, get32(p), out);
}

/* The export of that name; its size is settled, so that all answers agree. */
static int hs_find(struct conn *c, const char *name, struct ex **out) {
  int err = ex_get(c->s, name, out);
  if (err) return err;
  os_lock(&c->s->lock);
  c->size = (*out)->e.size;
  os_unlock(&c->s->lock);
  return 0;
}

/* The export is settled: what transmission needs to know of it. */
static void hs_settle(struct conn *c, struct ex *ex, const char *name) {
  unsigned threads = c->s->config.threads;
  assert(!c->ex);
  c->ex = ex;
  c->tflags = ex_flags(c->s, ex, c->structured);
  c->meta = c->meta && strcmp(c->meta_name, name) == 0;
  assert(c->structured || !c->meta);
  c->read_head = c->structured ? WIRE_CHUNK + 8 : WIRE_SIMPLE;
  c->max_workers = threads > 1 ? threads : 0;
  c->max_deferred = ex->e.ops->batch ? TX_DEFERRED : threads;
  c->can_splice = ex->e.ops->batch && c->io.stop < 0;
  HS_LOG(c, NBDSERVE_LOG_INFO, "%u: export '%s', %" PRIu64 " bytes%s", c->id,
         name, c->size, c->tflags & NBD_FLAG_READ_ONLY ? ", read-only" : "");
}

/* The options.  Each takes its data and answers: HS_*, or -errno to close. */

static int hs_opt_export_name(struct conn *c) {
  size_t n = c->no_zeroes ? 10 : 10 + 124;
  char name[WIRE_STRING + 1];
  unsigned char *p;
  struct ex *ex;
  if (hs_string(c->data, c->len, name) || hs_find(c, name, &ex)) {
    HS_LOG(c, NBDSERVE_LOG_INFO, "%u: no such export; closed", c->id);
    return -ENOENT; /* this option knows no error reply */
  }
  hs_settle(c, ex, name);
  p = memset(hs_room(c, n), 0, n);
  put64(p, c->size);
  put16(p + 8, c->tflags);
  return HS_ENTER;
}

/* One export of LIST; the host's list callback calls it too. */
static int hs_emit(void *arg, const char *name, const char *description) {
  size_t n = name ? strlen(name) : 0;
  size_t d = description ? strlen(description) : 0;
  struct conn *c = arg;
  unsigned char *p;
  if (n > WIRE_STRING || d > WIRE_STRING)
    return 0; /* nobody could ask for it: see ex_new */
  p = hs_reply(c, NBD_REP_SERVER, 4 + n + d);
  put32(p, (uint32_t)n);
  if (n) memcpy(p + 4, name, n);
  if (d) memcpy(p + 4 + n, description, d);
  return c->broken;
}

static int hs_opt_list(struct conn *c) {
  struct nbdserve *s = c->s;
  struct ex *ex;
  int err = 0;
  os_lock(&s->lock);
  for (ex = s->exports; ex && !err; ex = ex->next) {
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
    put64(p + 2, c->size);
    put16(p + 10, ex_flags(c->s, ex, c->structured));
  } else if (type == NBD_INFO_BLOCK_SIZE) {
    p = hs_reply(c, NBD_REP_INFO, 14);
    put32(p + 2, ex->e.min_block);
    put32(p + 6, ex->e.preferred_block);
    put32(p + 10, ex->e.max_request);
  } else {
    p = hs_reply(c, NBD_REP_INFO, 2 + strlen(text));
    memcpy(p + 2, text, strlen(text));
  }
  put16(p, type);
}

/* INFO and GO differ only in what comes afterwards. */
static int hs_opt_go(struct conn *c) {
  char name[WIRE_STRING + 1];
  unsigned wants = 1u << NBD_INFO_EXPORT, type, i;
  struct ex *ex;
  uint32_t bad = hs_take_string(c, name);
  int err;

  if (!bad && (c->len < 2 || c->len != 2 + 2 * (size_t)get16(c->data)))
    bad = NBD_REP_ERR_INVALID;
  if (bad) return hs_fail(c, bad, "malformed request for information");
  err = hs_find(c, name, &ex);
  if (err)
    return hs_fail(c, NBD_REP_ERR_UNKNOWN,
                   err == -ENOENT ? "no such export" : u_error(err));
  for (i = 2; i < c->len; i += 2) { /* others need not be known */
    type = get16(c->data + i);
    if (type <= NBD_INFO_BLOCK_SIZE) wants |= 1u << type;
  }
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

static int hs_opt_structured_reply(struct conn *c) {
  c->structured = 1;
  return hs_ack(c);
}

/* LIST and SET differ in what a query means and in what is remembered. */
static int hs_opt_meta_context(struct conn *c) {
  static const char context[] = "base:allocation";
  const size_t n = sizeof context - 1;
  char name[WIRE_STRING + 1], query[WIRE_STRING + 1];
  int set = c->opt == NBD_OPT_SET_META_CONTEXT, found;
  uint32_t bad, left = 0;
  unsigned char *p;
  struct ex *ex;

  if (!c->structured)
    return hs_fail(c, NBD_REP_ERR_INVALID, "structured replies come first");
  bad = hs_take_string(c, name);
  if (!bad && c->len < 4) bad = NBD_REP_ERR_INVALID;
  if (!bad) {
    left = get32(c->data);
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
  if (ex_get(c->s, name, &ex))
    return hs_fail(c, NBD_REP_ERR_UNKNOWN, "no such export");
  ex_put(ex);
  if (found) {
    p = hs_reply(c, NBD_REP_META_CONTEXT, 4 + n);
    put32(p, set ? 1 : 0); /* ids mean something in SET only */
    memcpy(p + 4, context, n);
    c->meta |= set;
    if (set) strcpy(c->meta_name, name);
  }
  return hs_ack(c);
}

static const struct hs_option {
  uint32_t opt, max; /* bytes of data it may have */
  int (*handler)(struct conn *c);
} hs_options[] = {
    {NBD_OPT_EXPORT_NAME, WIRE_STRING, hs_opt_export_name},
    {NBD_OPT_LIST, 0, hs_opt_list},
    {NBD_OPT_INFO, NBDSERVE_MAX_OPTION, hs_opt_go},
    {NBD_OPT_GO, NBDSERVE_MAX_OPTION, hs_opt_go},
    {NBD_OPT_STRUCTURED_REPLY, 0, hs_opt_structured_reply},
    {NBD_OPT_LIST_META_CONTEXT, NBDSERVE_MAX_OPTION, hs_opt_meta_context},
    {NBD_OPT_SET_META_CONTEXT, NBDSERVE_MAX_OPTION, hs_opt_meta_context}};

static int hs_option(struct conn *c) {
  const struct hs_option *o = hs_options, *end =
      hs_options + sizeof hs_options / sizeof *hs_options;
  unsigned char head[WIRE_OPTION];
  uint32_t len, left, piece;
  int err = io_recv_all(&c->io, head, sizeof head);

  if (err) return err;
  c->opt = get32(head + 8);
  len = get32(head + 12);
  if (get64(head) != NBD_OPTION_MAGIC) {
    HS_LOG(c, NBDSERVE_LOG_INFO, "%u: option magic 0x%016" PRIx64
           ", expected IHAVEOPT; closed", c->id, get64(head));
    return -EPROTO;
  }
  while (o < end && o->opt != c->opt) o++;
  if (len > WIRE_STRING && c->opt == NBD_OPT_EXPORT_NAME) return -ENOENT;
  for (left = len; left > 0 && !err; left -= piece) { /* (H1), (H2) */
    piece = (uint32_t)u_min(left, TX_RBUF);
    err = io_recv_all(&c->io, c->rbuf, piece);
  }
  if (err) return err;
  if (c->opt == NBD_OPT_SET_META_CONTEXT) c->meta = 0; /* also if it fails */
  if (c->opt == NBD_OPT_ABORT) return (void)hs_ack(c), HS_END;
  if (o == end) return hs_fail(c, NBD_REP_ERR_UNSUP, "unknown option");
  if (len > NBDSERVE_MAX_OPTION)
    return hs_fail(c, NBD_REP_ERR_TOO_BIG, "too much data");
  if (len > o->max)
    return hs_fail(c, NBD_REP_ERR_INVALID, "data where none belongs");
  c->data = c->rbuf;
  c->len = len;
  return o->handler(c);
}

/* The handshake: HS_ENTER, HS_END when the client has left in order, -errno. */
static int hs_run(struct conn *c) {
  unsigned char *p = hs_room(c, 18), flags[4];
  int r, err;

  c->io.deadline = os_now_ms() + c->s->config.handshake_ms; /* (H3) */
  put64(p, NBD_INIT_MAGIC);
  put64(p + 8, NBD_OPTION_MAGIC);
  put16(p + 16, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
  err = hs_send(c);
  if (!err) err = io_recv_all(&c->io, flags, sizeof flags);
  if (err) return err;
  if (get32(flags) > (NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES)) {
    HS_LOG(c, NBDSERVE_LOG_INFO, "%u: unknown client flags 0x%08" PRIx32
           "; closed", c->id, get32(flags));
    return -EPROTO;
  }
  c->no_zeroes = (get32(flags) & NBD_FLAG_C_NO_ZEROES) != 0;
  do {
    r = hs_option(c);
    err = hs_send(c);
  } while (r == HS_MORE && !err);
  c->io.deadline = 0;
  return r < 0 || !err ? r : err;
}

/* ==== [9] TRANSMISSION (tx_) =============================================
 * Requests in, replies out.
 *
 *   recv -> tx_take: parse, tx_validate -+-> batch -> tx_exec -> one send
 *                                        +-> tx_big: one by one
 *                                        +-> tx_defer -> tx_worker -> send
 *
 * (T1) Every request gets exactly one reply, DISC none.  The order is free.
 * (T2) A batch is what one recv brought.  READs get their place in the send
 *      buffer before they are done, each with room for its head in front, so
 *      data is never copied; the other replies follow behind them.
 * (T3) A batch's writes are done before its flushes start: a flush covers all
 *      that was answered before it arrived, and more.
 * (T4) Workers do what may take long: flushes, trims and the like, and all
 *      that a host's own backend does.  So no slow request holds up a READ
 *      behind it, while there are workers.
 * (T5) Memory is bounded, whatever a client claims, and nobody waits for it: a
 *      client has its fixed buffers and max_deferred requests of up to TX_KEEP
 *      bytes (EX_EXTENTS_SIZE with ops->batch: no READ or WRITE waits then).
 *      All others are done in pieces as they arrive and leave.
 */

static void tx_free_buf(struct nbdserve_req *r) {
  if (r->owned) NBDSERVE_FREE(r->buf);
  r->buf = NULL;
  r->owned = 0;
}

/* Sends to the client, unless that has failed before. */
static int tx_send(struct conn *c, struct iovec *v, int n, size_t piped,
                   int more) {
  int err;
  os_lock(&c->sending);
  if (!c->broken && (c->broken = io_send(&c->io, v, n, piped, more)) != 0)
    shutdown(c->io.out, SHUT_RDWR); /* the client's thread sees it so */
  err = c->broken;
  os_unlock(&c->sending);
  return err;
}

/* Tells the log of a request that is about to be answered. */
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
    HS_LOG(c, level, "%u: %s (%u) flags=0x%x off=%" PRIu64 " len=%" PRIu64
           ": %s%s", c->id, cmd ? cmd->name : "?", r->type, r->flags, r->off,
           r->len, !r->err ? "ok" : r->why ? r->why : u_error(r->err),
           logged == TX_LOGGED ? "; further failures are not logged" : "");
}

/* Writes all of r's reply but the data of a READ to p[TX_HEAD]; what a
 * BLOCK_STATUS found stays behind its head in r->buf.  The bytes written. */
static size_t tx_put_head(const struct conn *c, const struct nbdserve_req *r,
                          unsigned char *p) {
  const char *why = r->why || !r->err ? r->why : u_error(r->err);
  uint32_t err = wire_error(r->err);
  size_t n;

  if (err == NBD_ENOTSUP && !(r->flags & NBD_CMD_FLAG_FAST_ZERO))
    err = NBD_EINVAL; /* proto.md: only an answer to FAST_ZERO */
  if (err && c->structured) {
    n = (size_t)u_min(strlen(why), TX_WHY);
    put32(p + WIRE_CHUNK, err);
    put16(p + WIRE_CHUNK + 4, (unsigned)n);
    memcpy(p + WIRE_CHUNK + 6, why, n);
    return wire_put_chunk(p, NBD_REPLY_TYPE_ERROR, r->cookie, 6 + n) + 6 + n;
  }
  if (!err && r->type == NBD_CMD_BLOCK_STATUS) {
    assert(r->owned > EX_EXTENT_HEAD);
    put32(p + WIRE_CHUNK, 1); /* the id of base:allocation */
    return wire_put_chunk(p, NBD_REPLY_TYPE_BLOCK_STATUS, r->cookie,
                          r->owned - WIRE_CHUNK) + 4;
  }
  if (err || !c->structured || r->type != NBD_CMD_READ) {
    put32(p, NBD_SIMPLE_REPLY_MAGIC);
    put32(p + 4, err);
    put64(p + 8, r->cookie);
    return WIRE_SIMPLE;
  }
  if (!r->len) return wire_put_chunk(p, NBD_REPLY_TYPE_NONE, r->cookie, 0);
  n = wire_put_chunk(p, NBD_REPLY_TYPE_OFFSET_DATA, r->cookie, 8 + r->len);
  if (r->more) put16(p + 4, 0); /* not NBD_REPLY_FLAG_DONE */
  put64(p + n, r->off);
  return n + 8;
}

/* Answers the requests of a list, in as few sends as possible, and frees what
 * they own.  The replies that lie ready in the send buffer go first. */
static int tx_answer(struct conn *c, struct nbdserve_req *list, size_t ready) {
  unsigned char heads[32 * TX_HEAD];
  struct nbdserve_req *r;
  size_t sent = 0;
  int err = 0, split;

  os_lock(&c->lock);
  split = ready && !list->next && !c->ndeferred; /* no worker comes between */
  for (r = list; r; r = r->next) {
    assert(r->err <= 0 && !r->deferred);
    c->stats.requests++;
    c->stats.errors += r->err != 0;
    if (!r->err && r->type == NBD_CMD_READ) c->stats.bytes_read += r->len;
    if (!r->err && r->type == NBD_CMD_WRITE) c->stats.bytes_written += r->len;
  }
  os_unlock(&c->lock);
  for (r = list; r; r = r->next) tx_log(c, r);
  if (split) { /* a lone READ: its head already wakes the */
    struct iovec head = {c->wbuf, c->read_head}; /* client, on a processor of */
    assert(list->ready); /* its own while the data is still being copied */
    err = tx_send(c, &head, 1, 0, OS_MSG_MORE);
    sent = c->read_head;
  }
  for (r = list; r && !err; ready = sent = 0) {
    struct iovec v[] = {{c->wbuf + sent, ready - sent}, {heads, 0}, {NULL, 0}};
    size_t piped = 0;
    for (; r && !piped && !v[2].iov_len &&
           v[1].iov_len + TX_HEAD <= sizeof heads; r = r->next) {
      if (r->ready) continue;
      v[1].iov_len += tx_put_head(c, r, heads + v[1].iov_len);
      v[2].iov_base = r->buf;
      if (!r->err && r->type == NBD_CMD_READ)
        *(r->pipe ? &piped : &v[2].iov_len) = (size_t)r->len;
      if (r->err || r->type != NBD_CMD_BLOCK_STATUS) continue;
      v[2].iov_base = r->buf + EX_EXTENT_HEAD;
      v[2].iov_len = r->owned - EX_EXTENT_HEAD;
    }
    err = tx_send(c, v, v[2].iov_len ? 3 : v[1].iov_len ? 2 : 1, piped,
                  piped ? OS_MSG_MORE : 0);
  }
  for (r = list; r; r = r->next) tx_free_buf(r);
  return err;
}

/* Is only a flush left to do for r? */
static int tx_is_flush(const struct nbdserve_req *r) {
  return r->type == NBD_CMD_FLUSH || r->written;
}

/* Does what a worker took, one request or any number that want a flush, and
 * answers it.  The number of requests. */
static unsigned tx_work(struct conn *c, struct nbdserve_req *list) {
  struct nbdserve_req *r;
  unsigned n = 0;
  int err = 0;

  assert(tx_is_flush(list) || !list->next);
  if (!tx_is_flush(list)) err = ex_do(c->ex, list);
  if (!err && (tx_is_flush(list) || ex_wants_flush(c->ex, list)))
    err = ex_flush(c->ex);
  for (r = list; r; r = r->next) r->err = err;
  tx_answer(c, list, 0);
  for (; list; list = r, n++) {
    r = list->next;
    NBDSERVE_FREE(list);
  }
  return n;
}

/* A worker of a client: takes from the queues until the client has gone. */
static void *tx_worker(void *arg) {
  struct conn *c = arg;
  struct nbdserve_req *list;
  unsigned n;

  os_lock(&c->lock);
  for (;;) {
    int flush = c->flushes && !c->flusher;
    if (flush) {
      list = c->flushes;
      c->flushes = NULL;
      c->flusher = 1;
    } else if (c->queue) {
      list = c->queue;
      c->queue = list->next;
      if (!c->queue) c->queue_end = &c->queue;
      list->next = NULL;
      c->nqueue--;
    } else if (c->closing) {
      break; /* flushes that came meanwhile are the flusher's */
    } else {
      c->nidle++;
      os_wait(&c->work, &c->lock);
      c->nidle--;
      continue;
    }
    os_unlock(&c->lock);
    n = tx_work(c, list);
    os_lock(&c->lock);
    if (flush) c->flusher = 0;
    assert(c->ndeferred >= n);
    c->ndeferred -= n;
    os_wake_all(&c->room);
  }
  c->nworkers--;
  os_wake_all(&c->room);
  os_unlock(&c->lock);
  return NULL;
}

/* Hands a request to the workers, with its buffer if that is its own.  False
 * when there are none: then the caller does it. */
static int tx_defer(struct conn *c, const struct nbdserve_req *r) {
  struct nbdserve_req *q = c->max_workers ? NBDSERVE_MALLOC(sizeof *q) : NULL;
  unsigned takers; /* workers that are wanted */

  assert(!r->err && !r->deferred);
  if (!q) return 0;
  *q = *r;
  q->next = NULL;
  os_lock(&c->lock);
  while (c->ndeferred >= c->max_deferred) os_wait(&c->room, &c->lock);
  takers = c->nqueue + !tx_is_flush(q) +
           (!c->flusher && (c->flushes || tx_is_flush(q)));
  if (takers > c->nidle && c->nworkers < c->max_workers &&
      os_thread(tx_worker, c) == 0)
    c->nworkers++;
  if (!c->nworkers) {
    os_unlock(&c->lock);
    NBDSERVE_FREE(q);
    return 0;
  }
  c->ndeferred++;
  if (tx_is_flush(q)) {
    q->next = c->flushes;
    c->flushes = q;
  } else {
    *c->queue_end = q;
    c->queue_end = &q->next;
    c->nqueue++;
  }
  os_wake_one(&c->work);
  os_unlock(&c->lock);
  return 1;
}

/* Checks a request against all that was negotiated; everything behind this
 * relies on it.  Sets r->err and r->why. */
static void tx_validate(const struct conn *c, struct nbdserve_req *r) {
  const struct wire_cmd *cmd = wire_cmd(r->type);
  int fua = c->tflags & NBD_FLAG_SEND_FUA ? NBD_CMD_FLAG_FUA : 0;
  int no_df = c->tflags & NBD_FLAG_SEND_DF ? 0 : NBD_CMD_FLAG_DF;
  int is_status = r->type == NBD_CMD_BLOCK_STATUS, err = -EINVAL;

  r->why =
      !cmd ? "unknown command"
      : cmd->writes && (c->tflags & NBD_FLAG_READ_ONLY)
          ? ((void)(err = -EPERM), "the export is read-only")
      : cmd->beyond && (r->off > c->size || r->len > c->size - r->off)
          ? ((void)(err = cmd->beyond), "beyond the end of the export")
      : is_status && !c->meta ? "no metadata context was negotiated"
      : ~c->tflags & cmd->needs ? "the export does not offer it"
      : r->flags & ~((cmd->flags & ~no_df) | fua) ? "flag does not apply"
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

/* Does the batch's requests and the flushes they want, or defers them (T4). */
static void tx_do(struct conn *c, struct nbdserve_req *r, size_t n) {
  void (*batch)(void *, struct nbdserve_req *, size_t) = c->ex->e.ops->batch;
  size_t i, j;

  for (i = 0; i < n; i = j) {
    j = i + 1;
    if (r[i].err || !r[i].len) continue; /* FLUSH has no length either */
    if (batch && r[i].type <= NBD_CMD_WRITE) {
      while (j < n && !r[j].err && r[j].len && r[j].type <= NBD_CMD_WRITE) j++;
      batch(c->ex->e.ctx, r + i, j - i);
    } else {
      r[i].deferred = r[i].type > NBD_CMD_WRITE && tx_defer(c, r + i);
      if (!r[i].deferred) r[i].err = ex_do(c->ex, r + i);
    }
  }
  for (i = 0; i < n; i++) { /* (T3) */
    if (r[i].err || r[i].deferred) continue;
    r[i].written = ex_wants_flush(c->ex, r + i);
    if (!tx_is_flush(r + i)) continue;
    r[i].deferred = tx_defer(c, r + i);
    if (!r[i].deferred) r[i].err = ex_flush(c->ex);
  }
}

/* Does the batch and answers it: failed READs are taken out of the send buffer,
 * the others completed there (T2).  0, or -errno to close. */
static int tx_exec(struct conn *c) {
  struct nbdserve_req *r = c->reqs, *list = NULL, **end = &list;
  size_t n = c->nreqs, head = c->read_head, gap = 0, ready = c->wlen;

  if (!n) return 0;
  tx_do(c, r, n);
  c->nreqs = c->wlen = 0;
  for (; n > 0; n--, r++) {
    if (r->deferred) continue;
    *end = r;
    end = &r->next;
    if (r->type != NBD_CMD_READ || !r->buf) continue;
    if (r->err) {
      gap += head + (size_t)r->len;
      continue;
    }
    if (gap) memmove(r->buf - gap, r->buf, (size_t)r->len);
    tx_put_head(c, r, r->buf - gap - head);
    r->ready = 1;
  }
  assert(gap <= ready);
  return tx_answer(c, list, ready - gap);
}

/* Puts a request into the batch, which is done first if it is full. */
static int tx_add(struct conn *c, const struct nbdserve_req *r) {
  int is_read = r->type == NBD_CMD_READ && !r->err && r->len;
  size_t slot = is_read ? c->read_head + (size_t)r->len : 0;
  struct nbdserve_req *q;
  int err = 0;
  assert(r->err || r->len <= TX_SMALL || r->type > NBD_CMD_WRITE);
  if (c->nreqs == TX_BATCH || c->wlen + slot > TX_WBUF) err = tx_exec(c);
  if (err) return err;
  q = &c->reqs[c->nreqs++];
  *q = *r;
  if (slot) q->buf = c->wbuf + c->wlen + c->read_head;
  c->wlen += slot;
  assert(c->wlen <= TX_WBUF);
  return 0;
}

/* A long READ whose data need not be copied: is it in the pipe? */
static int tx_splice(struct conn *c, struct nbdserve_req *r) {
  if (r->type != NBD_CMD_READ || r->off % 4096 + r->len > TX_KEEP) return 0;
  if (c->can_splice && c->io.pipe[0] < 0)
    c->can_splice = os_splice_pipe(c->io.pipe, TX_KEEP);
  if (!c->can_splice) return 0;
  r->pipe = c->io.pipe[1];
  c->ex->e.ops->batch(c->ex->e.ctx, r, 1);
  if (!r->err) return 1;
  r->err = r->pipe = 0;
  c->can_splice = 0; /* never again: there may be something left in it */
  return 0;
}

/* Takes len bytes of payload: what is here, the rest from the socket. */
static int tx_payload(struct conn *c, unsigned char *buf, uint64_t len) {
  size_t part = (size_t)u_min(len, c->rend - c->rpos);
  memcpy(buf, c->rbuf + c->rpos, part);
  c->rpos += part;
  return io_recv_all(&c->io, buf + part, (size_t)len - part);
}

/* A long WRITE, in pieces; nothing is done of a refused one. */
static int tx_long_write(struct conn *c, struct nbdserve_req *r) {
  struct nbdserve_req p = *r;
  uint64_t left; /* a refused one may end beyond 2^64 */
  int err = 0;
  assert(!c->nreqs && r->len > 0);
  p.buf = c->big;
  for (left = r->len; left > 0 && !err; left -= p.len, p.off += p.len) {
    p.len = u_min(left, TX_KEEP);
    err = tx_payload(c, p.buf, p.len);
    if (!err && !r->err) r->err = ex_do(c->ex, &p);
  }
  c->big_write = 1;
  return err;
}

/* A long READ, in pieces: as chunks of a structured reply.  A simple one cannot
 * be taken back, so one of several pieces is read twice, to see that it can. */
static int tx_long_read(struct conn *c, struct nbdserve_req *r) {
  int pass = !c->structured && r->len > TX_KEEP ? 0 : 1, err = 0;
  uint64_t end = r->off + r->len;
  struct nbdserve_req p = *r;

  p.buf = c->big + TX_HEAD;
  os_lock(&c->lock); /* no worker's reply may come between the pieces */
  while (!pass && c->ndeferred) os_wait(&c->room, &c->lock);
  os_unlock(&c->lock);
  for (; pass < 2; pass++)
    for (p.off = r->off; p.off < end; p.off += p.len) {
      size_t head = c->structured || p.off == r->off ? c->read_head : 0;
      struct iovec v = {p.buf - head, head};
      p.len = u_min(end - p.off, TX_KEEP);
      p.more = p.off + p.len < end;
      r->err = ex_do(c->ex, &p);
      if (r->err && pass && !head) return r->err; /* proto.md: disconnect */
      if (r->err) return tx_answer(c, r, 0);
      if (head) tx_put_head(c, &p, p.buf - head);
      v.iov_len += (size_t)p.len;
      if (pass) err = tx_send(c, &v, 1, 0, 0);
      if (err) return err;
    }
  r->ready = 1;
  return tx_answer(c, r, 0);
}

/* A READ or WRITE behind the batch: a long one, or one for a worker. */
static int tx_big(struct conn *c, struct nbdserve_req *r, int defer) {
  int is_write = r->type == NBD_CMD_WRITE, err = 0;

  if (defer && r->len <= TX_KEEP) r->buf = NBDSERVE_MALLOC((size_t)r->len);
  if (r->buf) {
    r->owned = (size_t)r->len;
    if (is_write) err = tx_payload(c, r->buf, r->len);
    if (!err && tx_defer(c, r)) return 0;
    if (!err) r->err = ex_do(c->ex, r);
  } else if (tx_splice(c, r)) {
    return tx_answer(c, r, 0);
  } else {
    if (!c->big) c->big = NBDSERVE_MALLOC(TX_HEAD + TX_KEEP);
    if (!c->big) return -ENOMEM; /* for not even a megabyte */
    if (!is_write) return tx_long_read(c, r);
    err = tx_long_write(c, r);
  }
  if (!err && !r->err && ex_wants_flush(c->ex, r)) {
    tx_free_buf(r);
    r->written = 1;
    if (tx_defer(c, r)) return 0;
    r->err = ex_flush(c->ex);
  }
  if (!err) return tx_answer(c, r, 0);
  tx_free_buf(r);
  return err;
}

enum { TX_NEXT, TX_MORE, TX_DISC };

/* Takes the next request out of the receive buffer.  TX_NEXT, TX_MORE when it
 * is not all there yet, TX_DISC, or -errno to close. */
static int tx_take(struct conn *c) {
  unsigned char *p = c->rbuf + c->rpos;
  struct nbdserve_req r;
  uint64_t payload;
  int err, defer;

  if (c->rend - c->rpos < WIRE_REQUEST) return TX_MORE;
  memset(&r, 0, sizeof r);
  r.flags = get16(p + 4);
  r.type = get16(p + 6);
  r.cookie = get64(p + 8);
  r.off = get64(p + 16);
  r.len = get32(p + 24);
  payload = r.type == NBD_CMD_WRITE ? r.len : 0;
  if (get32(p) != NBD_REQUEST_MAGIC || payload > NBDSERVE_MAX_REQUEST) {
    err = tx_exec(c);
    HS_LOG(c, NBDSERVE_LOG_INFO, "%u: request magic 0x%08" PRIx32 ", %" PRIu64
           " bytes of payload; closed", c->id, get32(p), payload);
    return err ? err : -EPROTO;
  }
  if (r.type == NBD_CMD_DISC) return TX_DISC;
  if (r.type == NBD_CMD_FLUSH) r.off = r.len = 0; /* reserved */
  tx_validate(c, &r);
  defer = !c->ex->e.ops->batch && c->max_workers && r.len && !r.err;
  if (r.err ? payload > TX_SMALL
            : r.type <= NBD_CMD_WRITE && (r.len > TX_SMALL || defer ||
              (payload == 0 && r.len >= TX_SPLICE && c->can_splice))) {
    c->rpos += WIRE_REQUEST;
    err = tx_exec(c);
    return err ? err : tx_big(c, &r, defer);
  }
  if (c->rend - c->rpos < WIRE_REQUEST + payload) return TX_MORE;
  c->rpos += WIRE_REQUEST + (size_t)payload;
  if (payload) r.buf = p + WIRE_REQUEST;
  return tx_add(c, &r);
}

/* Receives more behind what is there.  0, 1 at the end, or -errno. */
static int tx_fill(struct conn *c) {
  size_t left = c->rend - c->rpos, want = TX_RBUF - left;
  ssize_t n;

  assert(c->rpos <= c->rend && c->rend <= TX_RBUF);
  assert(!c->nreqs && !c->wlen && want > 0); /* WRITEs of the batch lie there */
  if (c->rpos) memmove(c->rbuf, c->rbuf + c->rpos, left);
  c->rpos = 0;
  c->rend = left;
  if (c->big_write && want > 4096)
    want = 4096; /* so that little of the next payload need be copied */
  c->big_write = 0;
  n = io_recv(&c->io, c->rbuf + left, want, 0);
  if (n <= 0) return n < 0 ? (int)n : left ? -EPIPE : 1;
  c->rend += (size_t)n;
  return 0;
}

/* Serves the client until it leaves.  0, or the reason as -errno. */
static int tx_run(struct conn *c) {
  int r, err;

  do {
    do r = tx_take(c);
    while (r == TX_NEXT);
    err = r < 0 ? r : tx_exec(c);
    if (r == TX_MORE && !err) err = tx_fill(c);
  } while (r == TX_MORE && !err);
  os_lock(&c->lock);
  c->closing = 1;
  os_wake_all(&c->work);
  while (c->nworkers) os_wait(&c->room, &c->lock);
  assert(!c->queue && !c->flushes && !c->ndeferred);
  os_unlock(&c->lock);
  return err > 0 ? 0 : err;
}

/* ==== [10] FLAT (flat_) ==================================================
 * A regular file or block device, served as it is.
 *
 * (F1) After a failed fdatasync the kernel may have dropped what it could not
 *      write, and the next one says all is well.  So the first failure is for
 *      good: every later write and flush fails until the file is opened anew.
 * (F2) Calls that a system, file system or sandbox may lack are tried until
 *      they first say so; from then on the portable way is taken.
 * (F3) Nothing here depends on a file offset, so any number of threads may
 *      call.
 */
#if !NBDSERVE_NO_FLAT

enum { FLAT_RUN = 64 };          /* neighbours joined into one call */
enum { FLAT_FAILED = 1 << 30 };  /* (F1), beside the modes of os_fallocate */

struct flat {
  int fd;               /* fixed */
  uint64_t offset;      /* fixed: byte 0 of the export in the file */
  struct os_mutex lock; /* guards: */
  int lacks;            /* FLAT_FAILED, and 1 << mode for each mode (F2) */
};

/* What f lacks, after adding to it. */
static int flat_lacks(struct flat *f, int more) {
  int lacks;
  os_lock(&f->lock);
  lacks = f->lacks |= more;
  os_unlock(&f->lock);
  return lacks;
}

/* Does r[0..n), all READs or all WRITEs of neighbouring ranges, in one call. */
static int flat_transfer(struct flat *f, const struct nbdserve_req *r,
                         size_t n) {
  struct iovec v[FLAT_RUN];
  size_t i;
  assert(n > 0 && n <= FLAT_RUN);
  if (r->pipe && f->offset % 4096) return -EINVAL; /* pages would not fit */
  if (r->pipe) return os_fill_pipe(f->fd, f->offset + r->off, r->pipe, r->len);
  for (i = 0; i < n; i++) {
    v[i].iov_base = r[i].buf;
    v[i].iov_len = (size_t)r[i].len;
    assert(i == 0 || r[i].off == r[i - 1].off + r[i - 1].len);
  }
  return os_transfer(f->fd, r->type == NBD_CMD_WRITE, v, (int)n,
                     f->offset + r->off);
}

/* Does READs and WRITEs in their order, neighbours together. */
static void flat_batch(void *ctx, struct nbdserve_req *r, size_t n) {
  struct flat *f = ctx;
  int failed = flat_lacks(f, 0) & FLAT_FAILED, err;
  size_t i, j, k;
  for (i = 0; i < n; i = j) {
    for (j = i + 1; j < n && j - i < FLAT_RUN && r[j].type == r[i].type &&
                    r[j].off == r[j - 1].off + r[j - 1].len;)
      j++;
    err = failed && r[i].type == NBD_CMD_WRITE ? -EIO
                                               : flat_transfer(f, r + i, j - i);
    for (k = i; k < j; k++) /* only those that fail by themselves have failed */
      r[k].err = err && j - i > 1 ? flat_transfer(f, r + k, 1) : err;
  }
}

static int flat_read(void *ctx, void *buf, uint64_t off, uint64_t len,
                     uint32_t flags) {
  struct nbdserve_req r = {.type = NBD_CMD_READ, .buf = buf, .off = off,
                           .len = len};
  (void)flags;
  flat_batch(ctx, &r, 1);
  return r.err;
}

static int flat_write(void *ctx, const void *buf, uint64_t off, uint64_t len,
                      uint32_t flags) {
  struct nbdserve_req r = {.type = NBD_CMD_WRITE, .off = off, .len = len,
                           .buf = (unsigned char *)(uintptr_t)buf};
  assert(!(flags & NBDSERVE_FUA)); /* not NATIVE_FUA: a flush follows */
  (void)flags;
  flat_batch(ctx, &r, 1);
  return r.err;
}

static int flat_flush(void *ctx, uint32_t flags) {
  struct flat *f = ctx;
  int err = flat_lacks(f, 0) & FLAT_FAILED ? -EIO : os_datasync(f->fd);
  (void)flags;
  if (err) flat_lacks(f, FLAT_FAILED); /* (F1) */
  return err;
}

/* os_fallocate on a range of the export; -EOPNOTSUPP: do it another way. */
static int flat_allocate(struct flat *f, int mode, uint64_t off, uint64_t len) {
  int lacks = flat_lacks(f, 0), err = -EOPNOTSUPP;
  if (lacks & FLAT_FAILED) return -EIO;
  off += f->offset;
  if (!(lacks & 1 << mode)) err = os_fallocate(f->fd, mode, off, len);
  if (err == -EOPNOTSUPP) flat_lacks(f, 1 << mode); /* (F2) */
  return err == -EINVAL ? -EOPNOTSUPP : err;
}

static int flat_trim(void *ctx, uint64_t off, uint64_t len, uint32_t flags) {
  int err = flat_allocate(ctx, OS_PUNCH_HOLE, off, len);
  (void)flags;
  return err == -EOPNOTSUPP ? 0 : err; /* a trim may do nothing */
}

static int flat_zero(void *ctx, uint64_t off, uint64_t len, uint32_t flags) {
  struct flat *f = ctx;
  int err = -EOPNOTSUPP;
  if (!(flags & NBDSERVE_NO_HOLE))
    err = flat_allocate(f, OS_PUNCH_HOLE, off, len);
  if (err == -EOPNOTSUPP) err = flat_allocate(f, OS_ZERO_RANGE, off, len);
  if (err == -EOPNOTSUPP) { /* tmpfs: a hole, filled; first see if it can be */
    err = flat_allocate(f, OS_KEEP_SIZE, off, len);
    if (!err) err = flat_allocate(f, OS_PUNCH_HOLE, off, len);
    if (!err) err = flat_allocate(f, OS_KEEP_SIZE, off, len);
  }
  return err == -EOPNOTSUPP ? -ENOTSUP : err; /* the engine writes them */
}

static int flat_cache(void *ctx, uint64_t off, uint64_t len, uint32_t flags) {
  struct flat *f = ctx;
  (void)flags;
  os_willneed(f->fd, f->offset + off, len);
  return 0;
}

static int flat_extents(void *ctx, uint64_t off, uint64_t len, uint32_t flags,
                        struct nbdserve_extents *out) {
  struct flat *f = ctx;
  uint64_t pos = f->offset + off, end = pos + len, next;
  int is_data, enough = 0;
  (void)flags;
  for (; pos < end && !enough; pos = next) {
    is_data = os_is_data(f->fd, pos, end, &next);
    assert(next > pos);
    enough = nbdserve_extent(out, next - pos,
                             is_data ? 0 : NBDSERVE_HOLE | NBDSERVE_ZERO);
  }
  return 0;
}

static void flat_close(void *ctx) {
  struct flat *f = ctx;
  close(f->fd); /* after the last flush nothing is left that could fail */
  os_mutex_free(&f->lock);
  NBDSERVE_FREE(f);
}

static const struct nbdserve_ops flat_ops = {
    flat_read,  flat_write,   flat_flush, flat_trim, flat_zero,
    flat_cache, flat_extents, flat_close, flat_batch};

/* Gives a new file its size, lasting before a client can rely on it. */
static int flat_make_lasting(int fd, const char *path, uint64_t size) {
  int err = ftruncate(fd, (off_t)size) < 0 || fsync(fd) < 0 ? -errno : 0;
  int dir = err ? -1 : os_open_dir(path);
  if (!err && dir < 0) err = dir;
  if (!err && fsync(dir) < 0 && errno != EINVAL) err = -errno;
  if (dir >= 0) close(dir);
  return err;
}

/* Opens the file, or makes it if it is missing and may be made; *size is what
 * it holds.  The descriptor or -errno. */
static int flat_open_file(const char *path, const struct nbdserve_flat *o,
                          uint64_t *size) {
  int flags = O_CLOEXEC | O_NOCTTY | O_NONBLOCK; /* a FIFO must not hang us */
  int readonly = o->flags != 0, fd, err = 0;
  struct stat st;
  off_t end = 0;

  if (strncmp(path, "mem:", 4) == 0) {
    path = u_size(path + 4, size);
    fd = path && !*path ? os_nameless_file() : -EINVAL;
    if (fd < 0) return fd;
    if (ftruncate(fd, (off_t)*size) < 0) err = -errno;
  } else {
    flags |= (readonly ? O_RDONLY : O_RDWR) | (o->create ? O_CREAT : 0);
    fd = open(path, flags, 0666);
    if (fd < 0) return -errno;
    err = os_claim(fd, readonly);
    if (!err && fstat(fd, &st) < 0) err = -errno;
    if (!err && !S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode))
      err = S_ISDIR(st.st_mode) ? -EISDIR : -EINVAL;
    if (!err && o->create && S_ISREG(st.st_mode) && !st.st_size)
      err = flat_make_lasting(fd, path, o->create);
  }
  if (!err && (end = lseek(fd, 0, SEEK_END)) < 0) err = -errno;
  *size = (uint64_t)end;
  if (!err) return fd;
  close(fd);
  return err;
}

int nbdserve_flat_open(const char *path, const struct nbdserve_flat *options,
                       struct nbdserve_export *out) {
  static const struct nbdserve_flat none;
  const struct nbdserve_flat *o = options ? options : &none;
  struct flat *f;
  uint64_t size;
  int fd, err = -EINVAL;

  if (o->create > INT64_MAX || (o->flags & ~NBDSERVE_READONLY)) return -EINVAL;
  fd = flat_open_file(path, o, &size);
  if (fd < 0) return fd;
  f = u_zalloc(sizeof *f);
  if (!f) err = -ENOMEM;
  if (f && o->offset <= size && o->size <= size - o->offset)
    err = os_mutex_init(&f->lock);
  if (err) {
    close(fd);
    NBDSERVE_FREE(f);
    return err;
  }
  f->fd = fd;
  f->offset = o->offset;
  out->size = o->size ? o->size : size - o->offset;
  out->flags |= o->flags | NBDSERVE_MULTI_CONN;
  out->ops = &flat_ops;
  out->ctx = f;
  return 0;
}

#endif /* !NBDSERVE_NO_FLAT */

/* ==== [12] SERVER (srv_) =================================================
 * Listeners, clients and the public calls.
 *
 * (S1) A client is on s->conns from its acceptance to its end, so that
 *      nbdserve_stop reaches it.
 * (S2) The last thing a client's thread does with s is to leave that list.
 * (S3) Stopping: no more clients; those that are there get no further requests,
 *      but what they have sent is done and answered, for IO_GRACE_MS at most
 *      where they do not read; then all exports are flushed.
 */
enum { SRV_BACKLOG = 128, SRV_PAUSE_MS = 100 };
enum { SRV_STOP = 's', SRV_WAKE = 'w', SRV_GONE = 'g' }; /* bytes in pipes */

union srv_address {
  struct sockaddr sa;
  struct sockaddr_un un;
#if !NBDSERVE_NO_TCP
  struct sockaddr_in in;
  struct sockaddr_in6 in6;
#endif
};

const char *nbdserve_version(void) { return NBDSERVE_VERSION; }

int nbdserve_new(struct nbdserve **out, const struct nbdserve_config *config) {
  struct nbdserve_config k = {0};
  struct nbdserve *s;
  int err = -ENOMEM;

  *out = NULL;
  if (config && config->version / 100 != NBDSERVE_VERSION_NUMBER / 100)
    return -EINVAL; /* the rest of *config may not even be there */
  if (config) k = *config;
  if (!k.threads) k.threads = 16;
  if (!k.max_conn) k.max_conn = 128;
  if (NBDSERVE_NO_THREADS) k.max_conn = k.threads = 1;
  if (!k.handshake_ms) k.handshake_ms = 10000;
  if (k.threads > 1024 || k.max_conn > 1 << 20 || k.flags & ~NBDSERVE_ONCE)
    return -EINVAL;
  s = u_zalloc(sizeof *s);
  if (!s) return -ENOMEM;
  s->config = k;
  s->stop[0] = s->stop[1] = s->wake[0] = s->wake[1] = -1;
  s->last_export = &s->exports;
  if (!os_mutex_init(&s->lock)) err = os_pipe(s->stop);
  if (!err) err = os_pipe(s->wake);
  if (!err)
    *out = s;
  else
    nbdserve_free(s);
  return err;
}

int nbdserve_add(struct nbdserve *s, const struct nbdserve_export *e) {
  struct ex *ex;
  int err = ex_new(&ex, e), taken;
  if (err) return err;
  os_lock(&s->lock);
  taken = ex_by_name(s, ex->e.name) != NULL;
  if (!taken) {
    *s->last_export = ex;
    s->last_export = &ex->next;
  }
  os_unlock(&s->lock);
  if (!taken) return 0;
  ex->e.ops = NULL; /* ctx stays the caller's */
  ex_free(ex);
  return -EEXIST;
}

int nbdserve_resize(struct nbdserve *s, const char *name, uint64_t size) {
  struct ex *ex;
  if (size > INT64_MAX) return -EINVAL;
  os_lock(&s->lock);
  ex = ex_by_name(s, name ? name : "");
  if (ex) ex->e.size = size;
  os_unlock(&s->lock);
  return ex ? 0 : -ENOENT;
}

/* Adds a listener on fd, which it owns then; a negative fd is the error. */
static int srv_add_listener(struct nbdserve *s, int fd, int is_unix,
                            const char *text) {
  struct srv_listener *l = &s->listeners[s->nlisteners];
  if (fd < 0) return fd;
  os_own(fd, 1);
  l->fd = fd;
  l->is_unix = is_unix && lstat(text, &l->st) == 0;
  snprintf(l->text, sizeof l->text, "%s", text);
  s->nlisteners++;
  return 0;
}

/* A socket bound to an address and listening, or -errno. */
static int srv_bind(const union srv_address *a, socklen_t len) {
  int fd = socket(a->sa.sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1, err;
  if (fd < 0) return -errno;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one); /* TCP heeds it */
#if !NBDSERVE_NO_TCP
  setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &one, sizeof one); /* IPv6 does */
#endif
  if (bind(fd, &a->sa, len) == 0 && listen(fd, SRV_BACKLOG) == 0) return fd;
  err = -errno;
  close(fd);
  return err;
}

/* A socket file that nobody listens on is a leftover: removes it. */
static int srv_remove_stale(const union srv_address *a) {
  struct stat st;
  int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), stale;
  if (fd < 0) return -errno;
  os_own(fd, 1);
  stale = lstat(a->un.sun_path, &st) == 0 && S_ISSOCK(st.st_mode) &&
          connect(fd, &a->sa, sizeof a->un) < 0 && errno == ECONNREFUSED;
  close(fd);
  if (!stale) return -EADDRINUSE;
  return unlink(a->un.sun_path) < 0 ? -errno : 0;
}

static int srv_listen_unix(struct nbdserve *s, const char *path) {
  union srv_address a = {.un = {.sun_family = AF_UNIX}};
  int fd, dir, tries = 100;

  if (!*path) return -EINVAL;
  if (strlen(path) >= sizeof a.un.sun_path) return -ENAMETOOLONG;
  strcpy(a.un.sun_path, path);
  dir = os_open_dir(path); /* until it listens it looks stale to others */
  while (tries-- > 0 && flock(dir, LOCK_EX | LOCK_NB) < 0 &&
         errno == EWOULDBLOCK)
    poll(NULL, 0, 10);
  fd = srv_bind(&a, sizeof a.un);
  if (fd == -EADDRINUSE && (fd = srv_remove_stale(&a)) == 0)
    fd = srv_bind(&a, sizeof a.un);
  if (dir >= 0) close(dir);
  return srv_add_listener(s, fd, 1, path);
}

/* An address for humans and URIs. */
static void srv_name(const union srv_address *a, char *out, size_t size) {
  snprintf(out, size, "a unix socket");
#if !NBDSERVE_NO_TCP
  char host[INET6_ADDRSTRLEN];
  if (a->sa.sa_family == AF_INET &&
      inet_ntop(AF_INET, &a->in.sin_addr, host, sizeof host))
    snprintf(out, size, "%s:%d", host, ntohs(a->in.sin_port));
  if (a->sa.sa_family == AF_INET6 &&
      inet_ntop(AF_INET6, &a->in6.sin6_addr, host, sizeof host))
    snprintf(out, size, "[%s]:%d", host, ntohs(a->in6.sin6_port));
#endif
  (void)a;
}

#if !NBDSERVE_NO_TCP
/* Listens on a numeric address; *port 0 becomes what the kernel picked. */
static int srv_listen_ip(struct nbdserve *s, const char *host, uint64_t *port) {
  int v6 = strchr(host, ':') != NULL, fd;
  union srv_address a;
  socklen_t len = v6 ? sizeof a.in6 : sizeof a.in;
  in_port_t *in_port = v6 ? &a.in6.sin6_port : &a.in.sin_port;
  char text[64];

  memset(&a, 0, sizeof a);
  a.sa.sa_family = v6 ? AF_INET6 : AF_INET;
  *in_port = htons((uint16_t)*port);
  if (inet_pton(a.sa.sa_family, host,
                v6 ? (void *)&a.in6.sin6_addr : (void *)&a.in.sin_addr) != 1)
    return -EINVAL;
  fd = srv_bind(&a, len);
  if (fd >= 0) getsockname(fd, &a.sa, &len);
  *port = ntohs(*in_port);
  srv_name(&a, text, sizeof text);
  return srv_add_listener(s, fd, 0, text);
}

static int srv_listen_tcp(struct nbdserve *s, const char *address) {
  const char *colon = strrchr(address, ':'), *rest;
  uint64_t port = 0;
  char host[64];
  int n = colon ? (int)(colon - address) : 0, err, brackets;
  rest = colon ? u_size(colon + 1, &port) : NULL;
  if (n <= 0 || n >= (int)sizeof host || !rest || *rest || port > 65535)
    return -EINVAL;
  brackets = *address == '[' && address[n - 1] == ']';
  snprintf(host, sizeof host, "%.*s", n - 2 * brackets, address + brackets);
  if (strcmp(host, "localhost") != 0) return srv_listen_ip(s, host, &port);
  err = srv_listen_ip(s, "127.0.0.1", &port);
  if (!err) err = srv_listen_ip(s, "::1", &port);
  return err == -EAFNOSUPPORT || err == -EADDRNOTAVAIL ? 0 : err; /* no IPv6 */
}
#endif

int nbdserve_listen(struct nbdserve *s, const char *address) {
  socklen_t len = sizeof(int);
  const char *rest;
  uint64_t fd;
  int listens = 0;

  if (s->nlisteners >= SRV_LISTENERS) return -EMFILE;
  if (strncmp(address, "unix:", 5) == 0) return srv_listen_unix(s, address + 5);
#if !NBDSERVE_NO_TCP
  if (strncmp(address, "tcp:", 4) == 0) return srv_listen_tcp(s, address + 4);
#endif
  if (strncmp(address, "fd:", 3) != 0) return -EINVAL;
  rest = u_size(address + 3, &fd);
  if (!rest || *rest || fd > INT_MAX) return -EINVAL;
  if (getsockopt((int)fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &len) < 0)
    return -errno;
  return listens ? srv_add_listener(s, (int)fd, 0, "") : -EINVAL;
}

int nbdserve_uri(struct nbdserve *s, const char *name, char *buf, size_t size) {
  const struct srv_listener *l = s->listeners;
  int fits, n;
  if (!s->nlisteners || !*l->text) return -ENOENT;
  n = snprintf(buf, size, "nbd%s://%s/", l->is_unix ? "+unix" : "",
               l->is_unix ? "" : l->text);
  fits = (size_t)n < size && u_append_uri(buf, size, name ? name : "");
  if (fits && l->is_unix)
    fits = strlen(buf) + 8 < size &&
           u_append_uri(strcat(buf, "?socket="), size, l->text);
  return fits ? 0 : -ERANGE;
}

/* Puts a byte into a pipe that nbdserve_run looks at.  Keeps errno: it may be
 * in a handler.  A full pipe has said it already. */
static void srv_poke(int fd, char what) {
  int saved = errno;
  (void)!write(fd, &what, 1);
  errno = saved;
}

void nbdserve_stop(struct nbdserve *s) { srv_poke(s->stop[1], SRV_STOP); }

void nbdserve_wake(struct nbdserve *s) { srv_poke(s->wake[1], SRV_WAKE); }

static void srv_add_stats(struct nbdserve_stats *to,
                          const struct nbdserve_stats *from) {
  to->requests += from->requests;
  to->errors += from->errors;
  to->bytes_read += from->bytes_read;
  to->bytes_written += from->bytes_written;
}

void nbdserve_stats(struct nbdserve *s, struct nbdserve_stats *out) {
  struct conn *c;
  struct ex *ex;
  os_lock(&s->lock);
  *out = s->stats;
  out->clients_now = s->nconns;
  for (c = s->conns; c; c = c->next) {
    os_lock(&c->lock);
    srv_add_stats(out, &c->stats);
    os_unlock(&c->lock);
  }
  for (ex = s->exports; ex; ex = ex->next) {
    os_lock(&ex->lock);
    out->flushes += ex->nflushes;
    os_unlock(&ex->lock);
  }
  os_unlock(&s->lock);
}

/* A client, registered (S1); NULL without memory.  owned: close in its end. */
static struct conn *srv_new_client(struct nbdserve *s, int in, int out,
                                   int owned) {
  struct conn *c = NBDSERVE_MALLOC(sizeof *c);

  if (!c) return NULL;
  memset(c, 0, offsetof(struct conn, rbuf)); /* the rest stays untouched */
  c->s = s;
  c->fd = owned ? in : -1;
  c->io.in = in;
  c->io.out = out;
  c->io.pipe[0] = c->io.pipe[1] = -1;
  c->io.stop = owned && !NBDSERVE_NO_THREADS ? -1 : s->stop[0];
  c->queue_end = &c->queue;
  if (os_mutex_init(&c->lock) || os_mutex_init(&c->sending) ||
      os_cond_init(&c->work) || os_cond_init(&c->room)) {
    NBDSERVE_FREE(c);
    return NULL;
  }
  os_lock(&s->lock);
  c->id = (unsigned)++s->stats.clients;
  c->next = s->conns;
  s->conns = c;
  s->nconns++;
  os_unlock(&s->lock);
  return c;
}

/* Forgets a client that has been served. */
static void srv_free_client(struct conn *c) {
  struct nbdserve *s = c->s;
  struct conn **p = &s->conns;

  NBDSERVE_FREE(c->big);
  if (c->io.pipe[0] >= 0) close(c->io.pipe[0]);
  if (c->io.pipe[1] >= 0) close(c->io.pipe[1]);
  assert(!c->nworkers && !c->ndeferred);
  os_lock(&s->lock);
  while (*p != c) p = &(*p)->next;
  *p = c->next;
  s->nconns--;
  srv_add_stats(&s->stats, &c->stats);
  if (c->fd >= 0) close(c->fd); /* locked: srv_finish must not hit another */
  os_mutex_free(&c->lock);
  os_mutex_free(&c->sending);
  os_cond_free(&c->work);
  os_cond_free(&c->room);
  NBDSERVE_FREE(c);
  srv_poke(s->wake[1], SRV_GONE);
  os_unlock(&s->lock); /* (S2) */
}

/* Serves a client to its end and forgets it.  name: as in nbdserve_serve. */
static int srv_serve_client(struct conn *c, const char *name) {
  char peer[64] = "a pipe";
  union srv_address a;
  socklen_t len = sizeof a;
  struct ex *ex = NULL;
  int err, calm;

  if (getpeername(c->io.in, &a.sa, &len) == 0) srv_name(&a, peer, sizeof peer);
  HS_LOG(c, NBDSERVE_LOG_INFO, "%u: connected from %s", c->id, peer);
  os_tune(c->io.in);
  os_tune(c->io.out);
  err = name ? hs_find(c, name, &ex) : hs_run(c);
  if (name && !err) hs_settle(c, ex, name);
  if (err == HS_ENTER) err = tx_run(c);
  if (c->ex && c->ex->dynamic && !(c->tflags & NBD_FLAG_READ_ONLY))
    ex_flush(c->ex); /* a courtesy before it is closed: nobody waits for it */
  ex_put(c->ex);
  if (err == HS_END) err = 0;
  calm = !err || err == -EPIPE || err == -ECONNRESET || err == -ESHUTDOWN;
  HS_LOG(c, calm ? NBDSERVE_LOG_INFO : NBDSERVE_LOG_WARNING, "%u: gone: %s",
         c->id, err ? u_error(err) : "disconnected");
  srv_free_client(c);
  return err == -ESHUTDOWN ? 0 : err;
}

static void *srv_thread(void *client) {
  srv_serve_client(client, NULL);
  return NULL;
}

/* Takes a listener's next client.  -errno: no descriptor, memory or thread. */
static int srv_accept(struct nbdserve *s, int listener) {
  struct conn *c;
  int fd = os_accept(listener), err;
  if (fd < 0)
    return fd == -EAGAIN || fd == -ECONNABORTED || fd == -EINTR ? 0 : fd;
  c = srv_new_client(s, fd, fd, 1);
  if (!c) {
    close(fd);
    return -ENOMEM;
  }
  err = os_thread(srv_thread, c);
  if (err) srv_free_client(c);
  return err;
}

/* Empties the wake pipe; was nbdserve_wake called? */
static int srv_woken(struct nbdserve *s) {
  char buf[64];
  ssize_t n;
  int woken = 0;
  while ((n = read(s->wake[0], buf, sizeof buf)) > 0)
    woken |= memchr(buf, SRV_WAKE, (size_t)n) != NULL;
  return woken;
}

/* Ends service (S3). */
static int srv_finish(struct nbdserve *s) {
  int64_t until = os_now_ms() + IO_GRACE_MS, left;
  struct pollfd p = {s->wake[0], POLLIN, 0}; /* a client has gone */
  struct conn *c;
  struct ex *ex;
  int err = 0, busy, e;

  nbdserve_stop(s);
  do {
    left = until - os_now_ms();
    os_lock(&s->lock);
    busy = s->nconns > 0;
    for (c = s->conns; c; c = c->next)
      if (c->fd >= 0) shutdown(c->fd, left > 0 ? SHUT_RD : SHUT_RDWR);
    os_unlock(&s->lock);
    if (busy) poll(&p, 1, left > 0 ? (int)left : -1);
    srv_woken(s);
  } while (busy);
  for (ex = s->exports; ex; ex = ex->next) { /* nobody adds any more */
    e = ex->e.flags & NBDSERVE_READONLY ? 0 : ex_flush(ex);
    if (e)
      u_log(&s->config, NBDSERVE_LOG_ERROR,
            "export '%s': the last flush: %s; written data may be lost",
            ex->e.name, u_error(e));
    if (!err) err = e;
  }
  return err;
}

int nbdserve_run(struct nbdserve *s) {
  struct pollfd p[SRV_LISTENERS + 3];
  int64_t pause = 0, now, wait, idle;
  int i, n = s->nlisteners, room, busy, over, err, came;

  for (;;) {
    os_lock(&s->lock);
    busy = s->nconns > 0;
    room = s->nconns < s->config.max_conn
               ? (int)(s->config.max_conn - s->nconns) : 0;
    over = !busy && s->stats.clients && (s->config.flags & NBDSERVE_ONCE);
    os_unlock(&s->lock);
    now = os_now_ms();
    if (busy || !s->idle_from) s->idle_from = now;
    wait = pause > now ? pause - now : -1; /* -1: until something happens */
    idle = s->idle_from + s->config.idle_exit_ms - now;
    if (!busy && s->config.idle_exit_ms) {
      over |= idle <= 0;
      if (wait < 0 || idle < wait) wait = idle;
    }
    if (over) wait = 0; /* a last look whether somebody waits */
    if (pause > now) room = 0;
    for (i = 0; i < n; i++)
      p[i] = (struct pollfd){room ? s->listeners[i].fd : -1, POLLIN, 0};
    p[n] = (struct pollfd){s->stop[0], POLLIN, 0};
    p[n + 1] = (struct pollfd){s->wake[0], POLLIN, 0};
    if (poll(p, (nfds_t)n + 2, (int)(wait > INT_MAX ? INT_MAX : wait)) < 0 &&
        errno != EINTR)
      return -errno;
    if (p[n].revents) return srv_finish(s);
    if (p[n + 1].revents && srv_woken(s)) return -EINTR;
    for (came = i = 0; i < n; i++) {
      if (!p[i].revents || room-- <= 0) continue;
      came = 1;
      err = srv_accept(s, p[i].fd);
      if (err && now - pause > SRV_PAUSE_MS) /* once, not in every round */
        u_log(&s->config, NBDSERVE_LOG_WARNING, "clients have to wait: %s",
              u_error(err));
      if (err) pause = os_now_ms() + SRV_PAUSE_MS; /* the loop must not spin */
    }
    if (over && !came) return srv_finish(s);
  }
}

int nbdserve_serve(struct nbdserve *s, int in_fd, int out_fd,
                   const char *name) {
  struct conn *c = srv_new_client(s, in_fd, out_fd, 0);
  return c ? srv_serve_client(c, name) : -ENOMEM;
}

void nbdserve_free(struct nbdserve *s) {
  struct srv_listener *l;
  struct stat st;
  struct ex *ex;
  int i;

  if (!s) return;
  if (s->nconns > 0) srv_finish(s); /* nbdserve_run was left with -EINTR */
  assert(!s->conns);
  for (l = s->listeners; l < s->listeners + s->nlisteners; l++) {
    if (l->fd >= 0) close(l->fd);
    if (l->is_unix && lstat(l->text, &st) == 0 && st.st_ino == l->st.st_ino &&
        st.st_dev == l->st.st_dev)
      unlink(l->text);
  }
  while ((ex = s->exports)) {
    s->exports = ex->next;
    ex_free(ex);
  }
  for (i = 0; i < 2; i++) {
    if (s->stop[i] >= 0) close(s->stop[i]);
    if (s->wake[i] >= 0) close(s->wake[i]);
  }
  os_mutex_free(&s->lock);
  NBDSERVE_FREE(s);
}

/* ==== [13] CLI (cli_) ====================================================
 * The command, on top of nbdserve.h alone: it is also the largest example of
 * its use.  What a process has only one of (signals, standard streams,
 * environment, identity) is touched here and nowhere else.
 */
#if !NBDSERVE_NO_MAIN

#include <grp.h>
#include <sys/wait.h>

enum { CLI_FAILED = 1, CLI_USAGE = 2, CLI_IN_USE = 4 }; /* exit status */

enum { /* the options, in the order of the table */
  OPT_UNIX, OPT_PORT, OPT_BIND, OPT_STDIN, OPT_FD, OPT_READ_ONLY, OPT_EXPORT,
  OPT_DESCRIPTION, OPT_OFFSET, OPT_SIZE, OPT_BLOCK_SIZE, OPT_CREATE, OPT_CACHE,
  OPT_THREADS, OPT_MAX_CONN, OPT_ONCE, OPT_IDLE_EXIT, OPT_RUN, OPT_FORK,
  OPT_PIDFILE, OPT_READY_FD, OPT_USER, OPT_GROUP, OPT_QUIET, OPT_VERBOSE,
  OPT_STATS, OPT_JSON, OPT_VERSION, OPT_HELP, OPT_COUNT
};

static const struct cli_option {
  char letter; /* or ' ' */
  const char *name, *arg;
  uint64_t min, max; /* of a number; max 0: it is text */
  const char *help;
} cli_options[] = {
    {'U', "unix", "PATH", 0, 0, "listen on a unix socket (else: private)"},
    {'p', "port", "N", 0, 65535, "listen on TCP (usual: 10809; 0: any free)"},
    {'i', "bind", "ADDR", 0, 0, "TCP address instead of the two loopbacks"},
    {'s', "stdin", NULL, 0, 0, "serve one client on standard input and output"},
    {' ', "fd", "N", 0, INT_MAX, "serve a listening or a connected socket"},
    {'r', "read-only", NULL, 0, 0, "refuse writes"},
    {'e', "export", "NAME", 0, 0, "export name (else: any name will do)"},
    {'D', "description", "TEXT", 0, 0, "for clients that list the exports"},
    {'o', "offset", "N", 0, INT64_MAX, "serve the target from this byte on"},
    {' ', "size", "N", 1, INT64_MAX, "and that many bytes of it"},
    {'b', "block-size", "SIZES", 0, 0, "MIN:PREFERRED:MAX (1:4096:32M)"},
    {' ', "create", "SIZE", 1, INT64_MAX, "make a missing target, sparse"},
    {' ', "cache", "MODE", 0, 0, "writeback (default), writethrough, unsafe"},
    {'t', "threads", "N", 1, 1024, "slow requests at a time per client (16)"},
    {'m', "max-conn", "N", 1, 1 << 20, "clients at a time (128)"},
    {'1', "once", NULL, 0, 0, "exit when the last client has gone"},
    {' ', "idle-exit", "SEC", 1, 4000000, "exit after a time without clients"},
    {' ', "run", "CMD", 0, 0, "serve while a shell command runs ($uri, $nbd)"},
    {' ', "fork", NULL, 0, 0, "go into the background, once listening"},
    {'P', "pidfile", "FILE", 0, 0, "write the process id there, then"},
    {' ', "ready-fd", "N", 3, INT_MAX, "write the URI there, once listening"},
    {'u', "user", "USER", 0, 0, "become that user, once listening"},
    {'g', "group", "GROUP", 0, 0, "become that group"},
    {'q', "quiet", NULL, 0, 0, "errors only"},
    {'v', "verbose", NULL, 0, 0, "tell of clients; twice: of every request"},
    {' ', "stats", NULL, 0, 0, "print totals at exit (and always on SIGUSR1)"},
    {' ', "json", NULL, 0, 0, "print them as JSON"},
    {'V', "version", NULL, 0, 0, "print version and features"},
    {'h', "help", NULL, 0, 0, "print this"}};

STATIC_ASSERT(every_option, sizeof cli_options / sizeof *cli_options ==
                                (size_t)OPT_COUNT);

struct cli {
  const char *v[OPT_COUNT]; /* values; NULL: not given */
  uint64_t n[OPT_COUNT];    /* as numbers; how often, for those without */
  char **command;           /* behind --, or NULL */
  char **targets;           /* [NAME=]TARGET */
  int ntargets;
  const char *name;          /* -e, or "" */
  struct nbdserve_export ex; /* what all exports have in common */
  unsigned uid, gid, user_gid; /* (unsigned)-1: not known */
  int serve[2]; /* one client's input and output, or -1 */
  int report;   /* pipe to the parent of --fork, or -1 */
  int wrote_pidfile;
  pid_t child; /* the captive command; 0: none, or it has ended */
  int status;  /* and this was its exit status */
  char dir[100], sock[PATH_MAX]; /* private directory; unix socket */
  char uri[3 * WIRE_STRING + 1024];
};

static struct nbdserve *cli_server; /* for the handlers, as what follows */
static volatile sig_atomic_t cli_usr1, cli_ending;

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

static int cli_say_errno(const char *object) {
  return cli_say(CLI_FAILED, "%s: %s", object, u_error(-errno));
}

static void cli_log(void *ctx, int level, const char *message) {
  (void)ctx, (void)level;
  cli_say(0, "%s", message);
}

static void cli_help(void) {
  const struct cli_option *o = cli_options;
  puts("usage: nbdserve [OPTION]... [NAME=]TARGET... [-- CMD ARG...]\n"
       "Serves disks over NBD.  TARGET is a file, a block device or mem:SIZE.\n"
       "With CMD: serves while it runs; {} in an ARG becomes the URI.\n");
  for (; o < cli_options + OPT_COUNT; o++)
    printf("  %c%c%c --%s %-*s %s\n", o->letter == ' ' ? ' ' : '-', o->letter,
           o->letter == ' ' ? ' ' : ',', o->name, 18 - (int)strlen(o->name),
           o->arg ? o->arg : "", o->help);
  puts("\nNumbers take K, M, G, T, P and E (powers of 1024).  When it listens, "
       "the URI is\nprinted.  Exit status: 0 ok, 1 failed, 2 usage, 4 target "
       "in use, or CMD's.");
}

/* The id of a user or group: a number, or a name in /etc/passwd or /etc/group
 * (getpwnam would not survive static linking).  *gid: a user's group, if it
 * stands there. */
static int cli_lookup(const char *file, const char *name, unsigned *id,
                      unsigned *gid) {
  char line[1024], *rest;
  unsigned long number = strtoul(name, &rest, 10);
  int is_number = *name >= '0' && *name <= '9' && !*rest, found = 0;
  size_t n = strlen(name);
  FILE *f = fopen(file, "r");

  *gid = (unsigned)-1;
  while (f && !found && fgets(line, sizeof line, f)) {
    rest = strchr(line, ':');
    rest = rest ? strchr(rest + 1, ':') : NULL;
    if (!rest || sscanf(rest, ":%u:%u", id, gid) < 1) continue;
    found = is_number ? *id == number
                      : strncmp(line, name, n) == 0 && line[n] == ':';
  }
  if (f) fclose(f);
  if (found || !is_number || number >= UINT32_MAX) return found;
  *id = (unsigned)number;
  *gid = (unsigned)-1;
  return 1;
}

/* MIN:PREFERRED:MAX. */
static int cli_block_sizes(const char *s, struct nbdserve_export *ex) {
  uint32_t *to[] = {&ex->min_block, &ex->preferred_block, &ex->max_request};
  uint64_t v;
  int i;
  for (i = 0; i < 3; i++) {
    s = u_size(s, &v);
    if (!s || v < 1 || v > UINT32_MAX || *s++ != (i < 2 ? ':' : 0)) return 0;
    *to[i] = (uint32_t)v;
  }
  return 1;
}

/* Takes one option with its value.  0, or CLI_USAGE after a message. */
static int cli_set(struct cli *k, int opt, const char *value) {
  const struct cli_option *o = &cli_options[opt];
  const char *rest;
  unsigned unused;
  int ok = 1;

  k->v[opt] = value ? value : "";
  k->n[opt]++;
  if (o->max) {
    rest = u_size(value, &k->n[opt]);
    ok = rest && !*rest && k->n[opt] >= o->min && k->n[opt] <= o->max;
  }
  if (opt == OPT_FD || opt == OPT_READY_FD) /* or it could become ours */
    ok = ok && fcntl((int)k->n[opt], F_GETFD) >= 0;
  if (opt == OPT_BLOCK_SIZE) ok = cli_block_sizes(value, &k->ex);
  if (opt == OPT_USER)
    ok = cli_lookup("/etc/passwd", value, &k->uid, &k->user_gid);
  if (opt == OPT_GROUP) ok = cli_lookup("/etc/group", value, &k->gid, &unused);
  if (opt == OPT_CACHE) {
    k->ex.flags = strcmp(value, "writethrough") == 0 ? NBDSERVE_WRITETHROUGH
                  : strcmp(value, "unsafe") == 0     ? NBDSERVE_UNSAFE
                                                     : 0;
    ok = k->ex.flags || strcmp(value, "writeback") == 0;
  }
  return ok ? 0 : cli_say(CLI_USAGE, "--%s %s: no such %s, or out of range",
                          o->name, value, o->arg);
}

/* The option of that letter, or of that name of n bytes; OPT_COUNT: none. */
static int cli_find(char letter, const char *name, size_t n) {
  const struct cli_option *o = cli_options;
  for (; o < cli_options + OPT_COUNT; o++)
    if (name ? strncmp(o->name, name, n) == 0 && !o->name[n]
             : o->letter == letter && letter != ' ')
      break;
  return (int)(o - cli_options);
}

/* Reads the command line.  0, or CLI_USAGE after a message. */
static int cli_parse(struct cli *k, int argc, char **argv) {
  const char *a, *value;
  int i, opt, is_long, err = 0;

  for (i = 1; i < argc && !err; i++) {
    a = argv[i];
    if (a[0] != '-' || !a[1]) {
      k->targets[k->ntargets++] = argv[i];
      continue;
    }
    is_long = *++a == '-';
    if (is_long && !a[1]) {
      k->command = argv + i + 1;
      if (!*k->command) return cli_say(CLI_USAGE, "--: no command behind it");
      if (!k->v[OPT_RUN]) return cli_set(k, OPT_RUN, "");
      return cli_say(CLI_USAGE, "--: no command together with --run");
    }
    do {
      opt = cli_find(*a, is_long ? a + 1 : NULL, strcspn(a, "=") - 1);
      if (opt == OPT_COUNT)
        return cli_say(CLI_USAGE, "%s: unknown option; try --help", argv[i]);
      value = is_long ? strchr(a, '=') : a[1] ? a : NULL;
      a++;
      if (cli_options[opt].arg) {
        value = value ? value + 1 : argv[++i];
        if (!value)
          return cli_say(CLI_USAGE, "%s: a value is missing", argv[i - 1]);
      } else if (is_long && value) {
        return cli_say(CLI_USAGE, "%s: this option takes no value", argv[i]);
      }
      err = cli_set(k, opt, value);
    } while (!err && !is_long && !cli_options[opt].arg && *a);
  }
  return err;
}

static int cli_check(const struct cli *k) {
  static const struct { int a, b; } apart[] = {
      {OPT_STDIN, OPT_UNIX}, {OPT_STDIN, OPT_PORT}, {OPT_STDIN, OPT_BIND},
      {OPT_STDIN, OPT_FD},   {OPT_RUN, OPT_STDIN},  {OPT_STDIN, OPT_FORK},
      {OPT_FD, OPT_UNIX},    {OPT_FD, OPT_PORT},    {OPT_FD, OPT_BIND},
      {OPT_RUN, OPT_FD},     {OPT_RUN, OPT_FORK},   {OPT_RUN, OPT_ONCE},
      {OPT_RUN, OPT_IDLE_EXIT}, {OPT_CREATE, OPT_READ_ONLY}};
  const char *a, *b;
  size_t i;

  for (i = 0; i < sizeof apart / sizeof *apart; i++) {
    a = cli_options[apart[i].a].name;
    b = cli_options[apart[i].b].name;
    if (!k->v[apart[i].a] || !k->v[apart[i].b]) continue;
    return k->command && apart[i].a == OPT_RUN
               ? cli_say(CLI_USAGE, "--: no command together with --%s", b)
               : cli_say(CLI_USAGE, "--%s: not together with --%s", a, b);
  }
  if (!k->ntargets)
    return cli_say(CLI_USAGE, "no target: name a file, a block device or "
                   "mem:SIZE; try --help");
  if (k->v[OPT_EXPORT] && k->ntargets > 1)
    return cli_say(CLI_USAGE, "--export: for a single target; use NAME=TARGET");
  return 0;
}

/* Opens a target and adds it.  0, or the exit status after a message. */
static int cli_add(const struct cli *k, const char *path, const char *name) {
  struct nbdserve_export ex = k->ex;
  struct nbdserve_flat flat = {
      .offset = k->n[OPT_OFFSET], .size = k->n[OPT_SIZE],
      .create = k->n[OPT_CREATE],
      .flags = k->v[OPT_READ_ONLY] ? NBDSERVE_READONLY : 0};
  const char *hint = "";
  int err = -EOPNOTSUPP;

  ex.name = name;
  ex.description = k->v[OPT_DESCRIPTION];
  if (!*name && k->ntargets == 1 && !k->v[OPT_EXPORT])
    ex.flags |= NBDSERVE_ANY_NAME;
  if (strstr(path, "::"))
    return cli_say(CLI_FAILED, "%s: a store, and this build has none", path);
#if !NBDSERVE_NO_FLAT
  err = nbdserve_flat_open(path, &flat, &ex);
#endif
  if ((err == -EACCES || err == -EROFS) && !flat.flags)
    hint = "; -r serves it read-only";
  if (err == -ENOENT && !flat.create) hint = "; --create SIZE makes it";
  if (err == -EINVAL)
    hint = ": not a file, a block device or mem:SIZE, or smaller than --offset "
           "and --size say";
  if (err == -EBUSY)
    return cli_say(CLI_IN_USE, "%s: in use by another server", path);
  if (err) return cli_say(CLI_FAILED, "%s: %s%s", path, u_error(err), hint);
  err = nbdserve_add(cli_server, &ex);
  if (!err) return 0;
  ex.ops->close(ex.ctx);
  return err == -EEXIST
             ? cli_say(CLI_USAGE, "%s: two targets of that export name", name)
             : cli_say(CLI_USAGE, "%s: --block-size, name or description out "
                       "of range", path);
}

static int cli_add_all(struct cli *k) {
  int i, status = 0;
  for (i = 0; i < k->ntargets && !status; i++) {
    char *path = k->targets[i], *equals = strchr(path, '=');
    const char *slash = strrchr(path, '/');
    const char *base = slash ? slash + 1 : path;
    if (equals && !memchr(path, '/', (size_t)(equals - path))) {
      *equals = 0;
      if (k->ntargets == 1) k->name = path;
      status = cli_add(k, equals + 1, path);
    } else {
      status = cli_add(k, path, k->ntargets > 1 ? base : k->name);
    }
  }
  return status;
}

static int cli_listen_on(const char *kind, const char *address) {
  char full[PATH_MAX + 8];
  int err;
  snprintf(full, sizeof full, "%s:%s", kind, address);
  err = nbdserve_listen(cli_server, full);
  if (err == -ENAMETOOLONG)
    return cli_say(CLI_FAILED, "%s: a socket path has at most %u bytes",
                   address,
                   (unsigned)sizeof(((struct sockaddr_un *)0)->sun_path) - 1);
  if (err == -EADDRINUSE)
    return cli_say(CLI_FAILED, "%s: a server listens there, or it is something "
                   "else; not replaced", full);
  return err ? cli_say(CLI_FAILED, "%s: %s", full, u_error(err)) : 0;
}

/* A socket only its owner can reach, in a directory that is removed again. */
static int cli_listen_private(struct cli *k) {
  const char *dirs[] = {getenv("XDG_RUNTIME_DIR"), getenv("TMPDIR"), "/tmp"};
  int i, status;

  for (i = 0; i < 3 && !*k->dir; i++) {
    if (!dirs[i] || *dirs[i] != '/' || strlen(dirs[i]) > 80)
      continue; /* with the rest it must fit into every system's address */
    snprintf(k->dir, sizeof k->dir, "%s/nbdXXXXXX", dirs[i]);
    if (!mkdtemp(k->dir)) *k->dir = 0;
  }
  if (!*k->dir)
    return cli_say(CLI_FAILED, "private socket: no directory for it; use -U");
  snprintf(k->sock, sizeof k->sock, "%s/sock", k->dir);
  status = cli_listen_on("unix", k->sock);
  if (!status && (chmod(k->sock, 0600) < 0 ||
                  (k->v[OPT_USER] && (chown(k->sock, k->uid, (gid_t)-1) < 0 ||
                                      chown(k->dir, k->uid, (gid_t)-1) < 0))))
    status = cli_say_errno(k->sock);
  return status;
}

/* n sockets of whoever started us, from fd on: listening ones, or a client. */
static int cli_take_fds(struct cli *k, int fd, int n) {
  char address[16];
  int err = 0;
  if (n > SRV_LISTENERS) return cli_say(CLI_FAILED, "LISTEN_FDS: too many");
  for (; n > 0 && !err; n--, fd++) {
    snprintf(address, sizeof address, "fd:%d", fd);
    err = nbdserve_listen(cli_server, address);
    if (err == -EINVAL && k->serve[0] < 0) { /* connected, so a client */
      k->serve[0] = k->serve[1] = fd;
      err = 0;
    }
    if (err) cli_say(0, "%s: %s", address, u_error(err));
  }
  return err ? CLI_FAILED : 0;
}

/* How many sockets systemd, or nbdinfo and its like, hand over. */
static int cli_activation(void) {
  const char *pid = getenv("LISTEN_PID"), *fds = getenv("LISTEN_FDS");
  uint64_t n = 0;
  if (!pid || !fds || strtol(pid, NULL, 10) != (long)getpid()) return 0;
  u_size(fds, &n);
  unsetenv("LISTEN_PID");
  unsetenv("LISTEN_FDS");
  unsetenv("LISTEN_FDNAMES");
  return (int)u_min(n, INT_MAX);
}

static int cli_listen_tcp(const struct cli *k) {
  const char *host = k->v[OPT_BIND] ? k->v[OPT_BIND] : "localhost";
  const char *port = k->v[OPT_PORT] ? k->v[OPT_PORT] : "10809";
  char address[300];
  int bare_v6 = strchr(host, ':') && *host != '[', status;
  snprintf(address, sizeof address, bare_v6 ? "[%s]:%s" : "%s:%s", host, port);
  status = cli_listen_on("tcp", address);
  if (!status && strcmp(host, "localhost") != 0 && strcmp(host, "::1") != 0 &&
      strncmp(host, "127.", 4) != 0 && !k->v[OPT_QUIET])
    cli_say(0, "%s: no authentication: who reaches it reads and writes", host);
  return status;
}

static int cli_listen(struct cli *k) {
  const char *path = k->v[OPT_UNIX];
  int is_tcp = k->v[OPT_PORT] || k->v[OPT_BIND], n = cli_activation();
  int status = 0;

  if (k->v[OPT_FD]) return cli_take_fds(k, (int)k->n[OPT_FD], 1);
  if (n > 0 && !path && !is_tcp) return cli_take_fds(k, 3, n);
  if (path && strcmp(path, "-") != 0) {
    /* a whole path, where it fits, so that the URI works from anywhere */
    if (*path != '/' && getcwd(k->sock, 100 - u_min(strlen(path), 98)))
      strcat(k->sock, "/");
    strncat(k->sock, path, sizeof k->sock / 2);
    status = cli_listen_on("unix", k->sock);
  } else if (path || !is_tcp) {
    status = cli_listen_private(k);
  }
  if (!status && is_tcp) status = cli_listen_tcp(k);
  if (!status) nbdserve_uri(cli_server, k->name, k->uri, sizeof k->uri);
  return status;
}

static void cli_on_signal(int sig) {
  if (sig == SIGUSR1) cli_usr1 = 1;
  if (sig == SIGINT && cli_ending) _exit(130);
  if (sig == SIGUSR1 || sig == SIGCHLD) {
    nbdserve_wake(cli_server); /* cli_serve looks what it was */
  } else {
    cli_ending = 1;
    nbdserve_stop(cli_server);
  }
}

/* What was ignored when we were started (nohup) stays so. */
static void cli_catch_signals(void (*handler)(int)) {
  static const int signals[] = {SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGCHLD};
  struct sigaction sa = {.sa_handler = handler, .sa_flags = SA_RESTART}, was;
  size_t i;
  for (i = 0; i < sizeof signals / sizeof *signals; i++)
    if (i > 1 || (sigaction(signals[i], NULL, &was) == 0 &&
                  was.sa_handler != SIG_IGN))
      sigaction(signals[i], &sa, NULL);
  sa.sa_handler = handler == SIG_DFL ? SIG_DFL : SIG_IGN;
  sigaction(SIGPIPE, &sa, NULL);
  sigaction(SIGXFSZ, &sa, NULL); /* writes get EFBIG then */
}

/* The ARG with every {} in it replaced by the URI. */
static char *cli_expand(const char *arg, const char *uri) {
  size_t max = strlen(arg) * (strlen(uri) + 1) + 1, n = 0;
  char *out = u_zalloc(max);
  while (out && *arg) {
    int hit = strncmp(arg, "{}", 2) == 0;
    n += (size_t)snprintf(out + n, max - n, hit ? "%s" : "%.1s",
                          hit ? uri : arg);
    arg += hit ? 2 : 1;
  }
  return out;
}

/* What --run offers to its shell, as nbdkit does. */
static void cli_set_environment(const struct cli *k) {
  char nbd[PATH_MAX + 80];
  int is_tcp = !*k->sock;
  snprintf(nbd, sizeof nbd, "nbd:%s%.*s%s", is_tcp ? "" : "unix:",
           is_tcp ? (int)strcspn(k->uri + 6, "/") : 0, k->uri + 6, k->sock);
  setenv("uri", k->uri, 1);
  setenv("nbd", nbd, 1);
  setenv("unixsocket", k->sock, 1);
  setenv("port", is_tcp ? strrchr(nbd, ':') + 1 : "", 1);
  setenv("exportname", k->name, 1);
}

static int cli_start_command(struct cli *k) {
  char **p;

  k->child = fork();
  if (k->child < 0) return cli_say_errno("fork");
  if (k->child > 0) return 0;
  cli_catch_signals(SIG_DFL);
  if (k->command) {
    for (p = k->command; *p; p++) *p = cli_expand(*p, k->uri);
    execvp(k->command[0], k->command);
  } else {
    cli_set_environment(k);
    execl("/bin/sh", "sh", "-c", k->v[OPT_RUN], (char *)NULL);
  }
  _exit(cli_say_errno(k->command ? k->command[0] : "/bin/sh") + 126);
  return 0;
}

/* Has the captive command ended?  wait: until it has. */
static int cli_command_ended(struct cli *k, int wait) {
  int st = 0;
  if (waitpid(k->child, &st, wait ? 0 : WNOHANG) != k->child) return 0;
  k->status = WIFSIGNALED(st) ? 128 + WTERMSIG(st) : WEXITSTATUS(st);
  k->child = 0;
  return 1;
}

/* Writes the pidfile in one step: who sees it may connect. */
static int cli_write_pidfile(const char *path) {
  char temp[PATH_MAX];
  FILE *f;
  int ok;
  snprintf(temp, sizeof temp, "%.*s.new", PATH_MAX - 8, path);
  f = fopen(temp, "w");
  if (!f) return cli_say_errno(temp);
  ok = fprintf(f, "%ld\n", (long)getpid()) > 0;
  ok = fclose(f) == 0 && ok && rename(temp, path) == 0;
  return ok ? 0 : cli_say_errno(path);
}

static int cli_drop_privileges(const struct cli *k) {
  int user = k->v[OPT_USER] != NULL;
  unsigned gid = k->v[OPT_GROUP] ? k->gid : k->user_gid;
  if (!user && !k->v[OPT_GROUP]) return 0;
  if (gid == (unsigned)-1)
    return cli_say(CLI_FAILED, "--user %s: unknown group; use --group",
                   k->v[OPT_USER]);
  if (setgroups(0, NULL) < 0 || setgid(gid) < 0 || (user && setuid(k->uid) < 0))
    return cli_say_errno("--user");
  if (getgid() != gid || (user && (getuid() != k->uid ||
                                   (k->uid && setuid(0) == 0))))
    return cli_say(CLI_FAILED, "--user: it did not work");
  return 0;
}

/* Writes the URI line to a descriptor; closes it if it is no standard one. */
static int cli_tell(const struct cli *k, int fd, const char *who) {
  if (*k->uri && dprintf(fd, "%s\n", k->uri) < 0) return cli_say_errno(who);
  return fd > 2 && close(fd) < 0 ? cli_say_errno(who) : 0;
}

/* All is open and listening: tells everybody who asked. */
static int cli_ready(struct cli *k) {
  int status = 0, null;

  if (k->v[OPT_PIDFILE]) status = cli_write_pidfile(k->v[OPT_PIDFILE]);
  k->wrote_pidfile = k->v[OPT_PIDFILE] && !status;
  if (!status) status = cli_drop_privileges(k);
  if (!status && k->v[OPT_READY_FD])
    status = cli_tell(k, (int)k->n[OPT_READY_FD], "--ready-fd");
  if (status) return status;
  if (k->v[OPT_RUN])
    return *k->uri ? cli_start_command(k)
                   : cli_say(CLI_USAGE, "no URI for the command: sockets were "
                             "handed over");
  status = cli_tell(k, 1, "standard output");
  if (status || k->report < 0) return status;
  null = open("/dev/null", O_RDWR);
  if (null < 0) return cli_say_errno("/dev/null");
  if (dup2(null, 0) < 0 || dup2(null, 1) < 0 || dup2(null, 2) < 0) return 1;
  close(null);
  (void)!write(k->report, "", 1); /* a parent that is gone waits for nothing */
  close(k->report);
  return 0;
}

/* --fork: the parent waits until the child says that it serves, and exits, or
 * until it has failed.  The child returns. */
static int cli_fork(struct cli *k) {
  int fd[2], st = 0;
  char ready;
  ssize_t n;
  pid_t pid;

  if (pipe(fd) < 0 || (pid = fork()) < 0) return cli_say_errno("--fork");
  if (pid == 0) {
    close(fd[0]);
    k->report = fd[1];
    return setsid() < 0 ? cli_say_errno("--fork") : 0;
  }
  close(fd[1]);
  n = read(fd[0], &ready, 1);
  if (n != 1) waitpid(pid, &st, 0);
  _exit(n == 1 ? 0 : WIFEXITED(st) && WEXITSTATUS(st) ? WEXITSTATUS(st) : 1);
  return 0;
}

static void cli_print_stats(const struct cli *k) {
  struct nbdserve_stats t;
  nbdserve_stats(cli_server, &t);
  fprintf(stderr,
          k->v[OPT_JSON]
              ? "{\"clients\":%" PRIu64 ",\"clients_now\":%" PRIu64
                ",\"requests\":%" PRIu64 ",\"errors\":%" PRIu64
                ",\"bytes_read\":%" PRIu64 ",\"bytes_written\":%" PRIu64
                ",\"flushes\":%" PRIu64 "}\n"
              : "nbdserve: %" PRIu64 " clients (%" PRIu64 " now), %" PRIu64
                " requests (%" PRIu64 " failed), %" PRIu64
                " bytes read, %" PRIu64 " written, %" PRIu64 " flushes\n",
          t.clients, t.clients_now, t.requests, t.errors, t.bytes_read,
          t.bytes_written, t.flushes);
}

/* Serves until it is over; the exit status. */
static int cli_serve(struct cli *k) {
  int err = 0, run;

  if (k->serve[0] >= 0) {
    err = nbdserve_serve(cli_server, k->serve[0], k->serve[1], NULL);
    nbdserve_stop(cli_server); /* what follows only flushes */
  }
  while ((run = nbdserve_run(cli_server)) == -EINTR) {
    if (cli_usr1) {
      cli_usr1 = 0;
      cli_print_stats(k);
    }
    if (k->child > 0 && cli_command_ended(k, 0)) nbdserve_stop(cli_server);
  }
  if (k->v[OPT_STATS]) cli_print_stats(k);
  if (k->child > 0 && !cli_command_ended(k, 0)) {
    kill(k->child, SIGTERM);
    cli_command_ended(k, 1);
  }
  return k->status ? k->status : err || run ? CLI_FAILED : 0;
}

/* Everything from the first open file to the last. */
static int cli_main(struct cli *k) {
  int level = NBDSERVE_LOG_WARNING + (int)u_min(k->n[OPT_VERBOSE], 2);
  struct nbdserve_config config = {
      .version = NBDSERVE_VERSION_NUMBER,
      .flags = k->v[OPT_ONCE] ? NBDSERVE_ONCE : 0,
      .threads = (uint32_t)k->n[OPT_THREADS],
      .max_conn = (uint32_t)k->n[OPT_MAX_CONN],
      .idle_exit_ms = (uint32_t)k->n[OPT_IDLE_EXIT] * 1000,
      .log = cli_log,
      .log_level = k->v[OPT_QUIET] ? NBDSERVE_LOG_ERROR : level};
  int status = nbdserve_new(&cli_server, &config);

  if (status) return cli_say(CLI_FAILED, "start: %s", u_error(status));
  cli_catch_signals(cli_on_signal);
  status = cli_add_all(k);
  if (k->v[OPT_STDIN])
    k->serve[0] = !(k->serve[1] = 1);
  else if (!status)
    status = cli_listen(k);
  if (!status) status = cli_ready(k);
  if (!status) status = cli_serve(k);
  cli_catch_signals(SIG_IGN);
  if (k->wrote_pidfile) unlink(k->v[OPT_PIDFILE]);
  nbdserve_free(cli_server);
  if (*k->dir) rmdir(k->dir);
  return status;
}

int main(int argc, char **argv) {
  static struct cli cli;
  struct cli *k = &cli;
  int status, fd;

  do fd = open("/dev/null", O_RDWR); /* 0 to 2 are open: nothing else becomes */
  while (fd >= 0 && fd <= 2);        /* one of them and gets messages as data */
  if (fd > 2) close(fd);
  k->targets = argv; /* gathered at its front, behind what has been read */
  k->report = k->serve[0] = k->serve[1] = -1;
  status = cli_parse(k, argc, argv);
  k->name = k->v[OPT_EXPORT] ? k->v[OPT_EXPORT] : "";
  if (!status && k->v[OPT_HELP]) {
    cli_help();
    if (fflush(stdout) == EOF) status = CLI_FAILED;
  } else if (!status && k->v[OPT_VERSION]) {
    printf("nbdserve %s%s%s%s%s\n", nbdserve_version(),
           NBDSERVE_NO_FLAT ? "" : " flat", NBDSERVE_NO_TCP ? "" : " tcp",
           NBDSERVE_NO_THREADS ? "" : " threads",
           NBDSERVE_POSIX_ONLY ? " posix-only" : "");
  } else {
    if (!status) status = cli_check(k);
    if (!status && k->v[OPT_FORK]) status = cli_fork(k);
    if (!status) status = cli_main(k);
  }
  return status;
}

#endif /* !NBDSERVE_NO_MAIN */

/* ==== [14] LICENCE =======================================================
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
