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
enum {
  OS_KEEP_SIZE = 1,
  OS_PUNCH_HOLE = 2 + 1,
  OS_ZERO_RANGE = 16 + 1
};
static int os_fallocate(int fd, int mode, uint64_t off, uint64_t len) {
#if OS_LINUX
  while (fallocate(fd, mode, (off_t)off, (off_t)len) < 0)
    if (errno != EINTR)
      return errno == ENOSYS || errno == EPERM || errno == ENODEV ? -EOPNOTSUPP
                                                                  : -errno;
  return 0;
#else
  return (void)fd, (void)mode, (void)off, (void)len, -EOPNOTSUPP;
#endif
}

/* Keeps other servers out: a writer everyone, a reader writers.  -EBUSY: one
 * is there.  A file system without locks has none. */
static int os_lock_file(int fd, int readonly) {
  int r = flock(fd, (readonly ? LOCK_SH : LOCK_EX) | LOCK_NB);
  return r < 0 && (errno == EWOULDBLOCK || errno == EAGAIN) ? -EBUSY : 0;
}

/* A new file of that path is there after a power cut, as it is. */
static int os_sync_new_file(int fd, const char *path) {
  int err = os_datasync(fd), dir = err ? err : os_open_dir(path);
  if (dir < 0) return dir;
  err = os_datasync(dir);
  close(dir);
  return err == -EINVAL ? 0 : err; /* some directories cannot */
}
#endif

#if !NBDSERVE_NO_FLAT
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
  return (void)fd, (void)off, is_data;
}

/* A file that is gone when it is closed, in dir or, if that is NULL, memory. */
static int os_nameless_file(const char *dir) {
  char path[PATH_MAX];
  int fd = -1;
#if OS_LINUX && defined MFD_CLOEXEC
  if (!dir) fd = memfd_create("nbdserve", MFD_CLOEXEC);
#endif
  snprintf(path, sizeof path, "%s/nbdserveXXXXXX", dir ? dir : "/tmp");
  if (fd < 0 && (fd = mkstemp(path)) >= 0) {
    unlink(path);
    fcntl(fd, F_SETFD, FD_CLOEXEC);
  }
  return fd < 0 ? -errno : fd;
}

static int os_is_rotational(int fd) { /* a file does not know */
  unsigned short yes = 0;
  return OS_LINUX && ioctl(fd, _IO(0x12, 126), &yes) == 0 && yes;
}

static int os_willneed(int fd, uint64_t off, uint64_t len) {
#if defined POSIX_FADV_WILLNEED && !NBDSERVE_POSIX_ONLY
  posix_fadvise(fd, (off_t)off, (off_t)len, POSIX_FADV_WILLNEED);
#endif
  return (void)fd, (void)off, (void)len, 0;
}

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
 * FIPS 180-4, of one message in one call, or of two of the same length side by
 * side: the instructions of x86 processors then do both in the time of one.
 *
 * The words of a state lie in the order F E B A H G D C, as those want them. */
#if !NBDSERVE_NO_CAS

