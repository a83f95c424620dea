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
 *   nbdserve_run ── accept ──┬─> client thread ── recv, batch, send ─┐
 *   (caller's thread)        │     └─> workers: what may take long ──┤ replies
 *                            └─> client thread ...                   v
 *                                                                  socket
 *
 * One thread serves a client: it takes all that has arrived, does it as one
 * batch and sends all replies at once, so an ordinary request costs no lock
 * that another thread wants.  Flushes, trims and everything a host program's
 * own backend does go to that client's workers, which answer by themselves.
 *
 * ---- Locks, in the order they may be taken -------------------------------
 *   1. nbdserve.lock   list of exports, list of clients, memory, threads
 *   2. conn.lock       a client's queue, counters and stop flag
 *   3. conn.sending    one writer on a client's socket at a time (the only
 *                      lock held while a client is waited for: it is its own)
 *   4. ex.serial       one call into an NBDSERVE_SERIAL backend at a time
 *   5. ex.lock         an export's size and its group of waiting flushes
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
#ifndef NBDSERVE_MALLOC /* the three go together */
#define NBDSERVE_MALLOC malloc
#define NBDSERVE_REALLOC realloc
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
#elif defined __sun && !defined __EXTENSIONS__
#define __EXTENSIONS__ 1
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
#include <sys/time.h>
#include <sys/types.h>
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

/* A compile-time check that every compiler accepts. */
#define STATIC_ASSERT(name, cond) enum { assert_##name = 1 / (int)!!(cond) }

STATIC_ASSERT(off_t_has_64_bits, sizeof(off_t) >= 8);
STATIC_ASSERT(int_has_32_bits, sizeof(int) >= 4);

#if defined __linux__ && !NBDSERVE_POSIX_ONLY
#define OS_LINUX 1
#else
#define OS_LINUX 0
#endif
#if !NBDSERVE_POSIX_ONLY && (defined __linux__ || defined __FreeBSD__ || \
                             defined __NetBSD__ || defined __OpenBSD__)
#define OS_PREADV 1
#else
#define OS_PREADV 0
#endif
#if defined SEEK_HOLE && !NBDSERVE_POSIX_ONLY
#define OS_SEEK_HOLE 1
#else
#define OS_SEEK_HOLE 0
#endif
#ifdef SOCK_CLOEXEC
#define OS_SOCK_CLOEXEC SOCK_CLOEXEC
#else
#define OS_SOCK_CLOEXEC 0
#endif
#ifdef MSG_NOSIGNAL
#define OS_MSG_NOSIGNAL MSG_NOSIGNAL
#else
#define OS_MSG_NOSIGNAL 0 /* SO_NOSIGPIPE does it: see os_tune */
#endif

/* Lets printf-like functions be checked by compilers that can. */
#ifdef __GNUC__
#define OS_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))
#else
#define OS_PRINTF(fmt, args)
#endif

#if !NBDSERVE_NO_THREADS

struct os_mutex {
  pthread_mutex_t m;
};

struct os_cond {
  pthread_cond_t c;
};

static int os_mutex_init(struct os_mutex *m) {
  return -pthread_mutex_init(&m->m, NULL);
}

static void os_mutex_free(struct os_mutex *m) {
  int err = pthread_mutex_destroy(&m->m);
  assert(err == 0);
  (void)err;
}

static void os_lock(struct os_mutex *m) {
  int err = pthread_mutex_lock(&m->m);
  assert(err == 0);
  (void)err;
}

static void os_unlock(struct os_mutex *m) {
  int err = pthread_mutex_unlock(&m->m);
  assert(err == 0);
  (void)err;
}

static int os_cond_init(struct os_cond *c) {
  return -pthread_cond_init(&c->c, NULL);
}

static void os_cond_free(struct os_cond *c) {
  pthread_cond_destroy(&c->c);
}

static void os_wait(struct os_cond *c, struct os_mutex *m) {
  pthread_cond_wait(&c->c, &m->m);
}

/* Waits up to ms milliseconds; false when they are over. */
static int os_wait_ms(struct os_cond *c, struct os_mutex *m, int ms) {
  struct timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  t.tv_sec += ms / 1000;
  t.tv_nsec += (long)(ms % 1000) * 1000000;
  if (t.tv_nsec >= 1000000000) {
    t.tv_sec++;
    t.tv_nsec -= 1000000000;
  }
  return pthread_cond_timedwait(&c->c, &m->m, &t) == 0;
}

static void os_wake_one(struct os_cond *c) {
  pthread_cond_signal(&c->c);
}

static void os_wake_all(struct os_cond *c) {
  pthread_cond_broadcast(&c->c);
}

/* Starts a detached thread that takes no signals: those are the host's.  0, or
 * -errno when the system has no thread left. */
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

#else /* one thread: nothing to lock, nobody to wait for */

struct os_mutex {
  char unused;
};

struct os_cond {
  char unused;
};

static int os_mutex_init(struct os_mutex *m) {
  m->unused = 0;
  return 0;
}

static void os_mutex_free(struct os_mutex *m) {
  (void)m;
}

static void os_lock(struct os_mutex *m) {
  (void)m;
}

static void os_unlock(struct os_mutex *m) {
  (void)m;
}

static int os_cond_init(struct os_cond *c) {
  c->unused = 0;
  return 0;
}

static void os_cond_free(struct os_cond *c) {
  (void)c;
}

static void os_wait(struct os_cond *c, struct os_mutex *m) {
  (void)c;
  (void)m;
  assert(!"nobody could end this wait");
}

static int os_wait_ms(struct os_cond *c, struct os_mutex *m, int ms) {
  (void)c;
  (void)m;
  (void)ms;
  return 0;
}

static void os_wake_one(struct os_cond *c) {
  (void)c;
}

static void os_wake_all(struct os_cond *c) {
  (void)c;
}

static int os_thread(void *(*fn)(void *), void *arg) {
  (void)fn;
  (void)arg;
  return -EAGAIN;
}

#endif

/* Milliseconds of a clock that is never set. */
static int64_t os_now_ms(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* Sets or clears O_NONBLOCK. */
static void os_nonblock(int fd, int on) {
  int fl = fcntl(fd, F_GETFL);
  if (fl >= 0 && !(fl & O_NONBLOCK) == !!on)
    fcntl(fd, F_SETFL, on ? fl | O_NONBLOCK : fl & ~O_NONBLOCK);
}

/* A pipe of which neither end blocks or survives exec. */
static int os_pipe(int fd[2]) {
  int i;
  if (pipe(fd) < 0)
    return -errno;
  for (i = 0; i < 2; i++) {
    fcntl(fd[i], F_SETFD, FD_CLOEXEC);
    os_nonblock(fd[i], 1);
  }
  return 0;
}

/* A stream socket, or -errno. */
static int os_socket(int family) {
  int fd = socket(family, SOCK_STREAM | OS_SOCK_CLOEXEC, 0);
  if (fd < 0)
    return -errno;
  fcntl(fd, F_SETFD, FD_CLOEXEC);
  return fd;
}

/* The next client of a listening socket, blocking, or -errno. */
static int os_accept(int fd) {
#if OS_LINUX
  int c = accept4(fd, NULL, NULL, SOCK_CLOEXEC);
  if (c < 0)
    return -errno;
#else
  int c = accept(fd, NULL, NULL);
  if (c < 0)
    return -errno;
  fcntl(c, F_SETFD, FD_CLOEXEC);
  os_nonblock(c, 0); /* the BSDs inherit it */
#endif
  return c;
}

/* Prepares a client's socket: no Nagle delay (proto.md, Protocol phases), no
 * SIGPIPE, dead peers noticed, a blocked call returns after ms to look around.
 * Not a socket: nothing happens. */
static void os_tune(int fd, int ms) {
  struct timeval t;
  int one = 1;
  t.tv_sec = ms / 1000;
  t.tv_usec = ms % 1000 * 1000;
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t);
  setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &t, sizeof t);
  setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one);
#ifdef SO_NOSIGPIPE
  setsockopt(fd, SOL_SOCKET, SO_NOSIGPIPE, &one, sizeof one);
#endif
#ifdef __APPLE__ /* its default makes large replies ten times slower */
  one = 2 << 20;
  setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &one, sizeof one);
  one = 1;
#endif
#if !NBDSERVE_NO_TCP
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
#endif
}

/* Takes the first done bytes off the n pieces at v. */
static void os_advance(struct iovec **v, int *n, size_t done) {
  while (*n > 0 && done >= (*v)->iov_len) {
    done -= (*v)->iov_len;
    ++*v;
    --*n;
  }
  if (done > 0) {
    assert(*n > 0);
    (*v)->iov_base = (char *)(*v)->iov_base + done;
    (*v)->iov_len -= done;
  }
}

#if !NBDSERVE_NO_FLAT

/* Reads at off into v[0..n), or a first part of it. */
static ssize_t os_preadv(int fd, const struct iovec *v, int n, off_t off) {
#if OS_PREADV
  if (n > 1)
    return preadv(fd, v, n, off);
#endif
  (void)n;
  return pread(fd, v->iov_base, v->iov_len, off);
}

/* Writes v[0..n), or a first part of it, at off. */
static ssize_t os_pwritev(int fd, const struct iovec *v, int n, off_t off) {
#if OS_PREADV
  if (n > 1)
    return pwritev(fd, v, n, off);
#endif
  (void)n;
  return pwrite(fd, v->iov_base, v->iov_len, off);
}

/* Reads or writes all of v[0..n) at off; uses v up.  0 or -errno, -EIO when
 * the file ends before. */
static int os_transfer(int fd, int writing, struct iovec *v, int n,
                       uint64_t off) {
  while (n > 0) {
    ssize_t done = writing ? os_pwritev(fd, v, n, (off_t)off)
                           : os_preadv(fd, v, n, (off_t)off);
    if (done < 0 && errno == EINTR)
      continue;
    if (done <= 0)
      return done < 0 ? -errno : -EIO;
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
    if (r < 0 && errno != EINTR && errno != EIO)
      r = fsync(fd);
#else
    r = fdatasync(fd);
#endif
  } while (r < 0 && errno == EINTR);
  return r < 0 ? -errno : 0;
}

/* The directory entry of path is on the medium afterwards. */
static int os_sync_dir(const char *path) {
  char dir[PATH_MAX];
  const char *slash = strrchr(path, '/');
  size_t n = slash ? (size_t)(slash - path) + 1 : 0;
  int fd, err = 0;

  if (n >= sizeof dir)
    return -ENAMETOOLONG;
  memcpy(dir, path, n);
  memcpy(dir + n, ".", 2);
  fd = open(dir, O_RDONLY | O_CLOEXEC);
  if (fd < 0)
    return -errno;
  if (fsync(fd) < 0 && errno != EINVAL)
    err = -errno;
  close(fd);
  return err;
}

#if OS_LINUX
enum { OS_KEEP_SIZE = 1, OS_PUNCH_HOLE = 2, OS_ZERO_RANGE = 16 };

static int os_fallocate(int fd, int mode, uint64_t off, uint64_t len) {
  while (fallocate(fd, mode, (off_t)off, (off_t)len) < 0)
    if (errno != EINTR)
      return errno == ENOSYS || errno == EPERM ? -EOPNOTSUPP : -errno;
  return 0;
}
#endif

/* Gives the range's space back; it reads as zeroes then.  -EOPNOTSUPP. */
static int os_punch(int fd, uint64_t off, uint64_t len) {
#if OS_LINUX
  return os_fallocate(fd, OS_KEEP_SIZE | OS_PUNCH_HOLE, off, len);
#else
  (void)fd;
  (void)off;
  (void)len;
  return -EOPNOTSUPP;
#endif
}

/* The range reads as zeroes, without writing them, and is allocated. */
static int os_zero_range(int fd, uint64_t off, uint64_t len) {
#if OS_LINUX
  int err = os_fallocate(fd, OS_KEEP_SIZE | OS_ZERO_RANGE, off, len);
  if (err == -EOPNOTSUPP) { /* tmpfs: a hole, and then filled */
    err = os_punch(fd, off, len);
    if (!err)
      err = os_fallocate(fd, OS_KEEP_SIZE, off, len);
  }
  return err;
#else
  (void)fd;
  (void)off;
  (void)len;
  return -EOPNOTSUPP;
#endif
}

/* Is there data at off?  *next: where that answer ends, at most end. */
static int os_is_data(int fd, uint64_t off, uint64_t end, uint64_t *next) {
#if OS_SEEK_HOLE
  off_t data = lseek(fd, (off_t)off, SEEK_DATA), hole;
  int is_data = !(data < 0 ? errno == ENXIO : (uint64_t)data > off);
  *next = end;
  if (!is_data && data >= 0 && (uint64_t)data < end)
    *next = (uint64_t)data;
  if (is_data && data >= 0) {
    hole = lseek(fd, (off_t)off, SEEK_HOLE);
    if (hole > data && (uint64_t)hole < end)
      *next = (uint64_t)hole;
  }
  return is_data;
#else
  (void)fd;
  (void)off;
  *next = end;
  return 1;
#endif
}

/* The range will be read soon.  A hint: nothing can go wrong. */
static void os_willneed(int fd, uint64_t off, uint64_t len) {
#if defined POSIX_FADV_WILLNEED && !NBDSERVE_POSIX_ONLY
  posix_fadvise(fd, (off_t)off, (off_t)len, POSIX_FADV_WILLNEED);
#else
  (void)fd;
  (void)off;
  (void)len;
#endif
}

/* Keeps other servers out: a writer everyone, a reader writers.  -EBUSY: one
 * is there.  A file system without locks has none. */
static int os_claim(int fd, int readonly) {
  if (flock(fd, (readonly ? LOCK_SH : LOCK_EX) | LOCK_NB) < 0)
    if (errno == EWOULDBLOCK || errno == EAGAIN)
      return -EBUSY;
  return 0;
}

/* A file without a name: in memory, or else in $TMPDIR's stead, /tmp. */
static int os_nameless_file(void) {
  char path[] = "/tmp/nbdserveXXXXXX";
  int fd;
#if OS_LINUX && defined MFD_CLOEXEC
  fd = memfd_create("nbdserve", MFD_CLOEXEC);
  if (fd >= 0)
    return fd;
#endif
  fd = mkstemp(path);
  if (fd < 0)
    return -errno;
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

static void put16(unsigned char *p, uint16_t v) {
  p[0] = (unsigned char)(v >> 8);
  p[1] = (unsigned char)v;
}

static void put32(unsigned char *p, uint32_t v) {
  put16(p, (uint16_t)(v >> 16));
  put16(p + 2, (uint16_t)v);
}

static void put64(unsigned char *p, uint64_t v) {
  put32(p, (uint32_t)(v >> 32));
  put32(p + 4, (uint32_t)v);
}

static uint64_t u_min(uint64_t a, uint64_t b) {
  return a < b ? a : b;
}

static int u_is_power_of_2(uint64_t v) {
  return v && !(v & (v - 1));
}

/* A copy of s, "" for NULL; NULL without memory. */
static char *u_copy(const char *s) {
  size_t n = s ? strlen(s) + 1 : 1;
  char *p = NBDSERVE_MALLOC(n);
  if (p)
    memcpy(p, s ? s : "", n);
  return p;
}

/* A number with an optional K M G T P E (powers of 1024), up to INT64_MAX.
 * The character behind it, or NULL. */
static const char *u_size(const char *s, uint64_t *out) {
  static const char units[] = "KMGTPE";
  const char *unit;
  uint64_t v = 0;
  int shift = 0;

  if (*s < '0' || *s > '9')
    return NULL;
  for (; *s >= '0' && *s <= '9'; s++) {
    if (v > (INT64_MAX - 9) / 10)
      return NULL;
    v = v * 10 + (uint64_t)(*s - '0');
  }
  unit = *s ? strchr(units, *s >= 'a' && *s <= 'z' ? *s - 32 : *s) : NULL;
  if (unit) {
    shift = (int)(unit - units + 1) * 10;
    s++;
  }
  if (v > (uint64_t)INT64_MAX >> shift)
    return NULL;
  *out = v << shift;
  return s;
}

/* The text of a -errno value.  strerror is not safe in threads everywhere. */
static const char *u_error(int err) {
  static const struct {
    int err;
    const char *text;
  } table[] = {
      {EPERM, "operation not permitted"},
      {ENOENT, "no such file or directory"},
      {EIO, "input/output error"},
      {EAGAIN, "resource temporarily unavailable"},
      {ENOMEM, "out of memory"},
      {EACCES, "permission denied"},
      {EBUSY, "in use by another process"},
      {EEXIST, "exists already"},
      {ENOTDIR, "not a directory"},
      {EISDIR, "is a directory"},
      {EINVAL, "invalid argument"},
      {ENFILE, "too many open files in the system"},
      {EMFILE, "too many open files"},
      {EFBIG, "file too large"},
      {ENOSPC, "no space left on device"},
      {EROFS, "read-only file system"},
      {EPIPE, "connection closed by the client"},
      {ENAMETOOLONG, "name too long"},
      {ENOTSOCK, "not a socket"},
      {EPROTO, "protocol violation"},
      {EOPNOTSUPP, "operation not supported"},
      {EADDRINUSE, "address in use"},
      {EADDRNOTAVAIL, "address not available"},
      {EAFNOSUPPORT, "address family not supported"},
      {ENETUNREACH, "network is unreachable"},
      {ECONNRESET, "connection reset by the client"},
      {ETIMEDOUT, "timed out"},
      {EDQUOT, "disk quota exceeded"},
      {EOVERFLOW, "value too large"},
      {ELOOP, "too many symbolic links"},
      {ENXIO, "no such device or address"},
      {ENODEV, "no such device"},
      {ESHUTDOWN, "shutting down"},
  };
  size_t i;
  for (i = 0; i < sizeof table / sizeof *table; i++)
    if (table[i].err == -err)
      return table[i].text;
  return "unknown system error";
}

/* Appends s to the string in buf[size], with every byte that a URI may not
 * hold as %XX.  False when it does not fit. */
static int u_append_uri(char *buf, size_t size, const char *s) {
  static const char plain[] = "-._~/0123456789abcdefghijklmnopqrstuvwxyz"
                              "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
  size_t n = strlen(buf);
  for (; *s; s++) {
    int ok = strchr(plain, *s) != NULL;
    if (n + (ok ? 1 : 3) >= size)
      return 0;
    n += (size_t)snprintf(buf + n, size - n, ok ? "%c" : "%%%02X",
                          (unsigned char)*s);
  }
  return 1;
}

/* Gives the host a message if it wants that level; control characters, which
 * may come from a client, as '?'. */
static void OS_PRINTF(3, 4)
    u_log(const struct nbdserve_config *config, int level, const char *fmt, ...) {
  char text[512];
  va_list ap;
  size_t i;

  if (!config->log || level > config->log_level)
    return;
  va_start(ap, fmt);
  vsnprintf(text, sizeof text, fmt, ap);
  va_end(ap);
  for (i = 0; text[i]; i++)
    if ((unsigned char)text[i] < 32 || text[i] == 127)
      text[i] = '?';
  config->log(config->ctx, level, text);
}

/* ==== [5] WIRE (wire_) ===================================================
 * The protocol's numbers, spelled as in proto.md, and what is true of each
 * command.  Every message has a fixed head; the sizes of those are here too.
 */
#define NBD_INIT_MAGIC UINT64_C(0x4e42444d41474943)   /* "NBDMAGIC" */
#define NBD_OPTION_MAGIC UINT64_C(0x49484156454f5054) /* "IHAVEOPT" */
#define NBD_REP_MAGIC UINT64_C(0x0003e889045565a9)

enum {
  NBD_REQUEST_MAGIC = 0x25609513,
  NBD_SIMPLE_REPLY_MAGIC = 0x67446698,
  NBD_STRUCTURED_REPLY_MAGIC = 0x668e33ef,

  NBD_FLAG_FIXED_NEWSTYLE = 1 << 0, /* handshake flags, server and client */
  NBD_FLAG_NO_ZEROES = 1 << 1,
  NBD_FLAG_C_FIXED_NEWSTYLE = 1 << 0,
  NBD_FLAG_C_NO_ZEROES = 1 << 1,

  NBD_FLAG_HAS_FLAGS = 1 << 0, /* transmission flags */
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

  NBD_OPT_EXPORT_NAME = 1,
  NBD_OPT_ABORT = 2,
  NBD_OPT_LIST = 3,
  NBD_OPT_INFO = 6,
  NBD_OPT_GO = 7,
  NBD_OPT_STRUCTURED_REPLY = 8,
  NBD_OPT_LIST_META_CONTEXT = 9,
  NBD_OPT_SET_META_CONTEXT = 10,

  NBD_REP_ACK = 1,
  NBD_REP_SERVER = 2,
  NBD_REP_INFO = 3,
  NBD_REP_META_CONTEXT = 4,

  NBD_INFO_EXPORT = 0,
  NBD_INFO_NAME = 1,
  NBD_INFO_DESCRIPTION = 2,
  NBD_INFO_BLOCK_SIZE = 3,

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

  NBD_REPLY_FLAG_DONE = 1 << 0,
  NBD_REPLY_TYPE_NONE = 0,
  NBD_REPLY_TYPE_OFFSET_DATA = 1,
  NBD_REPLY_TYPE_BLOCK_STATUS = 5,
  NBD_REPLY_TYPE_ERROR = (1 << 15) + 1,

  NBD_EPERM = 1,
  NBD_EIO = 5,
  NBD_ENOMEM = 12,
  NBD_EINVAL = 22,
  NBD_ENOSPC = 28,
  NBD_EOVERFLOW = 75,
  NBD_ENOTSUP = 95,
  NBD_ESHUTDOWN = 108
};

/* Error replies to options have bit 31 set, which an enum need not hold. */
#define NBD_REP_ERR_UNSUP 0x80000001u
#define NBD_REP_ERR_INVALID 0x80000003u
#define NBD_REP_ERR_UNKNOWN 0x80000006u
#define NBD_REP_ERR_BLOCK_SIZE_REQD 0x80000008u
#define NBD_REP_ERR_TOO_BIG 0x80000009u

enum {
  WIRE_STRING = 4096, /* bytes of the longest name or message */
  WIRE_OPTION = 16,   /* magic, option, length */
  WIRE_REP = 20,      /* magic, option, type, length */
  WIRE_REQUEST = 28,  /* magic, flags, type, cookie, offset, length */
  WIRE_SIMPLE = 16,   /* magic, error, cookie */
  WIRE_CHUNK = 20     /* magic, flags, type, cookie, length */
};

STATIC_ASSERT(fast_zero, NBDSERVE_FAST_ZERO << 2 == NBD_CMD_FLAG_FAST_ZERO);

/* What is true of each command: validation and dispatch read it here. */
struct wire_cmd {
  const char *name;
  uint16_t flags;  /* besides FUA, which any command may carry */
  uint16_t needs;  /* transmission flags it is an answer to; 0: always there */
  int16_t beyond;  /* error of a range beyond the end, 0: no range */
  unsigned writes; /* refused on a read-only export */
};

static const struct wire_cmd wire_cmds[] = {
    {"NBD_CMD_READ", NBD_CMD_FLAG_DF, 0, EINVAL, 0},
    {"NBD_CMD_WRITE", 0, 0, ENOSPC, 1},
    {"NBD_CMD_DISC", 0, 0, 0, 0},
    {"NBD_CMD_FLUSH", 0, NBD_FLAG_SEND_FLUSH, 0, 0},
    {"NBD_CMD_TRIM", 0, NBD_FLAG_SEND_TRIM, EINVAL, 1},
    {"NBD_CMD_CACHE", 0, NBD_FLAG_SEND_CACHE, EINVAL, 0},
    {"NBD_CMD_WRITE_ZEROES", NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO,
     NBD_FLAG_SEND_WRITE_ZEROES, ENOSPC, 1},
    {"NBD_CMD_BLOCK_STATUS", NBD_CMD_FLAG_REQ_ONE, 0, EINVAL, 0}};

/* The entry of a command from the network, or NULL. */
static const struct wire_cmd *wire_cmd(unsigned type) {
  return type < sizeof wire_cmds / sizeof *wire_cmds ? &wire_cmds[type] : NULL;
}

/* The NBD error nearest to a -errno value (proto.md, Error values). */
static uint32_t wire_error(int err) {
  switch (-err) {
  case 0:
    return 0;
  case EPERM:
  case EACCES:
  case EROFS:
    return NBD_EPERM;
  case ENOMEM:
    return NBD_ENOMEM;
  case EINVAL:
    return NBD_EINVAL;
  case ENOSPC:
  case EDQUOT:
  case EFBIG:
    return NBD_ENOSPC;
  case EOVERFLOW:
    return NBD_EOVERFLOW;
  case ENOTSUP:
#if EOPNOTSUPP != ENOTSUP
  case EOPNOTSUPP:
#endif
    return NBD_ENOTSUP;
  case ESHUTDOWN:
    return NBD_ESHUTDOWN;
  default:
    return NBD_EIO;
  }
}

/* The head of one structured reply chunk with len bytes of payload. */
static size_t wire_put_chunk(unsigned char *p, unsigned type, uint64_t cookie,
                             uint32_t len) {
  put32(p, NBD_STRUCTURED_REPLY_MAGIC);
  put16(p + 4, NBD_REPLY_FLAG_DONE);
  put16(p + 6, (uint16_t)type);
  put64(p + 8, cookie);
  put32(p + 16, len);
  return WIRE_CHUNK;
}

/* A simple reply. */
static size_t wire_put_simple(unsigned char *p, uint64_t cookie, uint32_t err) {
  put32(p, NBD_SIMPLE_REPLY_MAGIC);
  put32(p + 4, err);
  put64(p + 8, cookie);
  return WIRE_SIMPLE;
}

/* ==== [6] SOCKET I/O (io_) ===============================================
 * Whole messages over sockets and pipes.  Deadlines are points of os_now_ms,
 * 0 for none; -ETIMEDOUT when one has passed.  A connection that has a stop
 * pipe looks at it before it waits for input, and gets -ESHUTDOWN; the others
 * are woken by shutdown(2).
 */
enum { IO_LOOK_AROUND_MS = 10000, IO_GRACE_MS = 5000 };

struct io {
  int in, out;
  int in_is_socket, out_is_socket;
  int stop; /* readable from nbdserve_stop on; -1: shutdown() is used */
};

/* Waits until fd can be read or written. */
static int io_wait(const struct io *io, int writing, int64_t deadline) {
  struct pollfd p[2];
  int64_t left;
  int r;

  p[0].fd = writing ? io->out : io->in;
  p[0].events = writing ? POLLOUT : POLLIN;
  p[1].fd = io->stop;
  p[1].events = POLLIN;
  for (;;) {
    left = deadline ? deadline - os_now_ms() : -1;
    if (deadline && left <= 0)
      return -ETIMEDOUT;
    p[0].revents = p[1].revents = 0;
    r = poll(p, io->stop >= 0 ? 2 : 1, left > INT_MAX ? INT_MAX : (int)left);
    if (r < 0 && errno != EINTR)
      return -errno;
    if (r > 0 && p[1].revents && !writing)
      return -ESHUTDOWN;
    if (r > 0 && p[0].revents)
      return 0;
    if (r > 0) { /* stopping: what is being sent gets a little longer */
      p[1].fd = -1;
      deadline = os_now_ms() + IO_GRACE_MS;
    }
  }
}

/* Receives up to len bytes, at least one.  Their number, 0 at the end of the
 * stream, or -errno.  all: waits for all of them where that is cheap. */
static ssize_t io_recv(const struct io *io, void *buf, size_t len, int all,
                       int64_t deadline) {
  int wait = io->stop >= 0 || deadline, err;
  ssize_t n;

  assert(len > 0);
  for (;; wait = 1) {
    err = wait ? io_wait(io, 0, deadline) : 0;
    if (err)
      return err;
    n = io->in_is_socket ? recv(io->in, buf, len, all ? MSG_WAITALL : 0)
                         : read(io->in, buf, len);
    if (n >= 0)
      return n;
    if (errno != EINTR && errno != EAGAIN && errno != EWOULDBLOCK)
      return -errno;
  }
}

/* Receives exactly len bytes: 0, -EPIPE when the stream ends before, or
 * -errno. */
static int io_recv_all(const struct io *io, void *buf, size_t len,
                       int64_t deadline) {
  unsigned char *p = buf;
  while (len > 0) {
    ssize_t n = io_recv(io, p, len, 1, deadline);
    if (n <= 0)
      return n < 0 ? (int)n : -EPIPE;
    p += n;
    len -= (size_t)n;
  }
  return 0;
}

/* Receives len bytes and forgets them, in pieces of scratch[size]. */
static int io_skip(const struct io *io, uint64_t len, unsigned char *scratch,
                   size_t size, int64_t deadline) {
  int err = 0;
  while (len > 0 && !err) {
    size_t n = (size_t)u_min(len, size);
    err = io_recv_all(io, scratch, n, deadline);
    len -= n;
  }
  return err;
}

/* Sends all of v[0..n); uses v up. */
static int io_send(const struct io *io, struct iovec *v, int n,
                   int64_t deadline) {
  struct msghdr m;
  int err;

  memset(&m, 0, sizeof m);
  while (n > 0) {
    ssize_t done;
    if (io->out_is_socket) {
      m.msg_iov = v;
      m.msg_iovlen = (unsigned)n;
      done = sendmsg(io->out, &m, OS_MSG_NOSIGNAL);
    } else {
      done = writev(io->out, v, n);
    }
    if (done < 0) {
      if (errno != EINTR && errno != EAGAIN && errno != EWOULDBLOCK)
        return -errno;
      err = io_wait(io, 1, deadline);
      if (err)
        return err;
      continue;
    }
    os_advance(&v, &n, (size_t)done);
  }
  return 0;
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
  unsigned char *buf;  /* data of READ and WRITE; reply of BLOCK_STATUS */
  size_t buflen;       /* bytes there that were taken from the budget */
  int err;             /* 0 or -errno */
  const char *why;     /* of an error, for humans; NULL: u_error */
  int written;         /* only the flush that FUA asks for is left to do */
  int deferred;        /* a worker answers it */
  struct nbdserve_req *next;
};

struct ex_flush { /* one caller that waits for a flush */
  struct ex_flush *next;
  int done, err;
};

struct ex {
  struct nbdserve_export e; /* fixed, but for the size; strings are our own */
  int dynamic;              /* from the find callback */
  struct ex *next;
  struct os_mutex serial;
  struct os_mutex lock; /* guards what follows, and e.size */
  struct os_cond flushed;
  struct ex_flush *waiting;
  int flushing;
  uint64_t nflushes;
};

struct nbdserve {
  struct nbdserve_config config; /* fixed; defaults filled in */
  int stop[2];                   /* pipe: readable from nbdserve_stop on */
  int wake[2];                   /* pipe: nbdserve_run looks around */
  struct srv_listener *listeners;
  struct os_mutex lock; /* guards what follows */
  struct os_cond gone;  /* a client, a thread or a request of size is */
  struct ex *exports, **last_export;
  struct conn *conns;    /* clients being served */
  struct conn *accepted; /* clients without a thread yet */
  struct os_cond work;   /* there is one */
  unsigned nthreads, nidle, nconns, naccepted;
  uint64_t memory; /* of big requests, see tx_take_memory */
  int stopping;
  struct nbdserve_stats stats; /* of clients that have gone */
};

/* The extents that a backend reports, in the form of the wire. */
struct nbdserve_extents {
  uint64_t left;   /* bytes of the request not yet described */
  uint64_t skip;   /* bytes described already, see nbdserve_extent */
  uint32_t align;  /* boundaries are multiples of it */
  uint32_t status; /* of the last extent */
  uint64_t len;    /* and its length */
  int one;         /* NBD_CMD_FLAG_REQ_ONE */
  unsigned char *data;
  size_t size, room;
  int err;
};

enum {
  EX_ZEROES = 1 << 20,           /* bytes of zeroes written at a time */
  EX_EXTENTS = 16384 * 8,        /* bytes of extents in one reply, at most */
  EX_EXTENT_HEAD = WIRE_CHUNK + 4 /* in front of them: chunk, context id */
};

static void ex_free(struct ex *ex) {
  assert(!ex->waiting && !ex->flushing);
  if (ex->e.ops && ex->e.ops->close)
    ex->e.ops->close(ex->e.ctx);
  os_cond_free(&ex->flushed);
  os_mutex_free(&ex->lock);
  os_mutex_free(&ex->serial);
  NBDSERVE_FREE((void *)(uintptr_t)ex->e.name);
  NBDSERVE_FREE((void *)(uintptr_t)ex->e.description);
  NBDSERVE_FREE(ex);
}

/* Checks an export as the host describes it and makes a copy with the defaults
 * filled in; the copy owns ctx.  -EINVAL, -ENOMEM: the caller keeps it. */
static int ex_new(struct ex **out, const struct nbdserve_export *e) {
  struct ex *ex;
  uint32_t min = e->min_block ? e->min_block : 1;
  uint32_t pref = e->preferred_block ? e->preferred_block
                                     : (uint32_t)(min > 4096 ? min : 4096);
  uint32_t max = e->max_request ? e->max_request : 32u << 20;

  if (!e->ops || !e->ops->read || e->size > INT64_MAX)
    return -EINVAL;
  if (!u_is_power_of_2(min) || min > 65536 || !u_is_power_of_2(pref) ||
      pref < min || pref < 512 || max < pref || max > NBDSERVE_MAX_REQUEST)
    return -EINVAL;
  if ((e->name && strlen(e->name) > WIRE_STRING) ||
      (e->description && strlen(e->description) > WIRE_STRING))
    return -EINVAL;
  ex = NBDSERVE_MALLOC(sizeof *ex);
  if (!ex)
    return -ENOMEM;
  memset(ex, 0, sizeof *ex);
  ex->e = *e;
  ex->e.name = u_copy(e->name);
  ex->e.description = u_copy(e->description);
  ex->e.min_block = min;
  ex->e.preferred_block = pref;
  ex->e.max_request = max;
  if (!e->ops->write)
    ex->e.flags |= NBDSERVE_READONLY;
  if (os_mutex_init(&ex->serial) || os_mutex_init(&ex->lock) ||
      os_cond_init(&ex->flushed) || !ex->e.name || !ex->e.description) {
    ex->e.ops = NULL; /* ctx stays the caller's */
    ex_free(ex);
    return -ENOMEM;
  }
  *out = ex;
  return 0;
}

/* The added export of exactly that name, or NULL.  Holds s->lock. */
static struct ex *ex_by_name(struct nbdserve *s, const char *name) {
  struct ex *ex;
  for (ex = s->exports; ex; ex = ex->next)
    if (strcmp(ex->e.name, name) == 0)
      return ex;
  return NULL;
}

/* The export a client means: an added one of that name, what the find callback
 * has, for the empty name the first one added, one that takes any name.
 * -ENOENT or what the callback said.  ex_put gives it back. */
static int ex_get(struct nbdserve *s, const char *name, struct ex **out) {
  struct nbdserve_export e;
  struct ex *ex;
  int err;

  os_lock(&s->lock);
  *out = ex_by_name(s, name);
  os_unlock(&s->lock);
  if (*out)
    return 0;
  if (s->config.find) {
    memset(&e, 0, sizeof e);
    err = s->config.find(s->config.ctx, name, &e);
    if (!err) {
      err = ex_new(out, &e);
      if (!err)
        (*out)->dynamic = 1;
      else if (e.ops && e.ops->close)
        e.ops->close(e.ctx);
      return err;
    }
    if (err != -ENOENT)
      return err;
  }
  os_lock(&s->lock);
  for (ex = s->exports; ex; ex = ex->next)
    if ((ex->e.flags & NBDSERVE_ANY_NAME) || (!*name && ex == s->exports))
      break;
  os_unlock(&s->lock);
  *out = ex;
  return ex ? 0 : -ENOENT;
}

static void ex_put(struct ex *ex) {
  if (ex && ex->dynamic) /* (E1) */
    ex_free(ex);
}

/* The export's size now. */
static uint64_t ex_size(struct ex *ex) {
  uint64_t size;
  os_lock(&ex->lock);
  size = ex->e.size;
  os_unlock(&ex->lock);
  return size;
}

/* The transmission flags of a client on this export: each exactly when it is
 * so. */
static uint16_t ex_flags(const struct ex *ex, int structured) {
  const struct nbdserve_ops *ops = ex->e.ops;
  unsigned f = NBD_FLAG_HAS_FLAGS;
  if (ex->e.flags & NBDSERVE_READONLY) {
    f |= NBD_FLAG_READ_ONLY;
  } else {
    if (ops->flush)
      f |= NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA;
    if (ops->trim)
      f |= NBD_FLAG_SEND_TRIM;
    f |= NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO;
  }
  if (ex->e.flags & NBDSERVE_ROTATIONAL)
    f |= NBD_FLAG_ROTATIONAL;
  if (ex->e.flags & NBDSERVE_MULTI_CONN)
    f |= NBD_FLAG_CAN_MULTI_CONN;
  if (ops->cache)
    f |= NBD_FLAG_SEND_CACHE;
  if (structured)
    f |= NBD_FLAG_SEND_DF;
  return (uint16_t)f;
}

/* Enters and leaves the backend. */
static void ex_enter(struct ex *ex) {
  if (ex->e.flags & NBDSERVE_SERIAL)
    os_lock(&ex->serial);
}

static void ex_leave(struct ex *ex) {
  if (ex->e.flags & NBDSERVE_SERIAL)
    os_unlock(&ex->serial);
}

/* All writes that returned before this call are on permanent storage when it
 * returns 0.  One caller flushes for all that wait (E3). */
static int ex_flush(struct ex *ex) {
  struct ex_flush me, *group, *w;
  int err;

  if (!ex->e.ops->flush || (ex->e.flags & NBDSERVE_UNSAFE))
    return 0;
  me.done = me.err = 0;
  os_lock(&ex->lock);
  me.next = ex->waiting;
  ex->waiting = &me;
  while (!me.done && ex->flushing)
    os_wait(&ex->flushed, &ex->lock);
  if (!me.done) {
    group = ex->waiting;
    ex->waiting = NULL;
    ex->flushing = 1;
    ex->nflushes++;
    os_unlock(&ex->lock);
    ex_enter(ex);
    err = ex->e.ops->flush(ex->e.ctx, 0);
    ex_leave(ex);
    os_lock(&ex->lock);
    ex->flushing = 0;
    for (w = group; w; w = w->next) {
      w->done = 1;
      w->err = err;
    }
    assert(me.done);
    os_wake_all(&ex->flushed);
  }
  os_unlock(&ex->lock);
  return me.err;
}

/* Zeroes by writing them, for a backend that has nothing better. */
static int ex_write_zeroes(struct ex *ex, uint64_t off, uint64_t len,
                           uint32_t flags) {
  uint64_t step = u_min(u_min(len, EX_ZEROES), ex->e.max_request);
  unsigned char *zeroes;
  int err = 0;

  step -= step % ex->e.min_block; /* both are multiples of it */
  assert(step > 0);
  if (flags & NBDSERVE_FAST_ZERO)
    return -ENOTSUP;
  zeroes = NBDSERVE_MALLOC((size_t)step);
  if (!zeroes)
    return -ENOMEM;
  memset(zeroes, 0, (size_t)step);
  for (; len > 0 && !err; off += step, len -= step) {
    step = u_min(step, len);
    err = ex->e.ops->write(ex->e.ctx, zeroes, off, step,
                           flags & NBDSERVE_FUA);
  }
  NBDSERVE_FREE(zeroes);
  return err;
}

/* Must the write r be followed by a flush before it is answered? */
static int ex_wants_flush(const struct ex *ex, const struct nbdserve_req *r) {
  const struct wire_cmd *cmd = wire_cmd(r->type);
  if (!cmd->writes || (ex->e.flags & NBDSERVE_NATIVE_FUA))
    return 0;
  return (r->flags & NBD_CMD_FLAG_FUA) || (ex->e.flags & NBDSERVE_WRITETHROUGH);
}

/* Appends one extent in the form of the wire, or makes the last one longer. */
static void ex_put_extent(struct nbdserve_extents *x, uint64_t len,
                          uint32_t status) {
  unsigned char *p;
  assert(len > 0 && len <= x->left);
  x->left -= len;
  if (x->size > EX_EXTENT_HEAD && x->status == status) {
    x->len += len;
  } else {
    if (x->size + 8 > x->room) {
      x->room = x->room ? x->room * 4 : 512;
      p = NBDSERVE_REALLOC(x->data, x->room);
      if (!p) {
        x->err = -ENOMEM;
        x->left = 0;
        return;
      }
      x->data = p;
      if (!x->size)
        x->size = EX_EXTENT_HEAD;
    }
    x->size += 8;
    x->status = status;
    x->len = len;
  }
  assert(x->len <= UINT32_MAX);
  put32(x->data + x->size - 8, (uint32_t)x->len);
  put32(x->data + x->size - 4, status);
}

NBDSERVE_API int nbdserve_extent(struct nbdserve_extents *x, uint64_t len,
                                 uint32_t status) {
  uint64_t part = u_min(len, x->skip), tail;
  x->skip -= part;
  len = u_min(len - part, x->left);
  tail = len == x->left ? 0 : len % x->align;
  if (len > tail)
    ex_put_extent(x, len - tail, status);
  if (tail && x->left) { /* a boundary inside a block: that block is data */
    part = u_min(x->align, x->left);
    x->skip = part - tail;
    ex_put_extent(x, part, 0);
  }
  if (x->one && x->size > EX_EXTENT_HEAD + 8) { /* two: one was enough */
    x->size -= 8;
    x->left = 0;
  }
  if (x->size >= EX_EXTENTS)
    x->left = 0;
  return x->left == 0;
}

/* The extents of a request, as the reply that goes out: r->buf, r->buflen. */
static int ex_extents(struct ex *ex, struct nbdserve_req *r) {
  struct nbdserve_extents x;
  int err = 0;

  memset(&x, 0, sizeof x);
  x.left = r->len;
  x.align = ex->e.min_block;
  x.one = (r->flags & NBD_CMD_FLAG_REQ_ONE) != 0;
  if (ex->e.ops->extents)
    err = ex->e.ops->extents(ex->e.ctx, r->off, r->len,
                             x.one ? NBDSERVE_REQ_ONE : 0, &x);
  else
    nbdserve_extent(&x, r->len, 0);
  if (!err && !x.err && !x.size) /* proto.md: at least one */
    nbdserve_extent(&x, r->len, 0);
  if (!err)
    err = x.err;
  if (err) {
    NBDSERVE_FREE(x.data);
    return err;
  }
  r->buf = x.data;
  r->buflen = x.size;
  return 0;
}

/* Does a request on the backend, but not the flush that may belong to it. */
static int ex_do(struct ex *ex, struct nbdserve_req *r) {
  const struct nbdserve_ops *ops = ex->e.ops;
  uint32_t fua = 0, zero;
  int err = -EINVAL;

  assert(r->len > 0 && r->off <= INT64_MAX && r->len <= INT64_MAX - r->off);
  assert(r->off % ex->e.min_block == 0); /* (E2) */
  assert(!wire_cmd(r->type)->writes || !(ex->e.flags & NBDSERVE_READONLY));
  if ((ex->e.flags & NBDSERVE_NATIVE_FUA) &&
      !(ex->e.flags & NBDSERVE_UNSAFE) &&
      ((r->flags & NBD_CMD_FLAG_FUA) || (ex->e.flags & NBDSERVE_WRITETHROUGH)))
    fua = NBDSERVE_FUA;
  ex_enter(ex);
  switch (r->type) {
  case NBD_CMD_READ:
    err = ops->read(ex->e.ctx, r->buf, r->off, r->len, 0);
    break;
  case NBD_CMD_WRITE:
    err = ops->write(ex->e.ctx, r->buf, r->off, r->len, fua);
    break;
  case NBD_CMD_TRIM:
    err = ops->trim(ex->e.ctx, r->off, r->len, fua);
    break;
  case NBD_CMD_CACHE:
    err = ops->cache(ex->e.ctx, r->off, r->len, 0);
    break;
  case NBD_CMD_WRITE_ZEROES:
    zero = fua | (r->flags & NBD_CMD_FLAG_NO_HOLE ? NBDSERVE_NO_HOLE : 0) |
           (r->flags & NBD_CMD_FLAG_FAST_ZERO ? NBDSERVE_FAST_ZERO : 0);
    err = ops->zero ? ops->zero(ex->e.ctx, r->off, r->len, zero)
                    : ex_write_zeroes(ex, r->off, r->len, zero);
    if (err == -ENOTSUP && !(zero & NBDSERVE_FAST_ZERO))
      err = ex_write_zeroes(ex, r->off, r->len, zero);
    break;
  case NBD_CMD_BLOCK_STATUS:
    err = ex_extents(ex, r);
    break;
  default:
    assert(!"tx_validate let it pass");
  }
  ex_leave(ex);
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
  TX_KEEP = 1 << 20,             /* buffer for those, kept while connected */
  TX_BATCH = 128,                /* requests in a batch */
  TX_HEAD = WIRE_CHUNK + 6 + 80, /* longest reply without its data */
  TX_MAX_DEFERRED = 1024,        /* requests waiting for a worker */
  TX_MAX_LOGGED = 10             /* failures of one client in the log */
};

STATIC_ASSERT(option_fits, NBDSERVE_MAX_OPTION <= TX_RBUF);
STATIC_ASSERT(small_fits_in, TX_SMALL + WIRE_REQUEST <= TX_RBUF);
STATIC_ASSERT(small_fits_out, TX_SMALL + 2 * TX_HEAD <= TX_WBUF);
STATIC_ASSERT(status_fits_out, EX_EXTENT_HEAD + EX_EXTENTS + 16 <= TX_WBUF);

/* One client. */
struct conn {
  /* fixed */
  struct nbdserve *s;
  struct conn *next, *next_accepted; /* guarded by s->lock */
  struct io io;
  int fd; /* to close; -1: the caller's */
  unsigned id;
  char peer[64];

  /* set by the handshake, then fixed */
  int no_zeroes, structured;
  char *meta_name; /* export of the last SET_META_CONTEXT that selected */
  int meta;        /* base:allocation may be asked for */
  int64_t deadline;
  struct ex *ex;
  uint64_t size;
  uint16_t tflags;
  size_t read_head; /* bytes in front of the data of a READ */
  unsigned max_workers, max_deferred;

  /* the client's thread only */
  unsigned char *rbuf, *wbuf, *big;
  size_t rpos, rend; /* received and not yet looked at */
  size_t wlen;
  struct nbdserve_req reqs[TX_BATCH];
  size_t nreqs, last_nreqs;
  int big_write; /* the last request was one: expect another */

  struct os_mutex sending; /* guards out and: */
  int broken;              /* a send failed: nothing more goes out */

  struct os_mutex lock; /* guards the rest */
  struct os_cond work;  /* something is in the queues, or closing */
  struct os_cond room;  /* something left them, or a worker has gone */
  struct nbdserve_req *queue, **queue_end; /* one worker each */
  struct nbdserve_req *flushes;            /* one worker for all of them */
  int flusher;                             /* which is at it */
  unsigned nqueue, ndeferred, nworkers, nidle;
  int closing; /* the client has gone: workers finish and end */
  int stop;    /* nbdserve_stop: no further requests are taken */
  unsigned nlogged;
  struct nbdserve_stats stats;
};

enum { HS_MORE, HS_ENTER, HS_END }; /* what follows an option; or -errno */

/* Sends the replies that have gathered. */
static int hs_send(struct conn *c) {
  struct iovec v;
  v.iov_base = c->wbuf;
  v.iov_len = c->wlen;
  c->wlen = 0;
  return v.iov_len ? io_send(&c->io, &v, 1, c->deadline) : 0;
}

/* Room for len more bytes to send, or NULL when the client is gone. */
static unsigned char *hs_room(struct conn *c, size_t len) {
  unsigned char *p;
  assert(len <= TX_WBUF);
  if (c->wlen + len > TX_WBUF && hs_send(c))
    return NULL;
  p = c->wbuf + c->wlen;
  c->wlen += len;
  return p;
}

/* A reply with len bytes of data, which the caller fills in; NULL when the
 * client is gone. */
static unsigned char *hs_reply(struct conn *c, uint32_t opt, uint32_t type,
                               size_t len) {
  unsigned char *p = hs_room(c, WIRE_REP + len);
  if (!p)
    return NULL;
  put64(p, NBD_REP_MAGIC);
  put32(p + 8, opt);
  put32(p + 12, type);
  put32(p + 16, (uint32_t)len);
  return p + WIRE_REP;
}

static int hs_ack(struct conn *c, uint32_t opt) {
  return hs_reply(c, opt, NBD_REP_ACK, 0) ? HS_MORE : -EPIPE;
}

/* An error reply with a message for humans; haggling goes on. */
static int hs_fail(struct conn *c, uint32_t opt, uint32_t type,
                   const char *why) {
  size_t n = strlen(why);
  unsigned char *p = hs_reply(c, opt, type, n);
  if (!p)
    return -EPIPE;
  memcpy(p, why, n);
  u_log(&c->s->config, NBDSERVE_LOG_INFO, "client %u: option %u refused: %s",
        c->id, (unsigned)opt, why);
  return HS_MORE;
}

/* Copies a string of n bytes from the client to out[WIRE_STRING + 1].  0, or
 * the error reply that it deserves. */
static uint32_t hs_string(const unsigned char *p, size_t n, char *out) {
  if (n > WIRE_STRING)
    return NBD_REP_ERR_TOO_BIG;
  memcpy(out, p, n);
  out[n] = 0;
  return memchr(out, 0, n) ? NBD_REP_ERR_INVALID : 0;
}

/* Takes a string with its 32-bit length off the data at *p, as hs_string. */
static uint32_t hs_take_string(const unsigned char **p, size_t *len,
                               char *out) {
  const unsigned char *s = *p;
  uint32_t n;
  if (*len < 4)
    return NBD_REP_ERR_INVALID;
  n = get32(s);
  if (n > *len - 4)
    return NBD_REP_ERR_INVALID;
  *p += 4 + n;
  *len -= 4 + n;
  return hs_string(s + 4, n, out);
}

/* The export is settled: what transmission needs to know of it. */
static void hs_settle(struct conn *c, struct ex *ex, const char *name) {
  const struct nbdserve_ops *ops = ex->e.ops;
  unsigned threads = c->s->config.threads;

  assert(!c->ex);
  c->ex = ex;
  c->size = ex_size(ex);
  c->tflags = ex_flags(ex, c->structured);
  c->meta = c->structured && c->meta_name && strcmp(c->meta_name, name) == 0;
  c->read_head = c->structured ? WIRE_CHUNK + 8 : WIRE_SIMPLE;
  c->max_workers = threads > 1 ? threads : 0;
  c->max_deferred = ops->batch ? TX_MAX_DEFERRED : threads;
  u_log(&c->s->config, NBDSERVE_LOG_INFO,
        "client %u: export '%s', %" PRIu64 " bytes%s", c->id, name, c->size,
        c->tflags & NBD_FLAG_READ_ONLY ? ", read-only" : "");
}

static int hs_opt_export_name(struct conn *c, uint32_t opt,
                              const unsigned char *data, size_t len) {
  char name[WIRE_STRING + 1];
  unsigned char *p;
  struct ex *ex;
  size_t n = 10 + (c->no_zeroes ? 0 : 124);

  (void)opt;
  if (hs_string(data, len, name) || ex_get(c->s, name, &ex)) {
    u_log(&c->s->config, NBDSERVE_LOG_INFO,
          "client %u: no such export; closed", c->id);
    return -ENOENT; /* this option knows no error reply */
  }
  hs_settle(c, ex, name);
  p = hs_room(c, n);
  if (!p)
    return -EPIPE;
  memset(p, 0, n);
  put64(p, c->size);
  put16(p + 8, c->tflags);
  return HS_ENTER;
}

static int hs_opt_abort(struct conn *c, uint32_t opt,
                        const unsigned char *data, size_t len) {
  (void)data;
  (void)len;
  hs_ack(c, opt);
  return HS_END;
}

/* One export of LIST; the host's list callback calls it too. */
static int hs_emit(void *arg, const char *name, const char *description) {
  struct conn *c = arg;
  size_t n = name ? strlen(name) : 0;
  size_t d = description ? strlen(description) : 0;
  unsigned char *p;
  if (n > WIRE_STRING || d > WIRE_STRING)
    return 0; /* such a name cannot be asked for: see ex_new */
  p = hs_reply(c, NBD_OPT_LIST, NBD_REP_SERVER, 4 + n + d);
  if (!p)
    return -EPIPE;
  put32(p, (uint32_t)n);
  if (n)
    memcpy(p + 4, name, n);
  if (d)
    memcpy(p + 4 + n, description, d);
  return 0;
}

static int hs_opt_list(struct conn *c, uint32_t opt, const unsigned char *data,
                       size_t len) {
  struct nbdserve *s = c->s;
  struct ex *ex;
  int err = 0;

  (void)data;
  (void)len;
  os_lock(&s->lock);
  ex = s->exports;
  os_unlock(&s->lock);
  while (ex && !err) { /* (E1): the list only grows at its end */
    err = hs_emit(c, ex->e.name, ex->e.description);
    os_lock(&s->lock);
    ex = ex->next;
    os_unlock(&s->lock);
  }
  if (!err && s->config.list)
    err = s->config.list(s->config.ctx, hs_emit, c);
  return err ? -EPIPE : hs_ack(c, opt);
}

/* One information about an export; text for those that are one. */
static int hs_info(struct conn *c, uint32_t opt, struct ex *ex, unsigned type,
                   const char *text) {
  size_t n = type == NBD_INFO_EXPORT       ? 10
             : type == NBD_INFO_BLOCK_SIZE ? 12
                                           : strlen(text);
  unsigned char *p = hs_reply(c, opt, NBD_REP_INFO, 2 + n);
  if (!p)
    return -EPIPE;
  put16(p, (uint16_t)type);
  if (type == NBD_INFO_EXPORT) {
    put64(p + 2, ex_size(ex));
    put16(p + 10, ex_flags(ex, c->structured));
  } else if (type == NBD_INFO_BLOCK_SIZE) {
    put32(p + 2, ex->e.min_block);
    put32(p + 6, ex->e.preferred_block);
    put32(p + 10, ex->e.max_request);
  } else {
    memcpy(p + 2, text, n);
  }
  return 0;
}

/* Are these the block sizes a client expects that was told none? */
static int hs_default_blocks(const struct ex *ex) {
  return ex->e.min_block == 1 && ex->e.preferred_block == 4096 &&
         ex->e.max_request == 32u << 20;
}

/* INFO and GO differ only in what comes afterwards. */
static int hs_opt_go(struct conn *c, uint32_t opt, const unsigned char *data,
                     size_t len) {
  char name[WIRE_STRING + 1];
  unsigned wants = 0, i;
  struct ex *ex;
  uint32_t bad = hs_take_string(&data, &len, name);
  int err;

  if (!bad && (len < 2 || len != 2 + 2 * (size_t)get16(data)))
    bad = NBD_REP_ERR_INVALID;
  if (bad)
    return hs_fail(c, opt, bad, "malformed request for information");
  for (i = 2; i < len; i += 2)
    if (get16(data + i) <= NBD_INFO_BLOCK_SIZE)
      wants |= 1u << get16(data + i);
  err = ex_get(c->s, name, &ex);
  if (err)
    return hs_fail(c, opt, NBD_REP_ERR_UNKNOWN,
                   err == -ENOENT ? "no such export" : u_error(err));
  err = hs_info(c, opt, ex, NBD_INFO_EXPORT, NULL);
  if (!err && (wants & 1 << NBD_INFO_NAME))
    err = hs_info(c, opt, ex, NBD_INFO_NAME, ex->e.name);
  if (!err && (wants & 1 << NBD_INFO_DESCRIPTION) && *ex->e.description)
    err = hs_info(c, opt, ex, NBD_INFO_DESCRIPTION, ex->e.description);
  if (!err && ((wants & 1 << NBD_INFO_BLOCK_SIZE) || !hs_default_blocks(ex)))
    err = hs_info(c, opt, ex, NBD_INFO_BLOCK_SIZE, NULL);
  if (!err && ex->e.min_block > 1 && !(wants & 1 << NBD_INFO_BLOCK_SIZE))
    err = hs_fail(c, opt, NBD_REP_ERR_BLOCK_SIZE_REQD,
                  "this export has a minimum block size: ask for it");
  else if (!err)
    err = hs_ack(c, opt) ? -EPIPE : HS_ENTER;
  if (err == HS_ENTER && opt == NBD_OPT_GO) {
    hs_settle(c, ex, name);
  } else {
    ex_put(ex);
    if (err == HS_ENTER)
      err = HS_MORE;
  }
  return err;
}

static int hs_opt_structured_reply(struct conn *c, uint32_t opt,
                                   const unsigned char *data, size_t len) {
  (void)data;
  (void)len;
  c->structured = 1;
  return hs_ack(c, opt);
}

/* LIST and SET differ in what a query means and in what is remembered. */
static int hs_opt_meta_context(struct conn *c, uint32_t opt,
                               const unsigned char *data, size_t len) {
  static const char context[] = "base:allocation";
  char name[WIRE_STRING + 1], query[WIRE_STRING + 1];
  int set = opt == NBD_OPT_SET_META_CONTEXT, found;
  uint32_t bad, n = 0, i;
  unsigned char *p;
  struct ex *ex;

  if (!c->structured)
    return hs_fail(c, opt, NBD_REP_ERR_INVALID,
                   "structured replies come first");
  bad = hs_take_string(&data, &len, name);
  if (!bad && len < 4)
    bad = NBD_REP_ERR_INVALID;
  if (!bad) {
    n = get32(data);
    data += 4;
    len -= 4;
  }
  found = !set && n == 0;
  for (i = 0; i < n && !bad; i++) {
    bad = hs_take_string(&data, &len, query);
    if (!bad && (strcmp(query, context) == 0 ||
                 (!set && strcmp(query, "base:") == 0)))
      found = 1;
  }
  if (!bad && len > 0)
    bad = NBD_REP_ERR_INVALID;
  if (bad)
    return hs_fail(c, opt, bad, "malformed query for metadata contexts");
  if (ex_get(c->s, name, &ex))
    return hs_fail(c, opt, NBD_REP_ERR_UNKNOWN, "no such export");
  ex_put(ex);
  if (found) {
    p = hs_reply(c, opt, NBD_REP_META_CONTEXT, 4 + sizeof context - 1);
    if (!p)
      return -EPIPE;
    put32(p, set ? 1 : 0); /* ids mean something in SET only */
    memcpy(p + 4, context, sizeof context - 1);
    if (set) {
      c->meta_name = u_copy(name);
      if (!c->meta_name)
        return -ENOMEM;
    }
  }
  return hs_ack(c, opt);
}

static const struct hs_option {
  uint32_t opt;
  uint32_t max; /* bytes of data it may have */
  int (*handler)(struct conn *c, uint32_t opt, const unsigned char *data,
                 size_t len);
} hs_options[] = {
    {NBD_OPT_EXPORT_NAME, NBDSERVE_MAX_OPTION, hs_opt_export_name},
    {NBD_OPT_ABORT, NBDSERVE_MAX_OPTION, hs_opt_abort},
    {NBD_OPT_LIST, 0, hs_opt_list},
    {NBD_OPT_INFO, NBDSERVE_MAX_OPTION, hs_opt_go},
    {NBD_OPT_GO, NBDSERVE_MAX_OPTION, hs_opt_go},
    {NBD_OPT_STRUCTURED_REPLY, 0, hs_opt_structured_reply},
    {NBD_OPT_LIST_META_CONTEXT, NBDSERVE_MAX_OPTION, hs_opt_meta_context},
    {NBD_OPT_SET_META_CONTEXT, NBDSERVE_MAX_OPTION, hs_opt_meta_context}};

/* Takes one option and answers it.  HS_*, or -errno to close. */
static int hs_option(struct conn *c) {
  const struct hs_option *o = NULL;
  unsigned char head[WIRE_OPTION];
  uint32_t opt, len;
  size_t i;
  int err = io_recv_all(&c->io, head, sizeof head, c->deadline);

  if (err)
    return err;
  if (get64(head) != NBD_OPTION_MAGIC) {
    u_log(&c->s->config, NBDSERVE_LOG_INFO,
          "client %u: option magic 0x%016" PRIx64 ", expected IHAVEOPT; closed",
          c->id, get64(head));
    return -EPROTO;
  }
  opt = get32(head + 8);
  len = get32(head + 12);
  for (i = 0; i < sizeof hs_options / sizeof *hs_options; i++)
    if (hs_options[i].opt == opt)
      o = &hs_options[i];
  if (len > NBDSERVE_MAX_OPTION) /* (H2) */
    err = opt == NBD_OPT_EXPORT_NAME
              ? -ENOENT
              : io_skip(&c->io, len, c->rbuf, TX_RBUF, c->deadline);
  else
    err = io_recv_all(&c->io, c->rbuf, len, c->deadline); /* (H1) */
  if (err)
    return err;
  if (opt == NBD_OPT_SET_META_CONTEXT) { /* replaced, also when it fails */
    NBDSERVE_FREE(c->meta_name);
    c->meta_name = NULL;
  }
  if (!o)
    return hs_fail(c, opt, NBD_REP_ERR_UNSUP, "unknown option");
  if (opt == NBD_OPT_ABORT)
    return hs_opt_abort(c, opt, NULL, 0);
  if (len > NBDSERVE_MAX_OPTION)
    return hs_fail(c, opt, NBD_REP_ERR_TOO_BIG, "too much data");
  if (len > o->max)
    return hs_fail(c, opt, NBD_REP_ERR_INVALID, "data where none belongs");
  return o->handler(c, opt, c->rbuf, len);
}

/* The handshake: HS_ENTER, HS_END when the client has left in order, or
 * -errno. */
static int hs_run(struct conn *c) {
  unsigned char hello[18], flags[4];
  int r, err;

  c->deadline = os_now_ms() + c->s->config.handshake_ms; /* (H3) */
  put64(hello, NBD_INIT_MAGIC);
  put64(hello + 8, NBD_OPTION_MAGIC);
  put16(hello + 16, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
  memcpy(hs_room(c, sizeof hello), hello, sizeof hello);
  err = hs_send(c);
  if (!err)
    err = io_recv_all(&c->io, flags, sizeof flags, c->deadline);
  if (err)
    return err;
  if (get32(flags) & ~(unsigned)(NBD_FLAG_C_FIXED_NEWSTYLE |
                                 NBD_FLAG_C_NO_ZEROES)) {
    u_log(&c->s->config, NBDSERVE_LOG_INFO,
          "client %u: unknown client flags 0x%08x; closed", c->id,
          (unsigned)get32(flags));
    return -EPROTO;
  }
  c->no_zeroes = (get32(flags) & NBD_FLAG_C_NO_ZEROES) != 0;
  do {
    r = hs_option(c);
    err = hs_send(c);
  } while (r == HS_MORE && !err);
  return r > 0 && err ? err : r ? r : err;
}

/* ==== [9] TRANSMISSION (tx_) =============================================
 * Requests in, replies out.
 *
 *   recv ─> tx_take: parse, tx_validate ─┬─> batch ─> tx_exec ─> one send
 *                                        ├─> tx_big: one by one
 *                                        └─> tx_defer ─> tx_worker ─> send
 *
 * (T1) Every request gets exactly one reply, DISC none.  The order is free.
 * (T2) A batch is what one recv brought.  READs get their place in the send
 *      buffer before they are done, each with room for its head in front, so
 *      data is never copied; the other replies follow behind them.
 * (T3) A batch's writes are done before its flushes start: a flush covers all
 *      that was answered before it arrived, and more.
 * (T4) Workers do what may take long: flushes, trims and the like, and all
 *      that a host's own backend does.  A client that has one request at a
 *      time waits for it anyway: then the client's thread does it.
 * (T5) Memory is bounded: a client has its fixed buffers and max_deferred
 *      requests; requests above TX_KEEP, and those of workers above TX_SMALL,
 *      come out of config.memory and wait for it.
 * (T6) Whoever holds memory of that budget while the client sends or receives
 *      has a deadline for it.
 */

/* Waits until len bytes fit into the budget; a request alone always does. */
static int tx_take_memory(struct conn *c, uint64_t len) {
  struct nbdserve *s = c->s;
  int err = 0;
  os_lock(&s->lock);
  while (s->memory > 0 && s->memory + len > s->config.memory && !s->stopping)
    os_wait(&s->gone, &s->lock);
  if (s->stopping && s->memory + len > s->config.memory && s->memory > 0)
    err = -ESHUTDOWN;
  else
    s->memory += len;
  os_unlock(&s->lock);
  return err;
}

/* Frees a request's buffer, if it has one of its own. */
static void tx_free_buf(struct conn *c, struct nbdserve_req *r) {
  if (!r->buflen)
    return;
  NBDSERVE_FREE(r->buf);
  if (r->buflen > TX_SMALL + EX_EXTENT_HEAD) {
    os_lock(&c->s->lock);
    assert(c->s->memory >= r->buflen);
    c->s->memory -= r->buflen;
    os_wake_all(&c->s->gone);
    os_unlock(&c->s->lock);
  }
  r->buf = NULL;
  r->buflen = 0;
}

STATIC_ASSERT(status_is_small, EX_EXTENTS <= TX_SMALL);

/* Gives a request a buffer of its own of len bytes. */
static int tx_new_buf(struct conn *c, struct nbdserve_req *r) {
  int err = 0;
  if (r->len > TX_SMALL + EX_EXTENT_HEAD)
    err = tx_take_memory(c, r->len);
  if (err)
    return err;
  r->buflen = (size_t)r->len;
  r->buf = NBDSERVE_MALLOC(r->buflen);
  if (!r->buf) {
    tx_free_buf(c, r);
    return -ENOMEM;
  }
  return 0;
}

/* Sends to the client, unless that has failed before. */
static int tx_send(struct conn *c, struct iovec *v, int n, int64_t deadline) {
  int err;
  os_lock(&c->sending);
  err = c->broken ? -EPIPE : io_send(&c->io, v, n, deadline);
  if (err && !c->broken) {
    c->broken = 1;
    if (c->io.out_is_socket)
      shutdown(c->io.out, SHUT_RDWR); /* the client's thread sees it so */
  }
  os_unlock(&c->sending);
  return err;
}

/* Counts and logs a request that is about to be answered.  Holds c->lock. */
static void tx_count(struct conn *c, const struct nbdserve_req *r) {
  const struct nbdserve_config *config = &c->s->config;
  const struct wire_cmd *cmd = wire_cmd(r->type);
  const char *name = cmd ? cmd->name : "unknown command";
  const char *why = r->why ? r->why : u_error(r->err);
  int level = r->err == 0 || r->err == -ENOTSUP ? NBDSERVE_LOG_TRACE
              : r->why                          ? NBDSERVE_LOG_INFO
                                                : NBDSERVE_LOG_WARNING;

  c->stats.requests++;
  c->stats.errors += r->err != 0;
  if (!r->err && r->type == NBD_CMD_READ)
    c->stats.bytes_read += r->len;
  if (!r->err && r->type == NBD_CMD_WRITE)
    c->stats.bytes_written += r->len;
  if (level > config->log_level)
    return;
  if (level < NBDSERVE_LOG_TRACE && ++c->nlogged > TX_MAX_LOGGED) {
    if (c->nlogged == TX_MAX_LOGGED + 1)
      u_log(config, level, "client %u: further failures are not logged", c->id);
    return;
  }
  u_log(config, level,
        "client %u: %s (%u) flags=0x%x off=%" PRIu64 " len=%" PRIu64 ": %s",
        c->id, name, r->type, r->flags, r->off, r->len, r->err ? why : "ok");
}

/* Writes all of r's reply but the data of a READ to p[TX_HEAD]; what a
 * BLOCK_STATUS found stays behind its head in r->buf.  The bytes written. */
static size_t tx_put_head(const struct conn *c, const struct nbdserve_req *r,
                          unsigned char *p) {
  const char *why = r->why ? r->why : u_error(r->err);
  uint32_t err = wire_error(r->err);
  size_t n;

  if (err == NBD_ENOTSUP && !(r->flags & NBD_CMD_FLAG_FAST_ZERO))
    err = NBD_EINVAL; /* proto.md: only an answer to FAST_ZERO */
  if (err && c->structured) {
    n = strlen(why);
    assert(WIRE_CHUNK + 6 + n <= TX_HEAD);
    wire_put_chunk(p, NBD_REPLY_TYPE_ERROR, r->cookie, (uint32_t)(6 + n));
    put32(p + WIRE_CHUNK, err);
    put16(p + WIRE_CHUNK + 4, (uint16_t)n);
    memcpy(p + WIRE_CHUNK + 6, why, n);
    return WIRE_CHUNK + 6 + n;
  }
  if (!err && c->structured && r->type == NBD_CMD_READ) {
    if (!r->len)
      return wire_put_chunk(p, NBD_REPLY_TYPE_NONE, r->cookie, 0);
    put64(p + WIRE_CHUNK, r->off);
    return wire_put_chunk(p, NBD_REPLY_TYPE_OFFSET_DATA, r->cookie,
                          (uint32_t)(8 + r->len)) + 8;
  }
  if (!err && r->type == NBD_CMD_BLOCK_STATUS) {
    assert(r->buflen > EX_EXTENT_HEAD);
    put32(p + WIRE_CHUNK, 1); /* the id of base:allocation */
    return wire_put_chunk(p, NBD_REPLY_TYPE_BLOCK_STATUS, r->cookie,
                          (uint32_t)(r->buflen - WIRE_CHUNK)) + 4;
  }
  return wire_put_simple(p, r->cookie, err);
}

/* Answers the requests of a list, in as few sends as possible, and frees what
 * they own. */
static int tx_answer(struct conn *c, struct nbdserve_req *list,
                     int64_t deadline) {
  unsigned char heads[16 * TX_HEAD];
  struct nbdserve_req *r;
  struct iovec v[2];
  size_t n = 0;
  int err = 0;

  os_lock(&c->lock);
  for (r = list; r; r = r->next)
    tx_count(c, r);
  os_unlock(&c->lock);
  for (r = list; r; r = r->next) {
    int status = r->type == NBD_CMD_BLOCK_STATUS && !r->err;
    int data = (r->type == NBD_CMD_READ && !r->err && r->len > 0) || status;
    n += tx_put_head(c, r, heads + n);
    if (data || !r->next || n + TX_HEAD > sizeof heads) {
      v[0].iov_base = heads;
      v[0].iov_len = n;
      v[1].iov_base = status ? r->buf + EX_EXTENT_HEAD : r->buf;
      v[1].iov_len = status ? r->buflen - EX_EXTENT_HEAD : (size_t)r->len;
      n = 0;
      if (!err)
        err = tx_send(c, v, data ? 2 : 1, deadline);
    }
  }
  for (r = list; r; r = r->next)
    tx_free_buf(c, r);
  return err;
}

/* When a request of len bytes must be in, and its answer out (T6): half a
 * minute, and as long as 16 KiB a second take. */
static int64_t tx_deadline(uint64_t len) {
  return os_now_ms() + 30000 + (int64_t)(len / 16);
}

/* Is only a flush left to do for r? */
static int tx_is_flush(const struct nbdserve_req *r) {
  return r->type == NBD_CMD_FLUSH || r->written;
}

/* Does what a worker took: one request, or any number that want a flush. */
static void tx_work(struct conn *c, struct nbdserve_req *list) {
  struct nbdserve_req *r;
  int err, is_big = list->buflen > TX_SMALL;

  if (tx_is_flush(list)) {
    err = ex_flush(c->ex);
    for (r = list; r; r = r->next)
      r->err = err;
  } else {
    assert(!list->next);
    list->err = ex_do(c->ex, list);
    if (!list->err && ex_wants_flush(c->ex, list))
      list->err = ex_flush(c->ex);
  }
  tx_answer(c, list, is_big ? tx_deadline(list->len) : 0);
  while (list) {
    r = list;
    list = r->next;
    NBDSERVE_FREE(r);
  }
}

/* A worker of a client: takes from the queues until the client has gone. */
static void *tx_worker(void *arg) {
  struct conn *c = arg;
  struct nbdserve_req *list, *r;
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
      if (!c->queue)
        c->queue_end = &c->queue;
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
    for (n = 0, r = list; r; r = r->next)
      n++;
    tx_work(c, list);
    os_lock(&c->lock);
    if (flush)
      c->flusher = 0;
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
  struct nbdserve_req *q;
  unsigned waiting;

  if (!c->max_workers)
    return 0;
  q = NBDSERVE_MALLOC(sizeof *q);
  if (!q)
    return 0;
  *q = *r;
  q->next = NULL;
  os_lock(&c->lock);
  while (c->ndeferred >= c->max_deferred)
    os_wait(&c->room, &c->lock);
  waiting = c->nqueue + (c->flushes && !c->flusher) +
            !(tx_is_flush(q) && (c->flushes || c->flusher));
  if (waiting > c->nidle && c->nworkers < c->max_workers) {
    if (os_thread(tx_worker, c) == 0) {
      c->nworkers++;
    } else if (!c->nworkers) {
      os_unlock(&c->lock);
      NBDSERVE_FREE(q);
      return 0;
    }
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
  unsigned allowed = c->tflags & NBD_FLAG_SEND_FUA ? NBD_CMD_FLAG_FUA : 0;
  int is_status = r->type == NBD_CMD_BLOCK_STATUS;

  r->err = -EINVAL;
  r->why = NULL;
  if (!cmd) {
    r->why = "unknown command";
    return;
  }
  allowed |= cmd->flags;
  if (!(c->tflags & NBD_FLAG_SEND_DF))
    allowed &= ~(unsigned)NBD_CMD_FLAG_DF;
  if (cmd->writes && (c->tflags & NBD_FLAG_READ_ONLY)) {
    r->err = -EPERM;
    r->why = "the export is read-only";
  } else if (is_status && !c->meta) {
    r->why = "no metadata context was negotiated";
  } else if ((c->tflags & cmd->needs) != cmd->needs) {
    r->why = "the export does not offer this command";
  } else if (r->flags & ~allowed) {
    r->why = "a flag that does not apply";
  } else if (cmd->beyond &&
             (r->off > c->size || r->len > c->size - r->off)) {
    r->err = -cmd->beyond;
    r->why = "beyond the end of the export";
  } else if (cmd->beyond && ((r->off | r->len) & (c->ex->e.min_block - 1))) {
    r->why = "not a multiple of the minimum block size";
  } else if (r->type <= NBD_CMD_WRITE && r->len > c->ex->e.max_request) {
    r->why = "longer than the maximum payload size";
  } else if (is_status && !r->len) {
    r->why = "nothing to report on";
  } else {
    r->err = 0;
  }
}

/* Does the batch's requests, but not the flushes after them.  alone: see
 * (T4). */
static void tx_do(struct conn *c, struct nbdserve_req *r, size_t n, int alone) {
  void (*batch)(void *, struct nbdserve_req *, size_t) = c->ex->e.ops->batch;
  size_t i, j;

  for (i = 0; i < n; i = j) {
    j = i + 1;
    if (r[i].err || !r[i].len || r[i].type == NBD_CMD_FLUSH)
      continue;
    if (batch && r[i].type <= NBD_CMD_WRITE) {
      while (j < n && !r[j].err && r[j].len && r[j].type <= NBD_CMD_WRITE)
        j++;
      batch(c->ex->e.ctx, r + i, j - i);
    } else if (alone || r[i].type <= NBD_CMD_WRITE || !tx_defer(c, r + i)) {
      r[i].err = ex_do(c->ex, r + i);
    } else {
      r[i].deferred = 1;
    }
  }
  for (i = 0; i < n; i++) { /* (T3) */
    if (r[i].err || r[i].deferred)
      continue;
    r[i].written = r[i].len && ex_wants_flush(c->ex, r + i);
    if (!tx_is_flush(r + i))
      continue;
    if (alone || !tx_defer(c, r + i))
      r[i].err = ex_flush(c->ex);
    else
      r[i].deferred = 1;
  }
}

/* Takes failed READs out of the send buffer and completes the others (T2). */
static void tx_settle_reads(struct conn *c, struct nbdserve_req *r, size_t n) {
  size_t i, gap = 0, head = c->read_head;
  for (i = 0; i < n; i++) {
    if (r[i].type != NBD_CMD_READ || !r[i].buf)
      continue;
    if (r[i].err) {
      gap += head + (size_t)r[i].len;
      continue;
    }
    if (gap)
      memmove(r[i].buf - gap, r[i].buf, (size_t)r[i].len);
    tx_put_head(c, r + i, r[i].buf - gap - head);
  }
  assert(gap <= c->wlen);
  c->wlen -= gap;
}

/* Sends what is in the send buffer. */
static int tx_send_buffer(struct conn *c) {
  struct iovec v;
  v.iov_base = c->wbuf;
  v.iov_len = c->wlen;
  c->wlen = 0;
  return v.iov_len ? tx_send(c, &v, 1, 0) : 0;
}

/* Does the batch and answers it.  0, or -errno to close. */
static int tx_exec(struct conn *c) {
  struct nbdserve_req *r = c->reqs;
  size_t n = c->nreqs, i, len;
  int err = 0;

  if (!n)
    return 0;
  tx_do(c, r, n, n == 1 && c->last_nreqs == 1 && c->ex->e.ops->batch);
  c->last_nreqs = n;
  c->nreqs = 0;
  tx_settle_reads(c, r, n);
  os_lock(&c->lock);
  for (i = 0; i < n; i++)
    if (!r[i].deferred)
      tx_count(c, r + i);
  os_unlock(&c->lock);
  for (i = 0; i < n; i++) {
    if (r[i].deferred || (r[i].type == NBD_CMD_READ && r[i].buf && !r[i].err))
      continue;
    len = r[i].type == NBD_CMD_BLOCK_STATUS ? r[i].buflen : 0;
    if (c->wlen + len + TX_HEAD > TX_WBUF && tx_send_buffer(c))
      err = -EPIPE;
    c->wlen += tx_put_head(c, r + i, c->wbuf + c->wlen);
    if (len) {
      memcpy(c->wbuf + c->wlen, r[i].buf + EX_EXTENT_HEAD,
             len - EX_EXTENT_HEAD);
      c->wlen += len - EX_EXTENT_HEAD;
      tx_free_buf(c, r + i);
    }
  }
  if (tx_send_buffer(c))
    err = -EPIPE;
  return err;
}

/* Puts a request into the batch, which is done first if it is full. */
static int tx_add(struct conn *c, const struct nbdserve_req *r) {
  size_t slot = r->type == NBD_CMD_READ && !r->err && r->len
                    ? c->read_head + (size_t)r->len
                    : 0;
  size_t room = slot + (c->nreqs + 1) * TX_HEAD;
  struct nbdserve_req *q;
  int err;

  assert(r->err || r->len <= TX_SMALL || r->type > NBD_CMD_WRITE);
  if (c->nreqs == TX_BATCH || c->wlen + room > TX_WBUF) {
    err = tx_exec(c);
    if (err)
      return err;
  }
  q = &c->reqs[c->nreqs++];
  *q = *r;
  if (slot) {
    q->buf = c->wbuf + c->wlen + c->read_head;
    c->wlen += slot;
  }
  assert(c->wlen <= TX_WBUF);
  return 0;
}

/* Copies len bytes of payload out of what has been received; the rest comes
 * straight from the socket. */
static int tx_payload(struct conn *c, unsigned char *buf, size_t len,
                      int64_t deadline) {
  size_t part = (size_t)u_min(len, c->rend - c->rpos);
  memcpy(buf, c->rbuf + c->rpos, part);
  c->rpos += part;
  return part == len
             ? 0
             : io_recv_all(&c->io, buf + part, len - part, deadline);
}

/* A READ or WRITE that has a buffer of its own: a long one, or one for a
 * worker.  The batch before it has been done. */
static int tx_big(struct conn *c, struct nbdserve_req *r, int defer) {
  int keep = !defer && r->len <= TX_KEEP, err;
  int64_t deadline = r->len > TX_SMALL ? tx_deadline(r->len) : 0;

  c->last_nreqs = 0;
  if (keep) {
    if (!c->big)
      c->big = NBDSERVE_MALLOC(TX_KEEP);
    r->buf = c->big;
    r->err = r->buf ? 0 : -ENOMEM;
  } else {
    r->err = tx_new_buf(c, r);
  }
  if (r->type == NBD_CMD_WRITE) {
    if (r->err) /* without memory there is nothing to carry on with */
      return r->err;
    err = tx_payload(c, r->buf, (size_t)r->len, deadline);
    if (err) {
      tx_free_buf(c, r);
      return err;
    }
    c->big_write = r->len > TX_SMALL;
  }
  if (!r->err && defer && tx_defer(c, r))
    return 0;
  if (!r->err)
    r->err = ex_do(c->ex, r);
  if (!r->err && ex_wants_flush(c->ex, r)) {
    tx_free_buf(c, r);
    r->written = 1;
    if (tx_defer(c, r))
      return 0;
    r->err = ex_flush(c->ex);
  }
  return tx_answer(c, r, deadline);
}

/* Throws the payload of a refused WRITE away. */
static int tx_skip_payload(struct conn *c, uint64_t len) {
  size_t part = (size_t)u_min(len, c->rend - c->rpos);
  int err;
  c->rpos += part;
  if (len == part)
    return 0;
  err = tx_exec(c);
  c->rpos = c->rend = 0;
  return err ? err
             : io_skip(&c->io, len - part, c->rbuf, TX_RBUF,
                       tx_deadline(len - part));
}

enum { TX_MORE, TX_DISC, TX_NEXT };

/* Takes the next request out of the receive buffer.  TX_NEXT, TX_MORE when it
 * is not all there yet, TX_DISC, or -errno to close. */
static int tx_take(struct conn *c) {
  const unsigned char *p = c->rbuf + c->rpos;
  struct nbdserve_req r;
  int err = 0, defer;
  uint64_t payload;

  if (c->rend - c->rpos < WIRE_REQUEST)
    return TX_MORE;
  if (get32(p) != NBD_REQUEST_MAGIC) {
    err = tx_exec(c);
    u_log(&c->s->config, NBDSERVE_LOG_INFO,
          "client %u: request magic 0x%08x, expected 0x%08x; closed", c->id,
          (unsigned)get32(p), (unsigned)NBD_REQUEST_MAGIC);
    return err ? err : -EPROTO;
  }
  memset(&r, 0, sizeof r);
  r.flags = get16(p + 4);
  r.type = get16(p + 6);
  r.cookie = get64(p + 8);
  r.off = get64(p + 16);
  r.len = get32(p + 24);
  if (r.type == NBD_CMD_DISC)
    return TX_DISC;
  if (r.type == NBD_CMD_FLUSH)
    r.off = r.len = 0; /* reserved */
  payload = r.type == NBD_CMD_WRITE ? r.len : 0;
  if (payload > NBDSERVE_MAX_REQUEST) {
    u_log(&c->s->config, NBDSERVE_LOG_INFO,
          "client %u: NBD_CMD_WRITE of %" PRIu64 " bytes; closed", c->id,
          payload);
    return -EPROTO;
  }
  tx_validate(c, &r);
  defer = !c->ex->e.ops->batch && c->max_workers && !r.err && r.len;
  if (!r.err && r.type <= NBD_CMD_WRITE && (r.len > TX_SMALL || defer)) {
    c->rpos += WIRE_REQUEST;
    err = tx_exec(c);
    if (!err)
      err = tx_big(c, &r, defer);
    return err ? err : TX_NEXT;
  }
  if (!r.err && c->rend - c->rpos < WIRE_REQUEST + payload)
    return TX_MORE;
  c->rpos += WIRE_REQUEST;
  if (r.err)
    err = tx_skip_payload(c, payload);
  else if (payload)
    r.buf = c->rbuf + c->rpos;
  if (!err && !r.err)
    c->rpos += (size_t)payload;
  if (!err)
    err = tx_add(c, &r);
  return err ? err : TX_NEXT;
}

/* Receives more behind what is there.  0, 1 at the end, or -errno. */
static int tx_fill(struct conn *c) {
  size_t left = c->rend - c->rpos, want;
  ssize_t n;
  int stop;

  os_lock(&c->lock);
  stop = c->stop;
  os_unlock(&c->lock);
  if (stop)
    return -ESHUTDOWN;
  if (c->rpos) {
    memmove(c->rbuf, c->rbuf + c->rpos, left);
    c->rpos = 0;
    c->rend = left;
  }
  want = TX_RBUF - left;
  if (c->big_write && want > 4096)
    want = 4096; /* so that little of the next payload need be copied */
  c->big_write = 0;
  n = io_recv(&c->io, c->rbuf + left, want, 0, 0);
  if (n <= 0)
    return n < 0 ? (int)n : left ? -EPIPE : 1;
  c->rend += (size_t)n;
  return 0;
}

/* Serves the client until it leaves.  0, or the reason as -errno. */
static int tx_run(struct conn *c) {
  int r, err;

  c->rpos = c->rend = 0;
  do {
    do
      r = tx_take(c);
    while (r == TX_NEXT);
    err = r < 0 ? r : tx_exec(c);
  } while (r == TX_MORE && !err && !(err = tx_fill(c)));
  os_lock(&c->lock);
  c->closing = 1;
  os_wake_all(&c->work);
  while (c->nworkers)
    os_wait(&c->room, &c->lock);
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

enum { FLAT_RUN = 64 }; /* neighbours joined into one call */

struct flat {
  int fd;          /* fixed */
  uint64_t offset; /* fixed: byte 0 of the export in the file */
  struct os_mutex lock; /* guards what follows */
  int failed;           /* (F1) */
  int no_punch, no_zero;
};

/* A flag of f, read or set to 1 under its lock. */
static int flat_get(struct flat *f, const int *flag) {
  int v;
  os_lock(&f->lock);
  v = *flag;
  os_unlock(&f->lock);
  return v;
}

static void flat_set(struct flat *f, int *flag) {
  os_lock(&f->lock);
  *flag = 1;
  os_unlock(&f->lock);
}

/* Does r[0..n), all READs or all WRITEs of neighbouring ranges, in one call. */
static int flat_transfer(struct flat *f, const struct nbdserve_req *r,
                         size_t n) {
  struct iovec v[FLAT_RUN];
  size_t i;
  assert(n > 0 && n <= FLAT_RUN);
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
  int failed = flat_get(f, &f->failed), err;
  size_t i, j, k;

  for (i = 0; i < n; i = j) {
    j = i + 1;
    while (j < n && j - i < FLAT_RUN && r[j].type == r[i].type &&
           r[j].off == r[j - 1].off + r[j - 1].len)
      j++;
    err = failed && r[i].type == NBD_CMD_WRITE ? -EIO
                                               : flat_transfer(f, r + i, j - i);
    for (k = i; k < j; k++) /* only those that fail by themselves have failed */
      r[k].err = err && j - i > 1 ? flat_transfer(f, r + k, 1) : err;
  }
}

/* One request through flat_batch. */
static int flat_one(void *ctx, uint16_t type, unsigned char *buf, uint64_t off,
                    uint64_t len) {
  struct nbdserve_req r;
  memset(&r, 0, sizeof r);
  r.type = type;
  r.buf = buf;
  r.off = off;
  r.len = len;
  flat_batch(ctx, &r, 1);
  return r.err;
}

static int flat_read(void *ctx, void *buf, uint64_t off, uint64_t len,
                     uint32_t flags) {
  (void)flags;
  return flat_one(ctx, NBD_CMD_READ, buf, off, len);
}

static int flat_write(void *ctx, const void *buf, uint64_t off, uint64_t len,
                      uint32_t flags) {
  assert(!(flags & NBDSERVE_FUA)); /* not NATIVE_FUA: a flush follows */
  (void)flags;
  return flat_one(ctx, NBD_CMD_WRITE, (unsigned char *)(uintptr_t)buf, off,
                  len);
}

static int flat_flush(void *ctx, uint32_t flags) {
  struct flat *f = ctx;
  int err = flat_get(f, &f->failed) ? -EIO : os_datasync(f->fd);
  (void)flags;
  if (err)
    flat_set(f, &f->failed); /* (F1) */
  return err;
}

static int flat_trim(void *ctx, uint64_t off, uint64_t len, uint32_t flags) {
  struct flat *f = ctx;
  int err;
  (void)flags;
  if (flat_get(f, &f->failed))
    return -EIO;
  if (flat_get(f, &f->no_punch))
    return 0; /* a trim may do nothing */
  err = os_punch(f->fd, f->offset + off, len);
  if (err != -EOPNOTSUPP)
    return err;
  flat_set(f, &f->no_punch); /* (F2) */
  return 0;
}

static int flat_zero(void *ctx, uint64_t off, uint64_t len, uint32_t flags) {
  struct flat *f = ctx;
  int err = -EOPNOTSUPP;

  off += f->offset;
  if (flat_get(f, &f->failed))
    return -EIO;
  if (!(flags & NBDSERVE_NO_HOLE) && !flat_get(f, &f->no_punch)) {
    err = os_punch(f->fd, off, len);
    if (err == -EOPNOTSUPP)
      flat_set(f, &f->no_punch); /* (F2) */
  }
  if (err == -EOPNOTSUPP && !flat_get(f, &f->no_zero)) {
    err = os_zero_range(f->fd, off, len);
    if (err == -EOPNOTSUPP)
      flat_set(f, &f->no_zero);
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

/* Opens the file, or makes it if it is missing and may be made; *size is what
 * it holds.  The descriptor or -errno. */
static int flat_open_file(const char *path, const struct nbdserve_flat *o,
                          uint64_t *size) {
  int readonly = (o->flags & NBDSERVE_READONLY) != 0, made = 0, err = 0;
  int flags = (readonly ? O_RDONLY : O_RDWR) | O_CLOEXEC | O_NOCTTY;
  struct stat st;
  off_t end;
  int fd = -1;

  if (strncmp(path, "mem:", 4) == 0) {
    path = u_size(path + 4, size);
    if (!path || *path)
      return -EINVAL;
    fd = os_nameless_file();
    if (fd >= 0 && ftruncate(fd, (off_t)*size) < 0)
      err = -errno;
  } else {
    if (o->create)
      fd = open(path, flags | O_CREAT | O_EXCL, 0666);
    made = fd >= 0;
    if (!made && (!o->create || errno == EEXIST))
      fd = open(path, flags | O_NONBLOCK); /* a FIFO must not hang us */
    if (fd < 0)
      return -errno;
    if (fstat(fd, &st) < 0)
      err = -errno;
    else if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode))
      err = S_ISDIR(st.st_mode) ? -EISDIR : -EINVAL;
    else
      err = os_claim(fd, readonly);
    if (!err && made) { /* lasting before a client can rely on it */
      if (ftruncate(fd, (off_t)o->create) < 0 || fsync(fd) < 0)
        err = -errno;
      else
        err = os_sync_dir(path);
      if (err)
        unlink(path);
    }
    end = err ? 0 : lseek(fd, 0, SEEK_END);
    if (end < 0)
      err = -errno;
    *size = (uint64_t)end;
  }
  if (err) {
    if (fd >= 0)
      close(fd);
    return err;
  }
  return fd;
}

NBDSERVE_API int nbdserve_flat_open(const char *path,
                                    const struct nbdserve_flat *options,
                                    struct nbdserve_export *out) {
  struct nbdserve_flat o;
  struct flat *f;
  uint64_t size = 0;
  int fd;

  memset(&o, 0, sizeof o);
  if (options)
    o = *options;
  if (o.create > INT64_MAX || (o.flags & ~NBDSERVE_READONLY))
    return -EINVAL;
  fd = flat_open_file(path, &o, &size);
  if (fd < 0)
    return fd;
  f = NBDSERVE_MALLOC(sizeof *f);
  if (!f || o.offset > size || o.size > size - o.offset ||
      os_mutex_init(&f->lock)) {
    close(fd);
    NBDSERVE_FREE(f);
    return f ? -EINVAL : -ENOMEM;
  }
  f->fd = fd;
  f->offset = o.offset;
  f->failed = f->no_punch = f->no_zero = 0;
  out->size = o.size ? o.size : size - o.offset;
  out->flags |= o.flags | NBDSERVE_MULTI_CONN;
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
 * (S2) Threads outlive their client for a while and take the next one.
 * (S3) Stopping: no more clients; those that are there get no further
 *      requests, but what they have sent is done and answered, for
 *      IO_GRACE_MS at most where they do not read; then all exports are
 *      flushed.
 */
enum {
  SRV_LISTENERS = 32,
  SRV_BACKLOG = 128,
  SRV_PARK_MS = 5000,
  SRV_PAUSE_MS = 100
};

enum { SRV_STOP = 's', SRV_WAKE = 'w', SRV_GONE = 'g' }; /* bytes in pipes */

struct srv_listener {
  struct srv_listener *next;
  int fd;
  char *path;     /* of a unix socket that is ours to unlink; NULL */
  int is_client;  /* a connected socket from "fd:N", served once */
  char where[64]; /* HOST:PORT of TCP, else "" */
};

union srv_address {
  struct sockaddr sa;
  struct sockaddr_un un;
#if !NBDSERVE_NO_TCP
  struct sockaddr_in in;
  struct sockaddr_in6 in6;
#endif
  struct sockaddr_storage any;
};

NBDSERVE_API const char *nbdserve_version(void) {
  return NBDSERVE_VERSION;
}

NBDSERVE_API int nbdserve_new(struct nbdserve **out,
                              const struct nbdserve_config *config) {
  struct nbdserve *s;
  struct nbdserve_config *k;
  int err = -ENOMEM;

  if (config && config->version / 100 != NBDSERVE_VERSION_NUMBER / 100)
    return -EINVAL;
  s = NBDSERVE_MALLOC(sizeof *s);
  if (!s)
    return -ENOMEM;
  memset(s, 0, sizeof *s);
  s->stop[0] = s->stop[1] = s->wake[0] = s->wake[1] = -1;
  s->last_export = &s->exports;
  k = &s->config;
  if (config)
    *k = *config;
  k->threads = k->threads ? k->threads : 16;
  k->max_conn = k->max_conn ? k->max_conn : 128;
  k->handshake_ms = k->handshake_ms ? k->handshake_ms : 10000;
  k->memory = k->memory ? k->memory : 256u << 20;
  if (k->threads > 1024 || k->max_conn > 1u << 20 ||
      (k->flags & ~NBDSERVE_ONCE))
    err = -EINVAL;
  else if (!os_mutex_init(&s->lock) && !os_cond_init(&s->gone) &&
           !os_cond_init(&s->work))
    err = os_pipe(s->stop);
  if (!err)
    err = os_pipe(s->wake);
  if (err) {
    nbdserve_free(s);
    return err;
  }
  *out = s;
  return 0;
}

NBDSERVE_API int nbdserve_add(struct nbdserve *s,
                              const struct nbdserve_export *e) {
  struct ex *ex;
  int err = ex_new(&ex, e);
  if (err)
    return err;
  os_lock(&s->lock);
  if (ex_by_name(s, ex->e.name)) {
    ex->e.ops = NULL; /* ctx stays the caller's */
    err = -EEXIST;
  } else {
    *s->last_export = ex;
    s->last_export = &ex->next;
  }
  os_unlock(&s->lock);
  if (err)
    ex_free(ex);
  return err;
}

NBDSERVE_API int nbdserve_resize(struct nbdserve *s, const char *name,
                                 uint64_t size) {
  struct ex *ex;
  if (size > INT64_MAX)
    return -EINVAL;
  os_lock(&s->lock);
  ex = ex_by_name(s, name);
  if (ex) {
    os_lock(&ex->lock);
    ex->e.size = size;
    os_unlock(&ex->lock);
  }
  os_unlock(&s->lock);
  return ex ? 0 : -ENOENT;
}

/* Adds a listener on fd, which it owns from then on, also when it fails. */
static int srv_add_listener(struct nbdserve *s, int fd, const char *path,
                            const char *where) {
  struct srv_listener **end = &s->listeners;
  struct srv_listener *l = NBDSERVE_MALLOC(sizeof *l);
  char *copy = path ? u_copy(path) : NULL;
  int n = 0;

  for (; *end; end = &(*end)->next)
    n++;
  if (!l || (path && !copy) || n == SRV_LISTENERS) {
    close(fd);
    NBDSERVE_FREE(l);
    NBDSERVE_FREE(copy);
    return n == SRV_LISTENERS ? -EMFILE : -ENOMEM;
  }
  memset(l, 0, sizeof *l);
  l->fd = fd;
  l->path = copy;
  snprintf(l->where, sizeof l->where, "%s", where);
  fcntl(fd, F_SETFD, FD_CLOEXEC);
  *end = l;
  return 0;
}

/* A socket bound to an address and listening, or -errno. */
static int srv_bind(const union srv_address *a, socklen_t len) {
  int fd = os_socket(a->sa.sa_family), one = 1, err;
  if (fd < 0)
    return fd;
  if (a->sa.sa_family != AF_UNIX)
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
#if !NBDSERVE_NO_TCP
  if (a->sa.sa_family == AF_INET6)
    setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &one, sizeof one);
#endif
  if (bind(fd, &a->sa, len) < 0 || listen(fd, SRV_BACKLOG) < 0) {
    err = -errno;
    close(fd);
    return err;
  }
  os_nonblock(fd, 1);
  return fd;
}

/* A socket file that nobody listens on is a leftover: removes it. */
static int srv_remove_stale(const union srv_address *a) {
  struct stat st;
  int fd, refused;
  if (lstat(a->un.sun_path, &st) < 0 || !S_ISSOCK(st.st_mode))
    return -EADDRINUSE;
  fd = os_socket(AF_UNIX);
  if (fd < 0)
    return fd;
  refused = connect(fd, &a->sa, sizeof a->un) < 0 && errno == ECONNREFUSED;
  close(fd);
  if (!refused)
    return -EADDRINUSE;
  return unlink(a->un.sun_path) < 0 ? -errno : 0;
}

static int srv_listen_unix(struct nbdserve *s, const char *path) {
  union srv_address a;
  int fd;

  memset(&a, 0, sizeof a);
  if (!*path)
    return -EINVAL;
  if (strlen(path) >= sizeof a.un.sun_path)
    return -ENAMETOOLONG;
  a.un.sun_family = AF_UNIX;
  memcpy(a.un.sun_path, path, strlen(path));
  fd = srv_bind(&a, sizeof a.un);
  if (fd == -EADDRINUSE) {
    fd = srv_remove_stale(&a);
    if (!fd)
      fd = srv_bind(&a, sizeof a.un);
  }
  return fd < 0 ? fd : srv_add_listener(s, fd, path, "");
}

#if NBDSERVE_NO_TCP
static int srv_listen_tcp(struct nbdserve *s, const char *address) {
  (void)s;
  (void)address;
  return -EAFNOSUPPORT;
}
#else
/* Listens on a numeric address; *port 0 becomes what the kernel picked. */
static int srv_listen_ip(struct nbdserve *s, const char *host, unsigned *port) {
  union srv_address a;
  socklen_t len;
  char where[64];
  int fd, v6 = strchr(host, ':') != NULL;

  memset(&a, 0, sizeof a);
  if (v6) {
    a.in6.sin6_family = AF_INET6;
    a.in6.sin6_port = htons((uint16_t)*port);
    len = sizeof a.in6;
  } else {
    a.in.sin_family = AF_INET;
    a.in.sin_port = htons((uint16_t)*port);
    len = sizeof a.in;
  }
  if (inet_pton(v6 ? AF_INET6 : AF_INET, host,
                v6 ? (void *)&a.in6.sin6_addr : (void *)&a.in.sin_addr) != 1)
    return -EINVAL;
  fd = srv_bind(&a, len);
  if (fd < 0)
    return fd;
  getsockname(fd, &a.sa, &len);
  *port = ntohs(v6 ? a.in6.sin6_port : a.in.sin_port);
  snprintf(where, sizeof where, v6 ? "[%s]:%u" : "%s:%u", host, *port);
  return srv_add_listener(s, fd, NULL, where);
}

static int srv_listen_tcp(struct nbdserve *s, const char *address) {
  const char *colon = strrchr(address, ':'), *rest;
  size_t n = colon ? (size_t)(colon - address) : 0;
  uint64_t number;
  unsigned port;
  char host[64];
  int err;

  if (!n || n >= sizeof host)
    return -EINVAL;
  rest = u_size(colon + 1, &number);
  if (!rest || *rest || number > 65535)
    return -EINVAL;
  port = (unsigned)number;
  memcpy(host, address, n);
  host[n] = 0;
  if (strcmp(host, "localhost") == 0) {
    err = srv_listen_ip(s, "127.0.0.1", &port);
    if (!err) /* a host without IPv6 has the other one */
      srv_listen_ip(s, "::1", &port);
    return err;
  }
  if (host[0] == '[' && host[n - 1] == ']') {
    memmove(host, host + 1, n - 2);
    host[n - 2] = 0;
  }
  return srv_listen_ip(s, host, &port);
}
#endif

/* A descriptor we were given: a listening socket, or a client's. */
static int srv_listen_fd(struct nbdserve *s, const char *number) {
  struct srv_listener *l;
  socklen_t len = sizeof(int);
  const char *rest;
  uint64_t fd;
  int listening = 0, err;

  rest = u_size(number, &fd);
  if (!rest || *rest || fd > INT_MAX)
    return -EINVAL;
  if (getsockopt((int)fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &len) < 0)
    return -errno;
  os_nonblock((int)fd, listening);
  err = srv_add_listener(s, (int)fd, NULL, "");
  for (l = s->listeners; l && !err; l = l->next)
    if (l->fd == (int)fd)
      l->is_client = !listening;
  if (!listening)
    s->config.flags |= NBDSERVE_ONCE;
  return err;
}

NBDSERVE_API int nbdserve_listen(struct nbdserve *s, const char *address) {
  if (strncmp(address, "unix:", 5) == 0)
    return srv_listen_unix(s, address + 5);
  if (strncmp(address, "tcp:", 4) == 0)
    return srv_listen_tcp(s, address + 4);
  if (strncmp(address, "fd:", 3) == 0)
    return srv_listen_fd(s, address + 3);
  return -EINVAL;
}

NBDSERVE_API int nbdserve_uri(struct nbdserve *s, const char *name, char *buf,
                              size_t size) {
  const struct srv_listener *l = s->listeners;
  int fits;
  while (l && !l->path && !*l->where)
    l = l->next;
  if (!l)
    return -ENOENT;
  if (snprintf(buf, size, l->path ? "nbd+unix:///" : "nbd://%s/", l->where) >=
      (int)u_min(size, INT_MAX))
    return -ERANGE;
  fits = u_append_uri(buf, size, name);
  if (fits && l->path) {
    fits = strlen(buf) + 8 < size;
    if (fits)
      memcpy(buf + strlen(buf), "?socket=", 9);
    fits = fits && u_append_uri(buf, size, l->path);
  }
  return fits ? 0 : -ERANGE;
}

/* Puts a byte into a pipe that nbdserve_run looks at.  Keeps errno: it may be
 * in a handler.  A full pipe has said it already. */
static void srv_poke(int fd, char what) {
  int saved = errno;
  ssize_t n = write(fd, &what, 1);
  (void)n;
  errno = saved;
}

NBDSERVE_API void nbdserve_stop(struct nbdserve *s) {
  srv_poke(s->stop[1], SRV_STOP);
}

NBDSERVE_API void nbdserve_wake(struct nbdserve *s) {
  srv_poke(s->wake[1], SRV_WAKE);
}

static void srv_add_stats(struct nbdserve_stats *to,
                          const struct nbdserve_stats *from) {
  to->requests += from->requests;
  to->errors += from->errors;
  to->bytes_read += from->bytes_read;
  to->bytes_written += from->bytes_written;
  to->flushes += from->flushes;
}

NBDSERVE_API void nbdserve_stats(struct nbdserve *s,
                                 struct nbdserve_stats *out) {
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

/* Who a client is, for the log. */
static void srv_name_peer(struct conn *c) {
  union srv_address a;
  socklen_t len = sizeof a;
  const char *text = "a pipe";

  memset(&a, 0, sizeof a);
  if (c->io.in_is_socket)
    text = "a unix socket";
#if !NBDSERVE_NO_TCP
  if (c->io.in_is_socket && getpeername(c->io.in, &a.sa, &len) == 0 &&
      (a.sa.sa_family == AF_INET || a.sa.sa_family == AF_INET6)) {
    int v6 = a.sa.sa_family == AF_INET6;
    char host[INET6_ADDRSTRLEN] = "";
    inet_ntop(a.sa.sa_family,
              v6 ? (void *)&a.in6.sin6_addr : (void *)&a.in.sin_addr, host,
              sizeof host);
    snprintf(c->peer, sizeof c->peer, v6 ? "[%s]:%u" : "%s:%u", host,
             (unsigned)ntohs(v6 ? a.in6.sin6_port : a.in.sin_port));
    return;
  }
#endif
  (void)len;
  snprintf(c->peer, sizeof c->peer, "%s", text);
}

static int srv_is_socket(int fd) {
  struct stat st;
  return fstat(fd, &st) == 0 && S_ISSOCK(st.st_mode);
}

/* A client on in and out, registered (S1); NULL without memory.  owned: the
 * descriptor is closed at its end. */
static struct conn *srv_new_client(struct nbdserve *s, int in, int out,
                                   int owned) {
  struct conn *c = NBDSERVE_MALLOC(sizeof *c);

  if (!c)
    return NULL;
  memset(c, 0, sizeof *c);
  c->s = s;
  c->fd = owned ? in : -1;
  c->io.in = in;
  c->io.out = out;
  c->io.in_is_socket = srv_is_socket(in);
  c->io.out_is_socket = srv_is_socket(out);
  c->io.stop = owned && c->io.in_is_socket && !NBDSERVE_NO_THREADS
                   ? -1
                   : s->stop[0];
  c->queue_end = &c->queue;
  if (os_mutex_init(&c->lock) || os_mutex_init(&c->sending) ||
      os_cond_init(&c->work) || os_cond_init(&c->room)) {
    NBDSERVE_FREE(c);
    return NULL;
  }
  srv_name_peer(c);
  os_lock(&s->lock);
  c->id = (unsigned)++s->stats.clients;
  c->stop = s->stopping;
  c->next = s->conns;
  s->conns = c;
  s->nconns++;
  os_unlock(&s->lock);
  return c;
}

/* Forgets a client that has been served. */
static void srv_free_client(struct conn *c) {
  struct nbdserve *s = c->s;
  struct conn **p;

  os_lock(&s->lock);
  for (p = &s->conns; *p != c; p = &(*p)->next)
    assert(*p);
  *p = c->next;
  s->nconns--;
  srv_add_stats(&s->stats, &c->stats);
  if (c->fd >= 0)
    close(c->fd); /* under the lock: srv_stop_clients must not hit another */
  os_wake_all(&s->gone);
  os_unlock(&s->lock);
  srv_poke(s->wake[1], SRV_GONE);
  NBDSERVE_FREE(c->meta_name);
  NBDSERVE_FREE(c->rbuf);
  NBDSERVE_FREE(c->wbuf);
  NBDSERVE_FREE(c->big);
  os_mutex_free(&c->lock);
  os_mutex_free(&c->sending);
  os_cond_free(&c->work);
  os_cond_free(&c->room);
  NBDSERVE_FREE(c);
}

/* Serves a client from its first byte to its last.  name: as in
 * nbdserve_serve.  0 or -errno. */
static int srv_serve_client(struct conn *c, const char *name) {
  const struct nbdserve_config *config = &c->s->config;
  struct ex *ex;
  int r = HS_ENTER, err = 0;

  u_log(config, NBDSERVE_LOG_INFO, "client %u: connected from %s", c->id,
        c->peer);
  os_tune(c->io.in, IO_LOOK_AROUND_MS);
  os_tune(c->io.out, IO_LOOK_AROUND_MS);
  c->rbuf = NBDSERVE_MALLOC(TX_RBUF);
  c->wbuf = NBDSERVE_MALLOC(TX_WBUF);
  if (!c->rbuf || !c->wbuf)
    err = -ENOMEM;
  else if (!name)
    r = hs_run(c);
  else if (!(err = ex_get(c->s, name, &ex)))
    hs_settle(c, ex, name);
  if (r < 0)
    err = r;
  if (!err && r == HS_ENTER)
    err = tx_run(c);
  if (c->ex && c->ex->dynamic && !(c->tflags & NBD_FLAG_READ_ONLY))
    ex_flush(c->ex); /* a courtesy before it is closed: nobody waits for it */
  ex_put(c->ex);
  u_log(config,
        err == 0 || err == -EPIPE || err == -ECONNRESET || err == -ESHUTDOWN
            ? NBDSERVE_LOG_INFO
            : NBDSERVE_LOG_WARNING,
        "client %u: gone: %s", c->id, err ? u_error(err) : "disconnected");
  return err;
}

/* A client thread: serves one after the other (S2). */
static void *srv_thread(void *arg) {
  struct nbdserve *s = arg;
  struct conn *c;
  int more = 1;

  os_lock(&s->lock);
  while (more) {
    c = s->accepted;
    if (c) {
      s->accepted = c->next_accepted;
      s->naccepted--;
      os_unlock(&s->lock);
      srv_serve_client(c, NULL);
      srv_free_client(c);
      os_lock(&s->lock);
    } else {
      s->nidle++;
      more = !s->stopping && os_wait_ms(&s->work, &s->lock, SRV_PARK_MS);
      s->nidle--;
      more = more || s->accepted;
    }
  }
  s->nthreads--;
  os_wake_all(&s->gone);
  os_unlock(&s->lock);
  return NULL;
}

/* Gives an accepted client to a thread; without one it is turned away. */
static void srv_start_client(struct conn *c) {
  struct nbdserve *s = c->s;
  int err = 0;

  if (NBDSERVE_NO_THREADS) { /* one at a time: here */
    srv_serve_client(c, NULL);
    srv_free_client(c);
    return;
  }
  os_lock(&s->lock);
  if (s->naccepted + 1 > s->nidle) {
    err = os_thread(srv_thread, s);
    if (!err)
      s->nthreads++;
  }
  if (!err) {
    c->next_accepted = s->accepted;
    s->accepted = c;
    s->naccepted++;
    os_wake_one(&s->work);
  }
  os_unlock(&s->lock);
  if (err) {
    u_log(&s->config, NBDSERVE_LOG_ERROR,
          "client %u: no thread for it: %s; closed", c->id, u_error(err));
    srv_free_client(c);
  }
}

/* Takes the next client of a listener.  Out of descriptors or memory: *pause
 * says until when nobody is taken, so that the loop does not spin. */
static void srv_accept(struct nbdserve *s, struct srv_listener *l,
                       int64_t *pause) {
  int fd = l->is_client ? l->fd : os_accept(l->fd);
  struct conn *c;

  if (l->is_client)
    l->fd = -1;
  if (fd < 0) {
    if (fd == -EMFILE || fd == -ENFILE || fd == -ENOMEM || fd == -ENOBUFS) {
      u_log(&s->config, NBDSERVE_LOG_WARNING, "a client has to wait: %s",
            u_error(fd));
      *pause = os_now_ms() + SRV_PAUSE_MS;
    }
    return;
  }
  c = srv_new_client(s, fd, fd, 1);
  if (c)
    srv_start_client(c);
  else
    close(fd);
}

/* How long nbdserve_run may sleep, in ms; -1: for ever; -2: it is done. */
static int srv_patience(struct nbdserve *s, int64_t *idle_from, int full,
                        int64_t pause) {
  int64_t now = os_now_ms(), left = -1;
  unsigned nconns;
  uint64_t clients;

  os_lock(&s->lock);
  nconns = s->nconns;
  clients = s->stats.clients;
  os_unlock(&s->lock);
  if ((s->config.flags & NBDSERVE_ONCE) && clients > 0 && nconns == 0)
    return -2;
  if (nconns > 0)
    *idle_from = 0;
  else if (!*idle_from)
    *idle_from = now;
  if (nconns == 0 && s->config.idle_exit_ms) {
    left = *idle_from + s->config.idle_exit_ms - now;
    if (left <= 0)
      return -2;
  }
  if (pause > now && !full && (left < 0 || pause - now < left))
    left = pause - now;
  return left > INT_MAX ? INT_MAX : (int)left;
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
  struct conn *c;
  struct ex *ex;
  int err = 0, e;

  os_lock(&s->lock);
  s->stopping = 1;
  os_wake_all(&s->work);
  os_wake_all(&s->gone); /* those that wait for memory */
  for (c = s->conns; c; c = c->next) {
    os_lock(&c->lock);
    c->stop = 1;
    os_unlock(&c->lock);
    if (c->fd >= 0)
      shutdown(c->fd, SHUT_RD);
  }
  while (s->nconns > 0 && (left = until - os_now_ms()) > 0)
    os_wait_ms(&s->gone, &s->lock, (int)left);
  for (c = s->conns; c; c = c->next)
    if (c->fd >= 0)
      shutdown(c->fd, SHUT_RDWR);
  while (s->nconns > 0 || s->nthreads > 0)
    os_wait(&s->gone, &s->lock);
  ex = s->exports;
  os_unlock(&s->lock);
  for (; ex; ex = ex->next) { /* nobody adds any more */
    e = ex->e.flags & NBDSERVE_READONLY ? 0 : ex_flush(ex);
    if (e)
      u_log(&s->config, NBDSERVE_LOG_ERROR,
            "export '%s': the last flush: %s; written data may be lost",
            ex->e.name, u_error(e));
    err = err ? err : e;
  }
  return err;
}

NBDSERVE_API int nbdserve_run(struct nbdserve *s) {
  struct pollfd p[SRV_LISTENERS + 2];
  struct srv_listener *l;
  int64_t pause = 0, idle_from = 0;
  int timeout, full, n, i;

  for (;;) {
    os_lock(&s->lock);
    full = s->nconns >= s->config.max_conn;
    os_unlock(&s->lock);
    timeout = srv_patience(s, &idle_from, full, pause);
    if (timeout == -2)
      return srv_finish(s);
    p[0].fd = s->stop[0];
    p[1].fd = s->wake[0];
    for (n = 2, l = s->listeners; l; l = l->next)
      p[n++].fd = full || pause > os_now_ms() ? -1 : l->fd;
    for (i = 0; i < n; i++) {
      p[i].events = POLLIN;
      p[i].revents = 0;
    }
    for (i = 2, l = s->listeners; l; l = l->next, i++)
      if (l->is_client && p[i].fd >= 0)
        timeout = 0;
    if (poll(p, (nfds_t)n, timeout) < 0 && errno != EINTR)
      return -errno;
    if (p[0].revents)
      return srv_finish(s);
    if (p[1].revents && srv_woken(s))
      return -EINTR;
    for (i = 2, l = s->listeners; l; l = l->next, i++)
      if (p[i].revents || (l->is_client && p[i].fd >= 0))
        srv_accept(s, l, &pause);
  }
}

NBDSERVE_API int nbdserve_serve(struct nbdserve *s, int in_fd, int out_fd,
                                const char *name) {
  struct conn *c = srv_new_client(s, in_fd, out_fd, 0);
  int err;
  if (!c)
    return -ENOMEM;
  err = srv_serve_client(c, name);
  srv_free_client(c);
  return err == -ESHUTDOWN ? 0 : err;
}

NBDSERVE_API void nbdserve_free(struct nbdserve *s) {
  struct srv_listener *l;
  struct ex *ex;
  int i;

  if (!s)
    return;
  assert(!s->conns && !s->nthreads && !s->memory);
  while ((l = s->listeners)) {
    s->listeners = l->next;
    if (l->fd >= 0)
      close(l->fd);
    if (l->path)
      unlink(l->path);
    NBDSERVE_FREE(l->path);
    NBDSERVE_FREE(l);
  }
  while ((ex = s->exports)) {
    s->exports = ex->next;
    ex_free(ex);
  }
  for (i = 0; i < 2; i++) {
    if (s->stop[i] >= 0)
      close(s->stop[i]);
    if (s->wake[i] >= 0)
      close(s->wake[i]);
  }
  os_cond_free(&s->gone);
  os_cond_free(&s->work);
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

enum { CLI_FAILED = 1, CLI_USAGE = 2, CLI_IN_USE = 4, CLI_LOGLINE = 600 };

/* Options without a letter */
enum {
  CLI_FD = 256,
  CLI_SIZE,
  CLI_CREATE,
  CLI_CACHE,
  CLI_IDLE,
  CLI_RUN,
  CLI_FORK,
  CLI_READY,
  CLI_STATS,
  CLI_JSON
};

static const struct cli_option {
  int key; /* the letter */
  const char *name, *arg, *help;
} cli_options[] = {
    {'U', "unix", "PATH", "listen on a unix socket (default: a private one)"},
    {'p', "port", "N", "listen on TCP; 0: any free port (usual: 10809)"},
    {'i', "bind", "ADDR", "TCP address instead of the two loopbacks"},
    {'s', "stdin", NULL, "serve one client on standard input and output"},
    {CLI_FD, "fd", "N", "serve a listening or connected socket"},
    {'r', "read-only", NULL, "refuse writes"},
    {'e', "export", "NAME", "export name (default: any name will do)"},
    {'D', "description", "TEXT", "description for clients that list exports"},
    {'o', "offset", "N", "serve the target from this byte on"},
    {CLI_SIZE, "size", "N", "serve that many bytes"},
    {'b', "block-size", "MIN:PREF:MAX", "block sizes (1:4096:32M)"},
    {CLI_CREATE, "create", "SIZE", "make the target if it is missing, sparse"},
    {CLI_CACHE, "cache", "MODE", "writeback, writethrough or unsafe"},
    {'t', "threads", "N", "requests at a time for each client (16)"},
    {'m', "max-conn", "N", "clients at a time (128)"},
    {'1', "once", NULL, "exit when the last client has gone"},
    {CLI_IDLE, "idle-exit", "SEC", "exit after that time without clients"},
    {CLI_RUN, "run", "CMD", "serve while a shell command runs ($uri, $nbd)"},
    {CLI_FORK, "fork", NULL, "go into the background, once listening"},
    {'P', "pidfile", "FILE", "write the process id there, once listening"},
    {CLI_READY, "ready-fd", "N", "write the URI there, once listening"},
    {'u', "user", "USER", "become that user, once listening"},
    {'g', "group", "GROUP", "become that group"},
    {'q', "quiet", NULL, "errors only"},
    {'v', "verbose", NULL, "tell of clients; twice: of every request"},
    {CLI_STATS, "stats", NULL, "print totals at exit (and on SIGUSR1)"},
    {CLI_JSON, "json", NULL, "print them as JSON"},
    {'V', "version", NULL, "print version and features"},
    {'h', "help", NULL, "print this"}};

struct cli {
  const char *unix_path, *port, *bind, *fd;
  const char *name, *description, *run, *pidfile;
  char **command;       /* behind --, or NULL */
  const char **targets; /* [NAME=]TARGET */
  int ntargets;
  struct nbdserve_flat flat;
  struct nbdserve_export ex; /* what all exports have in common */
  struct nbdserve_config config;
  int use_stdin, use_activation, background, stats, json, ready_fd;
  int has_uid, has_gid;
  uid_t uid;
  gid_t gid;
  int report;        /* pipe to the parent of --fork, or -1 */
  char private_dir[100];
  pid_t child;       /* of --run and -- */
  char uri[16384];
};

static struct nbdserve *cli_server; /* for the handlers */
static volatile sig_atomic_t cli_usr1, cli_ending;

/* One line on standard error: "nbdserve: object: what". */
static int cli_say(const char *object, const char *what, int status) {
  fprintf(stderr, "nbdserve: %s: %s\n", object, what);
  return status;
}

static void cli_log(void *ctx, int level, const char *message) {
  char line[CLI_LOGLINE];
  int n = snprintf(line, sizeof line, "nbdserve: %s\n", message);
  ssize_t done;
  (void)ctx;
  (void)level;
  done = write(2, line, (size_t)n < sizeof line ? (size_t)n : sizeof line - 1);
  (void)done; /* there is nobody to tell */
}

static int cli_help(void) {
  size_t i;
  printf("usage: nbdserve [OPTION]... [NAME=]TARGET... [-- CMD ARG...]\n"
         "Serves disks over NBD.  TARGET is a file, a block device or mem:SIZE."
         "\nWith CMD: serves while it runs; {} in an ARG becomes the URI.\n\n");
  for (i = 0; i < sizeof cli_options / sizeof *cli_options; i++) {
    const struct cli_option *o = &cli_options[i];
    char left[40];
    int n = o->key < 256 ? snprintf(left, sizeof left, "-%c, ", o->key)
                         : snprintf(left, sizeof left, "    ");
    snprintf(left + n, sizeof left - (size_t)n, "--%s%s%s", o->name,
             o->arg ? " " : "", o->arg ? o->arg : "");
    printf("  %-27s %s\n", left, o->help);
  }
  printf("\nSizes take K, M, G, T, P and E (powers of 1024).  When it listens, "
         "the URI is\nprinted.  Exit status: 0 ok, 1 failed, 2 usage, 4 target "
         "in use; CMD's with CMD.\n");
  return 0;
}

static int cli_version(void) {
  printf("nbdserve %s (%sflat, %stcp, %sthreads%s)\n", nbdserve_version(),
         NBDSERVE_NO_FLAT ? "no " : "", NBDSERVE_NO_TCP ? "no " : "",
         NBDSERVE_NO_THREADS ? "no " : "",
         NBDSERVE_POSIX_ONLY ? ", POSIX only" : "");
  return 0;
}

/* The id of a user or group: a number, or a name in /etc/passwd or /etc/group
 * (getpwnam would not survive static linking).  *gid: a user's group. */
static int cli_lookup(const char *file, const char *name, unsigned *id,
                      unsigned *gid) {
  char line[1024];
  size_t n = strlen(name);
  uint64_t number;
  const char *rest = u_size(name, &number);
  int found = 0;
  FILE *f;

  if (rest && !*rest && number < UINT32_MAX) {
    *id = (unsigned)number;
    return 1;
  }
  f = fopen(file, "r");
  while (f && !found && fgets(line, sizeof line, f))
    if (strncmp(line, name, n) == 0 && line[n] == ':' && strchr(line + n + 1, ':'))
      found = sscanf(strchr(line + n + 1, ':'), ":%u:%u", id, gid) >= 1;
  if (f)
    fclose(f);
  return found;
}

/* A number within min..max, with nothing behind it. */
static int cli_number(const char *s, uint64_t min, uint64_t max,
                      uint64_t *out) {
  const char *rest = u_size(s, out);
  return rest && !*rest && *out >= min && *out <= max;
}

/* MIN:PREF:MAX. */
static int cli_block_sizes(const char *s, struct nbdserve_export *ex) {
  uint64_t v[3] = {0, 0, 0};
  int i;
  for (i = 0; i < 3; i++) {
    s = u_size(s, &v[i]);
    if (!s || v[i] < 1 || v[i] > UINT32_MAX || *s != (i < 2 ? ':' : 0))
      return 0;
    s++;
  }
  ex->min_block = (uint32_t)v[0];
  ex->preferred_block = (uint32_t)v[1];
  ex->max_request = (uint32_t)v[2];
  return 1;
}

static int cli_cache_mode(const char *s, struct nbdserve_export *ex) {
  if (strcmp(s, "writethrough") == 0)
    ex->flags |= NBDSERVE_WRITETHROUGH;
  else if (strcmp(s, "unsafe") == 0)
    ex->flags |= NBDSERVE_UNSAFE;
  else
    return strcmp(s, "writeback") == 0;
  return 1;
}

/* Takes one option.  False: the value is not one for it. */
static int cli_set(struct cli *k, int key, const char *value) {
  uint64_t n = 0;
  unsigned id = 0, gid = 0;
  int ok = 1;

  switch (key) {
  case 'U': k->unix_path = value; break;
  case 'p':
    ok = cli_number(value, 0, 65535, &n);
    k->port = value;
    break;
  case 'i': k->bind = value; break;
  case 's': k->use_stdin = 1; break;
  case CLI_FD:
    ok = cli_number(value, 0, INT_MAX, &n);
    k->fd = value;
    break;
  case 'r': k->flat.flags |= NBDSERVE_READONLY; break;
  case 'e': k->name = value; break;
  case 'D': k->description = value; break;
  case 'o': ok = cli_number(value, 0, INT64_MAX, &k->flat.offset); break;
  case CLI_SIZE: ok = cli_number(value, 1, INT64_MAX, &k->flat.size); break;
  case 'b': ok = cli_block_sizes(value, &k->ex); break;
  case CLI_CREATE:
    ok = cli_number(value, 1, INT64_MAX, &k->flat.create);
    break;
  case CLI_CACHE: ok = cli_cache_mode(value, &k->ex); break;
  case 't':
    ok = cli_number(value, 1, 1024, &n);
    k->config.threads = (uint32_t)n;
    break;
  case 'm':
    ok = cli_number(value, 1, 1 << 20, &n);
    k->config.max_conn = (uint32_t)n;
    break;
  case '1': k->config.flags |= NBDSERVE_ONCE; break;
  case CLI_IDLE:
    ok = cli_number(value, 1, UINT32_MAX / 1000, &n);
    k->config.idle_exit_ms = (uint32_t)n * 1000;
    break;
  case CLI_RUN: k->run = value; break;
  case CLI_FORK: k->background = 1; break;
  case 'P': k->pidfile = value; break;
  case CLI_READY:
    ok = cli_number(value, 0, INT_MAX, &n);
    k->ready_fd = (int)n;
    break;
  case 'u':
    ok = k->has_uid = cli_lookup("/etc/passwd", value, &id, &gid);
    k->uid = (uid_t)id;
    if (!k->has_gid)
      k->gid = (gid_t)gid;
    break;
  case 'g':
    ok = k->has_gid = cli_lookup("/etc/group", value, &id, &gid);
    k->gid = (gid_t)id;
    break;
  case 'q': k->config.log_level = NBDSERVE_LOG_ERROR; break;
  case 'v':
    if (k->config.log_level < NBDSERVE_LOG_TRACE)
      k->config.log_level++;
    break;
  case CLI_STATS: k->stats = 1; break;
  case CLI_JSON: k->json = 1; break;
  default: assert(!"an option of the table has no case");
  }
  return ok;
}

/* Finds an option by letter or by name of n bytes. */
static const struct cli_option *cli_find(int letter, const char *name,
                                         size_t n) {
  size_t i;
  for (i = 0; i < sizeof cli_options / sizeof *cli_options; i++)
    if (name ? strncmp(cli_options[i].name, name, n) == 0 &&
                   !cli_options[i].name[n]
             : cli_options[i].key == letter)
      return &cli_options[i];
  return NULL;
}

/* Reads the command line.  0; CLI_USAGE after a message; -1: all is said. */
static int cli_parse(struct cli *k, int argc, char **argv) {
  const struct cli_option *o;
  const char *a, *value;
  int i, is_long;

  for (i = 1; i < argc; i++) {
    a = argv[i];
    if (a[0] != '-' || !a[1]) {
      k->targets[k->ntargets++] = a;
      continue;
    }
    if (strcmp(a, "--") == 0) {
      k->command = argv + i + 1;
      return *k->command ? 0 : cli_say("--", "no command behind it", CLI_USAGE);
    }
    is_long = *++a == '-';
    do {
      o = is_long ? cli_find(0, a + 1, strcspn(a + 1, "=")) : cli_find(*a, NULL, 0);
      if (!o)
        return cli_say(argv[i], "unknown option; try --help", CLI_USAGE);
      if (o->key == 'h' || o->key == 'V')
        return (o->key == 'h' ? cli_help() : cli_version()) - 1;
      value = is_long ? strchr(a, '=') : a[1] ? a : NULL;
      a++;
      if (!o->arg && value && is_long)
        return cli_say(argv[i], "this option takes no value", CLI_USAGE);
      if (o->arg) {
        value = value ? value + 1 : argv[++i];
        if (!value)
          return cli_say(argv[i - 1], "a value is missing", CLI_USAGE);
      }
      if (!cli_set(k, o->key, value)) {
        fprintf(stderr, "nbdserve: --%s %s: no good value; expected %s\n",
                o->name, value, o->arg);
        return CLI_USAGE;
      }
    } while (!is_long && !o->arg && *a);
  }
  return 0;
}

/* What does not go together.  0, or CLI_USAGE after a message. */
static int cli_check(const struct cli *k) {
  if (!k->ntargets)
    return cli_say("no target", "a file, a block device or mem:SIZE is needed",
                   CLI_USAGE);
  if (k->name && k->ntargets > 1)
    return cli_say("--export", "only for a single target; use NAME=TARGET",
                   CLI_USAGE);
  if (k->run && k->command)
    return cli_say("--run", "there is a command behind -- already", CLI_USAGE);
  if (k->background && (k->run || k->command || k->use_stdin))
    return cli_say("--fork", "not with a command or --stdin", CLI_USAGE);
  if (k->use_stdin && (k->unix_path || k->port || k->fd || k->run || k->command))
    return cli_say("--stdin", "not with another way to listen", CLI_USAGE);
  if ((k->flat.flags & NBDSERVE_READONLY) && k->flat.create)
    return cli_say("--create", "not with --read-only", CLI_USAGE);
  if (k->ready_fd == 0)
    return cli_say("--ready-fd", "0 is standard input", CLI_USAGE);
  return 0;
}

/* Opens one target and adds it to the server; name: its default name.  0, or
 * the exit status after a message. */
static int cli_add(const struct cli *k, const char *path, const char *name) {
  struct nbdserve_export ex = k->ex;
  int err;

  ex.name = name;
  ex.description = k->description;
  if (!k->name && k->ntargets == 1 && !*name)
    ex.flags |= NBDSERVE_ANY_NAME;
  if (strstr(path, "::"))
    return cli_say(path, "this build has no stores; a file whose name has :: "
                   "in it needs a link", CLI_FAILED);
#if NBDSERVE_NO_FLAT
  err = -EOPNOTSUPP;
#else
  err = nbdserve_flat_open(path, &k->flat, &ex);
#endif
  if (err == -EBUSY)
    return cli_say(path, "in use by another process; not served", CLI_IN_USE);
  if (err == -EACCES || err == -EROFS) {
    fprintf(stderr, "nbdserve: %s: %s%s\n", path, u_error(err),
            k->flat.flags & NBDSERVE_READONLY ? "" : "; -r serves it read-only");
    return CLI_FAILED;
  }
  if (err == -EINVAL)
    return cli_say(path, "not a file, a block device or mem:SIZE, or smaller "
                   "than --offset and --size", CLI_FAILED);
  if (err == -ENOENT && !k->flat.create)
    return cli_say(path, "no such file; --create SIZE makes it", CLI_FAILED);
  if (err)
    return cli_say(path, u_error(err), CLI_FAILED);
  err = nbdserve_add(cli_server, &ex);
  if (!err)
    return 0;
  ex.ops->close(ex.ctx);
  return err == -EEXIST
             ? cli_say(name, "two targets of that export name", CLI_USAGE)
             : cli_say(path, "block sizes, name or description out of range",
                       CLI_USAGE);
}

/* Opens all targets. */
static int cli_add_all(const struct cli *k) {
  int i, status = 0;
  for (i = 0; i < k->ntargets && !status; i++) {
    const char *path = k->targets[i], *equals = strchr(path, '=');
    const char *slash = strrchr(path, '/');
    char name[WIRE_STRING + 1] = "";
    if (equals && !memchr(path, '/', (size_t)(equals - path))) {
      snprintf(name, sizeof name, "%.*s", (int)(equals - path), path);
      path = equals + 1;
    } else if (k->name || k->ntargets > 1) {
      snprintf(name, sizeof name, "%s",
               k->name ? k->name : slash ? slash + 1 : path);
    }
    status = cli_add(k, path, name);
  }
  return status;
}

/* Listens on one address; text: how the user called it. */
static int cli_listen_on(const char *kind, const char *address) {
  char full[PATH_MAX + 8];
  char what[100];
  int err;

  if (snprintf(full, sizeof full, "%s:%s", kind, address) >= (int)sizeof full)
    err = -ENAMETOOLONG;
  else
    err = nbdserve_listen(cli_server, full);
  if (!err)
    return 0;
  if (err == -ENAMETOOLONG) {
    snprintf(what, sizeof what, "a socket path has at most %u bytes; this is %u",
             (unsigned)sizeof(((struct sockaddr_un *)0)->sun_path) - 1,
             (unsigned)strlen(address));
    return cli_say(address, what, CLI_FAILED);
  }
  if (err == -EADDRINUSE && strcmp(kind, "unix") == 0)
    return cli_say(address, "a server listens there, or it is no socket; not "
                   "replaced", CLI_FAILED);
  return cli_say(address, err == -EINVAL ? "no such kind of address"
                                         : u_error(err), CLI_FAILED);
}

/* A socket only its owner can reach, in a directory that is removed again. */
static int cli_listen_private(struct cli *k) {
  static const char *const vars[] = {"XDG_RUNTIME_DIR", "TMPDIR", NULL};
  char path[sizeof k->private_dir + 8];
  size_t i;
  int status;

  for (i = 0; i < sizeof vars / sizeof *vars; i++) {
    const char *dir = vars[i] ? getenv(vars[i]) : "/tmp";
    if (!dir || !*dir || strlen(dir) > 80)
      continue; /* the path must fit into a socket address everywhere */
    snprintf(k->private_dir, sizeof k->private_dir, "%s/nbdXXXXXX", dir);
    if (mkdtemp(k->private_dir))
      break;
    k->private_dir[0] = 0;
  }
  if (!k->private_dir[0])
    return cli_say("private socket", "no directory for it can be made; use -U",
                   CLI_FAILED);
  snprintf(path, sizeof path, "%s/sock", k->private_dir);
  status = cli_listen_on("unix", path);
  if (!status && (chmod(path, 0600) < 0 ||
                  (k->has_uid && (chown(path, k->uid, k->gid) < 0 ||
                                  chown(k->private_dir, k->uid, k->gid) < 0))))
    return cli_say(path, u_error(-errno), CLI_FAILED);
  return status;
}

/* Sockets handed over by systemd, or by nbdinfo and its like. */
static int cli_listen_activated(struct cli *k) {
  const char *pid = getenv("LISTEN_PID"), *fds = getenv("LISTEN_FDS");
  char number[16];
  uint64_t n;
  unsigned i;
  int status = 0;

  if (!pid || !fds || strtol(pid, NULL, 10) != (long)getpid() ||
      !cli_number(fds, 1, 1000, &n))
    return 0;
  k->use_activation = 1;
  unsetenv("LISTEN_PID");
  unsetenv("LISTEN_FDS");
  unsetenv("LISTEN_FDNAMES");
  for (i = 3; i < 3 + n && !status; i++) {
    snprintf(number, sizeof number, "%u", i);
    status = cli_listen_on("fd", number);
  }
  return status;
}

/* Listens wherever the command line says. */
static int cli_listen(struct cli *k) {
  char address[PATH_MAX];
  size_t n;
  int status = cli_listen_activated(k);

  if (status || k->use_activation)
    return status;
  if (k->fd)
    status = cli_listen_on("fd", k->fd);
  if (!status && (k->port || k->bind)) {
    const char *host = k->bind ? k->bind : "localhost";
    snprintf(address, sizeof address, strchr(host, ':') && *host != '['
             ? "[%s]:%s" : "%s:%s", host, k->port ? k->port : "10809");
    status = cli_listen_on("tcp", address);
    if (!status && strcmp(host, "localhost") && strncmp(host, "127.", 4) &&
        strcmp(host, "::1") && k->config.log_level > 0)
      cli_say(host, "no authentication: whoever reaches it reads and writes", 0);
  }
  if (!status && k->unix_path && strcmp(k->unix_path, "-") != 0) {
    address[0] = 0; /* a whole path, so that the URI works from anywhere */
    if (k->unix_path[0] != '/' && getcwd(address, sizeof address - 2))
      strcat(address, "/");
    n = strlen(address) + strlen(k->unix_path);
    if (n < sizeof(((struct sockaddr_un *)0)->sun_path))
      status = cli_listen_on("unix", strcat(address, k->unix_path));
    else
      status = cli_listen_on("unix", k->unix_path);
  } else if (!status && (k->unix_path || (!k->fd && !k->port && !k->bind))) {
    status = cli_listen_private(k);
  }
  if (!status)
    nbdserve_uri(cli_server, k->name ? k->name : "", k->uri, sizeof k->uri);
  return status;
}

static void cli_on_signal(int sig) {
  if (sig == SIGUSR1) {
    cli_usr1 = 1;
    nbdserve_wake(cli_server);
    return;
  }
  if (sig == SIGINT && cli_ending)
    _exit(130);
  cli_ending = 1;
  nbdserve_stop(cli_server);
}

static void cli_catch_signals(void (*handler)(int)) {
  static const int signals[] = {SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGCHLD};
  struct sigaction sa;
  size_t i;
  memset(&sa, 0, sizeof sa);
  sa.sa_handler = handler;
  for (i = 0; i < sizeof signals / sizeof *signals; i++)
    sigaction(signals[i], &sa, NULL);
  sa.sa_handler = handler == SIG_DFL ? SIG_DFL : SIG_IGN;
  sigaction(SIGPIPE, &sa, NULL);
  sigaction(SIGXFSZ, &sa, NULL); /* writes get EFBIG then */
}

/* The ARG with every {} in it replaced by the URI. */
static char *cli_expand(const char *arg, const char *uri) {
  size_t n = strlen(arg) + 1, step = strlen(uri);
  const char *p;
  char *out, *q;
  for (p = arg; (p = strstr(p, "{}")); p += 2)
    n += step;
  out = q = NBDSERVE_MALLOC(n);
  for (p = arg; out && *p;) {
    if (strncmp(p, "{}", 2) == 0) {
      memcpy(q, uri, step);
      q += step;
      p += 2;
    } else {
      *q++ = *p++;
    }
  }
  if (out)
    *q = 0;
  return out;
}

/* What --run offers to its shell, as nbdkit does. */
static void cli_set_environment(const struct cli *k) {
  const char *socket = strstr(k->uri, "?socket=");
  char nbd[PATH_MAX + 64], host[64] = "";
  const char *colon;

  setenv("uri", k->uri, 1);
  setenv("exportname", k->name ? k->name : "", 1);
  setenv("unixsocket", "", 1);
  setenv("port", "", 1);
  if (socket) {
    const char *path = k->private_dir[0] ? NULL : k->unix_path;
    snprintf(nbd, sizeof nbd, "%s%s", path ? path : k->private_dir,
             path ? "" : "/sock");
    setenv("unixsocket", nbd, 1);
    memmove(nbd + 9, nbd, strlen(nbd) + 1);
    memcpy(nbd, "nbd:unix:", 9);
  } else {
    snprintf(host, sizeof host, "%.*s", (int)strcspn(k->uri + 6, "/"),
             k->uri + 6);
    colon = strrchr(host, ':');
    setenv("port", colon ? colon + 1 : "", 1);
    snprintf(nbd, sizeof nbd, "nbd:%s", host);
  }
  setenv("nbd", nbd, 1);
}

/* Starts the captive command. */
static int cli_start_command(struct cli *k) {
  char *shell[4] = {NULL, NULL, NULL, NULL};
  char **argv = k->command, **p;

  k->child = fork();
  if (k->child < 0)
    return cli_say("--run", u_error(-errno), CLI_FAILED);
  if (k->child > 0)
    return 0;
  cli_catch_signals(SIG_DFL);
  if (k->run) {
    cli_set_environment(k);
    shell[0] = u_copy("/bin/sh");
    shell[1] = u_copy("-c");
    shell[2] = u_copy(k->run);
    argv = shell;
  } else {
    for (p = argv; *p; p++)
      *p = cli_expand(*p, k->uri);
  }
  execvp(argv[0], argv);
  cli_say(argv[0], u_error(-errno), 0);
  _exit(127);
}

/* Waits for the captive command, ending it if it is still there; its status. */
static int cli_end_command(const struct cli *k) {
  int st = 0;
  pid_t r = waitpid(k->child, &st, WNOHANG);
  if (r == 0)
    kill(k->child, SIGTERM);
  while (r == 0 || (r < 0 && errno == EINTR))
    r = waitpid(k->child, &st, 0);
  return WIFSIGNALED(st) ? 128 + WTERMSIG(st) : WEXITSTATUS(st);
}

/* Writes the pidfile in one step: who sees it may connect. */
static int cli_write_pidfile(const char *path) {
  char temp[PATH_MAX];
  FILE *f;
  int ok;
  if (snprintf(temp, sizeof temp, "%s.new", path) >= (int)sizeof temp)
    return cli_say(path, u_error(-ENAMETOOLONG), CLI_FAILED);
  f = fopen(temp, "w");
  if (!f)
    return cli_say(temp, u_error(-errno), CLI_FAILED);
  ok = fprintf(f, "%ld\n", (long)getpid()) > 0;
  ok = fclose(f) == 0 && ok && rename(temp, path) == 0;
  return ok ? 0 : cli_say(path, u_error(-errno), CLI_FAILED);
}

/* Tells systemd, if it asked. */
static void cli_notify(void) {
  const char *path = getenv("NOTIFY_SOCKET");
  union srv_address a;
  size_t n = path ? strlen(path) : 0;
  int fd;
  memset(&a, 0, sizeof a);
  if (!n || n >= sizeof a.un.sun_path)
    return;
  a.un.sun_family = AF_UNIX;
  memcpy(a.un.sun_path, path, n);
  if (*path == '@')
    a.un.sun_path[0] = 0;
  fd = socket(AF_UNIX, SOCK_DGRAM, 0);
  if (fd < 0)
    return;
  sendto(fd, "READY=1", 7, OS_MSG_NOSIGNAL, &a.sa,
         (socklen_t)(offsetof(struct sockaddr_un, sun_path) + n));
  close(fd);
}

/* Gives up root. */
static int cli_drop_privileges(const struct cli *k) {
  if (!k->has_uid && !k->has_gid)
    return 0;
  if (setgroups(0, NULL) < 0 || setgid(k->gid) < 0 ||
      (k->has_uid && setuid(k->uid) < 0) ||
      (k->has_uid && k->uid && setuid(0) == 0))
    return cli_say("--user", u_error(-errno), CLI_FAILED);
  return 0;
}

/* Writes the URI line to fd and closes it. */
static int cli_tell(const struct cli *k, int fd) {
  size_t n = strlen(k->uri);
  int ok = write(fd, k->uri, n) == (ssize_t)n && write(fd, "\n", 1) == 1;
  return close(fd) == 0 && ok ? 0 : cli_say("ready", u_error(-errno), CLI_FAILED);
}

/* All is open and listening: tells everybody who asked. */
static int cli_ready(struct cli *k) {
  int status = k->pidfile ? cli_write_pidfile(k->pidfile) : 0;
  int null;

  if (!status)
    status = cli_drop_privileges(k);
  if (!status && (k->run || k->command))
    status = cli_start_command(k);
  if (!status && k->ready_fd > 0)
    status = cli_tell(k, k->ready_fd);
  if (status)
    return status;
  cli_notify();
  if (k->report >= 0) {
    null = open("/dev/null", O_RDWR);
    dup2(null, 0);
    dup2(null, 1);
    dup2(null, 2);
    close(null);
    return cli_tell(k, k->report);
  }
  if (!k->child && !k->use_activation && *k->uri)
    status = printf("%s\n", k->uri) < 0 || fflush(stdout) == EOF
                 ? cli_say("standard output", u_error(-errno), CLI_FAILED)
                 : 0;
  return status;
}

/* --fork: the parent waits until the child listens, passes its URI line on and
 * exits.  The child returns. */
static int cli_fork(struct cli *k) {
  int fd[2], st = 0;
  char buf[1024];
  ssize_t n, total = 0;
  pid_t pid;

  if (pipe(fd) < 0 || (pid = fork()) < 0)
    return cli_say("--fork", u_error(-errno), CLI_FAILED);
  if (pid == 0) {
    close(fd[0]);
    k->report = fd[1];
    fcntl(fd[1], F_SETFD, FD_CLOEXEC);
    return setsid() < 0 ? cli_say("--fork", u_error(-errno), CLI_FAILED) : 0;
  }
  close(fd[1]);
  while ((n = read(fd[0], buf, sizeof buf)) > 0 || (n < 0 && errno == EINTR))
    if (n > 0 && write(1, buf, (size_t)n) == n)
      total += n;
  if (total > 0)
    _exit(0);
  waitpid(pid, &st, 0);
  _exit(WIFEXITED(st) && WEXITSTATUS(st) ? WEXITSTATUS(st) : CLI_FAILED);
}

static void cli_print_stats(const struct cli *k) {
  struct nbdserve_stats t;
  nbdserve_stats(cli_server, &t);
  fprintf(stderr,
          k->json ? "{\"clients\":%" PRIu64 ",\"clients_now\":%" PRIu64
                    ",\"requests\":%" PRIu64 ",\"errors\":%" PRIu64
                    ",\"bytes_read\":%" PRIu64 ",\"bytes_written\":%" PRIu64
                    ",\"flushes\":%" PRIu64 "}\n"
                  : "nbdserve: %" PRIu64 " clients (%" PRIu64
                    " now), %" PRIu64 " requests (%" PRIu64
                    " failed), %" PRIu64 " bytes read, %" PRIu64
                    " written, %" PRIu64 " flushes\n",
          t.clients, t.clients_now, t.requests, t.errors, t.bytes_read,
          t.bytes_written, t.flushes);
}

/* Serves until it is over; the exit status. */
static int cli_serve(struct cli *k) {
  int err = 0, status;

  if (k->use_stdin) {
    err = nbdserve_serve(cli_server, 0, 1, NULL);
    nbdserve_stop(cli_server); /* what follows only flushes */
  }
  do {
    status = nbdserve_run(cli_server);
    if (status == -EINTR && cli_usr1) {
      cli_usr1 = 0;
      cli_print_stats(k);
    }
  } while (status == -EINTR);
  if (k->stats)
    cli_print_stats(k);
  if (k->child > 0) {
    int st = cli_end_command(k);
    return st ? st : status ? CLI_FAILED : 0;
  }
  return err || status ? CLI_FAILED : 0;
}

/* Descriptors 0 to 2 are open, so that no file or socket becomes one of them
 * and takes messages for data. */
static void cli_fill_fds(void) {
  int fd;
  do
    fd = open("/dev/null", O_RDWR);
  while (fd >= 0 && fd <= 2);
  if (fd > 2)
    close(fd);
}

int main(int argc, char **argv) {
  struct cli *k;
  int status;

  cli_fill_fds();
  k = calloc(1, sizeof *k);
  if (k)
    k->targets = calloc((size_t)argc + 1, sizeof *k->targets);
  if (!k || !k->targets)
    return cli_say("start", u_error(-ENOMEM), CLI_FAILED);
  k->report = k->ready_fd = -1;
  k->config.version = NBDSERVE_VERSION_NUMBER;
  k->config.log = cli_log;
  k->config.log_level = NBDSERVE_LOG_WARNING;
  status = cli_parse(k, argc, argv);
  if (!status)
    status = cli_check(k);
  if (!status && k->background)
    status = cli_fork(k);
  if (!status && nbdserve_new(&cli_server, &k->config))
    status = cli_say("start", "no memory or descriptors", CLI_FAILED);
  if (!status) {
    cli_catch_signals(cli_on_signal);
    status = cli_add_all(k);
    if (!status && !k->use_stdin)
      status = cli_listen(k);
    if (!status && !k->use_stdin)
      status = cli_ready(k);
    if (!status)
      status = cli_serve(k);
    cli_catch_signals(SIG_IGN);
    if (k->pidfile)
      unlink(k->pidfile);
    nbdserve_free(cli_server);
    if (k->private_dir[0])
      rmdir(k->private_dir);
  }
  free(k->targets);
  free(k);
  return status < 0 ? 0 : status;
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