static const uint32_t sha_k[64] = {
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

#define SHA_ROR(x, n) ((x) >> (n) | (x) << (32 - (n)))
#define SHA_MIX(x, i, j, last) (SHA_ROR(x, i) ^ SHA_ROR(x, j) ^ (last))
#define SHA_ROUND(a, b, c, d, e, f, g, h, i) \
  v[h] += SHA_MIX(v[e], 6, 11, SHA_ROR(v[e], 25)) + sha_k[i] + w[i] + \
          ((v[e] & v[f]) ^ (~v[e] & v[g])); \
  v[d] += v[h]; \
  v[h] += SHA_MIX(v[a], 2, 13, SHA_ROR(v[a], 22)) + \
          ((v[a] & v[b]) ^ (v[a] & v[c]) ^ (v[b] & v[c]))

static void sha_portable(uint32_t *s, const unsigned char *p, uint32_t *u,
                         const unsigned char *q, size_t n) {
  uint32_t w[64], v[8];
  int i;
  if (q) sha_portable(u, q, NULL, NULL, n);
  for (; n > 0; n--, p += 64) {
    for (i = 0; i < 16; i++)
      w[i] = u_get32(p + 4 * i);
    for (; i < 64; i++)
      w[i] = w[i - 16] + SHA_MIX(w[i - 15], 7, 18, w[i - 15] >> 3) + w[i - 7] +
             SHA_MIX(w[i - 2], 17, 19, w[i - 2] >> 10);
    memcpy(v, s, sizeof v);
    for (i = 0; i < 64; i += 8) {
      SHA_ROUND(3, 2, 7, 6, 1, 0, 5, 4, i);
      SHA_ROUND(4, 3, 2, 7, 6, 1, 0, 5, i + 1);
      SHA_ROUND(5, 4, 3, 2, 7, 6, 1, 0, i + 2);
      SHA_ROUND(0, 5, 4, 3, 2, 7, 6, 1, i + 3);
      SHA_ROUND(1, 0, 5, 4, 3, 2, 7, 6, i + 4);
      SHA_ROUND(6, 1, 0, 5, 4, 3, 2, 7, i + 5);
      SHA_ROUND(7, 6, 1, 0, 5, 4, 3, 2, i + 6);
      SHA_ROUND(2, 7, 6, 1, 0, 5, 4, 3, i + 7);
    }
    for (i = 0; i < 8; i++)
      s[i] += v[i];
  }
}

#if OS_HWSHA
#define SHA_FOUR(x, k) /* rounds */ \
  t = _mm_add_epi32(x##0, k); \
  x##cd = _mm_sha256rnds2_epu32(x##cd, x##ab, t); \
  x##ab = _mm_sha256rnds2_epu32(x##ab, x##cd, _mm_shuffle_epi32(t, 14)); \
  t = _mm_add_epi32(_mm_sha256msg1_epu32(x##0, x##1), \
                    _mm_alignr_epi8(x##3, x##2, 4)); \
  x##0 = x##1, x##1 = x##2, x##2 = x##3; \
  x##3 = _mm_sha256msg2_epu32(t, x##2)
#define SHA_LOAD(p) _mm_loadu_si128((const __m128i *)(const void *)(p))
#define SHA_SAVE(p, v) _mm_storeu_si128((__m128i *)(void *)(p), v)
#define SHA_WORDS(x, p, i) x##i = _mm_shuffle_epi8(SHA_LOAD(p + 16 * i), order)
#define SHA_BLOCK(x, p) \
  SHA_WORDS(x, p, 0), SHA_WORDS(x, p, 1), SHA_WORDS(x, p, 2), SHA_WORDS(x, p, 3)

static OS_HWSHA_TARGET void sha_hw(uint32_t *s, const unsigned char *p,
                                   uint32_t *u, const unsigned char *q,
                                   size_t n) {
  const __m128i order = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  __m128i pab = SHA_LOAD(s), pcd = SHA_LOAD(s + 4), p0, p1, p2, p3;
  __m128i qab = SHA_LOAD(u), qcd = SHA_LOAD(u + 4), q0, q1, q2, q3, t, k;
  int i;
  for (; n > 0; n--, p += 64, q += 64) {
    SHA_BLOCK(p, p);
    SHA_BLOCK(q, q);
    for (i = 0; i < 64; i += 4) {
      k = SHA_LOAD(sha_k + i);
      SHA_FOUR(p, k);
      SHA_FOUR(q, k);
    }
    SHA_SAVE(s, pab = _mm_add_epi32(pab, SHA_LOAD(s)));
    SHA_SAVE(s + 4, pcd = _mm_add_epi32(pcd, SHA_LOAD(s + 4)));
    SHA_SAVE(u, qab = _mm_add_epi32(qab, SHA_LOAD(u)));
    SHA_SAVE(u + 4, qcd = _mm_add_epi32(qcd, SHA_LOAD(u + 4)));
  }
}
#else
#define sha_hw sha_portable
#endif

/* The digests of p[len] and of q[len], if not NULL.  hw: see os_has_hwsha. */
static void sha_256(int hw, const void *p, const void *q, size_t len,
                    unsigned char *p_out, unsigned char *q_out) {
  static const uint32_t start[8] = {0x9b05688c, 0x510e527f, 0xbb67ae85,
                                    0x6a09e667, 0x5be0cd19, 0x1f83d9ab,
                                    0xa54ff53a, 0x3c6ef372};
  static const unsigned char order[8] = {3, 2, 7, 6, 1, 0, 5, 4};
  size_t whole = len / 64, rest = len % 64, n = rest < 56 ? 1 : 2, i;
  unsigned char tail[2][128];
  uint32_t s[2][8];

  for (i = 0; i < 2; i++) {
    const unsigned char *m = i ? q : p;
    memcpy(s[i], start, sizeof start);
    memset(tail[i], 0, sizeof tail[i]);
    if (m && rest) memcpy(tail[i], m + 64 * whole, rest);
    tail[i][rest] = 0x80;
    u_put64(tail[i] + 64 * n - 8, (uint64_t)len * 8);
  }
  (hw ? sha_hw : sha_portable)(s[0], p, s[1], q || !hw ? q : p, whole);
  const unsigned char *t = q ? tail[1] : hw ? tail[0] : NULL;
  (hw ? sha_hw : sha_portable)(s[0], tail[0], s[1], t, n);
  for (i = 0; i < 8; i++) {
    u_put32(p_out + 4 * i, s[0][order[i]]);
    if (q) u_put32(q_out + 4 * i, s[1][order[i]]);
  }
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
 * A regular file or block device, served as it is.
 *
 * (F1) After a failed fdatasync the kernel may have dropped what it could not
 *      write, and the next one says all is well.  So the first failure is for
 *      good: every later write and flush fails until the file is opened anew.
 * (F2) Calls that a system, file system or sandbox may lack are tried until
 *      they first say so; from then on the portable way is taken.
 * (F3) Nothing here depends on a file offset: any number of threads may call */
#if !NBDSERVE_NO_FLAT

enum {
  FLAT_RUN = 64,
  FLAT_BLOCK = 65536
}; /* in one call; of the temporary */
enum {
  FLAT_FAILED = 1 << 30
}; /* (F1), beside the modes of os_fallocate */

struct flat {
  struct ex_batched own;
  int fd, temp;          /* fixed: the file; a nameless one for writes, or -1 */
  uint64_t offset, size; /* fixed: of the export in the file; 0: all of it */
  struct os_monitor lock; /* guards: */
  int lacks;              /* FLAT_FAILED, and 1 << mode for each mode (F2) */
  unsigned char there[];  /* a bit for each block that is in temp */
};

static int flat_lacks(struct flat *f, int more) {
  os_lock(&f->lock);
  int lacks = f->lacks |= more;
  os_unlock(&f->lock);
  return lacks;
}

/* Does r[0..n), all READs or all WRITEs of neighbouring ranges, in one call. */
static int flat_transfer(struct flat *f, struct nbdserve_req *r, size_t n) {
  struct iovec v[FLAT_RUN];
  assert(n > 0 && n <= FLAT_RUN);
  for (size_t i = 0; i < n; i++) {
    v[i].iov_base = r[i].buf;
    v[i].iov_len = (size_t)r[i].len;
    assert(i == 0 || r[i].off == r[i - 1].off + r[i - 1].len);
  }
  return os_transfer(f->fd, r->type == NBD_CMD_WRITE, v, (int)n,
                     f->offset + r->off);
}

/* Reads from where the blocks are, writes to the temporary file. */
static int flat_overlay(struct flat *f, struct nbdserve_req *r) {
  unsigned char block[FLAT_BLOCK];
  int writing = r->type == NBD_CMD_WRITE, err = 0;
  for (uint64_t at = 0, n; at < r->len && !err; at += n) {
    uint64_t off = r->off + at, i = off / FLAT_BLOCK, from = i * FLAT_BLOCK;
    uint64_t whole = u_min(FLAT_BLOCK, f->size - from);
    int there = f->there[i / 8] >> i % 8 & 1;
    n = u_min(from + whole - off, r->len - at);
    struct iovec v = {r->buf + at, (size_t)n}, b = {block, (size_t)whole};
    if (!there && writing && n < whole) { /* the rest comes along */
      err = os_transfer(f->fd, 0, &b, 1, f->offset + from);
      memcpy(block + (off - from), r->buf + at, (size_t)n);
      v = (struct iovec){block, (size_t)whole};
      off = from;
    }
    if (!err)
      err = there || writing ? os_transfer(f->temp, writing, &v, 1, off)
                             : os_transfer(f->fd, 0, &v, 1, f->offset + off);
    if (writing && !err) f->there[i / 8] |= (unsigned char)(1 << i % 8);
  }
  return err;
}

static void flat_batch(void *ctx, struct nbdserve_req *r, size_t n) {
  struct flat *f = ctx;
  int failed = flat_lacks(f, 0) & FLAT_FAILED;
  for (; f->temp >= 0 && n > 0; r++, n--) {
    os_lock(&f->lock);
    r->err = flat_overlay(f, r);
    os_unlock(&f->lock);
  }
  for (size_t i = 0, j; i < n; i = j) {
    for (j = i + 1; j < n && j - i < FLAT_RUN && r[j].type == r[i].type &&
                    r[j].off == r[j - 1].off + r[j - 1].len;)
      j++;
    int err = failed && r[i].type == NBD_CMD_WRITE
                  ? -EIO
                  : flat_transfer(f, r + i, j - i);
    for (size_t k = i; k < j; k++) /* only what fails by itself has failed */
      r[k].err = err && j - i > 1 ? flat_transfer(f, r + k, 1) : err;
  }
}

static int flat_flush(void *ctx, uint32_t flags) {
  struct flat *f = ctx;
  int err = flat_lacks(f, 0) & FLAT_FAILED ? -EIO
            : f->temp >= 0                 ? 0
                           : os_datasync(f->fd); /* it is not to last */
  if (err) flat_lacks(f, FLAT_FAILED);           /* (F1) */
  return (void)flags, err;
}

/* os_fallocate on a range of the export; -EOPNOTSUPP: do it another way. */
static int flat_allocate(struct flat *f, int mode, uint64_t off, uint64_t len) {
  int lacks = flat_lacks(f, f->temp < 0 ? 0 : 1 << mode), err = -EOPNOTSUPP;
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
  int err = -EOPNOTSUPP;
  if (!(flags & NBDSERVE_CMD_NO_HOLE))
    err = flat_allocate(ctx, OS_PUNCH_HOLE, off, len);
  if (err == -EOPNOTSUPP) err = flat_allocate(ctx, OS_ZERO_RANGE, off, len);
  return err == -EOPNOTSUPP ? -ENOTSUP : err; /* the engine writes them */
}

static int flat_cache(void *ctx, uint64_t off, uint64_t len, uint32_t flags) {
  struct flat *f = ctx;
  return (void)flags, os_willneed(f->fd, f->offset + off, len);
}

static int flat_extents(void *ctx, uint64_t off, uint64_t len, uint32_t flags,
                        struct nbdserve_extents *out) {
  struct flat *f = ctx;
  uint64_t pos = f->offset + off, end = pos + len, next;
  for (int enough = f->temp >= 0; pos < end && !enough; pos = next) {
    int is_data = os_is_data(f->fd, pos, end, &next);
    assert(next > pos);
    enough = nbdserve_extent(
        out, next - pos,
        is_data ? 0 : NBDSERVE_EXTENT_HOLE | NBDSERVE_EXTENT_ZERO);
  }
  return (void)flags, 0;
}

static uint64_t flat_size(void *ctx, uint64_t was) {
  struct flat *f = ctx;
  off_t end = lseek(f->fd, 0, SEEK_END);
  if (f->temp >= 0) return u_min(was, f->size); /* there is no longer */
  if (f->size || end < 0) return was;
  return (uint64_t)end < f->offset ? 0 : (uint64_t)end - f->offset;
}

static void flat_close(void *ctx) {
  struct flat *f = ctx;
  close(f->fd); /* after the last flush nothing is left that could fail */
  close(f->temp);
  os_monitor_free(&f->lock);
  NBDSERVE_FREE(f);
}

static const struct nbdserve_ops flat_ops = {
    ex_batched_read, ex_batched_write, flat_flush, flat_trim,  flat_zero,
    flat_cache,      flat_extents,     flat_close, flat_batch, flat_size};

int nbdserve_flat_open(const char *path, const struct nbdserve_flat *options,
                       struct nbdserve_export *out) {
  struct nbdserve_flat o = {.offset = 0};
  if (options) o = *options;
  int in_memory = strncmp(path, "mem:", 4) == 0;
  if (in_memory) path = u_parse_size(path + 4, &o.create);
  if (!path || (in_memory && *path) || o.create > INT64_MAX ||
      o.flags & ~(NBDSERVE_FLAT_READONLY | NBDSERVE_FLAT_TEMPORARY))
    return -EINVAL;
  int fd = in_memory
               ? os_nameless_file(NULL)
               : open(path,
                      (o.flags ? O_RDONLY : O_RDWR) | (o.create ? O_CREAT : 0) |
                          O_CLOEXEC | O_NOCTTY | O_NONBLOCK /* a FIFO's open */,
                      0666);
  if (fd < 0) return in_memory ? fd : -errno;
  struct stat st;
  off_t end = 0;
  int err = in_memory ? 0 : os_lock_file(fd, o.flags != 0);
  if (!err && fstat(fd, &st) < 0) err = -errno;
  if (!err && !S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode))
    err = S_ISDIR(st.st_mode) ? -EISDIR : -EINVAL;
  if (!err && o.create && S_ISREG(st.st_mode) && !st.st_size) {
    if (ftruncate(fd, (off_t)o.create) < 0)
      err = -errno;
    else if (!in_memory)
      err = os_sync_new_file(fd, path);
  }
  if (!err && (end = lseek(fd, 0, SEEK_END)) < 0) err = -errno;
  uint64_t size = (uint64_t)end;
  if (!err && (o.offset > size || o.size > size - o.offset)) err = -EINVAL;
  int temp = -1, lasts = !(o.flags & NBDSERVE_FLAT_TEMPORARY);
  if (!err && !lasts && (temp = os_nameless_file(o.dir)) < 0) err = temp;
  out->size = o.size ? o.size : size - o.offset;
  uint64_t blocks = lasts ? 0 : out->size / FLAT_BLOCK + 1;
  struct flat *f = err ? NULL : u_zalloc(sizeof *f + (size_t)(blocks / 8 + 1));
  if (!err) err = f ? os_monitor_init(&f->lock) : -ENOMEM;
  if (err) {
    close(temp); /* -1 is no harm */
    close(fd);
    NBDSERVE_FREE(f);
    return err;
  }
  f->fd = fd;
  f->temp = temp;
  f->own.run_batch = flat_batch;
  f->offset = o.offset;
  f->size = lasts ? o.size : out->size;
  if (o.flags & NBDSERVE_FLAT_READONLY) out->flags |= NBDSERVE_EXPORT_READONLY;
  out->flags |= NBDSERVE_EXPORT_MULTI_CONN;
  if (os_is_rotational(fd)) out->flags |= NBDSERVE_EXPORT_ROTATIONAL;
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

#ifndef CAS_UNIT /* the tests make stores with everything in small */
#define CAS_UNIT 1048576u
#define CAS_FANOUT(block_size) ((block_size) / 4 - 8)
#define CAS_ENTRIES 84  /* in a log page */
#define CAS_SEGMENT 256 /* slots that are taken in a row */
#define CAS_MIN_BLOCK 4096
#endif
#define CAS_MAGIC "NBDSCAS1"
#define CAS_ANY UINT32_MAX
#define CAS_TAG(digest) (u_get32(digest) >> 2 | 0x40000000u) /* never 0 */
#define CAS_GOOD 0x80000000u /* read or written since, and it fitted */

enum {
  CAS_MAP = 0x4d415031,
  CAS_CAT = 0x43415431,
  CAS_LOG = 0x4c4f4731,
  CAS_PAGE = 4096,
  CAS_SUM = 4064, /* a log page or superblock; its SHA-256 */
  CAS_HEAD = 32,
  CAS_CHECK = 16, /* of other pages; their SHA-256 */
  CAS_ENTRY = 48,
  CAS_RECORD = 256,
  CAS_NAME = 166,
  CAS_PATH = 334, /* bytes */
  CAS_ID = 0,
  CAS_IS_SNAPSHOT = 4,
  CAS_SIZE = 8,
  CAS_ROOT = 16,
  CAS_DEPTH = 20,
  CAS_CREATED = 24,
  CAS_ORIGIN = 36,
  CAS_CID = 40,
  CAS_NAMED = 89, /* record */
  CAS_SLOTS = CAS_UNIT / 32,
  CAS_GROUPS = CAS_UNIT / 8 - 1, /* < 2^32 in all */
  CAS_LEVELS = 4,
  CAS_FILL = 128, /* of a map; digests read at a time */
  CAS_BATCH = 256,
  CAS_RUN = 64, /* blocks done at a time; in one call */
  CAS_DIRTY = 4096,
  CAS_WAITING = 65536,           /* pages, slots for a checkpoint */
  CAS_RESERVE = 4 * CAS_SEGMENT, /* free slots that data may not take */
  CAS_SLACK = 64 * CAS_SEGMENT,  /* free slots to have before filling gaps */
  CAS_FREED = -1,                /* ref of a slot that will be free */
  CAS_DATA = 1,
  CAS_DIGEST = 2,
  CAS_DUP = 4 /* of a block, what is to be done */
};

struct cas_group {
  int32_t ref[CAS_SLOTS];   /* 0: free (C13) */
  uint32_t tag[CAS_SLOTS];  /* CAS_TAG if in the index; CAS_GOOD */
  uint32_t next[CAS_SLOTS]; /* slot in the index, or in a list */
  uint32_t head[CAS_SLOTS]; /* of the index: buckets, not slots */
  uint16_t nfree[CAS_SLOTS / CAS_SEGMENT];
};

/* A page of a map.  All are in memory, a fraction of what is kept of slots. */
struct cas_node {
  int32_t refs;           /* edges from pages and images (C13) */
  int level, bad;         /* 0: blocks below; what is below could not be read */
  uint32_t slot;          /* where it lies; 0: nowhere yet as it is now */
  uint32_t *e;            /* [fanout] slots of blocks, on level 0 */
  struct cas_node *kid[]; /* [fanout] pages below, on other levels */
};

/* A volume or snapshot, and what its exports have in common: all. */
struct cas_image {
  struct ex_batched own;
  struct nbdserve_cas *s;
  struct cas_image *next, *parent;  /* parent: whose snapshot it is */
  struct cas_node *root;            /* NULL: all holes */
  uint64_t size, clients;           /* exports and calls that use it */
  unsigned char record[CAS_RECORD]; /* of the catalog; root, size: see above */
};

struct nbdserve_cas {
  /* fixed */
  int fd, readonly, verify, hw, is_device;
  uint32_t bs, fanout, log_pages;
  uint64_t data_off, end, max_blocks; /* of the file when opened; an image */
  struct os_monitor ckpt;             /* one checkpoint at a time; guards: */
  struct cas_item *pages;             /* what it writes */
  uint32_t npages;
  unsigned char super[CAS_PAGE]; /* id and log_pages in it are fixed */
  struct os_monitor lock; /* guards the rest; woken: a sync or work ended */
  int syncing;            /* one at a time: else one may miss an error */
  int failed, log_damaged, damaged; /* -errno (C14); (C9); nothing is freed */
  int replaying;                    /* what is in the log need not be logged */
  int busy, closing;                /* a thread is in cas_work; it is to end */
  struct cas_image *images;
  struct cas_group *groups[CAS_GROUPS];
  uint32_t next_id, nimages, catalog; /* slot of its first page, then by next */
  uint32_t ngroups, nslots, nfree, mask; /* mask: see cas_bucket */
  uint32_t cursor, ndirty; /* where slots are taken; pages without one */
  uint32_t dropped, retired, nwaiting; /* slots, by next: (C5), (C6); in both */
  uint32_t filled, to_fill, nlog; /* slots in the index; to be; log's entries */
  uint64_t seq, tail, durable;    /* its; the superblock's; (C4) */
  uint64_t nlogged, nsynced;      /* entries so far; covered by a sync */
  unsigned char log[CAS_PAGE];    /* the page being filled */
  unsigned char page[65536];      /* any other */
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
  int err = s->is_device ? 0 : os_fallocate(s->fd, 0, off, end - off);
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

struct cas_item {
  uint64_t lba;
  unsigned char *data; /* [block_size] */
  struct nbdserve_req *req;
  uint32_t slot, expect; /* slot that the map must have, or CAS_ANY */
  int state, err;
  unsigned char sum[32], digest[32]; /* of data; what the slot's is, if read */
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

struct cas_op {
  int verb;
  const char *name, *to;
  uint64_t size;
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
  to = is_new                          ? u_zalloc(sizeof *to)
       : verb == NBDSERVE_CAS_ROLLBACK ? im->parent
                                       : im;
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
  for (uint32_t i = 0; i < s->fanout; i++)
    u_put32(p + CAS_HEAD + 4 * i, !level      ? b->e[i]
                                  : b->kid[i] ? b->kid[i]->slot
                                              : 0);
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
    it[i].state = !it[i].slot     ? 0
                  : good || trust ? want
                                  : CAS_DATA | CAS_DIGEST;
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
  return (void)flags, err;
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
  return (void)flags, err;
}

static int cas_flush(void *ctx, uint32_t flags) {
  return (void)flags, cas_sync(((struct cas_image *)ctx)->s, 0);
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
    err = level ? cas_load(s, v, level - 1, index * s->fanout + c, b->kid + c)
          : v < s->nslots ? 0
                          : -EIO;
    if (!level && !err) cas_hold(s, b->e[c] = v);
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
    err = !cas_is_name((char *)im->record + CAS_NAMED) ||
                  cas_blocks(s, im->size) > s->max_blocks
              ? -EIO
          : u_get32(im->record + CAS_DEPTH) != CAS_LEVELS
              ? -EOPNOTSUPP
              : cas_load(s, u_get32(im->record + CAS_ROOT), CAS_LEVELS - 1, 0,
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
    ex_batched_read, ex_batched_write, cas_flush, cas_trim, cas_zero, NULL,
    cas_extents,     cas_close,        cas_batch, NULL};

int nbdserve_cas_volume(struct nbdserve_cas *s, const char *name,
                        struct nbdserve_export *out) {
  os_lock(&s->ckpt); /* one that is under way may be changing what it is */
  os_lock(&s->lock);
  struct cas_image *im = cas_find(s, name, strlen(name));
  int err = s->failed ? s->failed : im ? 0 : -ENOENT;
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
 * standard streams, the environment, its end) is touched here, nowhere else.
 *
 * The life of the process: main reads the options.  If the command line is a
 * command on stores, cli_run_verb does it and exits.  Otherwise main opens the
 * targets, then the sockets, tells whoever waits that it is ready, and serves
 * until the end.  However the process ends, by way of exit(), cli_close removes
 * what was made and closes what was opened.  Whoever finds that it makes no
 * sense to go on prints one message and calls exit() at once: cli_die.
 *
 * Threads: the main thread does all this, and no other one takes signals.  The
 * threads of clients come here only for --fault and --delay (cli_before) and to
 * find a volume (cli_find_volume, cli_list_volumes).  A served store has the
 * thread cli_control.  What all of them read, `opt` and most of `cli`, does not
 * change after the server has started.
 *
 * To add a command-line option: an enumerator in enum cli_option_id, a member
 * in `opt` for its value, and a row in cli_options, which names the parser for
 * its kind of value.  --help prints that table.  What it must not be combined
 * with goes to cli_exclusions.
 *
 * To add a command on stores: an enumerator in enum cli_verb_id, a function
 * that does it, and a row in cli_verbs, from which --help prints it, too.
 *
 * To add a kind of target: cli_parse_target, which tells targets apart, and
 * cli_open_target. */
#if !NBDSERVE_NO_MAIN
#include <sys/wait.h>

/* Exit status.  A command that is served may have any other one. */
enum {
  CLI_OK = 0,
  CLI_FAILED = 1,      /* a message says why */
  CLI_USAGE = 2,       /* the command line makes no sense */
  CLI_DAMAGED = 3,     /* verify found damage */
  CLI_IN_USE = 4,      /* somebody else has the target */
  CLI_NOT_FOUND = 127, /* as a shell says it: there is no such program */
  CLI_BY_SIGNAL = 128  /* as a shell says it: plus the number of the signal */
};

enum {
  /* Seconds that a command has, from SIGTERM to its end: enough to write what
   * it has left, and no more than whoever has sent the signal will wait. */
  CLI_COMMAND_GRACE_S = 10,

  /* Socket activation passes this descriptor and the ones that follow it. */
  CLI_FIRST_PASSED_FD = 3,

  /* The port of NBD, as assigned by IANA */
  CLI_DEFAULT_PORT = 10809
};

/* How far the end has come; see "Signals, and how it ends" below.  It goes from
 * one to the next, and never back. */
enum cli_phase {
  CLI_SERVING,      /* nobody has asked for the end */
  CLI_COMMAND_ENDS, /* the command is to end, and is served until it has */
  CLI_STOPPING      /* nbdserve_stop was called */
};

/* The state of the process.  What the options say is in `opt`. */
static struct {
  /* ---- The command line without its options.  It stays where it is, in argv,
   * but is cut at "=" and "::". */

  /* [NAME=]TARGET each, or a command on stores with its operands */
  char **targets;
  int ntargets;
  /* What stands behind "--", ended by NULL; or NULL */
  char **command;

  /* ---- The server, and how it is reached */

  struct nbdserve *server;
  /* The name of the export if there is only one, for the URI; or "" */
  const char *export_name;
  /* The descriptors of a client that is the only one: standard input and output
   * with --stdin, or a connected socket that was passed to us.  -1: clients
   * connect, as usual. */
  int in;
  int out;
  /* "": there is nowhere to connect to, or whoever passed us a socket knows.
   * It has room for the longest name and path, with each byte as %XX. */
  char uri[3 * WIRE_STRING_MAX + 1024];

  /* ---- What has to be removed at exit */

  /* The directory of the private socket, or "".  It has to be short: the path
   * of a socket is limited to about a hundred bytes. */
  char private_dir[100];
  /* The path of the pidfile, if we have made one, or NULL; and the descriptor
   * of that file, which stays open: no other file can get its inode number
   * then, by which cli_remove_pidfile recognises it. */
  const char *pidfile;
  int pidfile_fd;

  /* ---- The store that is served, or that a command is for; one at most */

  /* Its path, or "" */
  char store[PATH_MAX];
  /* The store; NULL: it is not open. */
  struct nbdserve_cas *cas;
  /* The path of the socket that takes commands, STORE.ctl */
  char ctl_path[PATH_MAX];
  /* That socket, listening, or -1; and its file, as we have made it */
  int ctl;
  struct stat ctl_st;
  /* A pipe: cli_control writes to it when it ends, for cli_await_control.
   * ctl_ended[0] is -1 if that thread was never started. */
  int ctl_ended[2];

  /* --fork: the pipe to our parent, which waits for a byte; or -1 */
  int ready_pipe;

  /* ---- What the signal handler writes.  Others read it, and write to it only
   * while the signals are blocked.  (The exception is stats_wanted, which is
   * cleared before the totals are printed: a signal that comes in between gets
   * them printed again.) */

  /* SIGUSR1 has come. */
  volatile sig_atomic_t stats_wanted;
  /* SIGTERM, SIGINT or SIGHUP has come. */
  volatile sig_atomic_t end_wanted;
  /* enum cli_phase */
  volatile sig_atomic_t phase;
  /* The process id of the command while it runs; 0: there is none.  As long as
   * this is set the process exists, though it may have ended: nobody else waits
   * for it, so its id cannot become that of another process. */
  volatile sig_atomic_t child;
  /* We have sent SIGTERM to the command. */
  volatile sig_atomic_t child_told;
  /* The exit status of a command that has ended */
  volatile sig_atomic_t command_status;
} cli = {.export_name = "",
         .in = -1,
         .out = -1,
         .ctl = -1,
         .ctl_ended = {-1, -1},
         .ready_pipe = -1};

STATIC_ASSERT(a_process_id_is_read_in_one_piece,
              sizeof(sig_atomic_t) >= sizeof(pid_t));

/* ---- Messages ----------------------------------------------------------- */

/* Prints a message: a line on standard error, in one write, so that the lines
 * of several threads do not mix.  The form is "OBJECT: what is wrong: reason
 * (what to do)".  What is too long for the buffer is cut; a path fits. */
static void OS_PRINTF(1, 2) cli_say(const char *fmt, ...) {
  char line[PATH_MAX + 600] = "nbdserve: ";
  size_t n = strlen(line);
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(line + n, sizeof line - n - 1, fmt, ap);
  va_end(ap);
  n = strlen(line);
  assert(n + 1 < sizeof line);
  line[n++] = '\n';
  (void)!write(2, line, n); /* if that fails there is nobody to tell */
}

/* The `log` function of the server: it filters by level, so that all that comes
 * here is to be printed. */
static void cli_log(void *unused, int level, const char *message) {
  (void)unused;
  (void)level;
  cli_say("%s", message);
}

/* Prints a message and ends the process, by way of cli_close.  These are macros
 * because only then every compiler knows that they do not return. */
#define cli_die(status, ...) \
  do { \
    cli_say(__VA_ARGS__); \
    exit(status); \
  } while (0)
#define cli_usage(...) cli_die(CLI_USAGE, __VA_ARGS__)
#define cli_failed(...) cli_die(CLI_FAILED, __VA_ARGS__)

/* Ends the process if err is an error (-errno), with a message that names the
 * object.  EBUSY means that a file or store is locked by another server, which
 * has an exit status of its own: scripts try again then. */
static void cli_exit_if_error(int err, const char *object) {
  assert(err <= 0 && object);
  if (!err) return;
  if (err == -EBUSY)
    cli_die(CLI_IN_USE, "%s: %s; another server has it", object,
            u_errno_text(err));
  cli_failed("%s: %s", object, u_errno_text(err));
}

/* ---- Signals, and how it ends --------------------------------------------
 * SIGTERM, SIGINT and SIGHUP ask for the end.  If a command is being served
 * (--run, or what stands behind "--") the end comes in this order:
 *
 *   1. Nobody new can connect: nbdserve_unlisten.  The clients that are there,
 *      the command's above all, are served as before.
 *   2. The command is told, by SIGTERM, and served until it has ended.  It may
 *      still write what it has, and flush.
 *   3. Its end, a second signal or CLI_COMMAND_GRACE_S seconds finish step 2:
 *      nbdserve_stop.
 *   4. The server finishes in its own order: see srv_finish in [12].
 *   5. The status of the command becomes ours.  If it has still not ended a
 *      message says so, and it is left alone.
 *
 * Without a command the first signal leads to nbdserve_stop and step 4.  When
 * nbdserve_stop has been called and a signal has come before, SIGINT ends the
 * process at once: whoever types Ctrl-C twice does not want to wait.
 *
 *   CLI_SERVING --- a signal, while a command runs --> CLI_COMMAND_ENDS
 *        |                                                    |
 *        | a signal without a command,          its end, a second signal,
 *        | or the end of the command            or SIGALRM: time is over
 *        |                                                    |
 *        +-----------------> CLI_STOPPING <-------------------+
 *
 * Who does what: the signal handler owns cli.phase.  It runs in the main thread
 * (all others block the signals) and interrupts nbdserve_run by nbdserve_wake;
 * cli_run, around nbdserve_run, then does steps 1 and 2: nbdserve_unlisten must
 * not be called by a handler.  Without threads nbdserve_run does not return
 * while it serves a client, so there the handler itself does step 2; step 1 is
 * not urgent, as nobody is accepted meanwhile.  The handler also waits for the
 * command, so that its end reaches nbdserve_stop in that case, too. */

/* Signals that are caught, or ignored while the process ends. */
static const int cli_signals[] = {SIGHUP,  SIGINT,  SIGTERM,
                                  SIGUSR1, SIGCHLD, SIGALRM};
enum {
  CLI_NSIGNALS = sizeof cli_signals / sizeof *cli_signals
};

/* Keeps the handler away until cli_restore_signals.  This changes the mask of
 * the main thread, which is the only one that takes these signals.  (POSIX
 * wants pthread_sigmask for that if there are other threads; no system makes a
 * difference, and without threads there is none.) */
static void cli_block_signals(sigset_t *was) {
  sigset_t set;
  sigemptyset(&set);
  for (int i = 0; i < CLI_NSIGNALS; i++)
    sigaddset(&set, cli_signals[i]);
  sigprocmask(SIG_BLOCK, &set, was);
}

/* Undoes cli_block_signals: signals that have come meanwhile are handled before
 * this returns. */
static void cli_restore_signals(const sigset_t *was) {
  sigprocmask(SIG_SETMASK, was, NULL);
}

/* Translates what waitpid says into an exit status, as a shell does. */
static int cli_exit_status(int wait_status) {
  assert(WIFSIGNALED(wait_status) || WIFEXITED(wait_status));
  if (WIFSIGNALED(wait_status)) return CLI_BY_SIGNAL + WTERMSIG(wait_status);
  return WEXITSTATUS(wait_status);
}

/* Step 3.  Only the handler calls this: cli.phase is its own. */
static void cli_stop_server(void) {
  assert(cli.server);
  cli.phase = CLI_STOPPING;
  nbdserve_stop(cli.server);
}

/* Step 2: sends SIGTERM to the command, if that was not done yet, and sets the
 * clock that limits its time.  The handler may call this.  The signals are
 * blocked because the command may end at any moment: once the handler has
 * waited for it, its process id may belong to somebody else. */
static void cli_tell_command(void) {
  sigset_t was;
  cli_block_signals(&was);
  if (cli.child && !cli.child_told) {
    assert(cli.child > 0); /* kill would hit a group of processes */
    cli.child_told = 1;
    kill((pid_t)cli.child, SIGTERM);
    alarm(CLI_COMMAND_GRACE_S);
  }
  cli_restore_signals(&was);
}

/* SIGCHLD: takes the status of the command if it has ended.  The signal comes
 * for other reasons, too: the command was suspended, or a process has ended
 * that was started by whatever program this process was before exec.  Only the
 * command is waited for, so such children are left alone. */
static void cli_on_child(void) {
  int wait_status = 0;
  if (!cli.child) return;
  if (waitpid((pid_t)cli.child, &wait_status, WNOHANG) != (pid_t)cli.child)
    return;
  cli.command_status = cli_exit_status(wait_status);
  cli.child = 0;
  cli_stop_server();
}

/* SIGTERM, SIGINT or SIGHUP: see the order above.  A SIGINT that the terminal
 * sends goes to the command as well, so it may well have ended already. */
static void cli_on_end(int sig) {
  int is_first = !cli.end_wanted;
  assert(cli.phase != CLI_COMMAND_ENDS || cli.child);
  cli.end_wanted = 1;
  if (!is_first && cli.phase == CLI_STOPPING && sig == SIGINT)
    _exit(CLI_BY_SIGNAL + sig);
  if (!is_first || !cli.child) {
    cli_stop_server();
    return;
  }
  cli.phase = CLI_COMMAND_ENDS;
  if (NBDSERVE_NO_THREADS) cli_tell_command();
  nbdserve_wake(cli.server);
}

/* The signal handler.  It calls nothing but what POSIX and nbdserve.h allow in
 * a handler.  All other signals are blocked meanwhile (cli_catch_signals), so
 * that what it does to `cli` is done in one piece.  It may run before there is
 * a command, and after there was one, but never before there is a server. */
static void cli_on_signal(int sig) {
  int saved = errno;
  assert(cli.server);
  switch (sig) {
  case SIGUSR1:
    cli.stats_wanted = 1;
    nbdserve_wake(cli.server);
    break;
  case SIGCHLD:
    cli_on_child();
    break;
  case SIGALRM: /* the command has had its time */
    cli_stop_server();
    break;
  default:
    cli_on_end(sig);
  }
  errno = saved;
}

/* Is the signal ignored because whoever started us wants it so, as nohup does
 * for SIGHUP, and a shell for SIGINT of what it runs in the background? */
static int cli_stays_ignored(int sig) {
  struct sigaction was;
  if (sig != SIGHUP && sig != SIGINT) return 0;
  return sigaction(sig, NULL, &was) < 0 || was.sa_handler == SIG_IGN;
}

/* Gives our signals a handler, or SIG_IGN when the process ends, or SIG_DFL for
 * a program that is to be executed.  SIGPIPE and SIGXFSZ are ignored, so that
 * writing to a closed pipe, or beyond the limit for the size of files, becomes
 * an error; but not for such a program, which inherits what is ignored. */
static void cli_catch_signals(void (*handler)(int)) {
  struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART};
  sigfillset(&action.sa_mask);
  for (int i = 0; i < CLI_NSIGNALS; i++) {
    if (!cli_stays_ignored(cli_signals[i]))
      sigaction(cli_signals[i], &action, NULL);
  }
  if (handler != SIG_DFL) action.sa_handler = SIG_IGN;
  sigaction(SIGPIPE, &action, NULL);
  sigaction(SIGXFSZ, &action, NULL);
}

/* ---- Files that we make and remove -------------------------------------- */

/* Removes a file that we have made, if it still is that file.  Whoever has put
 * another one in its place, a server that was started after us for instance,
 * keeps it.  The caller has the file open, or has it bound as a socket: its
 * inode number would otherwise be free, and the other file may have got it. */
static void cli_remove_own(const char *path, const struct stat *made) {
  struct stat st;
  if (lstat(path, &st) == 0 && st.st_dev == made->st_dev &&
      st.st_ino == made->st_ino)
    unlink(path);
}

/* Writes our process id to a new file beside path, with the mode that the umask
 * asks for.  temp[] gets its name.  Returns a descriptor, or -errno and leaves
 * nothing behind.  mkstemp neither follows symbolic links nor opens a file that
 * is there already. */
static int cli_make_pidfile(const char *path, char temp[PATH_MAX]) {
  if (snprintf(temp, PATH_MAX, "%s.XXXXXX", path) >= PATH_MAX)
    return -ENAMETOOLONG;
  int fd = mkstemp(temp);
  if (fd < 0) return -errno;
  mode_t mask = umask(077); /* there is no other way to ask for it */
  umask(mask);
  if (dprintf(fd, "%ld\n", (long)getpid()) > 0 &&
      fchmod(fd, 0666 & ~mask) == 0 && fcntl(fd, F_SETFD, FD_CLOEXEC) == 0)
    return fd;
  int err = -errno;
  close(fd);
  unlink(temp);
  return err;
}

/* --pidfile.  The file appears in one step, when it is whole: whoever sees it
 * may connect.  A symbolic link of that name is replaced, not followed. */
static void cli_write_pidfile(const char *path) {
  char temp[PATH_MAX];
  int fd = cli_make_pidfile(path, temp);
  if (fd < 0) cli_exit_if_error(fd, path);
  if (rename(temp, path) < 0) {
    int err = -errno;
    unlink(temp);
    cli_exit_if_error(err, path);
  }
  assert(!cli.pidfile);
  cli.pidfile = path;
  cli.pidfile_fd = fd;
}

/* At exit: removes the pidfile that we have made, if any. */
static void cli_remove_pidfile(void) {
  struct stat made;
  assert(!cli.pidfile || cli.pidfile_fd > 2);
  if (cli.pidfile && fstat(cli.pidfile_fd, &made) == 0)
    cli_remove_own(cli.pidfile, &made);
}

/* ---- Words, and what --fault and --delay do to requests ----------------- */

/* A word that the value of an option may contain, and what it stands for.  In a
 * table of words the last name is NULL. */
struct cli_word {
  const char *name;
  uint32_t value;
};

enum {
  /* The types of requests are below this; NBD_CMD_BLOCK_STATUS is the last. */
  CLI_NCOMMANDS = NBD_CMD_BLOCK_STATUS + 1,
  /* In place of a type: each of them */
  CLI_ALL_COMMANDS = CLI_NCOMMANDS
};

/* clang-format off */

/* --without: bits of nbdserve_config.without, where flags of the transmission
 * stand for themselves, and option N of the handshake for bit 16 + N */
static const struct cli_word cli_features[] = {
    {"flush", NBD_FLAG_SEND_FLUSH},
    {"fua", NBD_FLAG_SEND_FUA},
    {"trim", NBD_FLAG_SEND_TRIM},
    {"zero", NBD_FLAG_SEND_WRITE_ZEROES},
    {"df", NBD_FLAG_SEND_DF},
    {"multi-conn", NBD_FLAG_CAN_MULTI_CONN},
    {"cache", NBD_FLAG_SEND_CACHE},
    {"fast-zero", NBD_FLAG_SEND_FAST_ZERO},
    {"list", 65536u << NBD_OPT_LIST},
    {"info", 65536u << NBD_OPT_INFO},
    {"go", 65536u << NBD_OPT_GO},
    {"structured", 65536u << NBD_OPT_STRUCTURED_REPLY},
    {"list-meta", 65536u << NBD_OPT_LIST_META_CONTEXT},
    {"meta", 65536u << NBD_OPT_SET_META_CONTEXT},
    {"extended", 65536u << NBD_OPT_EXTENDED_HEADERS},
    {NULL, 0}};

/* --fault and --delay: the requests that they concern */
static const struct cli_word cli_commands[] = {
    {"read", NBD_CMD_READ},
    {"write", NBD_CMD_WRITE},
    {"flush", NBD_CMD_FLUSH},
    {"trim", NBD_CMD_TRIM},
    {"cache", NBD_CMD_CACHE},
    {"zero", NBD_CMD_WRITE_ZEROES},
    {"status", NBD_CMD_BLOCK_STATUS},
    {"all", CLI_ALL_COMMANDS},
    {NULL, 0}};

/* --fault: the errors that the protocol knows, as errno values */
static const struct cli_word cli_errors[] = {
    {"EPERM", EPERM},
    {"EIO", EIO},
    {"ENOMEM", ENOMEM},
    {"EINVAL", EINVAL},
    {"ENOSPC", ENOSPC},
    {"EOVERFLOW", EOVERFLOW},
    {"ENOTSUP", ENOTSUP},
    {"ESHUTDOWN", ESHUTDOWN},
    {NULL, 0}};

/* --cache: flags of an export */
static const struct cli_word cli_cache_modes[] = {
    {"writeback", 0},
    {"writethrough", NBDSERVE_EXPORT_WRITETHROUGH},
    {"unsafe", NBDSERVE_EXPORT_UNSAFE},
    {NULL, 0}};

/* clang-format on */

/* What --fault and --delay do to the requests of a type.  This is fixed before
 * the server is made, except for `sum`, which server->lock guards. */
static struct cli_fault {
  /* The answer to requests that fail, -errno */
  int err;
  /* How many of a million requests fail */
  unsigned rate_ppm;
  /* Each request adds rate_ppm; where that makes a million the request fails,
   * and the million is taken off. */
  unsigned sum;
  /* How long each request waits before it is done */
  int delay_ms;
} cli_faults[CLI_NCOMMANDS];

/* The `before` function of the server: it is called for each request, in the
 * thread that is about to do it, and may wait there.  Which requests fail is
 * not left to chance: tests can rely on the number. */
static int cli_before(void *unused, unsigned type, uint64_t off, uint64_t len) {
  (void)unused;
  (void)off;
  (void)len;
  assert(type < CLI_NCOMMANDS);
  struct cli_fault *fault = &cli_faults[type];
  if (fault->delay_ms) poll(NULL, 0, fault->delay_ms);
  os_lock(&cli.server->lock);
  fault->sum += fault->rate_ppm;
  int fails = fault->sum >= 1000000;
  if (fails) fault->sum -= 1000000;
  assert(fault->sum < 1000000);
  os_unlock(&cli.server->lock);
  return fails ? fault->err : 0;
}

/* Takes a word off the front of *text.  The word goes to the first of the
 * characters in `ends`, which is taken off, too, or to the end of the text.
 * Returns false, and leaves *text alone, if the table has no such word. */
static int cli_take_word(const struct cli_word *words, const char **text,
                         const char *ends, uint32_t *value) {
  size_t len = strcspn(*text, ends);
  for (; words->name; words++) {
    if (strlen(words->name) == len && memcmp(words->name, *text, len) == 0)
      break;
  }
  if (!words->name) return 0;
  *value = words->value;
  *text += len;
  if (**text) ++*text;
  return 1;
}

/* Reads a number from 0 to max, which may have a decimal point.  Returns false
 * if the text is something else, or has something behind the number.  NaN fails
 * the comparisons, so it is refused. */
static int cli_take_real(const char *text, double max, double *value) {
  char *rest;
  *value = strtod(text, &rest);
  return rest != text && !*rest && *value >= 0 && *value <= max;
}

/* Writes the names in a table to list[size], with blanks between them, for a
 * message that says what is allowed.  The caller's array must have room. */
static const char *cli_list_words(const struct cli_word *words, char *list,
                                  size_t size) {
  size_t n = 0;
  assert(words->name);
  for (; words->name; words++) {
    n +=
        (size_t)snprintf(list + n, size - n, "%s%s", n ? " " : "", words->name);
    assert(n < size);
  }
  return list;
}

/* ---- Options ------------------------------------------------------------ */

/* The options, in the order of --help */
enum cli_option_id {
  OPT_UNIX,
  OPT_PORT,
  OPT_BIND,
  OPT_STDIN,
  OPT_FD,
  OPT_READ_ONLY,
  OPT_EXPORT,
  OPT_DESCRIPTION,
  OPT_OFFSET,
  OPT_SIZE,
  OPT_BLOCK_SIZE,
  OPT_CREATE,
  OPT_TEMPORARY,
  OPT_CACHE,
  OPT_THREADS,
  OPT_MAX_CONN,
  OPT_STALL,
  OPT_ONCE,
  OPT_IDLE_EXIT,
  OPT_RUN,
  OPT_FORK,
  OPT_PIDFILE,
  OPT_READY_FD,
  OPT_QUIET,
  OPT_VERBOSE,
  OPT_STATS,
  OPT_JSON,
  OPT_WITHOUT,
  OPT_FAULT,
  OPT_DELAY,
  OPT_DRY_RUN,
  OPT_NO_VERIFY,
  OPT_VERSION,
  OPT_HELP,
  OPT_COMMAND, /* "--", with a command behind it; --help shows it elsewhere */
  OPT_COUNT
};

/* What the options say.  What was not given is 0 or NULL, which is the default
 * for nbdserve.h as well; where 0 is a value of its own (a port, a descriptor)
 * opt.given tells the difference.  Nobody changes this after cli_parse. */
static struct {
  /* How often each option was given; an option without a value has no other
   * trace. */
  unsigned given[OPT_COUNT];

  /* ---- Where to listen */
  const char *unix_path;
  const char *bind_address;
  uint64_t port;
  uint64_t fd;

  /* ---- The targets and their exports; sizes in bytes */
  const char *export_name;
  const char *description;
  uint64_t offset;
  uint64_t size;
  uint64_t create_size;
  uint32_t min_block;
  uint32_t preferred_block;
  uint32_t max_request;
  /* 0, NBDSERVE_EXPORT_WRITETHROUGH or NBDSERVE_EXPORT_UNSAFE */
  uint32_t cache_mode;

  /* ---- Clients */
  uint64_t threads;
  uint64_t max_conn;
  uint64_t stall_s;
  /* Bits of nbdserve_config.without */
  uint32_t without;

  /* ---- The life of the process */
  uint64_t idle_exit_s;
  const char *run_command;
  const char *pidfile;
  uint64_t ready_fd;
} opt;

struct cli_option;

/* A parser takes the value of an option into `opt`.  A value that is not
 * allowed ends the process; the message says what is. */
typedef void cli_parser(const struct cli_option *option, const char *value);

struct cli_option {
  /* What stands behind "--" */
  const char *name;
  /* What stands behind "-"; 0: there is no short form. */
  char letter;
  /* What --help calls the value; NULL: the option takes none. */
  const char *argument;
  const char *help;
  /* Takes the value; NULL: opt.given says it all. */
  cli_parser *parse;
  /* For cli_parse_text: where the value goes */
  const char **text;
  /* For cli_parse_number and cli_parse_fd: where it goes, and its range */
  uint64_t *number;
  uint64_t min;
  uint64_t max;
};

/* ---- A parser for each kind of value ---- */

/* Any text.  It stays in argv. */
static void cli_parse_text(const struct cli_option *option, const char *value) {
  assert(option->text);
  *option->text = value;
}

/* A number or size in the range that the table says */
static void cli_parse_number(const struct cli_option *option,
                             const char *value) {
  uint64_t number;
  assert(option->number && option->min <= option->max);
  if (!u_parse_number(value, option->max, &number) || number < option->min)
    cli_usage("--%s %s: not a number from %" PRIu64 " to %" PRIu64,
              option->name, value, option->min, option->max);
  *option->number = number;
}

/* A descriptor that whoever started us has opened.  It has to be open: a number
 * that is free would later be that of a file of our own, maybe of an image. */
static void cli_parse_fd(const struct cli_option *option, const char *value) {
  uint64_t fd;
  assert(option->number && option->max <= INT_MAX);
  if (!u_parse_number(value, option->max, &fd) || fd < option->min)
    cli_usage("--%s %s: not the number of a descriptor (%" PRIu64 " or above)",
              option->name, value, option->min);
  if (fcntl((int)fd, F_GETFD) < 0)
    cli_usage("--%s %s: not an open descriptor", option->name, value);
  *option->number = fd;
}

/* --block-size: three sizes.  Whether they go together is for nbdserve_add to
 * say. */
static void cli_parse_block_sizes(const struct cli_option *option,
                                  const char *value) {
  uint32_t *const sizes[] = {&opt.min_block, &opt.preferred_block,
                             &opt.max_request};
  const char *rest = value;
  for (int i = 0; i < 3; i++) {
    char end = i < 2 ? ':' : '\0';
    uint64_t size = 0;
    rest = u_parse_size(rest, &size);
    if (!rest || *rest != end || size < 1 || size > UINT32_MAX)
      cli_usage("--%s %s: not MIN:PREFERRED:MAX, three sizes in bytes",
                option->name, value);
    *sizes[i] = (uint32_t)size;
    rest++;
  }
}

/* --cache: one of a few words */
static void cli_parse_cache_mode(const struct cli_option *option,
                                 const char *value) {
  const char *rest = value;
  if (!cli_take_word(cli_cache_modes, &rest, "", &opt.cache_mode))
    cli_usage("--%s %s: not writeback, writethrough or unsafe", option->name,
              value);
}

/* --without: a list of words, with commas between them.  Given again it adds to
 * the list. */
static void cli_parse_features(const struct cli_option *option,
                               const char *value) {
  const char *rest = value;
  char words[200];
  uint32_t bit;
  while (*rest) {
    if (!cli_take_word(cli_features, &rest, ",", &bit))
      cli_usage("--%s %s: not a list of: %s (with commas)", option->name, value,
                cli_list_words(cli_features, words, sizeof words));
    opt.without |= bit;
  }
}

/* --fault: which requests fail, how, and how often.  A rate is rounded up: what
 * is above 0 fails some time. */
static void cli_parse_fault(const struct cli_option *option,
                            const char *value) {
  const char *rest = value;
  char commands[100];
  char errors[100];
  uint32_t command;
  uint32_t error;
  double rate;
  if (!cli_take_word(cli_commands, &rest, ":", &command) ||
      !cli_take_word(cli_errors, &rest, ":", &error) ||
      !cli_take_real(rest, 1, &rate))
    cli_usage("--%s %s: not CMD:ERR:RATE; CMD: %s; ERR: %s; RATE: 0 to 1",
              option->name, value,
              cli_list_words(cli_commands, commands, sizeof commands),
              cli_list_words(cli_errors, errors, sizeof errors));
  for (uint32_t i = 0; i < CLI_NCOMMANDS; i++) {
    if (i != command && command != CLI_ALL_COMMANDS) continue;
    cli_faults[i].err = -(int)error;
    cli_faults[i].rate_ppm = (unsigned)(rate * 1e6 + .999);
  }
}

/* --delay: which requests wait, and how long, in milliseconds, rounded up */
static void cli_parse_delay(const struct cli_option *option,
                            const char *value) {
  const char *rest = value;
  char commands[100];
  uint32_t command;
  double ms;
  if (!cli_take_word(cli_commands, &rest, ":", &command) ||
      !cli_take_real(rest, 1e6, &ms))
    cli_usage("--%s %s: not CMD:MS; CMD: %s; MS: 0 to 1000000", option->name,
              value, cli_list_words(cli_commands, commands, sizeof commands));
  for (uint32_t i = 0; i < CLI_NCOMMANDS; i++) {
    if (i != command && command != CLI_ALL_COMMANDS) continue;
    cli_faults[i].delay_ms = (int)(ms + .999);
  }
}

/* ---- The table ---- */

/* clang-format off */
static const struct cli_option cli_options[OPT_COUNT] = {
    [OPT_UNIX] = {.name = "unix", .letter = 'U', .argument = "PATH",
        .help = "listen on a unix socket (default: a private one)",
        .parse = cli_parse_text, .text = &opt.unix_path},
    [OPT_PORT] = {.name = "port", .letter = 'p', .argument = "N",
        .help = "listen on TCP (usual: 10809; 0: any free port)",
        .parse = cli_parse_number, .number = &opt.port, .max = 65535},
    [OPT_BIND] = {.name = "bind", .letter = 'i', .argument = "ADDR",
        .help = "TCP address (default: the two of loopback)",
        .parse = cli_parse_text, .text = &opt.bind_address},
    [OPT_STDIN] = {.name = "stdin", .letter = 's',
        .help = "serve one client on standard input and output"},
    [OPT_FD] = {.name = "fd", .argument = "N",
        .help = "serve descriptor N, a listening or connected socket",
        .parse = cli_parse_fd, .number = &opt.fd, .max = INT_MAX},
    [OPT_READ_ONLY] = {.name = "read-only", .letter = 'r',
        .help = "refuse writes"},
    [OPT_EXPORT] = {.name = "export", .letter = 'e', .argument = "NAME",
        .help = "name of the export (default: every name will do)",
        .parse = cli_parse_text, .text = &opt.export_name},
    [OPT_DESCRIPTION] = {.name = "description", .letter = 'D',
        .argument = "TEXT", .help = "shown to clients that list the exports",
        .parse = cli_parse_text, .text = &opt.description},
    [OPT_OFFSET] = {.name = "offset", .letter = 'o', .argument = "N",
        .help = "serve the target from byte N on",
        .parse = cli_parse_number, .number = &opt.offset, .max = INT64_MAX},
    [OPT_SIZE] = {.name = "size", .argument = "N",
        .help = "serve only N bytes of the target",
        .parse = cli_parse_number, .number = &opt.size,
        .min = 1, .max = INT64_MAX},
    [OPT_BLOCK_SIZE] = {.name = "block-size", .letter = 'b',
        .argument = "SIZES", .help = "MIN:PREFERRED:MAX (1:4096:32M)",
        .parse = cli_parse_block_sizes},
    [OPT_CREATE] = {.name = "create", .argument = "SIZE",
        .help = "make the target, a sparse file, if it is missing",
        .parse = cli_parse_number, .number = &opt.create_size,
        .min = 1, .max = INT64_MAX},
    [OPT_TEMPORARY] = {.name = "temporary", .letter = 'T',
        .help = "discard at exit what clients have written"},
    [OPT_CACHE] = {.name = "cache", .argument = "MODE",
        .help = "writeback (default), writethrough or unsafe",
        .parse = cli_parse_cache_mode},
    [OPT_THREADS] = {.name = "threads", .letter = 't', .argument = "N",
        .help = "slow requests of a client done at a time (16)",
        .parse = cli_parse_number, .number = &opt.threads,
        .min = 1, .max = 1024},
    [OPT_MAX_CONN] = {.name = "max-conn", .letter = 'm', .argument = "N",
        .help = "clients served at a time (128)",
        .parse = cli_parse_number, .number = &opt.max_conn,
        .min = 1, .max = 1 << 20},
    [OPT_STALL] = {.name = "stall", .argument = "SEC",
        .help = "disconnect a client stalled in a request (120)",
        .parse = cli_parse_number, .number = &opt.stall_s,
        .min = 1, .max = 4000000},
    [OPT_ONCE] = {.name = "once", .letter = '1',
        .help = "exit when the last client has left"},
    [OPT_IDLE_EXIT] = {.name = "idle-exit", .argument = "SEC",
        .help = "exit after SEC seconds without a client",
        .parse = cli_parse_number, .number = &opt.idle_exit_s,
        .min = 1, .max = 4000000},
    [OPT_RUN] = {.name = "run", .argument = "CMD",
        .help = "serve while a shell command runs ($uri, $nbd)",
        .parse = cli_parse_text, .text = &opt.run_command},
    [OPT_FORK] = {.name = "fork",
        .help = "go into the background once it listens"},
    [OPT_PIDFILE] = {.name = "pidfile", .letter = 'P', .argument = "FILE",
        .help = "write the process id to FILE once it listens",
        .parse = cli_parse_text, .text = &opt.pidfile},
    [OPT_READY_FD] = {.name = "ready-fd", .argument = "N",
        .help = "write the URI to descriptor N once it listens",
        .parse = cli_parse_fd, .number = &opt.ready_fd,
        .min = 3, .max = INT_MAX},
    [OPT_QUIET] = {.name = "quiet", .letter = 'q',
        .help = "print errors only"},
    [OPT_VERBOSE] = {.name = "verbose", .letter = 'v',
        .help = "log clients; given twice: every request"},
    [OPT_STATS] = {.name = "stats",
        .help = "print totals at exit (on SIGUSR1 always)"},
    [OPT_JSON] = {.name = "json",
        .help = "print totals, or a command's output, as JSON"},
    [OPT_WITHOUT] = {.name = "without", .argument = "LIST",
        .help = "hide features from clients (see README)",
        .parse = cli_parse_features},
    [OPT_FAULT] = {.name = "fault", .argument = "CMD:ERR:RATE",
        .help = "make requests fail: write:EIO:0.1 (see README)",
        .parse = cli_parse_fault},
    [OPT_DELAY] = {.name = "delay", .argument = "CMD:MS",
        .help = "make requests wait: read:50 (see README)",
        .parse = cli_parse_delay},
    [OPT_DRY_RUN] = {.name = "dry-run", .letter = 'n',
        .help = "rollback, resize, rm: only check if they can be done"},
    [OPT_NO_VERIFY] = {.name = "no-verify",
        .help = "do not check the blocks of a store when reading"},
    [OPT_VERSION] = {.name = "version", .letter = 'V',
        .help = "print the version and what it was built with"},
    [OPT_HELP] = {.name = "help", .letter = 'h',
        .help = "print this text"},
    [OPT_COMMAND] = {.name = " CMD"}}; /* messages put "--" in front */

/* Options that exclude each other, and why.  The rows that concern a command
 * come twice, as there are two ways to give one. */
static const struct {
  enum cli_option_id a;
  enum cli_option_id b;
  const char *reason;
} cli_exclusions[] = {
    {OPT_STDIN, OPT_UNIX, "with --stdin nobody listens"},
    {OPT_STDIN, OPT_PORT, "with --stdin nobody listens"},
    {OPT_STDIN, OPT_BIND, "with --stdin nobody listens"},
    {OPT_STDIN, OPT_FD, "both name the client"},
    {OPT_FD, OPT_UNIX, "the socket is there already"},
    {OPT_FD, OPT_PORT, "the socket is there already"},
    {OPT_FD, OPT_BIND, "the socket is there already"},
    {OPT_RUN, OPT_STDIN, "the command could not connect"},
    {OPT_RUN, OPT_FD, "the command would have no URI"},
    {OPT_RUN, OPT_FORK, "nobody would wait for the command"},
    {OPT_RUN, OPT_ONCE, "it ends with the command"},
    {OPT_RUN, OPT_IDLE_EXIT, "it ends with the command"},
    {OPT_RUN, OPT_COMMAND, "both name the command"},
    {OPT_COMMAND, OPT_STDIN, "the command could not connect"},
    {OPT_COMMAND, OPT_FD, "the command would have no URI"},
    {OPT_COMMAND, OPT_FORK, "nobody would wait for the command"},
    {OPT_COMMAND, OPT_ONCE, "it ends with the command"},
    {OPT_COMMAND, OPT_IDLE_EXIT, "it ends with the command"},
    {OPT_STDIN, OPT_FORK, "the background has no standard input"},
    {OPT_CREATE, OPT_READ_ONLY, "a new target would stay empty"},
    {OPT_TEMPORARY, OPT_READ_ONLY, "there would be nothing to discard"},
    {OPT_TEMPORARY, OPT_CREATE, "the target is only read"}};
/* clang-format on */

/* ---- From argv to `opt` ---- */

/* Finds an option by the first len characters of name.  Returns OPT_COUNT if
 * there is none.  Names have to be written in full: a shorthand that is unique
 * today would not be so for ever. */
static enum cli_option_id cli_find_long(const char *name, size_t len) {
  int id = 0;
  for (; id < OPT_COMMAND; id++) {
    const char *known = cli_options[id].name;
    if (strlen(known) == len && memcmp(known, name, len) == 0) break;
  }
  return id < OPT_COMMAND ? (enum cli_option_id)id : OPT_COUNT;
}

/* Finds an option by its letter.  Returns OPT_COUNT if there is none. */
static enum cli_option_id cli_find_short(char letter) {
  int id = 0;
  assert(letter);
  while (id < OPT_COMMAND && cli_options[id].letter != letter)
    id++;
  return id < OPT_COMMAND ? (enum cli_option_id)id : OPT_COUNT;
}

/* Takes an option.  The value is NULL if there was none on the command line; it
 * is refused here where there has to be one, and where there must not. */
static void cli_set(enum cli_option_id id, const char *value) {
  const struct cli_option *option = &cli_options[id];
  assert(id < OPT_COMMAND && option->name && option->help);
  assert(!option->argument == !option->parse);
  if (option->argument && !value)
    cli_usage("--%s takes %s", option->name, option->argument);
  if (!option->argument && value)
    cli_usage("--%s takes no value", option->name);
  opt.given[id]++;
  if (option->parse) option->parse(option, value);
}

/* Parses the word at *word, which is --NAME or --NAME=VALUE, and the word
 * behind it if that is the value.  Returns the last word that it has used.
 * Behind the last word of argv there is NULL, which cli_set takes as "none". */
static char **cli_parse_long(char **word) {
  const char *name = *word + 2;
  size_t len = strcspn(name, "=");
  enum cli_option_id id = cli_find_long(name, len);
  if (id == OPT_COUNT) cli_usage("%s: unknown option (try --help)", *word);
  if (name[len]) {
    cli_set(id, name + len + 1);
    return word;
  }
  if (!cli_options[id].argument) {
    cli_set(id, NULL);
    return word;
  }
  cli_set(id, word[1]);
  return word + 1;
}

/* Does the same for a word of one or more letters behind "-".  The first letter
 * that takes a value ends it: the value is the rest of the word or, if there is
 * no rest, the word behind it. */
static char **cli_parse_short(char **word) {
  for (const char *letter = *word + 1; *letter; letter++) {
    enum cli_option_id id = cli_find_short(*letter);
    if (id == OPT_COUNT) cli_usage("%s: unknown option (try --help)", *word);
    if (!cli_options[id].argument) {
      cli_set(id, NULL);
    } else if (letter[1]) {
      cli_set(id, letter + 1);
      break;
    } else {
      cli_set(id, word[1]);
      return word + 1;
    }
  }
  return word;
}

/* Parses the command line.  Targets may stand between options.  They are
 * gathered at the front of argv, over words that have been parsed: there is at
 * least one such word, the name of the program, so they never reach one that
 * has not. */
static void cli_parse(char **argv) {
  cli.targets = argv;
  for (char **word = argv + 1; *word; word++) {
    const char *text = *word;
    assert(cli.targets + cli.ntargets < word);
    if (text[0] != '-' || !text[1]) {
      cli.targets[cli.ntargets++] = *word;
    } else if (strcmp(text, "--") == 0) {
      opt.given[OPT_COMMAND] = 1;
      cli.command = word + 1;
      break;
    } else if (text[1] == '-') {
      word = cli_parse_long(word);
    } else {
      word = cli_parse_short(word);
    }
  }
}

/* Refuses what makes no sense for a server.  Commands on stores come before
 * that and just ignore options that are not for them. */
static void cli_check_options(void) {
  size_t n = sizeof cli_exclusions / sizeof *cli_exclusions;
  for (size_t i = 0; i < n; i++) {
    enum cli_option_id a = cli_exclusions[i].a;
    enum cli_option_id b = cli_exclusions[i].b;
    if (opt.given[a] && opt.given[b])
      cli_usage("--%s: not together with --%s: %s", cli_options[a].name,
                cli_options[b].name, cli_exclusions[i].reason);
  }
  if (cli.command && !*cli.command) cli_usage("--: no command behind it");
  if (!cli.ntargets) cli_usage("no target (try --help)");
  if (opt.export_name && cli.ntargets > 1)
    cli_usage("--export: for a single target (use NAME=TARGET)");
}

/* Returns what all exports have in common. */
static struct nbdserve_export cli_new_export(void) {
  return (struct nbdserve_export){.description = opt.description,
                                  .min_block = opt.min_block,
                                  .preferred_block = opt.preferred_block,
                                  .max_request = opt.max_request,
                                  .flags = opt.cache_mode};
}

/* ---- Commands on stores ----------------------------------------------------
 * A store can be open in one process only, and that process does the command.
 * Usually it is us: the store is opened, the command done, and that is all.  If
 * opening it fails with EBUSY it is being served, and the server does it:
 *
 *   us                        the server's thread cli_control
 *   connect to STORE.ctl  ->  accepts
 *   struct cli_request,
 *   two descriptors       ->  cli_run_job, with its output and its messages
 *                             going straight to these descriptors
 *   exit with the status  <-  a byte: the exit status
 *
 * The descriptors are where the output goes (or the FILE of import and export,
 * which only we may be allowed to open) and our standard error.  If we are gone
 * before the command is done, the server sees that and ends it (cli_progress).
 * Both are processes of one machine and one version of nbdserve, so the request
 * is sent as it lies in memory.  STORE.ctl belongs to the owner of the store
 * and is nobody else's to connect to.
 *
 * The server does one command at a time; the next one waits in the backlog of
 * the socket.  Built without threads it takes no commands. */
#if !NBDSERVE_NO_CAS

/* The commands, in the order of --help */
enum cli_verb_id {
  VERB_INIT,
  VERB_CREATE,
  VERB_IMPORT,
  VERB_EXPORT,
  VERB_LIST,
  VERB_SNAPSHOT,
  VERB_SEAL,
  VERB_ROLLBACK,
  VERB_CLONE,
  VERB_RENAME,
  VERB_RESIZE,
  VERB_RM,
  VERB_DIFF,
  VERB_VERIFY,
  VERB_GC,
  VERB_STAT,
  VERB_COUNT
};

enum cli_verb_flags {
  /* It changes nothing in the store, which is opened next to other readers. */
  VERB_READS_ONLY = 1 << 0,
  /* It knows --dry-run.  The others refuse that option: they would change the
   * store all the same. */
  VERB_MAY_DRY_RUN = 1 << 1,
  /* Its last operand is a size. */
  VERB_TAKES_SIZE = 1 << 2,
  /* Its last operand may come many times; it is done for each of them. */
  VERB_REPEATS = 1 << 3,
  /* It may take long and leaves nothing half done when a signal ends it. */
  VERB_IS_LONG = 1 << 4,
  /* Its last operand is a FILE that it reads. */
  VERB_READS_FILE = 1 << 5,
  /* Its last operand is a FILE that it writes; "-" is standard output. */
  VERB_WRITES_FILE = 1 << 6
};

/* How a command prints what it finds out */
enum cli_output {
  OUTPUT_NOTHING,
  /* One row: a line with the values.  As JSON: an object. */
  OUTPUT_ROW,
  /* Any number of rows.  As JSON: an array of objects. */
  OUTPUT_ROWS,
  /* One row, with a line for each value, and its name in front.  As JSON: an
   * object. */
  OUTPUT_LINES
};

struct cli_job;

struct cli_verb {
  const char *name;
  /* The operands, as --help and the usage message print them */
  const char *operands;
  const char *help;
  /* VERB_READS_ONLY... */
  unsigned flags;
  /* How many operands it needs besides STORE, and how many more it may get
   * (VERB_REPEATS: any number).  Of two the first one is request.name and the
   * second one request.to; a single one is request.name. */
  int noperands;
  int noptional;
  enum cli_output output;
  /* For cli_do_change: NBDSERVE_CAS_CREATE... */
  int change;
  /* What -EINVAL means, for the message; NULL: it is not to be expected. */
  const char *invalid;
  /* Does the command on an open store.  Returns 0 or -errno.  Only `init` has
   * none, as there is no store yet: see cli_init. */
  int (*run)(struct cli_job *job, struct nbdserve_cas *cas);
};

/* What goes over the control socket.  The receiver believes nothing of it: the
 * number of the command is checked, and the texts are ended by NUL. */
struct cli_request {
  /* The operand that is a size; 0: it has none. */
  uint64_t size;
  /* enum cli_verb_id */
  unsigned char verb;
  /* --json and --dry-run */
  unsigned char json;
  unsigned char dry_run;
  /* The operands, or "" */
  char name[PATH_MAX];
  char to[PATH_MAX];
};

/* A command while it is being done, by whichever process */
struct cli_job {
  /* ---- What is to be done; fixed */
  const struct cli_verb *verb;
  struct cli_request request;
  /* The descriptor that rows go to.  For import and export: the FILE. */
  int output;
  /* The descriptor that messages and progress go to */
  int messages;
  /* The connection of whoever waits for it, in the server; or -1 */
  int client;

  /* ---- Its output so far */
  unsigned nrows;
  /* Columns in the row that has been begun */
  unsigned ncolumns;
  /* That row goes to a terminal, and its values are aligned. */
  int is_aligned;
  /* -errno, if something could not be printed */
  int lost;

  /* ---- Its progress; times are in os_now_ms */
  int64_t begun_ms;
  /* When progress was last shown; 0: none is on the screen. */
  int64_t shown_ms;
};

/* ---- Progress ----------------------------------------------------------- */

enum {
  /* A command that takes less time than this shows no progress. */
  CLI_PROGRESS_AFTER_MS = 1000,
  /* How often it is shown: often enough to look alive */
  CLI_PROGRESS_EVERY_MS = 100
};

/* Clears the line that shows the progress, if there is one, so that a row or a
 * message can take its place. */
static void cli_hide_progress(struct cli_job *job) {
  if (!job->shown_ms) return;
  dprintf(job->messages, "\r%60s\r", "");
  job->shown_ms = 0;
}

/* Shows on a terminal how many of `total` bytes are done, if it is time.  How
 * long the rest takes is guessed from the average so far. */
static void cli_show_progress(struct cli_job *job, uint64_t done,
                              uint64_t total) {
  int64_t now = os_now_ms();
  int64_t passed = now - job->begun_ms;
  if (!done || passed <= CLI_PROGRESS_AFTER_MS ||
      now - job->shown_ms <= CLI_PROGRESS_EVERY_MS || !isatty(job->messages))
    return;
  double s = (double)passed / 1000;
  double mib = (double)done / (1 << 20);
  double left = s * ((double)total / (double)done - 1);
  dprintf(job->messages, "\r%3.0f%% %8.0f MiB %8.1f MiB/s %6.0f s left",
          (double)done * 100 / (double)total, mib, mib / s, left);
  job->shown_ms = now;
}

/* Is called now and then by what takes long: a nbdserve_progress_fn.  Returns
 * true if the command has to end, because a signal has come, or because the
 * client that waits for it has gone. */
static int cli_progress(void *arg, uint64_t done, uint64_t total) {
  struct cli_job *job = arg;
  struct pollfd p[] = {{cli.server->stop[0], POLLIN, 0},
                       {job->client, POLLIN, 0}}; /* -1 is skipped */
  cli_show_progress(job, done, total);
  return poll(p, 2, 0) > 0;
}

/* ---- Rows --------------------------------------------------------------- */

/* Prints to the output of a job, and remembers if that fails: whoever reads a
 * list must not take the half of it for the whole. */
static void OS_PRINTF(2, 3)
    cli_print(struct cli_job *job, const char *fmt, ...) {
  va_list ap;
  va_start(ap, fmt);
  if (vdprintf(job->output, fmt, ap) < 0) job->lost = -errno;
  va_end(ap);
}

/* Begins a row.  Its columns follow, each by cli_row_text or cli_row_number,
 * then cli_row_end. */
static void cli_row_begin(struct cli_job *job) {
  enum cli_output kind = job->verb->output;
  assert(kind != OUTPUT_NOTHING);
  assert(kind == OUTPUT_ROWS || !job->nrows);
  cli_hide_progress(job);
  if (job->request.json && kind == OUTPUT_ROWS)
    cli_print(job, job->nrows ? "," : "[");
  job->is_aligned =
      !job->request.json && kind != OUTPUT_LINES && isatty(job->output);
  job->nrows++;
  job->ncolumns = 0;
}

/* Prints what stands in front of a value: its name, or what separates it from
 * the one before. */
static void cli_row_column(struct cli_job *job, const char *name) {
  int is_first = job->ncolumns == 0;
  job->ncolumns++;
  assert(job->nrows > 0);
  if (job->request.json) {
    cli_print(job, "%s\"%s\":", is_first ? "{" : ",", name);
  } else if (job->verb->output == OUTPUT_LINES) {
    cli_print(job, "%s%s\t", is_first ? "" : "\n", name);
  } else if (!is_first) {
    cli_print(job, job->is_aligned ? "  " : "\t");
  }
}

/* Adds a text to a row.  On a terminal the first column is padded, which is the
 * name wherever there is one.  JSON would want nothing in a text escaped: the
 * store refuses names with such characters, and the others are our own. */
static void cli_row_text(struct cli_job *job, const char *name,
                         const char *text) {
  cli_row_column(job, name);
  if (job->request.json)
    cli_print(job, "\"%s\"", text);
  else
    cli_print(job, "%-*s", job->is_aligned && job->ncolumns == 1 ? 40 : 0,
              text);
}

/* Adds a number to a row. */
static void cli_row_number(struct cli_job *job, const char *name,
                           uint64_t number) {
  cli_row_column(job, name);
  cli_print(job, "%*" PRIu64, job->is_aligned ? 16 : 0, number);
}

/* Ends a row.  Returns 0, or -errno if some of the output was lost, which ends
 * a list early. */
static int cli_row_end(struct cli_job *job) {
  assert(job->ncolumns > 0);
  cli_print(job, job->request.json ? "}\n" : "\n");
  return job->lost;
}

/* ---- What each command does --------------------------------------------- */

/* create, snapshot, rollback, clone, rename, resize, rm: they change the
 * catalog, and nbdserve.h has one call for all of them. */
static int cli_do_change(struct cli_job *job, struct nbdserve_cas *cas) {
  int verb = job->verb->change;
  assert(verb);
  if (job->request.dry_run && job->verb->flags & VERB_MAY_DRY_RUN)
    verb |= NBDSERVE_CAS_DRY_RUN;
  return nbdserve_cas_change(cas, verb, job->request.name, job->request.to,
                             job->request.size);
}

/* Prints a volume or snapshot: a nbdserve_list_fn.  The time comes from a file
 * that anybody may have made: it may lie behind all years. */
static int cli_list_row(void *arg, const struct nbdserve_cas_info *info) {
  struct cli_job *job = arg;
  time_t created = (time_t)info->created;
  char text[40];
  struct tm tm;
  if (!gmtime_r(&created, &tm)) tm = (struct tm){.tm_mday = 1};
  strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &tm);
  cli_row_begin(job);
  cli_row_text(job, "name", info->name);
  cli_row_number(job, "size", info->size);
  cli_row_text(job, "created", text);
  cli_row_text(job, "id", info->id);
  return cli_row_end(job);
}

/* list: a row for each volume and snapshot */
static int cli_do_list(struct cli_job *job, struct nbdserve_cas *cas) {
  return nbdserve_cas_list(cas, cli_list_row, job);
}

/* seal: gives a snapshot its id and prints that.  Until it was sealed all of it
 * has to be read, which takes long. */
static int cli_do_seal(struct cli_job *job, struct nbdserve_cas *cas) {
  char id[72];
  int err = nbdserve_cas_seal(cas, job->request.name, id, cli_progress, job);
  if (err) return err;
  assert(strncmp(id, "sha256-", 7) == 0);
  cli_row_begin(job);
  cli_row_text(job, "id", id);
  return cli_row_end(job);
}

/* Prints a range that differs: a nbdserve_range_fn */
static int cli_range_row(void *arg, uint64_t off, uint64_t len) {
  struct cli_job *job = arg;
  cli_row_begin(job);
  cli_row_number(job, "offset", off);
  cli_row_number(job, "length", len);
  return cli_row_end(job);
}

/* diff: a row for each range in which two volumes or snapshots differ */
static int cli_do_diff(struct cli_job *job, struct nbdserve_cas *cas) {
  return nbdserve_cas_diff(cas, job->request.name, job->request.to,
                           cli_range_row, job);
}

/* Prints what is damaged: a nbdserve_damage_fn.  Damage to the store itself has
 * no name; a row then has "-" there, so that it always has four fields.  What
 * cannot be printed shows in job->lost: there is no way to end this early. */
static void cli_damage_row(void *arg, const char *name, uint64_t off,
                           uint64_t len, const char *why) {
  struct cli_job *job = arg;
  cli_row_begin(job);
  cli_row_text(job, "name", *name || job->request.json ? name : "-");
  cli_row_number(job, "offset", off);
  cli_row_number(job, "length", len);
  cli_row_text(job, "why", why);
  cli_row_end(job);
}

/* verify: a row for each range that is damaged; the exit status tells, too. */
static int cli_do_verify(struct cli_job *job, struct nbdserve_cas *cas) {
  return nbdserve_cas_verify(cas, cli_damage_row, cli_progress, job);
}

/* gc: gives unused space to the file system.  The row has the bytes of the file
 * that nothing uses. */
static int cli_do_gc(struct cli_job *job, struct nbdserve_cas *cas) {
  uint64_t bytes;
  int err = nbdserve_cas_gc(cas, &bytes, cli_progress, job);
  if (err) return err;
  cli_row_begin(job);
  cli_row_number(job, "bytes", bytes);
  return cli_row_end(job);
}

/* stat: how much is stored, and how full the log is */
static int cli_do_stat(struct cli_job *job, struct nbdserve_cas *cas) {
  struct nbdserve_cas_stat stat;
  nbdserve_cas_stat(cas, &stat);
  assert(u_is_power_of_2(stat.block_size));
  cli_row_begin(job);
  cli_row_number(job, "block_size", stat.block_size);
  cli_row_number(job, "stored", stat.stored);
  cli_row_number(job, "free", stat.free);
  cli_row_number(job, "file", stat.file);
  cli_row_number(job, "log", stat.log);
  return cli_row_end(job);
}

/* What import and export move at a time: a whole number of blocks of every size
 * that a store may have.  A process does one command at a time, in the main
 * thread or in cli_control, so one buffer is enough. */
static unsigned char cli_buffer[65536];

/* Copies the first `size` bytes of the FILE of a job to a volume, and makes
 * them durable.  Zeroes need no care: the store knows them. */
static int cli_copy_in(struct cli_job *job, const struct nbdserve_export *ex,
                       uint64_t size) {
  for (uint64_t off = 0; off < size;) {
    uint64_t n = u_min(sizeof cli_buffer, size - off);
    struct iovec piece = {cli_buffer, (size_t)n};
    if (cli_progress(job, off, size)) return -ECANCELED;
    int err = os_transfer(job->output, 0, &piece, 1, off);
    if (!err) err = ex->ops->write(ex->ctx, cli_buffer, off, n, 0);
    if (err) return err;
    off += n;
  }
  return ex->ops->flush(ex->ctx, 0);
}

/* import: makes a volume of a file.  If that fails, at whatever point, there is
 * no volume afterwards.  The size has to be known first, so a pipe will not
 * do. */
static int cli_do_import(struct cli_job *job, struct nbdserve_cas *cas) {
  const char *name = job->request.name;
  struct nbdserve_export ex = {.name = NULL};
  off_t size = lseek(job->output, 0, SEEK_END);
  if (size < 0) return -errno;
  int err = nbdserve_cas_create(cas, name, (uint64_t)size);
  if (err) return err; /* what has that name already is not ours to remove */
  err = nbdserve_cas_volume(cas, name, &ex);
  if (!err) {
    assert(ex.size == (uint64_t)size);
    err = cli_copy_in(job, &ex, (uint64_t)size);
    ex.ops->close(ex.ctx);
  }
  if (err) nbdserve_cas_rm(cas, name);
  return err;
}

/* Writes the first n bytes of the buffer to a pipe, a terminal, or wherever
 * standard output may lead, in as many steps as it takes. */
static int cli_write_buffer(int fd, uint64_t n) {
  assert(n <= sizeof cli_buffer);
  for (uint64_t done = 0; done < n;) {
    ssize_t r = write(fd, cli_buffer + done, (size_t)(n - done));
    if (r <= 0) return r < 0 ? -errno : -EIO;
    done += (uint64_t)r;
  }
  return 0;
}

/* Copies a volume to the output of a job.  A sparse output is a file that has
 * its size already and is one hole: zeroes need not be written, and in the end
 * it is made durable. */
static int cli_copy_out(struct cli_job *job, const struct nbdserve_export *ex,
                        int is_sparse) {
  for (uint64_t off = 0; off < ex->size;) {
    uint64_t n = u_min(sizeof cli_buffer, ex->size - off);
    struct iovec piece = {cli_buffer, (size_t)n};
    if (cli_progress(job, off, ex->size)) return -ECANCELED;
    int err = ex->ops->read(ex->ctx, cli_buffer, off, n, 0);
    if (!err && !is_sparse) {
      err = cli_write_buffer(job->output, n);
    } else if (!err && !u_is_zero(cli_buffer, (size_t)n)) {
      err = os_transfer(job->output, 1, &piece, 1, off);
    }
    if (err) return err;
    off += n;
  }
  return is_sparse ? os_datasync(job->output) : 0;
}

/* export: writes a volume or snapshot to a FILE, which gets its size, or to
 * standard output, behind what may be there already.  A FILE that cannot be
 * cut, a block device or a pipe, is written from the front like standard
 * output. */
static int cli_do_export(struct cli_job *job, struct nbdserve_cas *cas) {
  struct nbdserve_export ex = {.name = NULL};
  int err = nbdserve_cas_volume(cas, job->request.name, &ex);
  if (err) return err;
  int is_sparse = strcmp(job->request.to, "-") != 0 &&
                  ftruncate(job->output, 0) == 0 &&
                  ftruncate(job->output, (off_t)ex.size) == 0;
  err = cli_copy_out(job, &ex, is_sparse);
  ex.ops->close(ex.ctx);
  return err;
}

/* ---- The table ---- */

/* clang-format off */
static const struct cli_verb cli_verbs[VERB_COUNT] = {
    [VERB_INIT] = {.name = "init", .operands = "STORE [BLOCK-SIZE]",
        .help = "make an empty store (4K)",
        .flags = VERB_TAKES_SIZE, .noptional = 1},
    [VERB_CREATE] = {.name = "create", .operands = "STORE::VOLUME SIZE",
        .help = "make a volume, all zeroes",
        .flags = VERB_TAKES_SIZE, .noperands = 2,
        .run = cli_do_change, .change = NBDSERVE_CAS_CREATE,
        .invalid = "not a name or size that a volume can have"},
    [VERB_IMPORT] = {.name = "import", .operands = "STORE::VOLUME FILE",
        .help = "make a volume of a file",
        .flags = VERB_IS_LONG | VERB_READS_FILE, .noperands = 2,
        .run = cli_do_import,
        .invalid = "not a name or size that a volume can have"},
    [VERB_EXPORT] = {.name = "export", .operands = "STORE::NAME FILE",
        .help = "copy to a file (-: standard output)",
        .flags = VERB_READS_ONLY | VERB_WRITES_FILE, .noperands = 2,
        .run = cli_do_export,
        .invalid = "not the name of a volume or snapshot"},
    [VERB_LIST] = {.name = "list", .operands = "STORE",
        .help = "print name, size, time and id of each",
        .flags = VERB_READS_ONLY,
        .run = cli_do_list, .output = OUTPUT_ROWS},
    [VERB_SNAPSHOT] = {.name = "snapshot", .operands = "STORE::VOLUME@SNAPSHOT",
        .help = "keep what VOLUME holds now, under a name",
        .noperands = 1,
        .run = cli_do_change, .change = NBDSERVE_CAS_SNAPSHOT,
        .invalid = "not a name that a snapshot can have"},
    [VERB_SEAL] = {.name = "seal", .operands = "STORE::VOLUME@SNAPSHOT",
        .help = "give it an id for its contents; print it",
        .flags = VERB_IS_LONG, .noperands = 1,
        .run = cli_do_seal, .output = OUTPUT_ROW,
        .invalid = "not a snapshot"},
    [VERB_ROLLBACK] = {.name = "rollback", .operands = "STORE::VOLUME@SNAPSHOT",
        .help = "make VOLUME what it was then",
        .flags = VERB_MAY_DRY_RUN, .noperands = 1,
        .run = cli_do_change, .change = NBDSERVE_CAS_ROLLBACK,
        .invalid = "not a snapshot"},
    [VERB_CLONE] = {.name = "clone", .operands = "STORE::NAME VOLUME...",
        .help = "make volumes that begin as copies",
        .flags = VERB_REPEATS, .noperands = 2,
        .run = cli_do_change, .change = NBDSERVE_CAS_CLONE,
        .invalid = "not a name that a volume can have"},
    [VERB_RENAME] = {.name = "rename", .operands = "STORE::NAME NEW",
        .help = "change a name",
        .noperands = 2,
        .run = cli_do_change, .change = NBDSERVE_CAS_RENAME,
        .invalid = "not a name that it can have"},
    [VERB_RESIZE] = {.name = "resize", .operands = "STORE::VOLUME SIZE",
        .help = "cut a volume, or add zeroes",
        .flags = VERB_MAY_DRY_RUN | VERB_TAKES_SIZE, .noperands = 2,
        .run = cli_do_change, .change = NBDSERVE_CAS_RESIZE,
        .invalid = "not a volume, or not a size that it can have"},
    [VERB_RM] = {.name = "rm", .operands = "STORE::NAME [NAME...]",
        .help = "remove volumes and snapshots",
        .flags = VERB_MAY_DRY_RUN | VERB_REPEATS, .noperands = 1,
        .run = cli_do_change, .change = NBDSERVE_CAS_RM,
        .invalid = "not the name of a volume or snapshot"},
    [VERB_DIFF] = {.name = "diff", .operands = "STORE::NAME NAME",
        .help = "print the ranges that differ",
        .flags = VERB_READS_ONLY, .noperands = 2,
        .run = cli_do_diff, .output = OUTPUT_ROWS,
        .invalid = "not the names of volumes or snapshots"},
    [VERB_VERIFY] = {.name = "verify", .operands = "STORE",
        .help = "check all data; print what is damaged",
        .flags = VERB_READS_ONLY | VERB_IS_LONG,
        .run = cli_do_verify, .output = OUTPUT_ROWS},
    [VERB_GC] = {.name = "gc", .operands = "STORE",
        .help = "give unused space back; print its bytes",
        .flags = VERB_IS_LONG,
        .run = cli_do_gc, .output = OUTPUT_ROW},
    [VERB_STAT] = {.name = "stat", .operands = "STORE",
        .help = "print how much is stored",
        .flags = VERB_READS_ONLY,
        .run = cli_do_stat, .output = OUTPUT_LINES}};
/* clang-format on */

/* ---- Doing a command ---- */

/* Says in words why a command has failed.  The errors of nbdserve.h mean more
 * here than what strerror has for them. */
static const char *cli_job_reason(const struct cli_job *job, int err) {
  switch (err) {
  case -EINVAL:
    return job->verb->invalid ? job->verb->invalid : u_errno_text(err);
  case -EBUSY:
    return "in use by a client, or being verified";
  case -ENOTEMPTY:
    return "it has snapshots";
  case -EUCLEAN:
    return "the store is damaged (verify names what is)";
  default:
    return u_errno_text(err);
  }
}

/* Prints the message of a command that has failed, to whoever gave it: this may
 * be the server.  The FILE of an import is not named, as the errors that come
 * after it was opened are about the volume. */
static void cli_report(const struct cli_job *job, int err) {
  const char *name = job->request.name;
  const char *to = job->request.to;
  if (job->verb->flags & VERB_READS_FILE) to = "";
  dprintf(job->messages, "nbdserve: %s%s%s%s%s: %s\n", job->verb->name,
          *name ? " " : "", name, *to ? " " : "", to, cli_job_reason(job, err));
}

/* Does a command on an open store, and prints what it has to say.  Returns the
 * exit status.  job->verb has been checked: see cli_run_verb for our own, and
 * cli_serve_command for what came over the socket. */
static int cli_run_job(struct cli_job *job, struct nbdserve_cas *cas) {
  assert(job->verb == &cli_verbs[job->request.verb] && job->verb->run);
  job->nrows = 0;
  job->lost = 0;
  job->shown_ms = 0;
  job->begun_ms = os_now_ms();
  int err = job->verb->run(job, cas);
  cli_hide_progress(job);
  if (job->request.json && job->verb->output == OUTPUT_ROWS)
    cli_print(job, job->nrows ? "]\n" : "[]\n");
  if (!err) err = job->lost;
  if (err == -EUCLEAN && job->nrows) return CLI_DAMAGED; /* rows tell what */
  if (err) cli_report(job, err);
  if (err == -EUCLEAN) return CLI_DAMAGED;
  return err ? CLI_FAILED : CLI_OK;
}

/* ---- Commands over the control socket ----------------------------------- */

/* The control data of a message that carries two descriptors.  The union gives
 * the room the alignment of a header. */
union cli_passed {
  struct cmsghdr header;
  char room[CMSG_SPACE(2 * sizeof(int))];
};

/* Sends a job with its descriptors, of which the receiver gets duplicates.  A
 * socket's buffer takes all of it at once.  Returns 0 or -EPIPE. */
static int cli_send_command(const struct io *io, struct cli_job *job) {
  const int fds[2] = {job->output, job->messages};
  struct iovec data = {&job->request, sizeof job->request};
  union cli_passed passed = {.header = {.cmsg_level = SOL_SOCKET,
                                        .cmsg_type = SCM_RIGHTS,
                                        .cmsg_len = CMSG_LEN(sizeof fds)}};
  struct msghdr message = {.msg_iov = &data,
                           .msg_iovlen = 1,
                           .msg_control = &passed,
                           .msg_controllen = CMSG_LEN(sizeof fds)};
  memcpy(CMSG_DATA(&passed.header), fds, sizeof fds);
  ssize_t n = sendmsg(io->out, &message, MSG_NOSIGNAL);
  return n == (ssize_t)sizeof job->request ? 0 : -EPIPE;
}

/* Receives a job.  The descriptors that come with it are the caller's to close,
 * even if this fails; where none has come there is -1.  There is room for two:
 * if somebody sends more, the system closes the rest. */
static int cli_receive_command(const struct io *io, struct cli_job *job) {
  int fds[2] = {-1, -1};
  struct iovec data = {&job->request, sizeof job->request};
  union cli_passed passed = {.header = {.cmsg_len = 0}};
  struct msghdr message = {.msg_iov = &data,
                           .msg_iovlen = 1,
                           .msg_control = &passed,
                           .msg_controllen = CMSG_LEN(sizeof fds)};
  job->output = -1;
  job->messages = -1;
  int err = io_wait(io, 0);
  if (err) return err;
  /* The descriptors come with the first bytes; what follows has none. */
  ssize_t n = recvmsg(io->in, &message, 0);
  if (n <= 0) return -EPIPE;
  assert(n <= (ssize_t)sizeof job->request);
  if (message.msg_controllen >= CMSG_LEN(0) &&
      passed.header.cmsg_type == SCM_RIGHTS)
    memcpy(fds, CMSG_DATA(&passed.header),
           (size_t)u_min(passed.header.cmsg_len - CMSG_LEN(0), sizeof fds));
  job->output = fds[0];
  job->messages = fds[1];
  return io_recv_all(io, (unsigned char *)&job->request + n,
                     sizeof job->request - (size_t)n);
}

/* Refuses a STORE.ctl that is somebody else's.  In a directory where everybody
 * may make files a stranger who can read the store could lock it, listen there,
 * and get our descriptors.  A server runs as the owner of the store, as
 * ourselves, or as root. */
static void cli_check_ctl_owner(void) {
  struct stat store;
  struct stat ctl;
  if (stat(cli.store, &store) < 0 || lstat(cli.ctl_path, &ctl) < 0) return;
  if (ctl.st_uid != store.st_uid && ctl.st_uid != geteuid() && ctl.st_uid != 0)
    cli_failed("%s: belongs neither to the owner of the store nor to us",
               cli.ctl_path);
}

/* Lets the server of the store do a job, waits for it as long as it takes, and
 * returns the exit status.  Whoever has the store without listening at
 * STORE.ctl is no server, or a read-only one, or was built without threads. */
static int cli_run_remote(struct cli_job *job) {
  unsigned char status;
  cli_check_ctl_owner();
  int fd = srv_unix(cli.ctl_path, SRV_CONNECT);
  struct io io = {.in = fd, .out = fd, .stop = -1};
  if (fd < 0)
    cli_die(CLI_IN_USE, "%s: in use by a process that takes no commands",
            cli.store);
  if (cli_send_command(&io, job) || io_recv_all(&io, &status, 1))
    cli_failed("%s: no answer from the server of the store", cli.ctl_path);
  close(fd);
  return status;
}

/* Does what a client of the control socket asks for.  It has to come in one go:
 * as long as we wait for it, others wait, too.  A request that makes no sense
 * is dropped without an answer. */
static void cli_serve_command(int client) {
  struct cli_job job = {.client = client};
  struct io io = {.in = client,
                  .out = client,
                  .stop = cli.server->stop[0],
                  .deadline = os_now_ms() + IO_GRACE_MS,
                  .stall_ms = IO_GRACE_MS};
  int err = cli_receive_command(&io, &job);
  if (!err && job.messages >= 0 && job.request.verb < VERB_COUNT &&
      cli_verbs[job.request.verb].run) {
    job.verb = &cli_verbs[job.request.verb];
    job.request.name[PATH_MAX - 1] = '\0';
    job.request.to[PATH_MAX - 1] = '\0';
    unsigned char status = (unsigned char)cli_run_job(&job, cli.cas);
    (void)!write(client, &status, 1); /* a client that has gone needs none */
  }
  close(job.output); /* closing -1 does no harm */
  close(job.messages);
}

/* The thread that takes commands until the server stops, which makes io_wait
 * fail, and ends a command that is under way (cli_progress).  If a client
 * cannot be accepted, for want of descriptors, trying again at once would not
 * help. */
static void *cli_control(void *unused) {
  struct io io = {.in = cli.ctl, .stop = cli.server->stop[0]};
  (void)unused;
  while (io_wait(&io, 0) == 0) {
    int client = os_accept(cli.ctl);
    if (client < 0) {
      poll(NULL, 0, SRV_PAUSE_MS);
      continue;
    }
    cli_serve_command(client);
    close(client);
  }
  (void)!write(cli.ctl_ended[1], "", 1);
  return NULL;
}

/* ---- The store of this process ------------------------------------------ */

/* Opens the store at path.  The process has one at most.  Returns 0, or -errno
 * and leaves cli.cas NULL; on -EBUSY the caller may want cli.ctl_path. */
static int cli_open_store(const char *path, int readonly) {
  struct nbdserve_cas_options options = {.flags = 0};
  assert(!cli.cas);
  if (readonly) options.flags |= NBDSERVE_CAS_READONLY;
  if (opt.given[OPT_NO_VERIFY]) options.flags |= NBDSERVE_CAS_NO_VERIFY;
  if (snprintf(cli.store, PATH_MAX, "%s", path) >= PATH_MAX ||
      snprintf(cli.ctl_path, PATH_MAX, "%s.ctl", path) >= PATH_MAX)
    return -ENAMETOOLONG;
  int err = nbdserve_cas_open(path, &options, &cli.cas);
  if (err == -EINVAL) cli_failed("%s: not a store", path);
  assert(!err == !!cli.cas);
  return err;
}

/* Listens on STORE.ctl, for ourselves and root only: the umask is in force when
 * the socket is made, so there is no moment at which others get in.  If it
 * cannot be made (its path may be too long for a socket, or the directory
 * read-only) the store is served all the same. */
static void cli_open_control(void) {
  mode_t mask = umask(0177);
  assert(cli.ctl < 0);
  cli.ctl = srv_unix(cli.ctl_path, SRV_LISTEN);
  umask(mask);
  if (cli.ctl >= 0 && lstat(cli.ctl_path, &cli.ctl_st) < 0) {
    close(cli.ctl);
    cli.ctl = -1;
  }
}

/* Starts the thread that takes commands.  This comes after --fork and after the
 * command was started: from now on the process makes no other one, which would
 * inherit the descriptors that come with commands.  Without the thread nobody
 * would answer at STORE.ctl, and a command would wait for ever; so it goes. */
static void cli_start_control(void) {
  if (cli.ctl < 0) return;
  assert(cli.cas && cli.ctl_ended[0] < 0);
  int err = os_pipe(cli.ctl_ended);
  if (!err) err = os_thread(cli_control, NULL);
  if (!err) return;
  cli.ctl_ended[0] = -1;
  cli_remove_own(cli.ctl_path, &cli.ctl_st);
  close(cli.ctl);
  cli.ctl = -1;
  cli_say("%s: %s; no commands are taken while it is served", cli.store,
          u_errno_text(err));
}

/* At exit: waits for the end of cli_control, and of the command that it may be
 * doing, which looks at whether the server has stopped.  Returns false if that
 * does not come in time.  The store must then be left as it is. */
static int cli_await_control(void) {
  struct pollfd ended = {cli.ctl_ended[0], POLLIN, 0};
  char byte;
  if (cli.ctl_ended[0] < 0) return 1;
  nbdserve_stop(cli.server);
  return poll(&ended, 1, IO_GRACE_MS) > 0 &&
         read(cli.ctl_ended[0], &byte, 1) == 1;
}

/* Opens a store that is to be served, wholly or in part, and its socket for
 * commands, if it is not open yet.  A read-only server takes no commands: next
 * to it the store can be opened by other readers. */
static int cli_use_store(const char *path) {
  int readonly = opt.given[OPT_READ_ONLY] != 0;
  if (*cli.store && strcmp(cli.store, path) != 0)
    cli_failed("%s: one store at a time: %s is open", path, cli.store);
  if (cli.cas) return 0;
  int err = cli_open_store(path, readonly);
  if (!err && !readonly && !NBDSERVE_NO_THREADS) cli_open_control();
  return err;
}

/* Opens a volume or snapshot of a store. */
static int cli_open_volume(const char *path, const char *name,
                           struct nbdserve_export *ex) {
  assert(*name);
  int err = cli_use_store(path);
  return err ? err : nbdserve_cas_volume(cli.cas, name, ex);
}

/* The `find` function of a server of all of a store: called in the threads of
 * clients, for each client, so that a volume that was made since is found. */
static int cli_find_volume(void *unused, const char *name,
                           struct nbdserve_export *out) {
  (void)unused;
  *out = cli_new_export();
  return nbdserve_cas_volume(cli.cas, name, out);
}

/* Where cli_emit_volume passes its names on to */
struct cli_emit {
  nbdserve_emit_fn *emit;
  void *arg;
};

/* Passes on a volume or snapshot: a nbdserve_list_fn */
static int cli_emit_volume(void *arg, const struct nbdserve_cas_info *info) {
  struct cli_emit *to = arg;
  return to->emit(to->arg, info->name, info->readonly ? "snapshot" : "");
}

/* The `list` function of a server of all of a store */
static int cli_list_volumes(void *unused, nbdserve_emit_fn *emit, void *arg) {
  struct cli_emit to = {emit, arg};
  (void)unused;
  return nbdserve_cas_list(cli.cas, cli_emit_volume, &to);
}

/* Opens a store and serves all that is in it, also what is made later. */
static int cli_serve_store(const char *path) {
  int err = cli_use_store(path);
  if (err) return err;
  cli.server->config.find = cli_find_volume;
  cli.server->config.list = cli_list_volumes;
  return 0;
}

/* At exit: closes the store, which makes all durable.  Returns NULL, or what
 * went wrong.  Exports and commands use the store, so the server has been freed
 * and cli_control has ended. */
static const char *cli_close_store(void) {
  int err = cli.cas ? nbdserve_cas_close(cli.cas) : 0;
  return err ? u_errno_text(err) : NULL;
}

/* ---- The command line of a command -------------------------------------- */

/* Finds the command of that name; VERB_COUNT: there is none. */
static enum cli_verb_id cli_find_verb(const char *name) {
  int id = 0;
  while (id < VERB_COUNT && strcmp(cli_verbs[id].name, name) != 0)
    id++;
  return (enum cli_verb_id)id;
}

/* Prints how a command is used, and ends the process. */
#define cli_verb_usage(verb) \
  cli_usage("usage: nbdserve %s %s", (verb)->name, (verb)->operands)

/* Finds out which store a command is for, and takes it off the operands:
 *
 *   STORE::NAME ...   the first operand becomes NAME
 *   NAME ...          for commands that take a name: $NBDSERVE_STORE
 *   STORE, STORE::    for commands that take none; the operand goes
 *   SIZE              only init: $NBDSERVE_STORE, if it is set
 *   nothing           $NBDSERVE_STORE
 *
 * Returns its path, or NULL if nothing names a store. */
static char *cli_take_store(const struct cli_verb *verb, char ***operands,
                            int *noperands) {
  char *fallback = getenv("NBDSERVE_STORE");
  uint64_t size;
  if (!*noperands) return fallback;
  char *first = **operands;
  char *colons = strstr(first, "::");
  if (colons) {
    **operands = colons + 2;
    *colons = '\0';
    if (verb->noperands || colons[2]) return first;
  } else {
    if (verb->noperands) return fallback;
    if (verb->noptional && *noperands == 1 && fallback &&
        u_parse_number(first, INT64_MAX, &size))
      return fallback;
  }
  ++*operands;
  --*noperands;
  return first;
}

/* Checks the number of operands behind the store, and that --dry-run was not
 * given to a command that would not heed it. */
static void cli_check_verb(const struct cli_verb *verb, int noperands) {
  int most =
      verb->flags & VERB_REPEATS ? INT_MAX : verb->noperands + verb->noptional;
  if (noperands < verb->noperands || noperands > most) cli_verb_usage(verb);
  if (opt.given[OPT_DRY_RUN] && !(verb->flags & VERB_MAY_DRY_RUN))
    cli_verb_usage(verb);
}

/* init: makes a store.  block_size is how `size` was written, or NULL. */
static void cli_init(const char *store, const char *block_size, uint64_t size) {
  struct nbdserve_cas_options options = {.block_size =
                                             (uint32_t)u_min(size, UINT32_MAX)};
  int err = nbdserve_cas_init(store, &options);
  if (err == -EINVAL && block_size)
    cli_usage("%s: not a block size (4K, 8K, 16K, 32K or 64K)", block_size);
  cli_exit_if_error(err, store);
}

/* Opens the FILE of an import or export, which takes the place of the output.
 * We do it, even if a server does the command: relative paths and permissions
 * are ours.  A FILE that is to be written may be a store, this one perhaps, or
 * an image that is being served: both are locked, and nobody wants to lose
 * them. */
static void cli_open_file(struct cli_job *job, const char *file) {
  int writes = (job->verb->flags & VERB_WRITES_FILE) != 0;
  if (writes && strcmp(file, "-") == 0) return;
  int flags = writes ? O_RDWR | O_CREAT : O_RDONLY;
  job->output = open(file, flags | O_CLOEXEC, 0666);
  if (job->output < 0) cli_exit_if_error(-errno, file);
  if (writes && os_lock_file(job->output, 0))
    cli_die(CLI_IN_USE, "%s: in use", file);
}

/* Does a command on a store, here or at its server.  If it needs one operand,
 * it is done for each that there is; if it needs two, for the first with each
 * of the others; otherwise once.  Returns the exit status of the first time
 * that it fails, or 0. */
static int cli_run_on_operands(struct cli_job *job, int is_remote,
                               char **operands, int noperands) {
  int needed = job->verb->noperands;
  int i = needed > 1; /* the first of those that may repeat */
  int status;
  assert(noperands >= needed);
  for (int j = 0; j < noperands; j++) {
    if (strlen(operands[j]) >= PATH_MAX)
      cli_usage("%s: a name is too long", job->verb->name);
  }
  if (needed > 1) strcpy(job->request.name, operands[0]);
  do {
    if (needed)
      strcpy(needed > 1 ? job->request.to : job->request.name, operands[i]);
    status = is_remote ? cli_run_remote(job) : cli_run_job(job, cli.cas);
    i++;
  } while (!status && i < noperands);
  return status;
}

/* If the command line is a command on a store: does it, and ends the process.
 * Its first word has to be one of the names in cli_verbs; a file of such a name
 * is served as ./NAME. */
static void cli_run_verb(void) {
  struct cli_job job = {.output = 1, .messages = 2, .client = -1};
  if (!cli.ntargets) return;
  enum cli_verb_id id = cli_find_verb(cli.targets[0]);
  if (id == VERB_COUNT) return;
  const struct cli_verb *verb = &cli_verbs[id];
  char **operands = cli.targets + 1;
  int noperands = cli.ntargets - 1;
  char *store = cli_take_store(verb, &operands, &noperands);
  if (!store) cli_verb_usage(verb);
  cli_check_verb(verb, noperands);
  const char *last = noperands ? operands[noperands - 1] : NULL;
  job.verb = verb;
  job.request.verb = (unsigned char)id;
  job.request.json = opt.given[OPT_JSON] != 0;
  job.request.dry_run = opt.given[OPT_DRY_RUN] != 0;
  if (last && verb->flags & VERB_TAKES_SIZE &&
      !u_parse_number(last, INT64_MAX, &job.request.size))
    cli_usage("%s %s: not a size", verb->name, last);
  if (id == VERB_INIT) {
    cli_init(store, last, job.request.size);
    exit(CLI_OK);
  }
  if (verb->flags & (VERB_READS_FILE | VERB_WRITES_FILE))
    cli_open_file(&job, last);
  int err = cli_open_store(store, (verb->flags & VERB_READS_ONLY) != 0);
  int is_remote = err == -EBUSY;
  if (!is_remote) cli_exit_if_error(err, store);
  if (!is_remote && verb->flags & VERB_IS_LONG)
    cli_catch_signals(cli_on_signal);
  exit(cli_run_on_operands(&job, is_remote, operands, noperands));
}

/* Prints the commands for --help. */
static void cli_help_verbs(void) {
  puts("\nCommands on stores, also while they are served.  NAME is VOLUME,\n"
       "VOLUME@SNAPSHOT or the id of a sealed snapshot; names that follow\n"
       "are in the same store.");
  for (int id = 0; id < VERB_COUNT; id++)
    printf("  %-9s %-23s %s\n", cli_verbs[id].name, cli_verbs[id].operands,
           cli_verbs[id].help);
}

#else /* NBDSERVE_NO_CAS: what the rest of the section calls */

/* There are no commands, so no thread takes any. */
static void cli_start_control(void) {}

/* There is no such thread to wait for. */
static int cli_await_control(void) {
  return 1;
}

/* No volume can be opened. */
static int cli_open_volume(const char *path, const char *name,
                           struct nbdserve_export *ex) {
  (void)path;
  (void)name;
  (void)ex;
  return -EOPNOTSUPP;
}

/* No store can be served. */
static int cli_serve_store(const char *path) {
  (void)path;
  return -EOPNOTSUPP;
}

/* No store is open. */
static const char *cli_close_store(void) {
  return NULL;
}

/* The command line is never a command on a store. */
static void cli_run_verb(void) {}

/* There are no commands to print. */
static void cli_help_verbs(void) {}
#endif

/* ---- Targets ---------------------------------------------------------------
 * How the text of a target is read, the first line that fits:
 *
 *   file:PATH           a file, whatever PATH looks like
 *   NAME=TARGET         the export NAME of a TARGET; no "/" stands before "="
 *   STORE::VOLUME       a volume, a snapshot (VOLUME@NAME) or the id of one
 *   STORE::             all of a store
 *   mem:SIZE            memory
 *   PATH                a file or block device
 *
 * So a file whose name looks like one of the others needs "file:", or "./"
 * where only a "=" is the matter. */

enum cli_target_kind {
  CLI_FILE,   /* a file, a block device, or memory */
  CLI_VOLUME, /* a volume or snapshot of a store */
  CLI_STORE   /* all of a store */
};

/* A target, taken apart.  The texts belong to argv. */
struct cli_target {
  enum cli_target_kind kind;
  /* TARGET as it was written, without NAME=, for messages */
  const char *text;
  /* NAME, or NULL */
  const char *name;
  /* What stands behind "::", or NULL */
  const char *volume;
  /* The path of the store; or of the file, as nbdserve_flat_open takes it, for
   * which mem:SIZE is one, too */
  char path[PATH_MAX];
};

/* Sets target->path to the prefix and the first len characters of path. */
static void cli_set_path(struct cli_target *target, const char *prefix,
                         const char *path, size_t len) {
  if (strlen(prefix) + len >= PATH_MAX)
    cli_exit_if_error(-ENAMETOOLONG, target->text);
  snprintf(target->path, PATH_MAX, "%s%.*s", prefix, (int)len, path);
  assert(strlen(target->path) == strlen(prefix) + len);
}

/* Takes a target apart, in the order of the table above.  The text is cut at
 * the
 * "=" behind NAME. */
static void cli_parse_target(char *text, struct cli_target *target) {
  static const char file[] = "file:";
  size_t prefix = sizeof file - 1;
  char *equals = text + strcspn(text, "/=");
  *target = (struct cli_target){.kind = CLI_FILE, .text = text};
  if (*equals == '=' && strncmp(text, file, prefix) != 0) {
    *equals = '\0';
    target->name = text;
    target->text = equals + 1;
  }
  if (strncmp(target->text, file, prefix) == 0) {
    const char *path = target->text + prefix;
    /* The backend must not take the file mem:5 for memory. */
    int is_ambiguous = strncmp(path, "mem:", 4) == 0;
    cli_set_path(target, is_ambiguous ? "./" : "", path, strlen(path));
    return;
  }
  const char *colons = strstr(target->text, "::");
  if (!colons) {
    cli_set_path(target, "", target->text, strlen(target->text));
    return;
  }
  cli_set_path(target, "", target->text, (size_t)(colons - target->text));
  target->volume = colons + 2;
  target->kind = *target->volume ? CLI_VOLUME : CLI_STORE;
}

/* Returns the name of the export of a target.  NULL: it is the only one, and
 * clients may call it what they like. */
static const char *cli_name_export(const struct cli_target *target) {
  assert(cli.ntargets > 0);
  if (target->name) return target->name;
  if (opt.export_name) return opt.export_name;
  if (cli.ntargets == 1) return NULL;
  if (target->kind != CLI_FILE) return target->volume;
  const char *slash = strrchr(target->path, '/');
  return slash ? slash + 1 : target->path;
}

#if NBDSERVE_NO_FLAT
/* Without that backend no file can be opened. */
static int cli_open_file_target(const char *path, struct nbdserve_export *ex) {
  (void)path;
  (void)ex;
  return -EOPNOTSUPP;
}
#else
/* Opens a file, a block device or memory.  With --temporary what clients write
 * goes to a directory of the user's choice; a message about that names it, as
 * it is not the target that is wrong. */
static int cli_open_file_target(const char *path, struct nbdserve_export *ex) {
  struct nbdserve_flat options = {
      .offset = opt.offset, .size = opt.size, .create = opt.create_size};
  if (opt.given[OPT_READ_ONLY]) options.flags = NBDSERVE_FLAT_READONLY;
  if (opt.given[OPT_TEMPORARY]) {
    options.flags = NBDSERVE_FLAT_TEMPORARY;
    options.dir = getenv("TMPDIR");
    if (!options.dir) options.dir = "/tmp";
    if (access(options.dir, W_OK) < 0) cli_exit_if_error(-errno, options.dir);
  }
  return nbdserve_flat_open(path, &options, ex);
}
#endif

/* If err is an error: ends the process with a message that says why the target
 * cannot be opened and, where an option helps, which one. */
static void cli_exit_if_unopened(int err, const struct cli_target *target) {
  const char *text = target->text;
  int writes = !opt.given[OPT_READ_ONLY] && !opt.given[OPT_TEMPORARY];
  if ((err == -EACCES || err == -EROFS) && writes)
    cli_failed("%s: %s (-r serves it read-only)", text, u_errno_text(err));
  if (err == -ENOENT && target->kind == CLI_FILE && writes && !opt.create_size)
    cli_failed("%s: %s (--create SIZE makes it)", text, u_errno_text(err));
  if (err == -EINVAL && target->kind == CLI_FILE)
    cli_failed("%s: not a file, block device or mem:SIZE, or --offset and "
               "--size exceed it",
               text);
  cli_exit_if_error(err, text);
}

/* Gives an export to the server, which takes over what is behind it; if it does
 * not take the export, that is closed here. */
static void cli_add_export(const struct nbdserve_export *ex,
                           const char *target) {
  assert(ex->ops && ex->ops->close);
  int err = nbdserve_add(cli.server, ex);
  if (!err) return;
  ex->ops->close(ex->ctx);
  if (err == -EEXIST)
    cli_usage("%s: another target has that export name", target);
  if (err == -EINVAL)
    cli_usage("%s: --block-size, name or description out of range", target);
  cli_exit_if_error(err, target);
}

/* Opens a target and adds it to the server.  A volume cannot be cut like a
 * file, and has clones in place of --temporary.  A whole store adds no export:
 * the server asks for each one when a client does. */
static void cli_add_target(char *text) {
  struct cli_target target;
  assert(cli.server && !cli.server->nlisteners);
  struct nbdserve_export ex = cli_new_export();
  int err = 0;
  cli_parse_target(text, &target);
  ex.name = cli_name_export(&target);
  if (cli.ntargets == 1 && !ex.name) ex.flags |= NBDSERVE_EXPORT_FALLBACK;
  if (cli.ntargets == 1 && ex.name) cli.export_name = ex.name;
  if (target.kind != CLI_FILE &&
      (opt.offset || opt.size || opt.create_size || opt.given[OPT_TEMPORARY]))
    cli_usage("%s: no --offset, --size, --create or --temporary with a store "
              "(clone it)",
              target.text);
  switch (target.kind) {
  case CLI_FILE:
    err = cli_open_file_target(target.path, &ex);
    break;
  case CLI_VOLUME:
    err = cli_open_volume(target.path, target.volume, &ex);
    break;
  case CLI_STORE:
    err = cli_serve_store(target.path);
    break;
  }
  cli_exit_if_unopened(err, &target);
  assert(!ex.ops == (target.kind == CLI_STORE));
  if (target.kind != CLI_STORE) cli_add_export(&ex, target.text);
}

/* ---- Where to listen ---------------------------------------------------- */

/* Listens at an address, as nbdserve_listen takes it, or ends the process with
 * a message that says what is wrong with it. */
static void cli_listen_at(const char *address) {
  int err = nbdserve_listen(cli.server, address);
  if (err == -ENAMETOOLONG)
    cli_failed("%s: a socket path has at most %u bytes", address,
               (unsigned)sizeof(((struct sockaddr_un *)0)->sun_path) - 1);
  if (err == -EADDRINUSE)
    cli_failed("%s: %s; not replaced", address, u_errno_text(err));
  if (err == -EINVAL && strncmp(address, "tcp:", 4) == 0)
    cli_failed("%s: not a numeric address or localhost, or built without TCP",
               address);
  cli_exit_if_error(err, address);
}

/* Listens on a socket that whoever started us has opened.  If it is not one
 * that listens, it is connected to a client, the only one then: a second such
 * socket is an error. */
static void cli_listen_on_fd(int fd) {
  char address[32];
  assert(fd >= 0);
  snprintf(address, sizeof address, "fd:%d", fd);
  int err = nbdserve_listen(cli.server, address);
  if (err == -EINVAL && cli.in < 0) {
    cli.in = fd;
    cli.out = fd;
    return;
  }
  cli_exit_if_error(err, address);
}

/* Returns how many sockets systemd, or a program like nbdinfo, has passed to
 * us.  LISTEN_PID says whom they are for: the variables are inherited by
 * children, who must not believe them. */
static uint64_t cli_count_passed(void) {
  const char *pid = getenv("LISTEN_PID");
  const char *fds = getenv("LISTEN_FDS");
  uint64_t n = 0;
  if (!pid || !fds || strtol(pid, NULL, 10) != (long)getpid()) return 0;
  if (!u_parse_number(fds, SRV_LISTENERS, &n))
    cli_failed("LISTEN_FDS: %s: not a number of sockets up to %d", fds,
               SRV_LISTENERS);
  return n;
}

/* Listens on a unix socket at path.  If the path is relative it gets the
 * working directory in front, so that the URI is right from everywhere; but
 * only where the whole fits into the address of a socket, for the path alone
 * may. */
static void cli_listen_on_unix(const char *path) {
  char address[PATH_MAX + 8];
  char dir[sizeof(((struct sockaddr_un *)0)->sun_path)];
  size_t n = strlen(path);
  int fits = n + 1 < sizeof dir && *path != '/' &&
             getcwd(dir, sizeof dir - n - 1) != NULL;
  snprintf(address, sizeof address, "unix:%s%s%s", fits ? dir : "",
           fits ? "/" : "", path);
  cli_listen_at(address);
}

/* Makes a directory that only its owner can enter, for a socket.  A parent
 * whose path is long is passed over: with what comes behind it the path has to
 * fit into the address of a socket on every system. */
static void cli_make_private_dir(void) {
  const char *const parents[] = {getenv("XDG_RUNTIME_DIR"), getenv("TMPDIR"),
                                 "/tmp"};
  for (int i = 0; i < 3; i++) {
    if (!parents[i] || *parents[i] != '/' || strlen(parents[i]) > 80) continue;
    snprintf(cli.private_dir, sizeof cli.private_dir, "%s/nbdXXXXXX",
             parents[i]);
    if (mkdtemp(cli.private_dir)) return;
    cli.private_dir[0] = '\0';
  }
  cli_failed("private socket: no directory for it (use -U)");
}

/* Listens on a private socket.  The directory protects it; the mode is for
 * those who look at the socket alone. */
static void cli_listen_privately(void) {
  char address[sizeof cli.private_dir + 16];
  cli_make_private_dir();
  assert(*cli.private_dir == '/');
  snprintf(address, sizeof address, "unix:%s/sock", cli.private_dir);
  cli_listen_at(address);
  if (chmod(address + strlen("unix:"), 0600) < 0)
    cli_exit_if_error(-errno, address);
}

/* Listens on TCP, and warns if others than this machine can connect. */
static void cli_listen_on_tcp(void) {
  const char *host = opt.bind_address ? opt.bind_address : "localhost";
  uint64_t port = opt.given[OPT_PORT] ? opt.port : CLI_DEFAULT_PORT;
  char address[PATH_MAX];
  snprintf(address, sizeof address, "tcp:%s:%" PRIu64, host, port);
  cli_listen_at(address);
  int is_loopback = strcmp(host, "localhost") == 0 ||
                    strcmp(host, "::1") == 0 || strncmp(host, "127.", 4) == 0;
  if (!is_loopback && !opt.given[OPT_QUIET])
    cli_say("%s: no authentication: anyone can read and write", host);
}

/* Opens the sockets that the command line asks for.  If it does not ask for
 * any, takes over those that were passed to us, or makes a private one.  Only
 * sockets that we have opened have a URI that we know. */
static void cli_listen(void) {
  int wants_tcp = opt.given[OPT_PORT] || opt.given[OPT_BIND];
  if (opt.given[OPT_STDIN]) {
    cli.in = 0;
    cli.out = 1;
    return;
  }
  if (opt.given[OPT_FD]) {
    cli_listen_on_fd((int)opt.fd);
    return;
  }
  uint64_t npassed = opt.unix_path || wants_tcp ? 0 : cli_count_passed();
  for (uint64_t i = 0; i < npassed; i++)
    cli_listen_on_fd(CLI_FIRST_PASSED_FD + (int)i);
  if (npassed) return;
  int wants_private =
      opt.unix_path ? strcmp(opt.unix_path, "-") == 0 : !wants_tcp;
  if (wants_private) {
    cli_listen_privately();
  } else if (opt.unix_path) {
    cli_listen_on_unix(opt.unix_path);
  }
  if (wants_tcp) cli_listen_on_tcp();
  int err = nbdserve_uri(cli.server, cli.export_name, cli.uri, sizeof cli.uri);
  cli_exit_if_error(err, "URI");
}

/* ---- The command that is served (--run, --) ----------------------------- */

/* Returns a copy of the text with the URI in place of each {}, or NULL if there
 * is no memory.  Nobody frees it: the program that gets it is about to be
 * executed. */
static char *cli_put_uri(const char *text) {
  size_t n = strlen(text) + 1;
  for (const char *hit = strstr(text, "{}"); hit; hit = strstr(hit + 2, "{}"))
    n += strlen(cli.uri);
  char *result = u_zalloc(n);
  if (!result) return NULL;
  char *end = result;
  for (;;) {
    const char *hit = strstr(text, "{}");
    if (!hit) break;
    memcpy(end, text, (size_t)(hit - text));
    end += hit - text;
    strcpy(end, cli.uri);
    end += strlen(cli.uri);
    text = hit + 2;
  }
  strcpy(end, text);
  assert(strlen(result) < n);
  return result;
}

/* Sets the variables that a shell command can use.  They have the names that
 * nbdkit gives them, so that scripts can be used with both. */
static void cli_set_variables(void) {
  assert(*cli.uri && cli.server->nlisteners > 0);
  const struct srv_listener *l = cli.server->listeners;
  char nbd[sizeof l->text + 16];
  const char *colon = strrchr(l->text, ':');
  snprintf(nbd, sizeof nbd, "nbd:%s%s", l->is_unix ? "unix:" : "", l->text);
  setenv("nbd", nbd, 1);
  setenv("uri", cli.uri, 1);
  setenv("unixsocket", l->is_unix ? l->text : "", 1);
  setenv("port", l->is_unix || !colon ? "" : colon + 1, 1);
  setenv("exportname", cli.export_name, 1);
}

/* Says why the command cannot be executed, and returns the exit status. */
static int cli_no_command(const char *program, int err) {
  cli_say("%s: %s", program, u_errno_text(err));
  return CLI_NOT_FOUND;
}

/* In the child: becomes the command.  Returns only if that fails, with the exit
 * status.  The descriptors that we have opened close themselves. */
static int cli_exec_command(void) {
  const char *program = "/bin/sh";
  if (opt.run_command) {
    cli_set_variables();
    execl(program, "sh", "-c", opt.run_command, (char *)NULL);
  } else {
    program = cli.command[0];
    for (char **word = cli.command; *word; word++) {
      *word = cli_put_uri(*word);
      if (!*word) return cli_no_command(program, -ENOMEM);
    }
    execvp(cli.command[0], cli.command);
  }
  return cli_no_command(program, -errno);
}

/* Starts the command.  It is a child of the process, not the other way round,
 * so that we can pass on its status.  The signals are blocked until its process
 * id is known to the handler: it may have ended by then, and SIGCHLD be
 * waiting.  If a signal has asked for the end already, there is nobody to serve
 * the command, so it is not started. */
static void cli_start_command(void) {
  sigset_t was;
  assert(!cli.child);
  if (!*cli.uri) cli_usage("no URI for the command to use");
  cli_block_signals(&was);
  if (cli.phase == CLI_SERVING) {
    pid_t pid = fork();
    if (pid < 0) cli_exit_if_error(-errno, "fork");
    if (pid == 0) {
      cli_catch_signals(SIG_DFL); /* first: it must not run our handler */
      cli_restore_signals(&was);
      _exit(cli_exec_command());
    }
    cli.child = pid;
  }
  cli_restore_signals(&was);
}

/* Step 5 of the end.  Usually the command has ended, which is what has brought
 * us here, or has been told and had its time.  If it has not been told (the
 * server has failed, or two signals have come at once) that is done now; in the
 * first case there is time to wait for it. */
static void cli_await_command(void) {
  sigset_t was;
  cli_tell_command();
  cli_block_signals(&was);
  if (cli.child && cli.phase == CLI_SERVING) cli.phase = CLI_COMMAND_ENDS;
  while (cli.child && cli.phase != CLI_STOPPING)
    sigsuspend(&was); /* until the handler has run */
  if (cli.child) {
    assert(cli.child_told);
    cli_say("%s: the command still runs after SIGTERM; not waited for",
            cli.command ? cli.command[0] : "--run");
    cli.command_status = CLI_FAILED;
  }
  cli_restore_signals(&was);
}

/* ---- Getting ready ------------------------------------------------------ */

/* --fork: goes on in a child.  Only the child returns.  The parent waits for a
 * byte from it, which says that it is ready, and exits.  If the pipe is closed
 * without one, the child has failed, and the parent passes its status on.  This
 * comes before anything is opened: threads would not come along. */
static void cli_fork(void) {
  int fd[2];
  char byte;
  assert(!cli.cas && !cli.server->nlisteners);
  if (pipe(fd) < 0) cli_exit_if_error(-errno, "--fork");
  pid_t pid = fork();
  if (pid < 0) cli_exit_if_error(-errno, "--fork");
  if (pid == 0) {
    close(fd[0]);
    cli.ready_pipe = fd[1];
    if (setsid() < 0) cli_exit_if_error(-errno, "--fork");
    return;
  }
  close(fd[1]);
  if (read(fd[0], &byte, 1) == 1) _exit(CLI_OK);
  int wait_status = 0;
  waitpid(pid, &wait_status, 0);
  int status = cli_exit_status(wait_status);
  _exit(status ? status : CLI_FAILED);
}

/* --fork: lets go of the terminal, and tells the parent.  If the parent has
 * gone there is nobody to tell. */
static void cli_leave_terminal(void) {
  assert(cli.ready_pipe > 2);
  int null = open("/dev/null", O_RDWR);
  if (null < 0 || dup2(null, 0) < 0 || dup2(null, 1) < 0 || dup2(null, 2) < 0)
    cli_exit_if_error(-errno, "/dev/null");
  close(null);
  (void)!write(cli.ready_pipe, "", 1);
  close(cli.ready_pipe);
}

/* --ready-fd: tells the URI, if there is one, and closes the descriptor, which
 * is a sign in itself.  The command does not get it. */
static void cli_tell_ready_fd(int fd) {
  assert(fd > 2);
  if (*cli.uri && dprintf(fd, "%s\n", cli.uri) < 0)
    cli_exit_if_error(-errno, "--ready-fd");
  if (close(fd) < 0) cli_exit_if_error(-errno, "--ready-fd");
}

/* Tells everybody who wants to know that all is open and we listen.  Whoever is
 * told may connect at once.  With a command, that is who uses the URI, and
 * standard output is the command's. */
static void cli_tell_ready(void) {
  if (opt.pidfile) cli_write_pidfile(opt.pidfile);
  if (opt.given[OPT_READY_FD]) cli_tell_ready_fd((int)opt.ready_fd);
  if (opt.run_command || cli.command) {
    cli_start_command();
  } else if (*cli.uri && dprintf(1, "%s\n", cli.uri) < 0) {
    cli_exit_if_error(-errno, "standard output");
  }
  if (cli.ready_pipe >= 0) cli_leave_terminal();
}

/* ---- Serving ------------------------------------------------------------ */

/* Prints the totals as JSON, with the names that nbdserve.h has for them. */
static void cli_print_stats_json(const struct nbdserve_stats *stats) {
  fprintf(stderr,
          "{\"clients\":%" PRIu64 ",\"clients_now\":%" PRIu64
          ",\"requests\":%" PRIu64 ",\"errors\":%" PRIu64
          ",\"bytes_read\":%" PRIu64 ",\"bytes_written\":%" PRIu64
          ",\"flushes\":%" PRIu64 "}\n",
          stats->clients, stats->clients_now, stats->requests, stats->errors,
          stats->bytes_read, stats->bytes_written, stats->flushes);
}

/* Prints the totals, for --stats and SIGUSR1. */
static void cli_print_stats(void) {
  struct nbdserve_stats stats;
  nbdserve_stats(cli.server, &stats);
  if (opt.given[OPT_JSON]) {
    cli_print_stats_json(&stats);
    return;
  }
  cli_say("%" PRIu64 " clients (%" PRIu64 " now), %" PRIu64
          " requests (%" PRIu64 " failed), %" PRIu64 " bytes read, %" PRIu64
          " written, %" PRIu64 " flushes",
          stats.clients, stats.clients_now, stats.requests, stats.errors,
          stats.bytes_read, stats.bytes_written, stats.flushes);
}

/* Runs the server to its end, and does what the signal handler leaves to
 * others: it prints totals, and does steps 1 and 2 of the end.  Returns what
 * nbdserve_run does. */
static int cli_run(void) {
  for (;;) {
    int err = nbdserve_run(cli.server);
    if (err != -EINTR) return err;
    if (cli.stats_wanted) {
      cli.stats_wanted = 0;
      cli_print_stats();
    }
    if (cli.phase == CLI_COMMAND_ENDS) {
      nbdserve_unlisten(cli.server);
      cli_tell_command();
    }
  }
}

/* Serves until the end.  Returns the exit status, which is the command's if
 * there was one and it has failed.  A client that is the only one is served
 * here; after that cli_run has nothing to do but to flush. */
static int cli_serve(void) {
  int err = 0;
  assert((cli.in < 0) == (cli.out < 0));
  cli_start_control();
  if (cli.in >= 0) {
    err = nbdserve_serve(cli.server, cli.in, cli.out, NULL);
    nbdserve_stop(cli.server);
  }
  int run_err = cli_run();
  if (opt.given[OPT_STATS]) cli_print_stats();
  cli_await_command();
  if (cli.command_status) return cli.command_status;
  return err || run_err ? CLI_FAILED : CLI_OK;
}

/* At exit, however that comes about: removes what we have made, first what
 * tells others that we are here, and closes what we have opened.  Clients and
 * commands use the store, so it is closed after they have ended.  If a command
 * does not end, the store stays open: opening it next time repairs what is
 * unfinished.  From here on signals are ignored. */
static void cli_close(void) {
  const char *trouble = NULL;
  cli_catch_signals(SIG_IGN);
  cli_remove_pidfile();
  if (cli.ctl >= 0) cli_remove_own(cli.ctl_path, &cli.ctl_st);
  if (!cli_await_control()) trouble = "a command was not finished";
  nbdserve_free(cli.server);
  if (!trouble) trouble = cli_close_store();
  if (*cli.private_dir) rmdir(cli.private_dir);
  if (trouble) {
    cli_say("%s: %s", cli.store, trouble);
    _exit(CLI_FAILED);
  }
}

/* ---- The command line as a whole ---------------------------------------- */

/* Prints the options for --help.  Those without a letter are indented, so that
 * all names are in one column. */
static void cli_help_options(void) {
  for (int id = 0; id < OPT_COMMAND; id++) {
    const struct cli_option *option = &cli_options[id];
    const char *argument = option->argument ? option->argument : "";
    char letter[] = "-x,";
    letter[1] = option->letter;
    printf("  %3s --%s %-*s %s\n", option->letter ? letter : "", option->name,
           18 - (int)strlen(option->name), argument, option->help);
  }
}

/* --help.  README has a copy of what this prints; a test compares them. */
static int cli_help(void) {
  puts("usage: nbdserve [OPTION]... [NAME=]TARGET... [-- CMD ARG...]\n"
       "       nbdserve COMMAND ARG...\n"
       "Serves disks over NBD.  TARGET is a file, a block device, mem:SIZE,\n"
       "file:PATH (a file whatever its name looks like), STORE::VOLUME,\n"
       "STORE::VOLUME@SNAPSHOT or, for a whole store, STORE::.\n"
       "With CMD: serves while CMD runs; {} in an ARG becomes the URI.\n");
  cli_help_options();
  cli_help_verbs();
  puts("\nNumbers take K, M, G, T, P and E (powers of 1024).  Once it\n"
       "listens it prints the URI.  Exit status: 0 success, 1 failure,\n"
       "2 usage, 3 verify found damage, 4 target in use, or the status\n"
       "of CMD.");
  return fflush(stdout) == EOF ? CLI_FAILED : CLI_OK;
}

/* --version.  The words tell what the build has; --help leaves out what it has
 * not. */
static int cli_version(void) {
  printf("nbdserve %s%s%s%s%s%s\n", nbdserve_version(),
         NBDSERVE_NO_FLAT ? "" : " flat", NBDSERVE_NO_CAS ? "" : " cas",
         NBDSERVE_NO_TCP ? "" : " tcp", NBDSERVE_NO_THREADS ? "" : " threads",
         NBDSERVE_POSIX_ONLY ? " posix-only" : "");
  return fflush(stdout) == EOF ? CLI_FAILED : CLI_OK;
}

/* Opens those of the descriptors 0 to 2 that are not open.  Otherwise an image
 * could become one of them, and our messages would be written to it. */
static void cli_open_standard_fds(void) {
  int fd = 0;
  while (fd >= 0 && fd <= 2)
    fd = open("/dev/null", O_RDWR);
  if (fd > 2) close(fd);
}

/* Makes the server as the options want it.  Commands on stores need one, too: a
 * signal ends them by way of nbdserve_stop. */
static void cli_new_server(void) {
  struct nbdserve_config config = {
      .version = NBDSERVE_VERSION_NUMBER,
      .threads = (uint32_t)opt.threads,
      .max_conn = (uint32_t)opt.max_conn,
      .stall_ms = (uint32_t)opt.stall_s * 1000,
      .idle_exit_ms = (uint32_t)opt.idle_exit_s * 1000,
      .without = opt.without,
      .log_level = NBDSERVE_LOG_WARNING + (int)u_min(opt.given[OPT_VERBOSE], 2),
      .log = cli_log};
  if (opt.given[OPT_QUIET]) config.log_level = NBDSERVE_LOG_ERROR;
  if (opt.given[OPT_ONCE]) config.flags |= NBDSERVE_CONFIG_ONCE;
  if (opt.given[OPT_FAULT] || opt.given[OPT_DELAY]) config.before = cli_before;
  cli_exit_if_error(nbdserve_new(&cli.server, &config), "start");
}

/* A command on a store, or a server from its start to its end: see the head of
 * this section.  The order matters: --fork before threads and locks, signals
 * before anything that must be removed, targets before sockets, so that whoever
 * can connect finds them. */
int main(int argc, char **argv) {
  cli_open_standard_fds();
  atexit(cli_close);
  if (argc > 0) cli_parse(argv);
  if (opt.given[OPT_HELP]) return cli_help();
  if (opt.given[OPT_VERSION]) return cli_version();
  cli_new_server();
  cli_run_verb();
  cli_check_options();
  if (opt.given[OPT_FORK]) cli_fork();
  cli_catch_signals(cli_on_signal);
  for (int i = 0; i < cli.ntargets; i++)
    cli_add_target(cli.targets[i]);
  cli_listen();
  cli_tell_ready();
  return cli_serve();
}

#endif /* !NBDSERVE_NO_MAIN */
